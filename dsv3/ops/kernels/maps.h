// Linear maps and the experts made of them, for a few rows.
#pragma once

#include "vectors.h"

namespace {

constexpr int TILE = 4;  // outputs of a map that are computed at a time
constexpr int ROUND = 256;  // rows whose gates wait for their other half at a time
constexpr int GROUP = 32;  // inputs of an output that share a scale and a zero, in 4 bits

// Weights of 4 bits. Of each output: I / 2 bytes, 32 for two groups each, the first group's in their lower halves; then
// the scale and the zero of each group, BF16. A weight is (q - 8) scale + zero.
struct Int4;

// What products with weights of one kind need to know: the bytes of an output's weights, and what rows of inputs are.
// Beside integers these are integers too, as large as cannot overflow (15 bits and a sign up to 8,000 inputs; BF16 has
// 8), so that a product is exact.
template <class Weight>
struct Kind;

template <>
struct Kind<bf16> {
    static int64_t bytes(int64_t I) { return I * 2; }
};

template <>
struct Kind<int8_t> {
    static int64_t bytes(int64_t I) { return I; }
    static int64_t largest(int64_t I) { return INT32_MAX / 127 / (I / WIDTH); }
    static int64_t row(int64_t I) { return I; }
    static void finish(int16_t*, int64_t) {}
};

template <>
struct Kind<Int4> {
    static int64_t bytes(int64_t I) { return I / 2 + I / GROUP * 4; }
    static int64_t largest(int64_t) { return INT16_MAX; }
    // Behind the inputs lie the sums of the groups, floats, up to a whole vector: what zeros are multiplied by.
    static int64_t row(int64_t I) { return I + (I / GROUP + WIDTH - 1) / WIDTH * WIDTH * 2; }
    static void finish(int16_t* inputs, int64_t I) {
        std::memset(inputs + I, 0, (row(I) - I) * sizeof(int16_t));
        for (int64_t g = 0; g < I / GROUP; ++g) {
            int32_t total = 0;
            for (int i = 0; i < GROUP; ++i) total += inputs[g * GROUP + i];
            const float sum = total;
            std::memcpy(inputs + I + 2 * g, &sum, sizeof sum);
        }
    }
};

// n rows of I inputs, `stride` apart, as products with weights of a kind take them, once `fill` has run in all threads.
template <class Weight>
class Inputs {
    const bf16* x;
    const int64_t stride, n, I;
    Buffer<int16_t> integers;
    Buffer<float> scales;

  public:
    Inputs(const bf16* x, int64_t stride, int64_t n, int64_t I)
        : x(x), stride(stride), n(n), I(I), integers(n * Kind<Weight>::row(I)), scales(n) {}

    void fill() {
        const int64_t limit = Kind<Weight>::largest(I) < INT16_MAX ? Kind<Weight>::largest(I) : INT16_MAX;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; ++r) {
            const bf16* from = x + r * stride;
            int16_t* to = integers + r * Kind<Weight>::row(I);
            Floats largest = {}, none = {};
            for (int64_t i = 0; i < I; i += WIDTH) {
                const Floats v = widen(from + i), size = (Floats)((Ints)v & INT32_MAX);
                largest = size > largest ? size : largest;
                none += v * 0.0f;
            }
            float of_row = limit / 1e38f;  // of smaller ones, zeros too, the factor would be infinite
            for (int k = 0; k < WIDTH; ++k) of_row = largest[k] > of_row ? largest[k] : of_row;
            const float factor = limit / of_row;
            for (int64_t i = 0; i < I; i += WIDTH) {
                const Floats v = widen(from + i) * factor;
                const Ints q = __builtin_convertvector(v + (v < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
                const Halves low = __builtin_convertvector(q, Halves);
                std::memcpy(to + i, &low, sizeof low);
            }
            scales[r] = of_row / limit + sum(none);  // no number, if one of the inputs is none
            Kind<Weight>::finish(to, I);
        }
    }
    const int16_t* row(int64_t r) const { return integers + r * Kind<Weight>::row(I); }
    // The answer that a product of integers stands for; of_output: the scale of its output. In this order, because a
    // sum times the scale of a large row may be more than a float holds.
    float scaled(float product, int64_t r, float of_output) const { return product * of_output * scales[r]; }
};

template <>
class Inputs<bf16> {
    const bf16* x;
    const int64_t stride;

  public:
    Inputs(const bf16* x, int64_t stride, int64_t, int64_t) : x(x), stride(stride) {}
    void fill() {}
    const bf16* row(int64_t r) const { return x + r * stride; }
    static float scaled(float product, int64_t, float) { return product; }
};

// The weights of output o of a map.
template <class Weight>
inline const Weight* of_output(const Weight* w, int64_t o, int64_t I) {
    return reinterpret_cast<const Weight*>(reinterpret_cast<const char*>(w) + o * Kind<Weight>::bytes(I));
}

// Calls step(o, i) for every input i, STEP by STEP, of OUTS outputs whose weights have `bytes` each. For one row in the
// order in which the weights lie: the machine reads ahead for that, and half as fast for several outputs at once. With
// more rows it is the products that take the time, and inputs loaded once serve all outputs; then the weights that come
// next are fetched in their order.
template <int ROWS, int OUTS, class Step>
inline void in_steps(int64_t I, const void* w, int64_t bytes, Step step) {
    if (ROWS == 1) {
        for (int o = 0; o < OUTS; ++o)
            for (int64_t i = 0; i + STEP <= I; i += STEP) step(o, i);
    } else {
        const char* next = static_cast<const char*>(w) + OUTS * bytes;
        const int64_t of_step = bytes * STEP / I;
        for (int64_t i = 0; i + STEP <= I; i += STEP)
            for (int o = 0; o < OUTS; ++o, next += of_step) {
                __builtin_prefetch(next, 0, 2);
                step(o, i);
            }
    }
}

// out[r][o]: the product of row r, given by address, with the weights of output o.
template <int ROWS, int OUTS>
inline void products(const bf16* const x[ROWS], const bf16* w, int64_t I, float out[ROWS][OUTS]) {
    Floats acc[ROWS][OUTS] = {};
    in_steps<ROWS, OUTS>(I, w, Kind<bf16>::bytes(I), [&](int o, int64_t i) {
        for (int r = 0; r < ROWS; ++r) acc[r][o] = dot(acc[r][o], x[r] + i, w + o * I + i);
    });
    if (const int64_t i = I / STEP * STEP; i < I)
        for (int o = 0; o < OUTS; ++o)
            for (int r = 0; r < ROWS; ++r) acc[r][o] += widen(x[r] + i) * widen(w + o * I + i);
    for (int r = 0; r < ROWS; ++r) sums<OUTS>(acc[r], out[r]);
}

template <int ROWS, int OUTS>
inline void products(const int16_t* const x[ROWS], const int8_t* w, int64_t I, float out[ROWS][OUTS]) {
    Ints exact[ROWS][OUTS] = {};
    in_steps<ROWS, OUTS>(I, w, Kind<int8_t>::bytes(I), [&](int o, int64_t i) {
        const Words of_step = words(w + o * I + i);
        for (int r = 0; r < ROWS; ++r) exact[r][o] = dot(exact[r][o], x[r] + i, of_step);
    });
    Floats acc[ROWS][OUTS];
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTS; ++o) acc[r][o] = floats(exact[r][o]);
    for (int r = 0; r < ROWS; ++r) sums<OUTS>(acc[r], out[r]);
}

template <int ROWS, int OUTS>
inline void products(const int16_t* const x[ROWS], const Int4* weights, int64_t I, float out[ROWS][OUTS]) {
    Floats acc[ROWS][OUTS] = {};
    for (int o = 0; o < OUTS; ++o) {
        const int8_t* w = reinterpret_cast<const int8_t*>(of_output(weights, o, I));
        const int8_t* pairs = w + I / 2;  // of scales and zeros
        for (int64_t begin = 0; begin < I; begin += WIDTH * GROUP) {
            const int64_t n = I - begin < WIDTH * GROUP ? I - begin : WIDTH * GROUP, first = begin / GROUP;
            Ints of_groups = {};
            std::memcpy(&of_groups, pairs + 4 * first, n == WIDTH * GROUP ? sizeof of_groups : n / GROUP * 4);
            const Floats zeros = (Floats)(of_groups & ~0xffff), scales = (Floats)(of_groups << 16);
            float scale[WIDTH];
            std::memcpy(scale, &scales, sizeof scale);
            for (int r = 0; r < ROWS; ++r)
                acc[r][o] += zeros * load<Floats>(reinterpret_cast<const float*>(x[r] + I) + first);
            for (int64_t i = 0; i < n; i += 2 * GROUP, w += GROUP) {
                const Bytes both = load<Bytes>(w), low = both & 15, high = (both >> 4) & 15;
                const Words one = words(reinterpret_cast<const int8_t*>(&low)) - 8;
                const Words other = words(reinterpret_cast<const int8_t*>(&high)) - 8;
                for (int r = 0; r < ROWS; ++r) {
                    const int16_t* from = x[r] + begin + i;
                    acc[r][o] += floats(dot(Ints{}, from, one)) * scale[i / GROUP];
                    acc[r][o] += floats(dot(Ints{}, from + GROUP, other)) * scale[i / GROUP + 1];
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) sums<OUTS>(acc[r], out[r]);
}

// Calls take(r, out[OUTS]) for each of n rows, which lie at row(r).
template <int OUTS, class Row, class Weight, class Take>
inline void outputs(int64_t n, Row row, const Weight* w, int64_t I, Take take) {
    using Input = decltype(row(0));
    int64_t r = 0;
    for (float out[4][OUTS]; r + 4 <= n; r += 4) {
        const Input rows[4] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
        products<4, OUTS>(rows, w, I, out);
        for (int k = 0; k < 4; ++k) take(r + k, out[k]);
    }
    for (float out[1][OUTS]; r < n; ++r) {
        const Input rows[1] = {row(r)};
        products<1, OUTS>(rows, w, I, out);
        take(r, out[0]);
    }
}

// y [n, O] = x [n, I] w [O, I]^T, the rows of x `stride` apart. scale [O]: what int8 weights are multiples of.
template <class Weight>
void linear_by(const bf16* x, int64_t stride, const Weight* w, const float* scale, bf16* y, int64_t n, int64_t I,
               int64_t O, int threads) {
    Inputs<Weight> in(x, stride, n, I);
#pragma omp parallel num_threads(threads)
    {
        in.fill();
#pragma omp for schedule(static)
        for (int64_t o = 0; o < O; o += TILE)
            outputs<TILE>(
                n, [&](int64_t r) { return in.row(r); }, of_output(w, o, I), I,
                [&](int64_t r, float* out) {
                    for (int k = 0; k < TILE; ++k)
                        y[r * O + o + k] = narrow(in.scaled(out[k], r, scale ? scale[o + k] : 1));
                });
    }
}

// y [N, D] = down_e (weight * silu(gate_e x) * up_e x) for rows x [N, D] that lie grouped by expert e, counts [E] of
// each. gate_up [E, 2F, D], gate first; down [E, D, F]; their scales, if any, one for each output. act [N, F] is
// scratch.
template <class Weight>
void experts_by(const bf16* x, const float* weights, const int64_t* counts, const Weight* gate_up,
                const float* gate_up_scale, const Weight* down, const float* down_scale, bf16* y, bf16* act, int64_t N,
                int64_t E, int64_t D, int64_t F, int threads) {
    Inputs<Weight> in(x, D, N, D), between(act, F, N, F);
#pragma omp parallel num_threads(threads)
    {
        in.fill();
        int64_t first = 0;
        for (int64_t e = 0; e < E; first += counts[e], ++e) {
            if (!counts[e]) continue;
            const Weight* gate = of_output(gate_up, e * 2 * F, D);
            const float* scale = gate_up_scale ? gate_up_scale + e * 2 * F : nullptr;
#pragma omp for schedule(static) nowait
            for (int64_t f = 0; f < F; f += TILE) {
                float gated[ROUND][TILE];
                for (int64_t begin = 0; begin < counts[e]; begin += ROUND) {
                    const int64_t n = counts[e] - begin < ROUND ? counts[e] - begin : ROUND, at = first + begin;
                    const auto row = [&](int64_t r) { return in.row(at + r); };
                    const auto scaled = [&](float out, int64_t r, int64_t f) {
                        return in.scaled(out, at + r, scale ? scale[f] : 1);
                    };
                    outputs<TILE>(n, row, of_output(gate, f, D), D, [&](int64_t r, float* out) {
                        for (int k = 0; k < TILE; ++k) gated[r][k] = silu(scaled(out[k], r, f + k));
                    });
                    outputs<TILE>(n, row, of_output(gate, F + f, D), D, [&](int64_t r, float* out) {
                        for (int k = 0; k < TILE; ++k) {
                            const float up = scaled(out[k], r, F + f + k);
                            act[(at + r) * F + f + k] = narrow(gated[r][k] * up * weights[at + r]);
                        }
                    });
                }
            }
        }
#pragma omp barrier
        between.fill();
        first = 0;
        for (int64_t e = 0; e < E; first += counts[e], ++e) {
            if (!counts[e]) continue;
            const float* scale = down_scale ? down_scale + e * D : nullptr;
            const auto row = [&](int64_t r) { return between.row(first + r); };
#pragma omp for schedule(static) nowait
            for (int64_t d = 0; d < D; d += TILE)
                outputs<TILE>(counts[e], row, of_output(down, e * D + d, F), F, [&](int64_t r, float* out) {
                    for (int k = 0; k < TILE; ++k) {
                        const float answer = between.scaled(out[k], first + r, scale ? scale[d + k] : 1);
                        y[(first + r) * D + d + k] = narrow(answer);
                    }
                });
        }
    }
}

// A linear map's weight: of 16 bits (BF16), 8 (with a scale for each output) or 4 (`Int4`).
struct Map {
    const void* weight;
    const float* scale;
    int64_t bits;
};

// Calls take(weight) with the map's weight as what it is.
template <class Take>
inline void as_it_is(const Map& map, Take take) {
    if (map.bits == 16)
        take(static_cast<const bf16*>(map.weight));
    else if (map.bits == 8)
        take(static_cast<const int8_t*>(map.weight));
    else
        take(static_cast<const Int4*>(map.weight));
}

void apply(const Map& map, const bf16* x, int64_t stride, bf16* y, int64_t n, int64_t I, int64_t O, int threads) {
    as_it_is(map, [&](auto w) { linear_by(x, stride, w, map.scale, y, n, I, O, threads); });
}

// Both maps are of one kind.
void apply_experts(const Map& gate_up, const Map& down, const bf16* x, const float* weights, const int64_t* counts,
                   bf16* y, bf16* act, int64_t N, int64_t E, int64_t D, int64_t F, int threads) {
    as_it_is(gate_up, [&](auto w) {
        const auto w_down = static_cast<decltype(w)>(down.weight);
        experts_by(x, weights, counts, w, gate_up.scale, w_down, down.scale, y, act, N, E, D, F, threads);
    });
}

}  // namespace
