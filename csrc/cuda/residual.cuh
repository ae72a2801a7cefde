// The residual stream of a program's rows, fp32, as a layer sees it: here a tile in memory (Program::tile); on sm_90a
// registers, where they have room (arch/sm90a_registers.cuh). Either has
//
//     each(f)        calls f(at) for a thread's own pairs of columns, which are the same in every pass
//     get(at), put(at, x)
//
// and overloads: norm, mlp, their backwards; loaded; add_product: x += scale (a b + bias), b as in matmul.cuh, a columns of
// work; left_of_bias: what of a bias a branch's first product is to add. Backward the same is a branch's input gradient.
#pragma once
#include "matmul.cuh"

namespace shift_cuda {

template <class A, class T>
struct InMemory {
    typedef T Operand;
    typedef Rows<T> Kept;  // an operand that goes to device memory
    static constexpr int KEYS = 16;  // that attention takes at a time
    const Program<A, T>& p;
    template <class F>
    __device__ void each(F f) const {
        p.each_pair([&](int r, int j) { f(At{r, j, 0}); });
    }
    __device__ float2 get(At at) const { return p.tile.get(at.row, at.column); }
    __device__ void put(At at, float2 x) const { store(p.tile.row(at.row) + at.column, x); }
};

// Adds scale (x + bias) to the tile; bias may be null.
__device__ inline void add_to_tile(Tile tile, int row, int column, float2 x, float2 y, float scale, const float* bias) {
    float* at = tile.row(row) + column;
    const float2 none = make_float2(0.0f, 0.0f);
    const float2 bx = bias ? load<float2>(bias + column) : none, by = bias ? load<float2>(bias + column + 8) : none;
    const float2 u = load<float2>(at), v = load<float2>(at + 8);
    store(at, make_float2(u.x + scale * (x.x + bx.x), u.y + scale * (x.y + bx.y)));
    store(at + 8, make_float2(v.x + scale * (y.x + by.x), v.y + scale * (y.y + by.y)));
}

template <bool ROWS_ALONG_N, class A, class T>
__device__ __forceinline__ void add_product(const InMemory<A, T>& x, Rows<T> a, Prefetch<T> b, float scale,
                                            const float* bias, Prefetch<T> prefetch) {
    const auto add = [&](int r, int j, float2 u, float2 v) { add_to_tile(x.p.tile, r, j, u, v, scale, bias); };
    multiply<ROWS_ALONG_N>(x.p, a, b.b, b.ld, b.n, b.k, add, prefetch);
}

template <class A, class T>
__device__ inline const float* left_of_bias(const InMemory<A, T>&, const float* bias, float) {
    return bias;
}

// An operand's rows for products: where they are, or in registers.
template <class A, class T>
__device__ inline Rows<T> loaded(const InMemory<A, T>&, Rows<T> rows) {
    return rows;
}

}  // namespace shift_cuda
