// The MLP's activations and their gradients, fp32: the only place that knows them on this backend. Each is non-finite
// where PyTorch's is; a maximum would drop a NaN, so relu is a choice. As operands are 16 bits wide, GELU's erf is an
// exponential of a polynomial: its error is at most 1e-6, that of its slope 2e-6.
#pragma once
#include "call.h"
#include "tile/math.cuh"

namespace shift_cuda {

// Of x sigmoid(z): sigmoid(z), and dz/dx.
struct Gate {
    float share, dz;
};

// gelu_tanh is x sigmoid(2 z), as tanh(z) = 2 sigmoid(2 z) - 1; swiglu's gate is silu, x sigmoid(x).
__device__ inline Gate sigmoid_gate(bool silu, float x) {
    const float z = silu ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const float dz = silu ? 1.0f : 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    return {tile::reciprocal_approx(1.0f + tile::exp2_approx(-tile::LOG2_E * z)), dz};
}

struct Gelu {
    float y, tail;  // Phi(-|x|)
};

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with the coefficients of benchmarks/offline/fit_gelu.py. The maximum may drop a
// NaN: the other term has it, too.
__device__ inline Gelu gelu(float x) {
    const float a = fabsf(x);
    float log2 = -0.0004925047978758812f * a + 0.007229604292660952f;
    log2 = log2 * a - 0.052220799028873444f;
    log2 = log2 * a - 0.459526389837265f;
    log2 = log2 * a - 1.1510180234909058f;
    log2 = log2 * a - 1.0000033378601074f;
    const float tail = tile::exp2_approx(log2);
    return {fmaxf(x, 0.0f) - a * tail, tail};
}

// f(x); of swiglu's gate, silu.
__device__ inline float activate(int64_t activation, float x) {
    if (activation == RELU) return x < 0.0f ? 0.0f : x;
    if (activation == RELU2) return x < 0.0f ? 0.0f : x * x;
    if (activation == GELU) return gelu(x).y;
    return x * sigmoid_gate(activation == SWIGLU, x).share;
}

// f(x), and dy becomes dy f'(x).
__device__ inline float activate_backward(int64_t activation, float x, float& dy) {
    if (activation == RELU) {
        if (x <= 0.0f) dy = 0.0f;
        return x < 0.0f ? 0.0f : x;
    }
    if (activation == RELU2) {
        dy = x <= 0.0f ? 0.0f : dy * 2.0f * x;
        return x < 0.0f ? 0.0f : x * x;
    }
    if (activation == GELU) {
        const Gelu found = gelu(x);
        const float share = x > 0.0f ? 1.0f - found.tail : found.tail;
        dy *= share + x * 0.3989422804014327f * tile::exp2_approx(-0.5f * tile::LOG2_E * x * x);
        return found.y;
    }
    const Gate gate = sigmoid_gate(activation == SWIGLU, x);
    dy *= gate.share + x * gate.share * (1.0f - gate.share) * gate.dz;
    return x * gate.share;
}

__device__ inline float2 activate_backward(int64_t activation, float2 x, float2& dy) {
    return make_float2(activate_backward(activation, x.x, dy.x), activate_backward(activation, x.y, dy.y));
}

// Of gates and their values: what they make, and from its gradient theirs.
struct Gated {
    float2 act, gate, value;
};

__device__ inline Gated gated_backward(int64_t activation, float2 gate, float2 value, float2 dy) {
    float2 d_gate = make_float2(dy.x * value.x, dy.y * value.y);
    const float2 a = activate_backward(activation, gate, d_gate);
    return {make_float2(a.x * value.x, a.y * value.y), d_gate, make_float2(dy.x * a.x, dy.y * a.y)};
}

}  // namespace shift_cuda
