// Vectors of one register and the functions of them that a transformer block needs, in single precision.
//
// Written with the compiler's vector types, so the same source becomes AVX-512, AVX2 or plain SSE2 code by
// the flags it is compiled with; SHIFT_ISA names the result (see build_native.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../../block.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

// Before a loop over an array of vectors, which is to live in registers.
#if defined(__SANITIZE_ADDRESS__)
#define UNROLLED  // every access is checked: the compiler would take very long
#elif defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

namespace {

constexpr int padded(int n) { return int(cpu_padded(n)); }  // leading dimensions, the same for every ISA

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
// Of the first n numbers alone (none, or more than there are, too); what is not loaded is zero.
#if defined(__AVX512F__)
inline __mmask16 first(int n) { return n <= 0 ? 0 : n < VL ? (1u << n) - 1 : 0xffff; }
inline vf load_first(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
inline void store_first(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
#elif defined(__AVX2__)
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
inline vf load_first(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first(n)); }
inline void store_first(float* p, vf x, int n) { _mm256_maskstore_ps(p, first(n), (__m256)x); }
#else
inline size_t bytes_of(int n) { return (n <= 0 ? 0 : n < VL ? n : VL) * sizeof(float); }
inline vf load_first(const float* p, int n) {
    vf x = {};
    std::memcpy(&x, p, bytes_of(n));
    return x;
}
inline void store_first(float* p, vf x, int n) { std::memcpy(p, &x, bytes_of(n)); }
#endif
inline void prefetch(const void* p) { __builtin_prefetch(p, 0); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }
inline vf all(float x) { return x - (vf){}; }
inline vf pick(vi mask, vf a, vf b) { return mask ? a : b; }
// b where the two do not compare: a NaN passes as b, and is lost as a.
#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline vf max(vf a, vf b) { return pick(a > b, a, b); }
inline vf min(vf a, vf b) { return pick(a < b, a, b); }
#endif

// The sum of each of VL vectors.
inline vf sums(const vf* x) {
#if defined(__AVX512F__)
    // By halves: of two vectors that are added to one, each has half of the lanes, in the end one of sixteen.
    __m512 halves[8], quarters[4], eighths[2];
    UNROLLED for (int i = 0; i < 8; i++) {  // i + 4: so that the lanes end up in order
        const __m512 a = (__m512)x[i < 4 ? i : i + 4], b = (__m512)x[i < 4 ? i + 4 : i + 8];
        halves[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        const __m512 a = halves[i], b = halves[i + 4];
        quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    }
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m512d a = (__m512d)quarters[2 * i], b = (__m512d)quarters[2 * i + 1];
        eighths[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    return (vf)(_mm512_shuffle_ps(eighths[0], eighths[1], 0x88) + _mm512_shuffle_ps(eighths[0], eighths[1], 0xdd));
#elif defined(__AVX2__)
    __m256 fours[2];  // half of each of four vectors' sums in the lower lanes, half in the upper
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m256 a = _mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]);
        const __m256 b = _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]);
        fours[i] = _mm256_hadd_ps(a, b);
    }
    return (vf)(_mm256_permute2f128_ps(fours[0], fours[1], 0x20) + _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
    vf result;
    for (int i = 0; i < VL; i++) {
        typedef float half __attribute__((vector_size(VL * 2)));
        half low, high;
        std::memcpy(&low, &x[i], sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&x[i]) + sizeof low, sizeof high);
        low += high;
        result[i] = low[0] + low[1];
        for (int lane = 2; lane < VL / 2; lane++) result[i] += low[lane];
    }
    return result;
#endif
}

// VL rows of VL numbers become columns.
inline void transpose(vf* x) {
#if defined(__AVX512F__)
    __m512 pairs[16], fours[16];  // of rows, of which a quarter of the lanes has four columns
    UNROLLED for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            const __m512d a = (__m512d)pairs[i + j], b = (__m512d)pairs[i + j + 2];
            fours[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
            fours[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        const __m512 a = fours[i], b = fours[i + 4], c = fours[i + 8], d = fours[i + 12];
        const __m512 even = _mm512_shuffle_f32x4(a, b, 0x88), odd = _mm512_shuffle_f32x4(a, b, 0xdd);
        const __m512 even_too = _mm512_shuffle_f32x4(c, d, 0x88), odd_too = _mm512_shuffle_f32x4(c, d, 0xdd);
        x[i] = (vf)_mm512_shuffle_f32x4(even, even_too, 0x88);
        x[i + 4] = (vf)_mm512_shuffle_f32x4(odd, odd_too, 0x88);
        x[i + 8] = (vf)_mm512_shuffle_f32x4(even, even_too, 0xdd);
        x[i + 12] = (vf)_mm512_shuffle_f32x4(odd, odd_too, 0xdd);
    }
#elif defined(__AVX2__)
    __m256 fours[8];  // of rows, of which a half of the lanes has four columns
    UNROLLED for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
        const __m256 b = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
        const __m256 c = _mm256_unpacklo_ps((__m256)x[i + 2], (__m256)x[i + 3]);
        const __m256 d = _mm256_unpackhi_ps((__m256)x[i + 2], (__m256)x[i + 3]);
        fours[i] = _mm256_shuffle_ps(a, c, 0x44), fours[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        fours[i + 2] = _mm256_shuffle_ps(b, d, 0x44), fours[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        x[i + 4] = (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
#else
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < i; j++) {
            const float above = x[j][i];
            x[j][i] = x[i][j], x[i][j] = above;
        }
#endif
}

// x 2^n for whole n in [-150, 128]; without AVX-512 n is no less than -126, and 0 there.
inline vf scaled(vf x, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    const vi exponent = (__builtin_convertvector(n, vi) + 126) << 23;
    vf half;  // of 2^n: 2^128 is no number
    std::memcpy(&half, &exponent, sizeof half);
    return (x + x) * half;
#endif
}

// e^x = 2^n e^r with r = x - n ln 2 in [-0.35, 0.35], where seven terms of the series are exact to 5e-9. It is
// infinite from 89 on, and 0 below SMALLEST_EXPONENT: infinities go where they belong.
#if defined(__AVX512F__)
constexpr float SMALLEST_EXPONENT = -104.0f;
#else
constexpr float SMALLEST_EXPONENT = -87.3f;
#endif
inline vf exp(vf x) {
    x = min(all(89.0f), max(all(SMALLEST_EXPONENT), x));  // in this order a NaN stays one
    const vf magic = all(12582912.0f);                    // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = all(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return scaled(p, n);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace
