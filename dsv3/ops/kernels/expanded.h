// Attention of prompts: keys and values of each head, packed once; tiles of queries meet blocks of keys.
#pragma once

#include "products.h"

namespace {

constexpr int TILE_ROWS = 4 * ROWS;  // queries that meet a block of keys together
constexpr int BLOCK = 4 * PANEL;  // keys
constexpr float LOG2_E = 1.44269504f;

// Queries [B * S] and keys and values [B * T] of H heads; in each, tokens and heads lie as far apart as said. A query's
// and a key's first N values and their last R lie in different places; the latter are one key of all heads.
struct Expanded {
    const bf16 *q_nope, *q_rope, *k_nope, *k_rope, *values;
    int64_t q_nope_token, q_nope_head, q_rope_token, q_rope_head, k_token, k_head, k_rope_token, v_token, v_head;
    float scale;
    int64_t B, S, T, H, N, R, V;
    int64_t causal;  // a query sees up to its own place, the S queries being the last of the T; else everything

    int64_t visible(int64_t s) const { return causal ? T - S + s + 1 : T; }
    int64_t panels() const { return (T + PANEL - 1) / PANEL; }
    int64_t keys_size() const { return panels() * PANEL * (N + R); }  // of one head, packed
    int64_t values_size() const { return (V + PANEL - 1) / PANEL * panels() * PANEL * PANEL; }
};

// The keys of panel p and one head: [K / 2][PANEL][2], and its values: for each panel of V [PANEL / 2][PANEL][2], pairs
// of keys, in `values` at the places that the p panels before leave.
inline void pack_keys(const Expanded& in, int64_t b, int64_t h, int64_t p, bf16* keys, bf16* values) {
    const int64_t first = p * PANEL, n = in.T - first < PANEL ? in.T - first : PANEL, token = b * in.T + first;
    for (int64_t k = 0; k < n; k += WIDTH) {
        bf16* to = keys + p * PANEL * (in.N + in.R) + 2 * k;
        pack_rows(in.k_nope + (token + k) * in.k_token + h * in.k_head, in.k_token, n - k - 1, in.N, to);
        pack_rows(in.k_rope + (token + k) * in.k_rope_token, in.k_rope_token, n - k - 1, in.R, to + in.N / 2 * PAIRS);
    }
    for (int64_t v = 0; v < in.V; v += WIDTH) {
        bf16* to = values + v / PANEL * in.panels() * PANEL * PANEL + p * PANEL * PANEL + 2 * (v % PANEL);
        const bf16* from = in.values + token * in.v_token + h * in.v_head + v;
        for (int64_t k = 0; k < PANEL; k += 2, to += PAIRS) {
            Ints pair = {};
            if (k < n) pair = __builtin_convertvector(load<Halves>(from + k * in.v_token), Ints);
            if (k + 1 < n) pair |= __builtin_convertvector(load<Halves>(from + (k + 1) * in.v_token), Ints) << 16;
            std::memcpy(to, &pair, sizeof pair);
        }
    }
}

// out[r][v] = (add: + what stands there times factor[r]) R rows of x times V vectors of a panel.
template <int V>
inline void multiply_rows(const bf16* x, int64_t stride, const bf16* panel, int64_t I, float* out, int64_t apart,
                          const float* factor) {
    Floats acc[ROWS][V] = {};
    if (factor)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = load<Floats>(out + r * apart + v * WIDTH) * factor[r];
    multiply(x, stride, panel, I, acc);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) std::memcpy(out + r * apart + v * WIDTH, &acc[r][v], sizeof acc[r][v]);
}

inline void multiply_rows(int64_t vectors, const bf16* x, int64_t stride, const bf16* panel, int64_t I, float* out,
                          int64_t apart, const float* factor = nullptr) {
    switch (vectors) {
        case 1:
            return multiply_rows<1>(x, stride, panel, I, out, apart, factor);
        case 2:
            return multiply_rows<2>(x, stride, panel, I, out, apart, factor);
        case 3:
            return multiply_rows<3>(x, stride, panel, I, out, apart, factor);
        default:
            return multiply_rows<4>(x, stride, panel, I, out, apart, factor);
    }
}

// 2^x for x <= 0, to about 3e-6, which is far below what BF16 tells apart, and 0 below 2^-126: 2^n times a polynomial
// of the rest.
inline Floats exp2_of_negative(const Floats x) {
    constexpr float ROUNDS =
        12582912.0f + 127.0f;  // adding this leaves n, and what an exponent has more, in the low bits
    const Floats shifted = x + ROUNDS, rest = x - (shifted - ROUNDS);
    Floats p = rest * 1.33335581e-3f + 9.61812911e-3f;
    p = p * rest + 5.55041087e-2f;
    p = p * rest + 2.40226507e-1f;
    p = p * rest + 6.93147181e-1f;
    p = p * rest + 1.0f;
    return x < -126.0f ? Floats{} : p * (Floats)((Ints)shifted << 23);
}

inline float largest_of(const Floats v) {
    float out = v[0];
    for (int k = 1; k < WIDTH; ++k) out = v[k] > out ? v[k] : out;
    return out;
}

// probs[0 .. padded) = 2^(score * scale - the largest so far) of n scores, 0 behind them; highest and total are brought
// up to date. Returns what earlier sums have to be multiplied with. Scores behind the n up to a whole vector are
// changed.
inline float soften(float* scores, int64_t n, int64_t padded, float scale, float& highest, float& total, bf16* probs) {
    for (int64_t j = n; j % WIDTH; ++j) scores[j] = -INFINITY;
    Floats most = Floats{} + highest;
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Floats s = load<Floats>(scores + j) * scale;
        most = s > most ? s : most;
    }
    const float now = largest_of(most);
    const Floats subtracted = Floats{} + (now == -INFINITY ? 0 : now);
    Floats sums = {};
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Floats e = exp2_of_negative(load<Floats>(scores + j) * scale - subtracted);
        sums += e;
        store_rounded(probs + j, e);
    }
    for (int64_t j = (n + WIDTH - 1) / WIDTH * WIDTH; j < padded; j += WIDTH) store_rounded(probs + j, Floats{});
    const float factor = highest == now ? 1 : std::exp2(highest - now);  // 0 where there was nothing
    highest = now;
    total = total * factor + sum(sums);
    return factor;
}

struct Tile {
    alignas(64) float scores[TILE_ROWS * BLOCK];
    alignas(64) bf16 probs[TILE_ROWS * BLOCK];
    float highest[TILE_ROWS], total[TILE_ROWS], factor[TILE_ROWS];
};

// The queries s .. s + TILE_ROWS of one sequence and head: out [.., H, V] their attention, lse (or null) the logarithm
// of their sum of exponentials. queries: scratch, TILE_ROWS * (N + R); sums: TILE_ROWS * V rounded up to PANEL.
inline void attend_tile(const Expanded& in, const bf16* keys, const bf16* values, int64_t b, int64_t h, int64_t s,
                        bf16* out, float* lse, Tile& tile, bf16* queries, float* sums) {
    const int64_t K = in.N + in.R, n = in.S - s < TILE_ROWS ? in.S - s : TILE_ROWS;
    const int64_t width = (in.V + PANEL - 1) / PANEL * PANEL, end = in.visible(s + n - 1);
    for (int64_t r = 0; r < TILE_ROWS; ++r) {  // rows that are no queries repeat the last
        const int64_t token = b * in.S + s + (r < n ? r : n - 1);
        std::memcpy(queries + r * K, in.q_nope + token * in.q_nope_token + h * in.q_nope_head, in.N * sizeof(bf16));
        std::memcpy(queries + r * K + in.N, in.q_rope + token * in.q_rope_token + h * in.q_rope_head,
                    in.R * sizeof(bf16));
        tile.highest[r] = -INFINITY;
        tile.total[r] = 0;
    }
    std::memset(sums, 0, TILE_ROWS * width * sizeof(float));
    const auto visible = [&](int64_t r) { return in.visible(s + (r < n ? r : n - 1)); };
    for (int64_t begin = 0; begin < end; begin += BLOCK) {
        const auto seen = [&](int64_t r) {  // of this block
            const int64_t left = visible(r) - begin;
            return left < 0 ? 0 : left < BLOCK ? left : BLOCK;
        };
        for (int64_t j = 0; j < seen(n - 1); j += PANEL)
            for (int64_t r = 0; r < n; r += ROWS)
                if (const int64_t left = seen(r + ROWS - 1) - j; left > 0)
                    multiply_rows((left + WIDTH - 1) / WIDTH, queries + r * K, K, keys + (begin + j) * K, K,
                                  tile.scores + r * BLOCK + j, BLOCK);
        for (int64_t r = 0; r < n; r += ROWS) {
            const int64_t most = (seen(r + ROWS - 1) + WIDTH - 1) / WIDTH * WIDTH;
            if (!most) continue;
            for (int64_t k = r; k < r + ROWS; ++k)
                tile.factor[k] = soften(tile.scores + k * BLOCK, seen(k), most, in.scale * LOG2_E, tile.highest[k],
                                        tile.total[k], tile.probs + k * BLOCK);
            for (int64_t v = 0; v < in.V; v += PANEL)
                multiply_rows((in.V - v + WIDTH - 1) / WIDTH, tile.probs + r * BLOCK, BLOCK,
                              values + v * in.panels() * PANEL + begin * PANEL, (seen(r + ROWS - 1) + 1) / 2 * 2,
                              sums + r * width + v, width, tile.factor + r);
        }
    }
    for (int64_t r = 0; r < n; ++r) {
        bf16* to = out + ((b * in.S + s + r) * in.H + h) * in.V;
        for (int64_t v = 0; v < in.V; v += WIDTH)
            store_rounded(to + v, load<Floats>(sums + r * width + v) / tile.total[r]);
        if (lse) lse[(b * in.H + h) * in.S + s + r] = tile.highest[r] / LOG2_E + std::log(tile.total[r]);
    }
}

}  // namespace
