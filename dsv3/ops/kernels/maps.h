// Linear maps and the experts made of them, for a few rows.
#pragma once

#include "vectors.h"

namespace {

constexpr int TILE = 4;  // outputs of a map that are computed at a time
constexpr int ROUND = 256;  // rows whose gates wait for their other half at a time

// out[r][o] = x[r] . w[o] for ROWS rows, given by address, and OUTS outputs of I inputs. Weights go by in the order in
// which they lie: the machine reads ahead for that, and half as fast for several rows of weights at once.
template <int ROWS, int OUTS, class Weight>
inline void tile(const bf16* const x[ROWS], const Weight* w, int64_t I, float out[ROWS][OUTS]) {
    Floats acc[ROWS][OUTS] = {};
    for (int o = 0; o < OUTS; ++o)
        for (int64_t i = 0; i < I; i += STEP)
            for (int r = 0; r < ROWS; ++r) acc[r][o] = dot(acc[r][o], x[r] + i, w + o * I + i);
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTS; ++o) out[r][o] = sum(acc[r][o]);
}

// Calls take(r, out[OUTS]) for each of n rows, which lie at row(r).
template <int OUTS, class Row, class Weight, class Take>
inline void outputs(int64_t n, Row row, const Weight* w, int64_t I, Take take) {
    int64_t r = 0;
    for (float out[8][OUTS]; r + 8 <= n; r += 8) {
        const bf16* rows[8];
        for (int k = 0; k < 8; ++k) rows[k] = row(r + k);
        tile<8, OUTS>(rows, w, I, out);
        for (int k = 0; k < 8; ++k) take(r + k, out[k]);
    }
    for (float out[4][OUTS]; r + 4 <= n; r += 4) {
        const bf16* const rows[4] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
        tile<4, OUTS>(rows, w, I, out);
        for (int k = 0; k < 4; ++k) take(r + k, out[k]);
    }
    for (float out[1][OUTS]; r < n; ++r) {
        const bf16* const rows[1] = {row(r)};
        tile<1, OUTS>(rows, w, I, out);
        take(r, out[0]);
    }
}

// y [n, O] = x [n, I] w [O, I]^T, the rows of x `stride` apart. scale [O]: what integer weights are multiples of.
template <class Weight>
void linear_by(const bf16* x, int64_t stride, const Weight* w, const float* scale, bf16* y, int64_t n, int64_t I,
               int64_t O, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < O; o += TILE)
        outputs<TILE>(n, [&](int64_t r) { return x + r * stride; }, w + o * I, I, [&](int64_t r, const float* out) {
            for (int k = 0; k < TILE; ++k) y[r * O + o + k] = narrow(scale ? out[k] * scale[o + k] : out[k]);
        });
}

// y [N, D] = down_e (weight * silu(gate_e x) * up_e x) for rows x [N, D] that lie grouped by expert e, counts [E] of each.
// gate_up [E, 2F, D], gate first; down [E, D, F]; their scales, if any, one for each output. act [N, F] is scratch.
template <class Weight>
void experts_by(const bf16* x, const float* weights, const int64_t* counts, const Weight* gate_up,
                const float* gate_up_scale, const Weight* down, const float* down_scale, bf16* y, bf16* act, int64_t E,
                int64_t D, int64_t F, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t first = 0;
        for (int64_t e = 0; e < E; first += counts[e], ++e) {
            if (!counts[e]) continue;
            const Weight* gate = gate_up + e * 2 * F * D;
            const float* scale = gate_up_scale ? gate_up_scale + e * 2 * F : nullptr;
            const auto row = [&](int64_t r) { return x + (first + r) * D; };
#pragma omp for schedule(static) nowait
            for (int64_t f = 0; f < F; f += TILE) {
                float gated[ROUND][TILE];
                for (int64_t begin = 0; begin < counts[e]; begin += ROUND) {
                    const int64_t n = counts[e] - begin < ROUND ? counts[e] - begin : ROUND;
                    const auto of_round = [&](int64_t r) { return row(begin + r); };
                    outputs<TILE>(n, of_round, gate + f * D, D, [&](int64_t r, const float* out) {
                        for (int k = 0; k < TILE; ++k) gated[r][k] = silu(scale ? out[k] * scale[f + k] : out[k]);
                    });
                    outputs<TILE>(n, of_round, gate + (F + f) * D, D, [&](int64_t r, const float* out) {
                        const int64_t at = first + begin + r;
                        for (int k = 0; k < TILE; ++k) {
                            const float up = scale ? out[k] * scale[F + f + k] : out[k];
                            act[at * F + f + k] = narrow(gated[r][k] * up * weights[at]);
                        }
                    });
                }
            }
        }
#pragma omp barrier
        first = 0;
        for (int64_t e = 0; e < E; first += counts[e], ++e) {
            if (!counts[e]) continue;
            const float* scale = down_scale ? down_scale + e * D : nullptr;
            const auto row = [&](int64_t r) { return act + (first + r) * F; };
#pragma omp for schedule(static) nowait
            for (int64_t d = 0; d < D; d += TILE)
                outputs<TILE>(counts[e], row, down + (e * D + d) * F, F, [&](int64_t r, const float* out) {
                    for (int k = 0; k < TILE; ++k)
                        y[(first + r) * D + d + k] = narrow(scale ? out[k] * scale[d + k] : out[k]);
                });
        }
    }
}

// A linear map's weight: BF16, or int8 if it has a scale for each output.
struct Map {
    const void* weight;
    const float* scale;
};

void apply(const Map& map, const bf16* x, bf16* y, int64_t n, int64_t I, int64_t O, int threads) {
    if (map.scale)
        linear_by(x, I, static_cast<const int8_t*>(map.weight), map.scale, y, n, I, O, threads);
    else
        linear_by(x, I, static_cast<const bf16*>(map.weight), nullptr, y, n, I, O, threads);
}

void apply_experts(const Map& gate_up, const Map& down, const bf16* x, const float* weights, const int64_t* counts,
                   bf16* y, bf16* act, int64_t E, int64_t D, int64_t F, int threads) {
    if (gate_up.scale)
        experts_by(x, weights, counts, static_cast<const int8_t*>(gate_up.weight), gate_up.scale,
                   static_cast<const int8_t*>(down.weight), down.scale, y, act, E, D, F, threads);
    else
        experts_by(x, weights, counts, static_cast<const bf16*>(gate_up.weight), nullptr,
                   static_cast<const bf16*>(down.weight), nullptr, y, act, E, D, F, threads);
}

}  // namespace
