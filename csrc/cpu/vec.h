// Vectors of one register and the functions of them that a transformer block needs, in single precision.
//
// Written with the compiler's vector types, so the same source becomes AVX-512, AVX2 or plain SSE2 code by
// the flags it is compiled with; SHIFT_ISA names the result (see build_native.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

namespace {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int padded(int n) { return round_up(n, 16); }  // leading dimensions, the same for every ISA

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
inline void prefetch(const float* p) { __builtin_prefetch(p, 0); }
inline void prefetch_to_write(const float* p) { __builtin_prefetch(p, 1); }
inline vf all(float x) { return x - (vf){}; }
inline vf pick(vi mask, vf a, vf b) { return mask ? a : b; }
// b where the two do not compare.
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
    for (int i = 0; i < 8; i++) {  // i + 4: so that the lanes end up in order
        const __m512 a = (__m512)x[i < 4 ? i : i + 4], b = (__m512)x[i < 4 ? i + 4 : i + 8];
        halves[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        const __m512 a = halves[i], b = halves[i + 4];
        quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    }
    for (int i = 0; i < 2; i++) {
        const __m512d a = (__m512d)quarters[2 * i], b = (__m512d)quarters[2 * i + 1];
        eighths[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    return (vf)(_mm512_shuffle_ps(eighths[0], eighths[1], 0x88) + _mm512_shuffle_ps(eighths[0], eighths[1], 0xdd));
#else
    vf result;
    for (int i = 0; i < VL; i++) {
        typedef float half __attribute__((vector_size(VL * 2)));
        half low, high;
        std::memcpy(&low, &x[i], sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&x[i]) + sizeof low, sizeof high);
        low += high;
        result[i] = low[0] + low[1];
        if (VL == 8) result[i] += low[2] + low[3];
    }
    return result;
#endif
}

// x 2^n for whole n in [-126, 127]
inline vf scaled(vf x, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    vf power;
    std::memcpy(&power, &exponent, sizeof power);
    return x * power;
#endif
}

// e^x = 2^n e^r with r = x - n ln 2 in [-0.35, 0.35], where seven terms of the series are exact to 5e-9.
inline vf exp(vf x) {
    x = min(all(88.0f), max(all(-87.0f), x));  // in this order a NaN stays one
    const vf magic = all(12582912.0f);         // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = all(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return scaled(p, n);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

enum Activation { RELU, GELU, GELU_TANH, SWIGLU };

// P(X > |x|) of a normal X, given exp(-x^2 / 2). The rest of it, Mills' ratio, is a polynomial of ours, fitted
// so that the result's absolute error is below 7e-8 everywhere.
inline vf normal_tail(vf x, vf bell) {
    const vf a = min(max(x, -x), all(5.5f));
    vf ratio = all(1.631720624e-06f);
    for (float c : {-3.520834492e-05f, 3.397427622e-04f, -1.974645624e-03f, 7.939437004e-03f, -2.431400313e-02f,
                    6.115495721e-02f, -1.325138389e-01f, 2.499168060e-01f, -3.989365166e-01f, 4.999999342e-01f})
        ratio = ratio * a + c;
    return bell * ratio;
}

constexpr float TANH_A = 0.7978845608f, TANH_B = 0.044715f;  // sqrt(2 / pi), and the cubic's share

// Half of 1 + tanh(y), which is the logistic function of 2 y.
inline vf half_tanh(vf x) { return sigmoid(2 * TANH_A * (x + TANH_B * x * x * x)); }

struct ValueSlope {
    vf value, slope;
};

// The activation and its derivative, which share what is expensive. (SWIGLU's is not of this form.)
template <Activation A>
inline ValueSlope activation(vf x) {
    if (A == RELU) return {max(x, all(0)), pick(x > 0.0f, all(1), all(0))};
    if (A == GELU) {
        const vf bell = exp(-0.5f * x * x), below = normal_tail(x, bell);
        const vf cdf = pick(x < 0.0f, below, 1.0f - below);
        return {x * cdf, cdf + x * 0.39894228f * bell};
    }
    const vf s = half_tanh(x);
    return {x * s, s + x * s * (1.0f - s) * 2 * TANH_A * (1.0f + 3 * TANH_B * x * x)};
}

}  // namespace
