// The MLP's activations and their derivatives.
#pragma once
#include "../../block.h"
#include "normal.h"

namespace {

constexpr float TANH_A = 0.7978845608f, TANH_B = 0.044715f;  // sqrt(2 / pi), and the cubic's share

// Half of 1 + tanh(y), which is the logistic function of 2 y.
inline vf half_tanh(vf x) { return sigmoid(2 * TANH_A * (x + TANH_B * x * x * x)); }

struct ValueSlope {
    vf value, slope;
};

// The activation and its derivative, which share what is expensive; where values are gated, the gate's.
template <Activation A>
inline ValueSlope activation(vf x) {
    if (A == SWIGLU) {
        const vf s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    if (A == RELU) return {max(all(0), x), pick(x <= 0.0f, all(0), all(1))};  // in this order a NaN stays one
    if (A == RELU2) {
        const vf root = max(all(0), x);
        return {root * root, 2.0f * root};
    }
    if (A == GELU) {
        const Normal n = normal(x);
        const vf cdf = pick(x < 0.0f, n.tail, 1.0f - n.tail);
        return {x * cdf, cdf + x * n.density};
    }
    const vf s = half_tanh(x);
    return {x * s, s + x * s * (1.0f - s) * 2 * TANH_A * (1.0f + 3 * TANH_B * x * x)};
}

// The gradient of x, given the activation's. A unit of relu or relu2 that is off stops even an infinity.
template <Activation A>
inline vf through(vf x, vf slope, vf gradient) {
    if (A == RELU) return pick(x <= 0.0f, all(0), gradient);
    if (A == RELU2) return pick(x <= 0.0f, all(0), slope * gradient);
    return slope * gradient;
}

}  // namespace
