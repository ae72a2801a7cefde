// Layernorm, rmsnorm or none of the residual stream's rows; in memory a warp a row, as each_row has them. A thread's
// columns are those of each_pair.
#pragma once
#include "residual.cuh"

namespace shift_cuda {

struct Moments {
    float mean, inverse;  // 1 / deviation; for rmsnorm 0 and 1 / root mean square
};

// Of row r of a Tile or ScratchState, by a warp.
template <class X>
__device__ inline Moments moments(const X& x, int r, const Call& c) {
    const int d = int(c.d_model);
    float mean = 0.0f, squares = 0.0f;
    if (c.norm == LAYERNORM) {
        for (int j = 2 * lane(); j < d; j += 64) {
            const float2 v = x.get(r, j);
            mean += v.x + v.y;
        }
        mean = sum_over_lanes(mean) / d;
    }
    for (int j = 2 * lane(); j < d; j += 64) {
        const float2 v = x.get(r, j);
        squares += (v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean);
    }
    return {mean, rsqrt_approx(sum_over_lanes(squares) / d + float(c.eps))};
}

// y = (x - mean) / deviation weight + bias, of a pair of columns; the weights, and behind them the biases, at `weight`.
__device__ inline float2 normed(float2 x, Moments m, const float* weight, int column, int d) {
    const float2 w = load<float2>(weight + column), b = load<float2>(weight + d + column);
    return make_float2((x.x - m.mean) * m.inverse * w.x + b.x, (x.y - m.mean) * m.inverse * w.y + b.y);
}

// Calls out(at, y) with y = norm(x).
template <class A, class T, class Out>
__device__ inline void norm(const InMemory<A, T>& x, const float* weight, Out out) {
    const Program<A, T>& p = x.p;
    const int d = p.d();
    p.each_row([&](int r) {
        const bool is_none = p.c().norm == NO_NORM;
        const Moments m = is_none ? Moments{} : moments(p.tile, r, p.c());
        for (int j = 2 * lane(); j < d; j += 64) {
            const float2 v = p.tile.get(r, j);
            out(At{r, j, 0}, is_none ? v : normed(v, m, weight, j, d));
        }
    });
}

// x = norm(x): a thread reads and writes its own columns alone.
template <class X>
__device__ inline void norm_in_place(X& x, const float* weight) {
    norm(x, weight, [&](At at, float2 y) { x.put(at, y); });
}

}  // namespace shift_cuda
