// The MLP's activations and their gradients, fp32: the only place that knows them on this backend. Each is non-finite
// where PyTorch's is; a maximum would drop a NaN, so relu is a choice.
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

// f(x); of swiglu's gate, silu.
__device__ inline float activate(int64_t activation, float x) {
    if (activation == RELU) return x < 0.0f ? 0.0f : x;
    if (activation == RELU2) return x < 0.0f ? 0.0f : x * x;
    if (activation == GELU) return x * (0.5f * (1.0f + erff(x * 0.7071067811865476f)));
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
        const float share = 0.5f * (1.0f + erff(x * 0.7071067811865476f));
        dy *= share + x * 0.3989422804014327f * tile::exp2_approx(-0.5f * 1.4426950408889634f * x * x);
        return x * share;
    }
    const Gate gate = sigmoid_gate(activation == SWIGLU, x);
    dy *= gate.share + x * gate.share * (1.0f - gate.share) * gate.dz;
    return x * gate.share;
}

}  // namespace shift_cuda
