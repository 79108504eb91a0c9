// Latent attention of one token and some heads: the absorbed query, and its softmax over latents and their weighted sum.
#pragma once

#include "maps.h"

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

// acc[k][c ...] += sum_j probs[k][j] latent(j)[c ...] over n tokens, for VECTORS vectors from dimension c on.
template <int HEADS, int VECTORS, class Latent>
inline void weighted_sum(float* acc, Latent latent, const float* probs, int64_t n, int64_t c, int64_t C) {
    Floats sums[HEADS][VECTORS];
    for (int k = 0; k < HEADS; ++k)
        for (int v = 0; v < VECTORS; ++v) sums[k][v] = load<Floats>(acc + k * C + c + v * WIDTH);
    for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < VECTORS; ++v) {
            const Floats values = widen(latent(j) + c + v * WIDTH);
            for (int k = 0; k < HEADS; ++k) sums[k][v] += values * probs[k * KEYS + j];
        }
    for (int k = 0; k < HEADS; ++k)
        for (int v = 0; v < VECTORS; ++v) std::memcpy(acc + k * C + c + v * WIDTH, &sums[k][v], sizeof(Floats));
}

// q[k] <- the first C of sum_j p_j latent(j), p the softmax of q[k] . latent(j) over the `visible` first tokens that
// `looks` does not hide, for HEADS queries that lie X apart. Goes over the latents once, KEYS at a time, which stay in
// the cache: what came before is scaled down whenever a larger score comes. acc: scratch, [HEADS][C].
template <int HEADS, class Latent>
void attend(bf16* q, Latent latent, const uint8_t* looks, float scale, float* acc, int64_t visible, int64_t C,
            int64_t X) {
    float probs[HEADS * KEYS], total[HEADS] = {}, highest[HEADS];
    for (int k = 0; k < HEADS; ++k) highest[k] = -INFINITY;
    std::memset(acc, 0, HEADS * C * sizeof(float));
    for (int64_t begin = 0; begin < visible; begin += KEYS) {
        const int64_t n = visible - begin < KEYS ? visible - begin : KEYS;
        const auto of_block = [=](int64_t j) { return latent(begin + j); };
        outputs<HEADS>(n, of_block, q, X, [&](int64_t j, const float* out) {
            for (int k = 0; k < HEADS; ++k) probs[k * KEYS + j] = looks && !looks[begin + j] ? -INFINITY : out[k] * scale;
        });
        for (int k = 0; k < HEADS; ++k) {
            float* p = probs + k * KEYS;
            float most = highest[k];
            for (int64_t j = 0; j < n; ++j) most = p[j] > most ? p[j] : most;
            for (int64_t j = n; j < KEYS; ++j) p[j] = -INFINITY;
            const float before = highest[k];
            highest[k] = most;
            // Where nothing may be seen yet all is zero; there -inf must not meet -inf.
            const Floats subtracted = Floats{} + (most == -INFINITY ? 0 : most);
            Floats sums = {};
            for (int64_t j = 0; j < KEYS; j += WIDTH) {
                const Floats e = exp_of_negative(load<Floats>(p + j) - subtracted);
                sums += e;
                std::memcpy(p + j, &e, sizeof e);
            }
            if (before != most && before != -INFINITY) {
                const float less = std::exp(before - most);
                total[k] *= less;
                for (int64_t c = 0; c < C; ++c) acc[k * C + c] *= less;
            }
            total[k] += sum(sums);
        }
        for (int64_t c = 0; c < C; c += 2 * WIDTH) weighted_sum<HEADS, 2>(acc, of_block, probs, n, c, C);
    }
    for (int k = 0; k < HEADS; ++k)
        for (int64_t c = 0; c < C; c += WIDTH) store(q + k * X + c, load<Floats>(acc + k * C + c) / total[k]);
}

}  // namespace
