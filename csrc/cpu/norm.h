// Layernorm and rmsnorm of rows with leading dimension padded(d); the padding stays zero.
#pragma once
#include "call.h"
#include "vec.h"

namespace {

struct NormWeights {  // padded(d) numbers each, zero beyond d
    const float *gain, *shift;
};

struct NormGrads {
    float *gain, *shift;
};

inline float row_sum(const float* x, int d) {
    vf s = all(0);
    int j = 0;
    for (; j + VL <= d; j += VL) s += load(x + j);
    float total = sum(s);
    for (; j < d; j++) total += x[j];
    return total;
}

struct Moments {
    float mean, inverse_root;
};

inline Moments moments(int kind, const float* x, int d, float eps) {
    const float mean = kind == LAYERNORM ? row_sum(x, d) / d : 0.0f;
    vf s = all(0);
    int j = 0;
    for (; j + VL <= d; j += VL) s += (load(x + j) - mean) * (load(x + j) - mean);
    float squares = sum(s);
    for (; j < d; j++) squares += (x[j] - mean) * (x[j] - mean);
    return {mean, 1.0f / std::sqrt(squares / d + eps)};
}

inline void norm(int kind, int rows, int d, const float* x, NormWeights w, float eps, float* y) {
    const int dp = padded(d);
    for (int i = 0; i < rows; i++, x += dp, y += dp) {
        const Moments m = moments(kind, x, d, eps);
        for (int j = 0; j < dp; j += VL)
            store(y + j, (load(x + j) - m.mean) * m.inverse_root * load(w.gain + j) + load(w.shift + j));
    }
}

// dx = d norm(x) / dx applied to dy, added to what dx holds if `add`; gain and shift collect theirs.
inline void norm_backward(int kind, int rows, int d, const float* x, const float* dy, NormWeights w, float eps,
                          NormGrads grads, float* dx, bool add) {
    const int dp = padded(d);
    for (int i = 0; i < rows; i++, x += dp, dy += dp, dx += dp) {
        const Moments m = moments(kind, x, d, eps);
        vf along = all(0), total = all(0);
        for (int j = 0; j < dp; j += VL) {
            const vf xhat = (load(x + j) - m.mean) * m.inverse_root, g = load(dy + j) * load(w.gain + j);
            along += g * xhat;
            total += g;
            store(grads.gain + j, load(grads.gain + j) + load(dy + j) * xhat);
            store(grads.shift + j, load(grads.shift + j) + load(dy + j));
        }
        const float mean_along = sum(along) / d, mean_g = kind == LAYERNORM ? sum(total) / d : 0.0f;
        for (int j = 0; j < dp; j += VL) {
            const vf xhat = (load(x + j) - m.mean) * m.inverse_root, g = load(dy + j) * load(w.gain + j);
            const vf step = (g - mean_g - xhat * mean_along) * m.inverse_root;
            store(dx + j, add ? load(dx + j) + step : step);
        }
        for (int j = d; j < dp; j++) dx[j] = 0;
    }
}

}  // namespace
