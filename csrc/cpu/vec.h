// Vectors of one register and the functions of them that a transformer block needs, in single precision.
//
// Written with the compiler's vector types, so the same source becomes AVX-512, AVX2 or plain SSE2 code by
// the flags it is compiled with; SHIFT_ISA names the result (see build.py next to setup.py's build step).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

namespace {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int padded(int n) { return round_up(n, 16); }  // leading dimensions, the same for every ISA

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
inline vf all(float x) { return x - (vf){}; }
inline vf pick(vi mask, vf a, vf b) { return mask ? a : b; }
inline vf max(vf a, vf b) { return pick(a > b, a, b); }
inline vf min(vf a, vf b) { return pick(a < b, a, b); }

inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += x[i];
    return s;
}

inline float largest(vf x) {
    float m = x[0];
    for (int i = 1; i < VL; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// e^x = 2^n e^r with r = x - n ln 2 in [-0.35, 0.35], where seven terms of the series are exact to 5e-9.
inline vf exp(vf x) {
    x = min(max(x, all(-87.0f)), all(88.0f));
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = all(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    vf scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return p * scale;
}

// Two least-squares fits (ours, relative error below 2e-9): erf(x) / x in x^2 up to 1, log erfc beyond.
inline vf erf(vf x) {
    const vf a = min(max(x, -x), all(3.95f)), s = a * a;
    vf near = all(7.847259133e-05f);
    for (float c : {-8.008189325e-04f, 5.188098890e-03f, -2.685369110e-02f, 1.128358225e-01f,
                    -3.761262557e-01f, 1.128379166e+00f})
        near = near * s + c;
    vf log_erfc = all(-2.178314809e-05f);
    for (float c : {4.425255172e-04f, -4.210719848e-03f, 2.522559794e-02f, -1.084472697e-01f,
                    -6.331919853e-01f, -1.129593208e+00f, 1.913330620e-04f})
        log_erfc = log_erfc * a + c;
    const vf far = 1.0f - exp(log_erfc);
    return pick(a < 1.0f, x * near, pick(x < 0.0f, -far, far));
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

enum Activation { RELU, GELU, GELU_TANH, SWIGLU };

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
        const vf cdf = 0.5f + 0.5f * erf(x * 0.70710678f);
        return {x * cdf, cdf + x * 0.39894228f * exp(-0.5f * x * x)};
    }
    const vf s = half_tanh(x);
    return {x * s, s + x * s * (1.0f - s) * 2 * TANH_A * (1.0f + 3 * TANH_B * x * x)};
}

}  // namespace
