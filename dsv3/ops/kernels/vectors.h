// Vectors of 16 floats, and BF16 and int8 values turned into them and back. They are the compiler's (GCC, Clang), made of
// what the machine has; where it has dot products of BF16, those are taken.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int WIDTH = 16;  // floats of a vector
constexpr int STEP = 32;  // BF16 inputs that a dot product takes at a time: widths are multiples of it

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

}  // namespace
