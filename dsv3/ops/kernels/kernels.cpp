// Kernels for decoding on a CPU: few rows against every weight, so that reading the weights is their time.
//
// Weights stay as PyTorch has them, BF16 rows [outputs, inputs] (or integers with scales), and go by in the order in
// which they lie; sums are FP32. Each sum is taken in one order whatever the number of rows or threads, so a row's
// result does not depend on what is computed beside it. bf16 is the upper half of a float.
//
// No header of PyTorch and no C++ library: this compiles in two seconds and is called with plain pointers.

#include "attention.h"
#include "block.h"
#include "maps.h"
#include "routing.h"
#include "vectors.h"

namespace {

constexpr int64_t MANY = 64;  // rows from which threads pay where there is little to do with each

}  // namespace

extern "C" {

void rms_norm(const bf16* x, int64_t stride, const bf16* weight, bf16* y, int64_t n, int64_t D, float eps) {
#pragma omp parallel for if (n >= MANY) schedule(static)
    for (int64_t r = 0; r < n; ++r) norm_rows(x + r * stride, stride, weight, y + r * D, 1, D, eps);
}

void rotate(const bf16* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, bf16* y,
            int64_t n, int64_t heads, int64_t R) {
#pragma omp parallel for if (n >= MANY) schedule(static)
    for (int64_t t = 0; t < n; ++t)
        rotate_rows(x + t * token_stride, 0, head_stride, cos + t * (R / 2), sin + t * (R / 2), y + t * heads * R, 1,
                    heads, R);
}

void linear(const bf16* x, int64_t stride, Map map, bf16* y, int64_t n, int64_t I, int64_t O, int64_t threads) {
    apply(map, x, stride, y, n, I, O, threads);
}

void experts(const bf16* x, const float* weights, const int64_t* counts, Map gate_up, Map down, bf16* y, bf16* act,
             int64_t N, int64_t E, int64_t D, int64_t F, int64_t threads) {
    apply_experts(gate_up, down, x, weights, counts, y, act, N, E, D, F, threads);
}

void select_experts(const float* scores, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t E,
                    int64_t chosen, int64_t groups, int64_t kept, int64_t pairs, int64_t normalised, float factor) {
    choose_experts(scores, bias, ids, weights, n, E, chosen, groups, kept, pairs, normalised, factor);
}

void latent_attention(const Queries* queries, const bf16* latents, const Piece* piece, const bf16* up, float scale,
                      bf16* y, int64_t H, int64_t N, int64_t C, int64_t R, int64_t V, int64_t threads) {
    attend_latents(*queries, latents, *piece, up, scale, y, H, N, C, R, V, threads);
}

void run_block(const Block* block, const Pass* pass, const bf16* h, bf16* pool, bf16* y, float* scores, int64_t* ids,
               float* weights, int64_t* counts, int64_t threads) {
    run(*block, *pass, h, pool, y, scores, ids, weights, counts, threads);
}

// Of each of n rows of x [n, V] the index of its largest value, the first among equals; -1 where a value is no number
// or the largest is infinite.
void greedy(const bf16* x, int64_t* ids, int64_t n, int64_t V, int64_t threads) {
    constexpr int64_t SPAN = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        const bf16* row = x + r * V;
        float most = -INFINITY;
        int64_t best = 0;
        bool sound = true;
        for (int64_t begin = 0; begin < V; begin += SPAN) {
            const int64_t end = begin + SPAN < V ? begin + SPAN : V;
            Floats most_of_span = Floats{} + most, none = {};
            int64_t v = begin;
            for (; v + WIDTH <= end; v += WIDTH) {
                const Floats here = widen(row + v);
                most_of_span = here > most_of_span ? here : most_of_span;
                none += here * 0.0f;
            }
            float largest = most;
            for (int k = 0; k < WIDTH; ++k) largest = most_of_span[k] > largest ? most_of_span[k] : largest;
            for (; v < end; ++v) {
                const float here = widen(row[v]);
                largest = here > largest ? here : largest;
                none[0] += here * 0.0f;
            }
            // An infinity, too, is none here; -inf need not be the largest, so it is looked for below.
            const float total = sum(none);
            if (total != total)
                for (v = begin; v < end; ++v) sound &= widen(row[v]) == widen(row[v]);
            if (largest > most) {
                most = largest;
                for (v = begin; widen(row[v]) != most;) ++v;
                best = v;
            }
        }
        ids[r] = sound && most < INFINITY && most > -INFINITY ? best : -1;
    }
}
}

// What follows is for prompts: many rows.

#include "expanded.h"
#include "products.h"
#include "prompt_rows.h"

namespace {

// Calls take(weight) of a map in BF16 or int8.
template <class Take>
void as_stored(const Map& map, Take take) {
    if (map.bits == 16)
        take(static_cast<const bf16*>(map.weight));
    else
        take(static_cast<const int8_t*>(map.weight));
}

}  // namespace

extern "C" {

// Whether one instruction multiplies pairs of BF16 and adds them: without it these are no faster than what they
// replace.
#ifdef __AVX512BF16__
extern const int64_t multiplies_pairs = 1;
#else
extern const int64_t multiplies_pairs = 0;
#endif

// y [n, O] = x [n, I] W^T, the map BF16 or int8; the rows of x lie `stride` apart. scratch: threads * PANEL * I.
void linear_many(const bf16* x, int64_t stride, Map map, bf16* y, bf16* scratch, int64_t n, int64_t I, int64_t O,
                 int64_t threads) {
    as_stored(map, [=](auto* w) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; ++t)
            linear_share(x, stride, nullptr, &n, w, map.scale, y, scratch + t * PANEL * I, 1, I, O, {t, threads});
    });
}

// As `experts`, both maps BF16 or both int8. scratch: threads * PANEL * max(D, F).
void experts_many(const bf16* x, const float* weights, const int64_t* counts, Map gate_up, Map down, bf16* y, bf16* act,
                  bf16* scratch, int64_t E, int64_t D, int64_t F, int64_t threads) {
    const int64_t size = PANEL * (D > F ? D : F);
    as_stored(gate_up, [=](auto* w) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; ++t)
            gate_share(x, weights, counts, w, gate_up.scale, act, scratch + t * size, E, D, F, {t, threads});
    });
    as_stored(down, [=](auto* w) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t t = 0; t < threads; ++t)
            linear_share(act, F, weights, counts, w, down.scale, y, scratch + t * size, E, F, D, {t, threads});
    });
    for (int64_t e = 0, first = 0; e < E; first += counts[e++]) {  // padding
        const int64_t n = without_padding(weights + first, counts[e]);
        std::memset(y + (first + n) * D, 0, (counts[e] - n) * D * sizeof(bf16));
    }
}

// The affinities [n, E] of tokens x [n, D] to experts, and the choice by them as in select_experts; counts
// [E]: of the tokens that chose each.
void route(const bf16* x, const float* router, const float* bias, float* scores, int64_t* ids, float* weights,
           int64_t* counts, int64_t n, int64_t D, int64_t E, int64_t softmax, int64_t chosen, int64_t groups,
           int64_t kept, int64_t pairs, int64_t normalised, float factor, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; t += 4) {
        const int64_t some = n - t < 4 ? n - t : 4;
        if (some == 4)
            score_tokens<4>(x + t * D, router, scores + t * E, D, E);
        else
            for (int64_t k = t; k < n; ++k) score_tokens<1>(x + k * D, router, scores + k * E, D, E);
        for (int64_t k = t; k < t + some; ++k) weigh_scores(scores + k * E, E, softmax);
        choose_experts(scores + t * E, bias, ids + t * chosen, weights + t * chosen, some, E, chosen, groups, kept,
                       pairs, normalised, factor);
    }
    std::memset(counts, 0, E * sizeof(int64_t));
    for (int64_t i = 0; i < n * chosen; ++i) ++counts[ids[i]];
}

// Rows on their way to experts, of each token x [n, D] one for each choice: copies that lie grouped by expert, the
// weight of each and its token. Every group is filled up to a multiple of `unit` with rows of weight 0. counts [E] are
// set, and places [n, chosen]: where the row of each choice lies.
void prompt_rows(const bf16* x, const int64_t* ids, const float* weights, bf16* rows, float* row_weights,
                 int64_t* tokens, int64_t* counts, int64_t* places, int64_t n, int64_t chosen, int64_t D, int64_t E,
                 int64_t unit, int64_t threads) {
    const int64_t N = place_rows(ids, weights, row_weights, tokens, counts, places, n, chosen, E, unit);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < N; ++r) std::memcpy(rows + r * D, x + tokens[r] * D, D * sizeof(bf16));
}

// y [n, D]: the sum of the rows [D] at places [n, chosen], in that order.
void sum_rows(const bf16* rows, const int64_t* places, bf16* y, int64_t n, int64_t chosen, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t)
        for (int64_t d = 0; d < D; d += WIDTH) {
            Floats out = {};
            for (int64_t k = 0; k < chosen; ++k) out += widen(rows + places[t * chosen + k] * D + d);
            store_rounded(y + t * D + d, out);
        }
}

// Attention of S queries to T keys of each of B sequences and H heads, as `Expanded` has them: y [B, S, H, V]; lse [B,
// H, S] or null. Scratch: packed, `together` * (keys_size + values_size), of as many heads as go at a time; own,
// threads * TILE_ROWS * (K + 2 V rounded up to PANEL).
void expanded_attention(const bf16* q_nope, int64_t q_nope_token, int64_t q_nope_head, const bf16* q_rope,
                        int64_t q_rope_token, int64_t q_rope_head, const bf16* k_nope, int64_t k_token, int64_t k_head,
                        const bf16* k_rope, int64_t k_rope_token, const bf16* values, int64_t v_token, int64_t v_head,
                        float scale, int64_t causal, bf16* y, float* lse, bf16* packed, bf16* own, int64_t together,
                        int64_t B, int64_t S, int64_t T, int64_t H, int64_t N, int64_t R, int64_t V, int64_t threads) {
    const Expanded in{q_nope,      q_rope,
                      k_nope,      k_rope,
                      values,      q_nope_token,
                      q_nope_head, q_rope_token,
                      q_rope_head, k_token,
                      k_head,      k_rope_token,
                      v_token,     v_head,
                      scale,       B,
                      S,           T,
                      H,           N,
                      R,           V,
                      causal};
    const int64_t width = (V + PANEL - 1) / PANEL * PANEL, size = TILE_ROWS * (N + R + 2 * width);
    const int64_t of_head = in.keys_size() + in.values_size(), tiles = (S + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel num_threads(threads)
    {
        bf16* queries = own + thread() * size;
        Tile tile;
        for (int64_t first = 0; first < B * H; first += together) {
            const int64_t end = first + together < B * H ? first + together : B * H;
#pragma omp for collapse(2) schedule(static)
            for (int64_t g = first; g < end; ++g)
                for (int64_t p = 0; p < in.panels(); ++p) {
                    bf16* keys = packed + (g - first) * of_head;
                    pack_keys(in, g / H, g % H, p, keys, keys + in.keys_size());
                }
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t g = first; g < end; ++g)
                for (int64_t i = 0; i < tiles; ++i) {
                    const bf16* keys = packed + (g - first) * of_head;
                    attend_tile(in, keys, keys + in.keys_size(), g / H, g % H, (tiles - 1 - i) * TILE_ROWS, y, lse,
                                tile, queries, reinterpret_cast<float*>(queries + TILE_ROWS * (N + R)));
                }
        }
    }
}
}
