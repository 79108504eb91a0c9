// Kernels for decoding on a CPU: few rows against every weight, so that reading the weights is their time.
//
// Weights stay as PyTorch has them, BF16 rows [outputs, inputs] (or integers with scales), and go by in the order in which
// they lie; sums are FP32. Each sum is taken in one order whatever the number of rows or threads, so a row's result does
// not depend on what is computed beside it. bf16 is the upper half of a float.
//
// No header of PyTorch and no C++ library: this compiles in two seconds and is called with plain pointers.

#include "attention.h"
#include "block.h"
#include "maps.h"
#include "routing.h"
#include "vectors.h"

extern "C" {

void rms_norm(const bf16* x, int64_t stride, const bf16* weight, bf16* y, int64_t n, int64_t D, float eps) {
    norm_rows(x, stride, weight, y, n, D, eps);
}

void rotate(const bf16* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, bf16* y,
            int64_t n, int64_t heads, int64_t R) {
    rotate_rows(x, token_stride, head_stride, cos, sin, y, n, heads, R);
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

// Of each of n rows of x [n, V] the index of its largest value, the first among equals; -1 where a value is no number or
// the largest is infinite.
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
