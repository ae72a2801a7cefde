// Layernorm, rmsnorm or none of the tile's rows, a warp a row, as each_row has them. A thread's columns are those of each_pair.
#pragma once
#include "program.cuh"

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

// Calls out(row, column, y) with pairs of columns of y = norm(tile); the weight and bias stand at `weight`.
template <class A, class T, class Out>
__device__ inline void norm(const Program<A, T>& p, const float* weight, Out out) {
    const int d = p.d();
    p.each_row([&](int r) {
        const float* x = p.tile.row(r);
        if (p.c().norm == NO_NORM) {
            for (int j = 2 * lane(); j < d; j += 64) out(r, j, load<float2>(x + j));
            return;
        }
        const Moments m = moments(p.tile, r, p.c());
        for (int j = 2 * lane(); j < d; j += 64) {
            const float2 v = load<float2>(x + j), w = load<float2>(weight + j), b = load<float2>(weight + d + j);
            out(r, j, make_float2((v.x - m.mean) * m.inverse * w.x + b.x, (v.y - m.mean) * m.inverse * w.y + b.y));
        }
    });
}

// The same, in place: a thread reads and writes its own columns alone.
template <class A, class T>
__device__ inline void norm_in_place(const Program<A, T>& p, const float* weight) {
    norm(p, weight, [&](int r, int j, float2 y) { store(p.tile.row(r) + j, y); });
}

}  // namespace shift_cuda
