// Products of many rows with a weight: prompts, where multiplying is what takes the time and not reading.
//
// A weight is packed as it goes by, PANEL outputs at a time, which costs little beside the many rows that meet them:
// for each pair of inputs those of all outputs side by side. Then one instruction adds to the sums of WIDTH outputs
// what a row's pair gives them. Every sum is taken in one order, whatever the number of rows or threads.
#pragma once

#include "vectors.h"

namespace {

constexpr int ROWS = 6;  // rows and
constexpr int VECTORS = 4;  // vectors of outputs that meet at a time: their sums fill the registers
constexpr int PANEL = VECTORS * WIDTH;  // outputs that are packed together
constexpr int PAIRS = 2 * PANEL;  // values of a panel that belong to one pair of inputs

// acc + the products of pairs of inputs: x one row's, in every place; w those of WIDTH outputs.
inline Floats dot_pairs(Floats acc, Ints x, Ints w) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#else
    const Ints upper = Ints{} + (int32_t)0xffff0000;
    acc += (Floats)(x << 16) * (Floats)(w << 16);
    return acc + (Floats)(x & upper) * (Floats)(w & upper);
#endif
}

// Rounded as by `store`, in one instruction where there is one (which takes what is too small for a normal number for
// 0).
inline void store_rounded(bf16* to, Floats v) {
#ifdef __AVX512BF16__
    const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &out, sizeof out);
#else
    store(to, v);
#endif
}

// STEP inputs as pairs of BF16, which hold bytes exactly.
inline Ints pairs(const bf16* from) {
    return load<Ints>(from);
}

inline Ints pairs(const int8_t* from) {
    typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
    const Words wide = words(from);
    bf16 out[STEP];
    for (int k = 0; k < STEP; k += WIDTH) {
        Shorts part;
        std::memcpy(&part, reinterpret_cast<const char*>(&wide) + 2 * k, sizeof part);
        store_rounded(out + k, floats(__builtin_convertvector(part, Ints)));
    }
    return load<Ints>(out);
}

// The pairs of WIDTH rows [I] of `w`, which lie `stride` apart, to a panel: to[i / 2][row]. Of rows behind `last` the
// last is taken again. I is a multiple of STEP.
template <class Weight>
inline void pack_rows(const Weight* w, int64_t stride, int64_t last, int64_t I, bf16* to) {
    for (int64_t i = 0; i < I; i += STEP, to += STEP / 2 * PAIRS) {
        Ints a[WIDTH], b[WIDTH];
        for (int r = 0; r < WIDTH; ++r) a[r] = pairs(w + (r < last ? r : last) * stride + i);
#ifdef __AVX512F__  // four rounds of exchanges; a compiler would gather
        const auto m = [](Ints v) { return (__m512i)v; };
        for (int r = 0; r < WIDTH; r += 2) {
            b[r] = (Ints)_mm512_unpacklo_epi32(m(a[r]), m(a[r + 1]));
            b[r + 1] = (Ints)_mm512_unpackhi_epi32(m(a[r]), m(a[r + 1]));
        }
        for (int r = 0; r < WIDTH; r += 4)
            for (int k = 0; k < 2; ++k) {
                a[r + 2 * k] = (Ints)_mm512_unpacklo_epi64(m(b[r + k]), m(b[r + k + 2]));
                a[r + 2 * k + 1] = (Ints)_mm512_unpackhi_epi64(m(b[r + k]), m(b[r + k + 2]));
            }
        for (int r = 0; r < WIDTH; r += 8)
            for (int k = 0; k < 4; ++k) {
                b[r + k] = (Ints)_mm512_shuffle_i32x4(m(a[r + k]), m(a[r + k + 4]), 0x88);
                b[r + k + 4] = (Ints)_mm512_shuffle_i32x4(m(a[r + k]), m(a[r + k + 4]), 0xdd);
            }
        for (int k = 0; k < 8; ++k) {
            a[k] = (Ints)_mm512_shuffle_i32x4(m(b[k]), m(b[k + 8]), 0x88);
            a[k + 8] = (Ints)_mm512_shuffle_i32x4(m(b[k]), m(b[k + 8]), 0xdd);
        }
        for (int k = 0; k < WIDTH; ++k) std::memcpy(to + k * PAIRS, &a[k], sizeof a[k]);
#else
        for (int k = 0; k < WIDTH; ++k) {
            for (int r = 0; r < WIDTH; ++r) b[k][r] = a[r][k];
            std::memcpy(to + k * PAIRS, &b[k], sizeof b[k]);
        }
#endif
    }
}

// acc += R rows of x, `stride` apart, times the first V vectors of a panel of I inputs. Meanwhile 32 * I bytes from
// `ahead` on, if there is such a place, are fetched into the cache.
template <int R, int V, bool AHEAD = false>
inline void multiply(const bf16* x, int64_t stride, const bf16* panel, int64_t I, Floats (&acc)[R][V],
                     const char* ahead = nullptr) {
    Floats sums[R][V];  // in registers
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = acc[r][v];
    for (int64_t i = 0; i < I; i += 2, panel += PAIRS) {
        Ints w[V];
        for (int v = 0; v < V; ++v) w[v] = load<Ints>(panel + 2 * v * WIDTH);
        if (AHEAD) __builtin_prefetch(ahead + 32 * i, 0, 2);
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + i, sizeof pair);
            for (int v = 0; v < V; ++v) sums[r][v] = dot_pairs(sums[r][v], Ints{} + pair, w[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = sums[r][v];
}

template <int R, bool AHEAD = false, class Take>
inline void some_rows(const bf16* x, int64_t stride, const bf16* panel, int64_t I, int64_t first, Take take,
                      const char* ahead = nullptr) {
    Floats acc[R][VECTORS] = {};
    multiply<R, VECTORS, AHEAD>(x + first * stride, stride, panel, I, acc, ahead);
    for (int r = 0; r < R; ++r) take(first + r, acc[r]);
}

// Calls take(r, sums[VECTORS]) for n rows of x. The weights of the next panel, whose two halves begin at first_half and
// second_half, come from memory while these are multiplied.
template <class Weight, class Take>
inline void all_rows(const bf16* x, int64_t stride, const bf16* panel, int64_t I, int64_t n, const Weight* first_half,
                     const Weight* second_half, Take take) {
    constexpr int64_t TIMES = sizeof(Weight);  // that 32 * I bytes make half a panel
    int64_t r = 0;
    for (int64_t k = 0; k < 2 * TIMES && r + ROWS <= n; ++k, r += ROWS) {
        const char* half = reinterpret_cast<const char*>(k < TIMES ? first_half : second_half);
        some_rows<ROWS, true>(x, stride, panel, I, r, take, half + k % TIMES * 32 * I);
    }
    for (; r + ROWS <= n; r += ROWS) some_rows<ROWS>(x, stride, panel, I, r, take);
    switch (n - r) {
        case 5:
            return some_rows<5>(x, stride, panel, I, r, take);
        case 4:
            return some_rows<4>(x, stride, panel, I, r, take);
        case 3:
            return some_rows<3>(x, stride, panel, I, r, take);
        case 2:
            return some_rows<2>(x, stride, panel, I, r, take);
        case 1:
            return some_rows<1>(x, stride, panel, I, r, take);
    }
}

// One of several threads.
struct Share {
    int64_t index, of;
};

// How many of a group's n rows there are to compute: those of weight 0 at its end are padding.
inline int64_t without_padding(const float* weights, int64_t n) {
    while (n && !weights[n - 1]) --n;
    return n;
}

// A share of the work on rows that lie in groups, counts [G] of each, and meet `panels` panels of their group's weight:
// calls run(group, panel, first row, number of rows). All shares are equal to a row, so a panel may be in two of them.
// weights: of each row, or null.
template <class Run>
inline void spread(const int64_t* counts, const float* weights, int64_t G, int64_t panels, Share share, Run run) {
    const auto real = [=](int64_t g, int64_t first) {
        return weights ? without_padding(weights + first, counts[g]) : counts[g];
    };
    int64_t rows = 0, at = 0;
    for (int64_t g = 0, first = 0; g < G; first += counts[g++]) rows += real(g, first);
    const int64_t begin = rows * panels * share.index / share.of, end = rows * panels * (share.index + 1) / share.of;
    for (int64_t g = 0, first = 0; g < G; first += counts[g++]) {
        const int64_t n = real(g, first);
        for (int64_t p = 0; p < panels; ++p, at += n) {
            const int64_t from = begin > at ? begin - at : 0, to = end - at < n ? end - at : n;
            if (from < to) run(g, p, first + from, to - from);
        }
    }
}

inline Floats silu(Floats x) {
    const Floats e = exp_of_negative(x < 0 ? x : -x);
    return x * (x < 0 ? e : Floats{} + 1) / (1 + e);
}

// The groups' products: y [N, O] = w_g x for rows x [N, I], `stride` apart, that lie grouped by g, counts [G] of each.
// w [G, O, I] and, or null, scale [G, O]. weights: as in `spread`. panel: scratch, PANEL * I. O is a multiple of WIDTH.
template <class Weight>
void linear_share(const bf16* x, int64_t stride, const float* weights, const int64_t* counts, const Weight* w,
                  const float* scale, bf16* y, bf16* panel, int64_t G, int64_t I, int64_t O, Share share) {
    spread(counts, weights, G, (O + PANEL - 1) / PANEL, share, [=](int64_t g, int64_t p, int64_t first, int64_t rows) {
        const int64_t o = p * PANEL, vectors = O - o < PANEL ? (O - o) / WIDTH : VECTORS;
        const Weight* here = w + (g * O + o) * I;
        for (int64_t v = 0; v < vectors; ++v) pack_rows(here + v * WIDTH * I, I, WIDTH, I, panel + 2 * v * WIDTH);
        const Weight* next = here + vectors * WIDTH * I;
        const auto take = [=](int64_t r, const Floats* sums) {
            for (int64_t v = 0; v < vectors; ++v) {
                const Floats out = scale ? sums[v] * load<Floats>(scale + g * O + o + v * WIDTH) : sums[v];
                store_rounded(y + (first + r) * O + o + v * WIDTH, out);
            }
        };
        all_rows(x + first * stride, stride, panel, I, rows, next, next + PANEL / 2 * I, take);
    });
}

// act [N, F] = weight * silu(gate_e x) * up_e x of rows x [N, D] that lie grouped by expert e, counts [E] of each.
// gate_up [E, 2F, D], gate first, and its scale. panel: scratch, PANEL * D. F is a multiple of 2 WIDTH.
template <class Weight>
void gate_share(const bf16* x, const float* weights, const int64_t* counts, const Weight* gate_up, const float* scale,
                bf16* act, bf16* panel, int64_t E, int64_t D, int64_t F, Share share) {
    constexpr int HALF = VECTORS / 2, OUTS = HALF * WIDTH;  // of a panel is gate, half up
    spread(counts, weights, E, F / OUTS, share, [=](int64_t e, int64_t p, int64_t first, int64_t rows) {
        const int64_t f = e * 2 * F + p * OUTS;
        for (int v = 0; v < HALF; ++v) {
            pack_rows(gate_up + (f + v * WIDTH) * D, D, WIDTH, D, panel + 2 * v * WIDTH);
            pack_rows(gate_up + (f + F + v * WIDTH) * D, D, WIDTH, D, panel + 2 * (HALF + v) * WIDTH);
        }
        const Weight* next = gate_up + ((p + 1) * OUTS == F ? (e + 1) * 2 * F : f + OUTS) * D;
        const auto take = [=](int64_t r, const Floats* sums) {
            for (int v = 0; v < HALF; ++v) {
                Floats gate = sums[v], up = sums[HALF + v];
                if (scale) {
                    gate *= load<Floats>(scale + f + v * WIDTH);
                    up *= load<Floats>(scale + f + F + v * WIDTH);
                }
                store_rounded(act + (first + r) * F + p * OUTS + v * WIDTH, silu(gate) * up * weights[first + r]);
            }
        };
        all_rows(x + first * D, D, panel, D, rows, next, next + F * D, take);
    });
}

}  // namespace
