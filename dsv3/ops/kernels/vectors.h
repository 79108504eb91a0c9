// Vectors of 16 floats or integers, and BF16 and narrow integers turned into them and back. They are the compiler's
// (GCC, Clang), made of what the machine has; where it has dot products of BF16 or of int16, those are taken.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int WIDTH = 16;  // floats of a vector: widths are multiples of it
constexpr int STEP = 32;  // inputs that a dot product takes at a time

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Words __attribute__((vector_size(2 * STEP)));
typedef int8_t Bytes __attribute__((vector_size(STEP)));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats widen(const bf16* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
}

inline Words words(const int8_t* from) {
#ifdef __AVX512BW__  // compilers take a vector of bytes apart
    return (Words)_mm512_cvtepi8_epi16(load<__m256i>(from));
#else
    return __builtin_convertvector(load<Bytes>(from), Words);
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

typedef float Four __attribute__((vector_size(WIDTH)));

// The four sums of every fourth float.
inline Four fold(const Floats v) {
    Four f[4];
    std::memcpy(f, &v, sizeof v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

inline float sum(const Floats v) {
    const Four f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

// The sums of N vectors, four at a time; each is what `sum` gives.
template <int N>
inline void sums(const Floats v[N], float out[N]) {
    int k = 0;
    for (; k + 4 <= N; k += 4) {
        const Four a = fold(v[k]), b = fold(v[k + 1]), c = fold(v[k + 2]), d = fold(v[k + 3]);
        const Four even_ab = {a[0], b[0], a[2], b[2]}, odd_ab = {a[1], b[1], a[3], b[3]};
        const Four even_cd = {c[0], d[0], c[2], d[2]}, odd_cd = {c[1], d[1], c[3], d[3]};
        const Four first = {even_ab[0], even_ab[1], even_cd[0], even_cd[1]};
        const Four third = {even_ab[2], even_ab[3], even_cd[2], even_cd[3]};
        const Four second = {odd_ab[0], odd_ab[1], odd_cd[0], odd_cd[1]};
        const Four fourth = {odd_ab[2], odd_ab[3], odd_cd[2], odd_cd[3]};
        const Four all = (first + third) + (second + fourth);
        std::memcpy(out + k, &all, sizeof all);
    }
    for (; k < N; ++k) out[k] = sum(v[k]);
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

// The same of integers, without rounding; b: what `words` gives.
inline Ints dot(Ints acc, const int16_t* a, Words b) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpwssd_epi32((__m512i)acc, load<__m512i>(a), (__m512i)b);
#else
    const Words x = load<Words>(a);
    for (int i = 0; i < WIDTH; ++i) acc[i] += x[2 * i] * b[2 * i] + x[2 * i + 1] * b[2 * i + 1];
    return acc;
#endif
}

// pairs[i / 16]: a[i] below b[i], for STEP values of each.
inline void interleave(const bf16* a, const bf16* b, Ints pairs[2]) {
#ifdef __AVX512BW__
    alignas(64) static constexpr uint16_t ORDER[2][STEP] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
    };
    const __m512i of_a = load<__m512i>(a), of_b = load<__m512i>(b);
    for (int v = 0; v < 2; ++v) pairs[v] = (Ints)_mm512_permutex2var_epi16(of_a, load<__m512i>(ORDER[v]), of_b);
#else
    for (int v = 0; v < 2; ++v) {
        const Ints low = __builtin_convertvector(load<Halves>(a + v * WIDTH), Ints);
        pairs[v] = low | __builtin_convertvector(load<Halves>(b + v * WIDTH), Ints) << 16;
    }
#endif
}

// acc + a * p + b * q for pairs of a and b, and p below q, BF16.
inline Floats dot(Floats acc, Ints pairs, uint32_t p_and_q) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(p_and_q));
#else
    acc += (Floats)(pairs << 16) * widen((bf16)p_and_q);
    return acc + (Floats)(pairs & ~0xffff) * widen((bf16)(p_and_q >> 16));
#endif
}

inline Floats floats(const Ints v) {
    return __builtin_convertvector(v, Floats);
}

inline float silu(float x) {
    return x / (1 + std::exp(-x));
}

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

// A number that is a type, for functions that are made for it.
template <int N>
struct Constant {
    static constexpr int value = N;
};

// Memory for a while.
template <class T>
class Buffer {
    T* data;

  public:
    explicit Buffer(int64_t size) : data(static_cast<T*>(std::malloc((size + !size) * sizeof(T)))) {
        if (!data) std::abort();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator T*() const { return data; }
};

}  // namespace
