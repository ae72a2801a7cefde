// Layernorm and rmsnorm of rows with leading dimension padded(d); the padding stays zero.
#pragma once
#include "../call.h"
#include "../simd/vec.h"

namespace {

struct NormWeights {  // padded(d) numbers each, zero beyond d
    const float *gain, *shift;
};

struct NormGrads {
    float *gain, *shift;
};

// Of up to VL rows at a time, whose sums are then taken together.
struct Moments {
    float mean[VL], inverse_root[VL];
};

inline Moments moments(int kind, int rows, int d, const float* x, float eps) {
    const int ld = padded(d), whole = d / VL * VL;
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    Moments m{};
    vf part[VL] = {};
    if (kind == LAYERNORM) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < ld; j += VL) part[i] += load(x + i * ld + j);
        store(m.mean, sums(part) / float(d));
    }
    for (int i = 0; i < rows; i++) {
        vf squares = all(0);
        int j = 0;
        for (; j < whole; j += VL) squares += (load(x + i * ld + j) - m.mean[i]) * (load(x + i * ld + j) - m.mean[i]);
        if (j < d) {
            const vf tail = pick(lane < d - j, load(x + i * ld + j) - m.mean[i], all(0));
            squares += tail * tail;
        }
        part[i] = squares;
    }
    const vf variance = sums(part) / float(d) + eps;
    for (int i = 0; i < VL; i++) m.inverse_root[i] = 1.0f / std::sqrt(variance[i]);
    return m;
}

inline void norm(int kind, int rows, int d, const float* x, NormWeights w, float eps, float* y) {
    const int ld = padded(d);
    for (; rows > 0; rows -= VL, x += VL * ld, y += VL * ld) {
        const int count = rows < VL ? rows : VL;
        const Moments m = moments(kind, count, d, x, eps);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < ld; j += VL)
                store(y + i * ld + j,
                      (load(x + i * ld + j) - m.mean[i]) * m.inverse_root[i] * load(w.gain + j) + load(w.shift + j));
    }
}

// dx = d norm(x) / dx applied to dy, added to what dx holds if `add`; gain and shift collect theirs.
inline void norm_backward(int kind, int rows, int d, const float* x, const float* dy, NormWeights w, float eps,
                          NormGrads grads, float* dx, bool add) {
    const int ld = padded(d);
    for (; rows > 0; rows -= VL, x += VL * ld, dy += VL * ld, dx += VL * ld) {
        const int count = rows < VL ? rows : VL;
        const Moments m = moments(kind, count, d, x, eps);
        vf along[VL] = {}, total[VL] = {};
        for (int i = 0; i < count; i++)
            for (int j = 0; j < ld; j += VL) {
                const vf dyj = load(dy + i * ld + j), g = dyj * load(w.gain + j);
                const vf xhat = (load(x + i * ld + j) - m.mean[i]) * m.inverse_root[i];
                along[i] += g * xhat;
                total[i] += g;
                store(grads.gain + j, load(grads.gain + j) + dyj * xhat);
                store(grads.shift + j, load(grads.shift + j) + dyj);
            }
        const vf mean_along = sums(along) / float(d), mean_g = kind == LAYERNORM ? sums(total) / float(d) : all(0);
        for (int i = 0; i < count; i++) {
            for (int j = 0; j < ld; j += VL) {
                const vf xhat = (load(x + i * ld + j) - m.mean[i]) * m.inverse_root[i];
                const vf g = load(dy + i * ld + j) * load(w.gain + j);
                const vf step = (g - mean_g[i] - xhat * mean_along[i]) * m.inverse_root[i];
                store(dx + i * ld + j, add ? load(dx + i * ld + j) + step : step);
            }
            for (int j = d; j < ld; j++) dx[i * ld + j] = 0;
        }
    }
}

}  // namespace
