// Kernels for decoding on a CPU: few rows against every weight, so that reading the weights is their time.
//
// Weights stay as PyTorch has them, BF16 rows [outputs, inputs] (or int8 with a scale for each output), and go by in the
// order in which they lie; sums are FP32. Each sum is taken in one order whatever the number of rows or threads, so a
// row's result does not depend on what is computed beside it. bf16 is the upper half of a float.
//
// No header of PyTorch and no C++ library: this compiles in two seconds and is called with plain pointers.

#include "attention.h"
#include "maps.h"
#include "routing.h"
#include "vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace

extern "C" {

void select_experts(const float* scores, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t E,
                    int64_t chosen, int64_t groups, int64_t kept, int64_t pairs, int64_t normalised, float factor) {
    choose_experts(scores, bias, ids, weights, n, E, chosen, groups, kept, pairs, normalised, factor);
}

void linear(const bf16* x, int64_t stride, const bf16* w, bf16* y, int64_t n, int64_t I, int64_t O, int64_t threads) {
    linear_by(x, stride, w, nullptr, y, n, I, O, threads);
}

void linear_int8(const bf16* x, int64_t stride, const int8_t* w, const float* scale, bf16* y, int64_t n, int64_t I,
                 int64_t O, int64_t threads) {
    linear_by(x, stride, w, scale, y, n, I, O, threads);
}

void experts(const bf16* x, const float* weights, const int64_t* counts, const bf16* gate_up, const bf16* down, bf16* y,
             bf16* act, int64_t E, int64_t D, int64_t F, int64_t threads) {
    experts_by(x, weights, counts, gate_up, nullptr, down, nullptr, y, act, E, D, F, threads);
}

void experts_int8(const bf16* x, const float* weights, const int64_t* counts, const int8_t* gate_up,
                  const float* gate_up_scale, const int8_t* down, const float* down_scale, bf16* y, bf16* act, int64_t E,
                  int64_t D, int64_t F, int64_t threads) {
    experts_by(x, weights, counts, gate_up, gate_up_scale, down, down_scale, y, act, E, D, F, threads);
}

// y [n, D] = x / sqrt(mean(x^2) + eps) * weight; the rows of x lie `stride` apart.
void rms_norm(const bf16* x, int64_t stride, const bf16* weight, bf16* y, int64_t n, int64_t D, float eps) {
    for (int64_t r = 0; r < n; ++r, x += stride, y += D) {
        Floats squares = {};
        for (int64_t i = 0; i < D; i += WIDTH) squares += widen(x + i) * widen(x + i);
        float scale = 1 / std::sqrt(sum(squares) / D + eps);
        for (int64_t i = 0; i < D; i += WIDTH) store(y + i, widen(x + i) * scale * widen(weight + i));
    }
}

// y [n, heads, R] = x with each pair (2i, 2i + 1) turned by the angle of its token; cos, sin [n, R / 2]. Tokens of x lie
// `token_stride` apart, heads `head_stride`.
void rotate(const bf16* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, bf16* y,
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

// Multi-head latent attention in the absorbed order: y [B, S, H, V] of queries nope [B, S, H, N] and rope [B, S, H, R],
// whose tokens lie `*_token` apart and heads `*_head`. The T latents [C + R] of sequence b are the rows of `latents` from
// `apart` * b on, or, if there are slots [B, T], those that they say. up [H, N + V, C]: of each head W_UK,
// then W_UV. mask [B, S, T]: not 0 where a query may look; null: the S queries are the last of the T positions.
// Scratch: queries [B * S, H, C + R] BF16; scratch [threads, 8, C] floats.
void latent_attention(const bf16* nope, int64_t nope_token, int64_t nope_head, const bf16* rope, int64_t rope_token,
                      int64_t rope_head, const bf16* latents, int64_t apart, const int64_t* slots, const bf16* up,
                      const uint8_t* mask, float scale, bf16* y, bf16* queries, float* scratch, int64_t B, int64_t S, int64_t T, int64_t H, int64_t N, int64_t C,
                      int64_t R, int64_t V, int64_t threads) {
    const int64_t X = C + R, tokens = B * S;
#pragma omp parallel num_threads(threads)
    {
        float* own = scratch + thread() * 8 * C;
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t first = 0; first < tokens; first += 4) {
                const bf16* w_uk = up + h * (N + V) * C;
                const bf16* q = nope + first * nope_token + h * nope_head;
                bf16* out = queries + (first * H + h) * X;
                if (tokens - first >= 4)
                    absorb_four(q, nope_token, w_uk, N, C, out, H * X);
                else
                    for (int64_t t = 0; t < tokens - first; ++t)
                        absorb(q + t * nope_token, w_uk, N, C, own, out + t * H * X);
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < H; ++h)
                std::memcpy(queries + (t * H + h) * X + C, rope + t * rope_token + h * rope_head, R * sizeof(bf16));
        // Softmax over the latents and their weighted sum, which takes the place of the query.
        const int64_t group = tokens * ((H + 7) / 8) >= threads ? 8 : 4;
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < H; h += group) {
                const bf16* rows = latents + t / S * apart;
                const int64_t* places = slots ? slots + t / S * T : nullptr;
                const auto latent = [=](int64_t j) { return rows + (places ? places[j] : j) * X; };
                const uint8_t* looks = mask ? mask + t * T : nullptr;
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
            for (int64_t v = 0; v < V; v += TILE)
                outputs<TILE>(
                    tokens, [&](int64_t t) { return queries + (t * H + h) * X; }, up + (h * (N + V) + N + v) * C, C,
                    [&](int64_t t, const float* out) {
                        for (int k = 0; k < TILE; ++k) y[(t * H + h) * V + v + k] = narrow(out[k]);
                    });
    }
}

// What follows is a block of the model on a few tokens, in three calls around its attention. Maps: in and out as named.
// All of n tokens, D wide.

// Before attention: q [n, H, N + R], rotated, and the token's latent [n, C + R], normed and rotated, of the residual h.
// q_norm null: q_b makes queries of x itself. scratch: n (D + Q + C + R) BF16, where Q is the width that q_norm norms.
void block_before(const bf16* h, const bf16* norm, Map q_a, const bf16* q_norm, Map q_b, Map kv_a, const bf16* kv_norm,
                  float eps, const float* cos, const float* sin, bf16* q, bf16* latent, bf16* scratch, int64_t n,
                  int64_t D, int64_t Q, int64_t H, int64_t N, int64_t C, int64_t R, int64_t threads) {
    bf16 *x = scratch, *low = x + n * D, *kv = low + n * Q;
    rms_norm(h, D, norm, x, n, D, eps);
    const bf16* source = x;
    if (q_norm) {
        apply(q_a, x, low, n, D, Q, threads);
        rms_norm(low, Q, q_norm, low, n, Q, eps);
        source = low;
    }
    apply(q_b, source, q, n, q_norm ? Q : D, H * (N + R), threads);
    apply(kv_a, x, kv, n, D, C + R, threads);
    for (int64_t t = 0; t < n; ++t) {
        const float *c = cos + t * (R / 2), *s = sin + t * (R / 2);
        for (int64_t k = 0; k < H; ++k) {
            bf16* rope = q + (t * H + k) * (N + R) + N;
            rotate(rope, 0, 0, c, s, rope, 1, 1, R);
        }
        rms_norm(kv + t * (C + R), 0, kv_norm, latent + t * (C + R), 1, C, eps);
        rotate(kv + t * (C + R) + C, 0, 0, c, s, latent + t * (C + R) + C, 1, 1, R);
    }
}

// Behind attention: residual = h + o_proj(attended), x its norm, and, if there are experts (E), the router's scores and
// choice, as in select_experts; `softmax` of the scores instead of sigmoids.
void block_between(const bf16* attended, Map o_proj, const bf16* h, const bf16* norm, float eps, const float* router,
                   const float* bias, bf16* residual, bf16* x, float* scores, int64_t* ids, float* weights, int64_t n,
                   int64_t D, int64_t A, int64_t E, int64_t softmax, int64_t chosen, int64_t groups, int64_t kept,
                   int64_t pairs, int64_t normalised, float factor, int64_t threads) {
    apply(o_proj, attended, residual, n, A, D, threads);
    for (int64_t i = 0; i < n * D; i += WIDTH) store(residual + i, widen(residual + i) + widen(h + i));
    rms_norm(residual, D, norm, x, n, D, eps);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t e = 0; e < E; ++e)
        for (int64_t t = 0; t < n; ++t) {
            Floats acc = {};
            for (int64_t d = 0; d < D; d += WIDTH) acc += widen(x + t * D + d) * load<Floats>(router + e * D + d);
            scores[t * E + e] = softmax ? sum(acc) : 1 / (1 + std::exp(-sum(acc)));
        }
    for (int64_t t = 0; E && softmax && t < n; ++t) {
        float *of_token = scores + t * E, total = 0, most = of_token[largest(of_token, E)];
        for (int64_t e = 0; e < E; ++e) total += of_token[e] = std::exp(of_token[e] - most);
        for (int64_t e = 0; e < E; ++e) of_token[e] /= total;
    }
    if (E) choose_experts(scores, bias, ids, weights, n, E, chosen, groups, kept, pairs, normalised, factor);
}

// The FFN: y = residual + local(x) + the chosen experts' answers. `local` is the shared experts, L wide (0: none), or a
// dense FFN, and then E is 0. counts [E] are set. scratch: BF16, n (chosen (2 D + F + 6) + D + L + 2).
void block_after(const bf16* residual, const bf16* x, const int64_t* ids, const float* weights, Map local_gate_up,
                 Map local_down, Map gate_up, Map down, int64_t* counts, bf16* y, bf16* scratch, int64_t n, int64_t D,
                 int64_t L, int64_t E, int64_t chosen, int64_t F, int64_t threads) {
    const int64_t N = n * chosen;
    int64_t* places = reinterpret_cast<int64_t*>(scratch);
    float* row_weights = reinterpret_cast<float*>(places + N);
    bf16 *rows = reinterpret_cast<bf16*>(row_weights + N + n), *answers = rows + N * D, *act = answers + N * D;
    bf16 *local = act + N * F, *local_act = local + n * D;
    if (L) {
        float* ones = row_weights + N;
        for (int64_t t = 0; t < n; ++t) ones[t] = 1;
        apply_experts(local_gate_up, local_down, x, ones, &n, local, local_act, 1, D, L, threads);
    }
    if (E) {
        group_rows(x, ids, weights, rows, row_weights, counts, places, n, chosen, D, E);
        apply_experts(gate_up, down, rows, row_weights, counts, answers, act, E, D, F, threads);
    }
    for (int64_t t = 0; t < n; ++t)
        for (int64_t d = 0; d < D; d += WIDTH) {
            Floats out = widen(residual + t * D + d);
            if (L) out += widen(local + t * D + d);
            for (int64_t k = 0; k < chosen && E; ++k) out += widen(answers + places[t * chosen + k] * D + d);
            store(y + t * D + d, out);
        }
}
}
