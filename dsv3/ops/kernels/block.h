// A block of the model on a few tokens: norms, attention over the cache, the router, the experts.
#pragma once

#include "attention.h"
#include "maps.h"
#include "routing.h"

namespace {

// y [n, D] = x / sqrt(mean(x^2) + eps) * weight; the rows of x lie `stride` apart.
void norm_rows(const bf16* x, int64_t stride, const bf16* weight, bf16* y, int64_t n, int64_t D, float eps) {
    for (int64_t r = 0; r < n; ++r, x += stride, y += D) {
        Floats squares = {};
        for (int64_t i = 0; i < D; i += WIDTH) squares += widen(x + i) * widen(x + i);
        float scale = 1 / std::sqrt(sum(squares) / D + eps);
        for (int64_t i = 0; i < D; i += WIDTH) store(y + i, widen(x + i) * scale * widen(weight + i));
    }
}

// y [n, heads, R] = x with each pair (2i, 2i + 1) turned by the angle of its token; cos, sin [n, R / 2]. Tokens of x
// lie `token_stride` apart, heads `head_stride`.
void rotate_rows(const bf16* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, bf16* y,
                 int64_t n, int64_t heads, int64_t R) {
    for (int64_t t = 0; t < n; ++t, cos += R / 2, sin += R / 2)
        for (int64_t h = 0; h < heads; ++h, y += R) {
            const bf16* from = x + t * token_stride + h * head_stride;
            for (int64_t i = 0; i < R / 2; ++i) {
                float even = widen(from[2 * i]), odd = widen(from[2 * i + 1]);
                y[2 * i] = narrow(even * cos[i] - odd * sin[i]);
                y[2 * i + 1] = narrow(even * sin[i] + odd * cos[i]);
            }
        }
}

// A block: D wide, H heads of N + R and V, queries of rank Q (0: none), latents of C + R; L: width of the shared
// experts or of the dense FFN (0: none); E routed experts (0: a dense block), `chosen` of them for a token, F wide
// each. The rest as `choose_experts` has it; scores are a softmax, or sigmoids.
struct Block {
    const bf16 *input_norm, *q_norm, *kv_norm, *up, *post_norm;
    const float *router, *bias;
    Map q_a, q_b, kv_a, o, local_gate_up, local_down, gate_up, down;
    int64_t D, H, N, R, V, Q, C, L, E, chosen, F, softmax, groups, kept, pairs, normalised;
    float factor, eps, scale;
};

// What the blocks of a pass of n tokens share: their angles (cos and sin [n, R / 2]), where their latents go in the
// pool, and what they look at.
struct Pass {
    const float *cos, *sin;
    const int64_t* slots;
    const Piece* pieces;
    int64_t n, num_pieces;
};

// attended [n, H, V] of the residual h [n, D]; the tokens' latents, normed and rotated, are written to the pool.
void attend(const Block& b, const Pass& pass, const bf16* h, bf16* pool, bf16* attended, int threads) {
    const int64_t n = pass.n, K = b.N + b.R, X = b.C + b.R;
    Buffer<bf16> x(n * b.D), low(n * b.Q), q(n * b.H * K), kv(n * X);
    norm_rows(h, b.D, b.input_norm, x, n, b.D, b.eps);
    if (b.Q) {
        apply(b.q_a, x, b.D, low, n, b.D, b.Q, threads);
        norm_rows(low, b.Q, b.q_norm, low, n, b.Q, b.eps);
        apply(b.q_b, low, b.Q, q, n, b.Q, b.H * K, threads);
    } else
        apply(b.q_b, x, b.D, q, n, b.D, b.H * K, threads);
    apply(b.kv_a, x, b.D, kv, n, b.D, X, threads);
    for (int64_t t = 0; t < n; ++t) {
        const float *cos = pass.cos + t * (b.R / 2), *sin = pass.sin + t * (b.R / 2);
        for (int64_t k = 0; k < b.H; ++k) {
            bf16* rope = q + (t * b.H + k) * K + b.N;
            rotate_rows(rope, 0, 0, cos, sin, rope, 1, 1, b.R);
        }
        bf16* latent = pool + pass.slots[t] * X;
        norm_rows(kv + t * X, 0, b.kv_norm, latent, 1, b.C, b.eps);
        rotate_rows(kv + t * X + b.C, 0, 0, cos, sin, latent + b.C, 1, 1, b.R);
    }
    int64_t first = 0;
    for (int64_t i = 0; i < pass.num_pieces; first += pass.pieces[i].B * pass.pieces[i].S, ++i) {
        const bf16* of_piece = q + first * b.H * K;
        const Queries queries = {of_piece, of_piece + b.N, b.H * K, K, b.H * K, K};
        attend_latents(queries, pool, pass.pieces[i], b.up, b.scale, attended + first * b.H * b.V, b.H, b.N, b.C, b.R,
                       b.V, threads);
    }
}

// The router's scores [n, E] of x [n, D], sigmoids or a softmax, and its choice (`choose_experts`).
void route(const Block& b, const bf16* x, float* scores, int64_t* ids, float* weights, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t e = 0; e < b.E; ++e)
        for (int64_t t = 0; t < n; ++t) {
            Floats acc = {};
            for (int64_t d = 0; d < b.D; d += WIDTH)
                acc += widen(x + t * b.D + d) * load<Floats>(b.router + e * b.D + d);
            scores[t * b.E + e] = b.softmax ? sum(acc) : 1 / (1 + std::exp(-sum(acc)));
        }
    for (int64_t t = 0; b.softmax && t < n; ++t) {
        float *of_token = scores + t * b.E, total = 0, most = of_token[largest(of_token, b.E)];
        for (int64_t e = 0; e < b.E; ++e) total += of_token[e] = std::exp(of_token[e] - most);
        for (int64_t e = 0; e < b.E; ++e) of_token[e] /= total;
    }
    choose_experts(scores, b.bias, ids, weights, n, b.E, b.chosen, b.groups, b.kept, b.pairs, b.normalised, b.factor);
}

// y [n, D] = h + attention, and its FFN's answer added. Of a block with experts also the routing: scores [n, E], ids
// and weights [n, chosen], counts [E] of tokens.
void run(const Block& b, const Pass& pass, const bf16* h, bf16* pool, bf16* y, float* scores, int64_t* ids,
         float* weights, int64_t* counts, int threads) {
    const int64_t n = pass.n, D = b.D, N = b.E ? n * b.chosen : 0;
    Buffer<bf16> attended(n * b.H * b.V), residual(n * D), x(n * D), local(n * D), local_act(n * b.L);
    attend(b, pass, h, pool, attended, threads);
    apply(b.o, attended, b.H * b.V, residual, n, b.H * b.V, D, threads);
    for (int64_t i = 0; i < n * D; i += WIDTH) store(residual + i, widen(residual + i) + widen(h + i));
    norm_rows(residual, D, b.post_norm, x, n, D, b.eps);
    if (b.L) {
        Buffer<float> ones(n);
        for (int64_t t = 0; t < n; ++t) ones[t] = 1;
        apply_experts(b.local_gate_up, b.local_down, x, ones, &n, local, local_act, n, 1, D, b.L, threads);
    }
    Buffer<bf16> rows(N * D), answers(N * D), act(N * b.F);
    Buffer<float> row_weights(N);
    Buffer<int64_t> places(N);
    if (b.E) {
        route(b, x, scores, ids, weights, n, threads);
        group_rows(x, ids, weights, rows, row_weights, counts, places, n, b.chosen, D, b.E);
        apply_experts(b.gate_up, b.down, rows, row_weights, counts, answers, act, N, b.E, D, b.F, threads);
    }
    for (int64_t t = 0; t < n; ++t)
        for (int64_t d = 0; d < D; d += WIDTH) {
            Floats out = widen(residual + t * D + d);
            if (b.L) out += widen(local + t * D + d);
            for (int64_t k = 0; k < b.chosen && b.E; ++k) out += widen(answers + places[t * b.chosen + k] * D + d);
            store(y + t * D + d, out);
        }
}

}  // namespace
