// Latent attention of one token and some heads: the absorbed query, and its softmax over latents and their weighted
// sum.
#pragma once

#include "maps.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int KEYS = 64;  // latents that attention looks at at a time

// The absorbed query of one token and head, q W_UK. W_UK goes by in the order in which it lies. acc: scratch, [C].
inline void absorb(const bf16* q, const bf16* w_uk, int64_t N, int64_t C, float* acc, bf16* out) {
    std::memset(acc, 0, C * sizeof(float));
    for (int64_t n = 0; n < N; ++n) {
        const float factor = widen(q[n]);
        for (int64_t c = 0; c < C; c += WIDTH) {
            const Floats v = load<Floats>(acc + c) + widen(w_uk + n * C + c) * factor;
            std::memcpy(acc + c, &v, sizeof v);
        }
    }
    for (int64_t c = 0; c < C; c += WIDTH) store(out + c, load<Floats>(acc + c));
}

// The same of four tokens, whose queries and answers lie `from` and `to` apart: columns of W_UK serve all four.
inline void absorb_four(const bf16* q, int64_t from, const bf16* w_uk, int64_t N, int64_t C, bf16* out, int64_t to) {
    constexpr int VECTORS = STEP / WIDTH;
    for (int64_t c = 0; c < C; c += STEP) {
        Floats acc[4][VECTORS] = {};
        for (int64_t n = 0; n < N; ++n)
            for (int v = 0; v < VECTORS; ++v) {
                const Floats w = widen(w_uk + n * C + c + v * WIDTH);
                for (int t = 0; t < 4; ++t) acc[t][v] += w * widen(q[t * from + n]);
            }
        for (int t = 0; t < 4; ++t)
            for (int v = 0; v < VECTORS; ++v) store(out + t * to + c + v * WIDTH, acc[t][v]);
    }
}

// acc[k][c ...] += sum_j p[k][j] latent(j)[c ...] over n tokens, for STEP dimensions from c on. Two tokens at a time:
// probs[k][j / 2] are the probabilities of tokens j and j + 1, BF16.
template <int HEADS, class Latent>
inline void weighted_sum(float* acc, Latent latent, const uint32_t* probs, int64_t n, int64_t c, int64_t C) {
    Floats sums[HEADS][2];
    for (int k = 0; k < HEADS; ++k)
        for (int v = 0; v < 2; ++v) sums[k][v] = load<Floats>(acc + k * C + c + v * WIDTH);
    for (int64_t j = 0; j < n; j += 2) {
        Ints pairs[2];
        interleave(latent(j) + c, latent(j + 1 < n ? j + 1 : j) + c, pairs);
        for (int k = 0; k < HEADS; ++k)
            for (int v = 0; v < 2; ++v) sums[k][v] = dot(sums[k][v], pairs[v], probs[k * (KEYS / 2) + j / 2]);
    }
    for (int k = 0; k < HEADS; ++k)
        for (int v = 0; v < 2; ++v) std::memcpy(acc + k * C + c + v * WIDTH, &sums[k][v], sizeof(Floats));
}

// q[k] <- the first C of sum_j p_j latent(j), p the softmax of q[k] . latent(j) over the `visible` first tokens that
// `looks` does not hide, for HEADS queries that lie X apart. Goes over the latents once, KEYS at a time, which stay in
// the cache: what came before is scaled down whenever a larger score comes. acc: scratch, [HEADS][C].
template <int HEADS, class Latent>
void attend(bf16* q, Latent latent, const uint8_t* looks, float scale, float* acc, int64_t visible, int64_t C,
            int64_t X) {
    float scores[HEADS * KEYS], total[HEADS] = {}, highest[HEADS];
    uint32_t probs[HEADS * KEYS / 2];
    for (int k = 0; k < HEADS; ++k) highest[k] = -INFINITY;
    std::memset(acc, 0, HEADS * C * sizeof(float));
    for (int64_t begin = 0; begin < visible; begin += KEYS) {
        const int64_t n = visible - begin < KEYS ? visible - begin : KEYS;
        const auto of_block = [=](int64_t j) { return latent(begin + j); };
        constexpr int SOME = HEADS < 4 ? HEADS : 4;
        for (int first = 0; first < HEADS; first += SOME)
            outputs<SOME>(n, of_block, q + first * X, X, [&](int64_t j, float* out) {
                const bool hidden = looks && !looks[begin + j];
                for (int k = 0; k < SOME; ++k) scores[(first + k) * KEYS + j] = hidden ? -INFINITY : out[k] * scale;
            });
        for (int k = 0; k < HEADS; ++k) {
            float* s = scores + k * KEYS;
            float most = highest[k];
            for (int64_t j = 0; j < n; ++j) most = s[j] > most ? s[j] : most;
            for (int64_t j = n; j < KEYS; ++j) s[j] = -INFINITY;
            const float before = highest[k];
            highest[k] = most;
            // Where nothing may be seen yet all is zero; there -inf must not meet -inf.
            const Floats subtracted = Floats{} + (most == -INFINITY ? 0 : most);
            Floats sums = {};
            for (int64_t j = 0; j < KEYS; j += WIDTH) {
                bf16 rounded[WIDTH];
                store(rounded, exp_of_negative(load<Floats>(s + j) - subtracted));
                sums += widen(rounded);  // so that the weights add up to 1
                std::memcpy(probs + k * (KEYS / 2) + j / 2, rounded, sizeof rounded);
            }
            if (before != most && before != -INFINITY) {
                const float less = std::exp(before - most);
                total[k] *= less;
                for (int64_t c = 0; c < C; ++c) acc[k * C + c] *= less;
            }
            total[k] += sum(sums);
        }
        // Meanwhile the latents that come next are fetched.
        const int64_t left = visible - begin - KEYS;
        const int64_t num_next = left < 0 ? 0 : left < KEYS ? left : KEYS;
        for (int64_t c = 0; c < C; c += STEP) {
            for (int64_t j = 0; j < num_next; ++j) __builtin_prefetch(latent(begin + KEYS + j) + c, 0, 2);
            weighted_sum<HEADS>(acc, of_block, probs, n, c, C);
        }
    }
    for (int k = 0; k < HEADS; ++k)
        for (int64_t c = 0; c < C; c += WIDTH) store(q + k * X + c, load<Floats>(acc + k * C + c) / total[k]);
}

int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Queries nope [tokens, H, N] and rope [tokens, H, R], whose tokens lie `*_token` apart and heads `*_head`.
struct Queries {
    const bf16 *nope, *rope;
    int64_t nope_token, nope_head, rope_token, rope_head;
};

// Some sequences' latents [C + R], T of each: those that the slots [B, T] say, or, without slots, the rows of sequence
// b from `apart` * b on; and which of them S queries of each may look at: where the mask [B, S, T] is not 0, or,
// without a mask, those up to their own, the queries being the last of the T.
struct Piece {
    const int64_t* slots;
    const uint8_t* mask;
    int64_t apart, B, S, T;
};

// Multi-head latent attention in the absorbed order: y [B * S, H, V]. up [H, N + V, C]: of each head W_UK, then W_UV.
void attend_latents(const Queries& of, const bf16* latents, const Piece& piece, const bf16* up, float scale, bf16* y,
                    int64_t H, int64_t N, int64_t C, int64_t R, int64_t V, int threads) {
    const int64_t X = C + R, S = piece.S, T = piece.T, tokens = piece.B * S;
    Buffer<bf16> queries(tokens * H * X);
    Buffer<float> scratch(threads * 8 * C);
#pragma omp parallel num_threads(threads)
    {
        float* own = scratch + thread() * 8 * C;
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t first = 0; first < tokens; first += 4) {
                const bf16 *w_uk = up + h * (N + V) * C, *nope = of.nope + first * of.nope_token + h * of.nope_head;
                const bf16* rope = of.rope + first * of.rope_token + h * of.rope_head;
                bf16* out = queries + (first * H + h) * X;
                const int64_t n = tokens - first < 4 ? tokens - first : 4;
                if (n == 4)
                    absorb_four(nope, of.nope_token, w_uk, N, C, out, H * X);
                else
                    for (int64_t t = 0; t < n; ++t) absorb(nope + t * of.nope_token, w_uk, N, C, own, out + t * H * X);
                for (int64_t t = 0; t < n; ++t)
                    std::memcpy(out + t * H * X + C, rope + t * of.rope_token, R * sizeof(bf16));
            }
        // Softmax over the latents and their weighted sum, which takes the place of the query.
        const int64_t group = tokens * ((H + 7) / 8) >= threads ? 8 : 4;
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < H; h += group) {
                const bf16* rows = latents + t / S * piece.apart;
                const int64_t* places = piece.slots ? piece.slots + t / S * T : nullptr;
                const auto latent = [=](int64_t j) { return rows + (places ? places[j] : j) * X; };
                const uint8_t* looks = piece.mask ? piece.mask + t * T : nullptr;
                int64_t visible = T - S + t % S + 1;
                if (looks)
                    for (visible = T; visible > 1 && !looks[visible - 1];) --visible;
                bf16* q = queries + (t * H + h) * X;
                int64_t left = H - h < group ? H - h : group;
                for (; left >= 8; left -= 8, q += 8 * X) attend<8>(q, latent, looks, scale, own, visible, C, X);
                for (; left >= 4; left -= 4, q += 4 * X) attend<4>(q, latent, looks, scale, own, visible, C, X);
                for (; left; --left, q += X) attend<1>(q, latent, looks, scale, own, visible, C, X);
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t v = 0; v < V; v += TILE) {
                const bf16* w_uv = up + (h * (N + V) + N + v) * C;
                const auto attended = [&](int64_t t) { return queries + (t * H + h) * X; };
                outputs<TILE>(tokens, attended, w_uv, C, [&](int64_t t, float* out) {
                    for (int k = 0; k < TILE; ++k) y[(t * H + h) * V + v + k] = narrow(out[k]);
                });
            }
    }
}

}  // namespace
