// The MLP's activations and their gradients, fp32: the only place that knows them on this backend. Each is non-finite
// where PyTorch's is; a maximum would drop a NaN, so relu is a choice. As operands are 16 bits wide, GELU's erf is a
// polynomial: its error is at most 1.6e-5, that of its slope 3.2e-5.
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
    return {tile::reciprocal_approx(1.0f + tile::exp2_approx(-1.4426950408889634f * z)), dz};
}

struct Gelu {
    float y, tail;  // Phi(-|x|)
};

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with the coefficients of benchmarks/offline/fit_gelu.py. Non-finite for every x
// that is: -inf + inf is NaN.
__device__ inline Gelu gelu(float x) {
    const float a = fminf(fabsf(x), 4.5f), s = a - 2.25f;  // about the middle, so that no terms cancel
    float q = -1.3151538951206021e-05f * s + 4.486757461563684e-05f;
    q = q * s + 0.00017128988110926002f;
    q = q * s - 0.0009948682272806764f;
    q = q * s + 0.0006458957213908434f;
    q = q * s + 0.006104551255702972f;
    q = q * s - 0.021636884659528732f;
    q = q * s + 0.03573797270655632f;
    q = q * s - 0.03170836344361305f;
    q = q * s + 0.01222113985568285f;
    return {0.5f * (x + fabsf(x)) - a * q, q};
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
        dy *= share + x * 0.3989422804014327f * tile::exp2_approx(-0.5f * 1.4426950408889634f * x * x);
        return found.y;
    }
    const Gate gate = sigmoid_gate(activation == SWIGLU, x);
    dy *= gate.share + x * gate.share * (1.0f - gate.share) * gate.dz;
    return x * gate.share;
}

}  // namespace shift_cuda
