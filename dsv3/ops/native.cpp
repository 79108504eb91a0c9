// Kernels for decoding on a CPU: few rows against every weight, so that reading the weights is their time.
//
// Weights stay as PyTorch has them, BF16 rows [outputs, inputs]; sums are FP32. Each sum is taken in one order whatever
// the number of rows or threads, so a row's result does not depend on what is computed beside it. Vectors are the
// compiler's (GCC, Clang): 16 floats, made of what the machine has; where it has dot products of BF16, those are taken.
//
// No header of PyTorch and no C++ library: this file compiles in a second and is called with plain pointers.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int WIDTH = 16;  // floats of a vector
constexpr int OUTS = 4;    // outputs of a map that are computed at a time
constexpr int KEYS = 64;   // latents that attention looks at at a time
constexpr int STEP = 32;   // BF16 inputs that a dot product takes at a time: widths are multiples of it

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats widen(const bf16* from) { return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16); }

inline Floats widen(const int8_t* from) {
#ifdef __AVX512F__  // compilers take a vector of bytes apart
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#else
    float out[WIDTH];
    for (int i = 0; i < WIDTH; ++i) out[i] = from[i];
    return load<Floats>(out);
#endif
}

inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest, ties to even; a NaN stays one.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bf16* to, Floats v) {
    Ints bits = (Ints)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = v != v ? Ints{} + 0x7fc0 : bits;
    const Halves out = __builtin_convertvector(bits, Halves);
    std::memcpy(to, &out, sizeof out);
}

inline float sum(const Floats v) {
    typedef float Half __attribute__((vector_size(2 * WIDTH)));
    typedef float Quarter __attribute__((vector_size(WIDTH)));
    Half h[2];
    std::memcpy(h, &v, sizeof v);
    h[0] += h[1];
    Quarter q[2];
    std::memcpy(q, h, sizeof q);
    q[0] += q[1];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// acc + a * b over STEP inputs.
inline Floats dot(Floats acc, const bf16* a, const bf16* b) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
#else
    acc += widen(a) * widen(b);
    return acc + widen(a + WIDTH) * widen(b + WIDTH);
#endif
}

inline Floats dot(Floats acc, const bf16* a, const int8_t* b) {
    acc += widen(a) * widen(b);
    return acc + widen(a + WIDTH) * widen(b + WIDTH);
}

inline float silu(float x) { return x / (1 + std::exp(-x)); }

// e^x for x <= 0, to about 2 ulp, and 0 below e^-87: 2^n times a polynomial of the rest.
inline Floats exp_of_negative(const Floats x) {
    Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
    Ints n = (Ints)shifted - 0x4b400000;
    Floats rest = x - (shifted - 12582912.0f) * 0.693359375f;
    rest = rest - (shifted - 12582912.0f) * -2.12194440e-4f;
    Floats p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return x < -87.0f ? Floats{} : p * (Floats)((n + 127) << 23);
}

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


constexpr int MAX_EXPERTS = 1024;
constexpr int ROUND = 256;  // rows whose gates wait for their other half at a time

// Index of the largest, the first among equals; a NaN counts as larger than anything.
inline int64_t largest(const float* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
        if (x[i] > x[best] || (x[i] != x[i] && x[best] == x[best])) best = i;
    return best;
}

int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// y [n, O] = x [n, I] w [O, I]^T, the rows of x `stride` apart. scale [O]: what integer weights are multiples of.
template <class Weight>
void linear_by(const bf16* x, int64_t stride, const Weight* w, const float* scale, bf16* y, int64_t n, int64_t I,
               int64_t O, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < O; o += OUTS)
        outputs<OUTS>(n, [&](int64_t r) { return x + r * stride; }, w + o * I, I, [&](int64_t r, const float* out) {
            for (int k = 0; k < OUTS; ++k) y[r * O + o + k] = narrow(scale ? out[k] * scale[o + k] : out[k]);
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
            for (int64_t f = 0; f < F; f += OUTS) {
                float gated[ROUND][OUTS];
                for (int64_t begin = 0; begin < counts[e]; begin += ROUND) {
                    const int64_t n = counts[e] - begin < ROUND ? counts[e] - begin : ROUND;
                    const auto of_round = [&](int64_t r) { return row(begin + r); };
                    outputs<OUTS>(n, of_round, gate + f * D, D, [&](int64_t r, const float* out) {
                        for (int k = 0; k < OUTS; ++k) gated[r][k] = silu(scale ? out[k] * scale[f + k] : out[k]);
                    });
                    outputs<OUTS>(n, of_round, gate + (F + f) * D, D, [&](int64_t r, const float* out) {
                        const int64_t at = first + begin + r;
                        for (int k = 0; k < OUTS; ++k) {
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
            for (int64_t d = 0; d < D; d += OUTS)
                outputs<OUTS>(counts[e], row, down + (e * D + d) * F, F, [&](int64_t r, const float* out) {
                    for (int k = 0; k < OUTS; ++k)
                        y[(first + r) * D + d + k] = narrow(scale ? out[k] * scale[d + k] : out[k]);
                });
        }
    }
}

// The `chosen` experts of each of n tokens by their scores [n, E] plus bias [E] (or null), best first, lower index first
// among equals; if `groups` is above 1 only of the `kept` groups whose two best scores (best, if `pairs` is 0) add up to
// most. ids [n, chosen]; weights [n, chosen]: their scores, divided by the sum if `normalised`, times `factor`.
void choose_experts(const float* scores, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t E,
                    int64_t chosen, int64_t groups, int64_t kept, int64_t pairs, int64_t normalised, float factor) {
    const int64_t size = E / groups;
    for (int64_t t = 0; t < n; ++t, scores += E, ids += chosen, weights += chosen) {
        float biased[MAX_EXPERTS], of_group[MAX_EXPERTS];
        for (int64_t e = 0; e < E; ++e) biased[e] = scores[e] + (bias ? bias[e] : 0);
        if (groups > 1) {
            for (int64_t g = 0; g < groups; ++g) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t e = g * size; e < (g + 1) * size; ++e)
                    if (biased[e] > first) {
                        second = first;
                        first = biased[e];
                    } else if (biased[e] > second)
                        second = biased[e];
                of_group[g] = pairs ? first + second : first;
            }
            for (int64_t k = 0; k < kept; ++k) of_group[largest(of_group, groups)] = -INFINITY;
            for (int64_t e = 0; e < E; ++e)
                if (of_group[e / size] != -INFINITY) biased[e] = -INFINITY;
        }
        float total = 0;
        for (int64_t k = 0; k < chosen; ++k) {
            ids[k] = largest(biased, E);
            biased[ids[k]] = -INFINITY;
            total += weights[k] = scores[ids[k]];
        }
        for (int64_t k = 0; k < chosen; ++k) weights[k] = (normalised ? weights[k] / (total + 1e-20f) : weights[k]) * factor;
    }
}

// The rows of x [n, D] on their way to experts: copies of them, grouped by expert, with the weight of each, how many each
// of E experts gets, and where the answer to each choice will lie.
void group_rows(const bf16* x, const int64_t* ids, const float* weights, bf16* rows, float* row_weights, int64_t* counts,
                int64_t* places, int64_t n, int64_t chosen, int64_t D, int64_t E) {
    int64_t begin[MAX_EXPERTS], at = 0;
    std::memset(counts, 0, E * sizeof(int64_t));
    for (int64_t i = 0; i < n * chosen; ++i) ++counts[ids[i]];
    for (int64_t e = 0; e < E; at += counts[e++]) begin[e] = at;
    for (int64_t i = 0; i < n * chosen; ++i) {
        places[i] = begin[ids[i]]++;
        row_weights[places[i]] = weights[i];
        std::memcpy(rows + places[i] * D, x + i / chosen * D, D * sizeof(bf16));
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

extern "C" {

void rms_norm(const bf16*, int64_t, const bf16*, bf16*, int64_t, int64_t, float);
void rotate(const bf16*, int64_t, int64_t, const float*, const float*, bf16*, int64_t, int64_t, int64_t);

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
                      int64_t rope_head, const bf16* latents, int64_t apart, const int64_t* slots, const bf16* up, const uint8_t* mask, float scale, bf16* y,
                      bf16* queries, float* scratch, int64_t B, int64_t S, int64_t T, int64_t H, int64_t N, int64_t C,
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
            for (int64_t v = 0; v < V; v += OUTS)
                outputs<OUTS>(
                    tokens, [&](int64_t t) { return queries + (t * H + h) * X; }, up + (h * (N + V) + N + v) * C, C,
                    [&](int64_t t, const float* out) {
                        for (int k = 0; k < OUTS; ++k) y[(t * H + h) * V + v + k] = narrow(out[k]);
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
