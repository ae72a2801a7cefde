// Half a layer, attention or MLP, applied to the tile; what is kept on the way is up to the caller:
//
//     pre:       x + scale f(norm(x))        accumulated straight into the tile
//     post:      norm(x + scale f(x))        likewise
//     sandwich:  x + scale norm_post(f(norm(x)))      f alone in the tile, x in a scratch state
#pragma once
#include "attention.cuh"
#include "mlp.cuh"
#include "norm.cuh"

namespace shift_cuda {

template <class A, class T>
__device__ inline float2 tile_pair(const Program<A, T>& p, int r, int j) {
    return load<float2>(p.tile.row(r) + j);
}

template <class A, class T>
__device__ inline void clear_tile(const Program<A, T>& p) {
    p.each_pair([&](int r, int j) { store(p.tile.row(r) + j, make_float2(0.0f, 0.0f)); });
}

// The first weights that the half layer behind this one needs; behind the last, the first layer's in the next loop.
template <class A, class T>
__device__ inline Prefetch<T> following(const Program<A, T>& p, int layer, bool is_mlp) {
    if (!is_mlp && p.c().d_ff) return prefetch_up(p, Weights<T>{p.job, layer}, 0);
    return prefetch_qkv(p, Weights<T>{p.job, layer + 1 < p.c().n_layers ? layer + 1 : 0}, 0);
}

// Keep has: xn(layer, is_mlp), rows for the branch's input; n_rows, how many of them exist; input(layer, is_mlp)
// and sum(layer, is_mlp), scratch states for x and for what the second norm reads, or none. apply: whether the
// result is wanted, and not only what is kept before the branch.
template <class A, class T, class Keep>
__device__ __forceinline__ void half_layer(const Program<A, T>& p, int layer, bool is_mlp, const Keep& keep,
                                           bool apply = true) {
    const Weights<T> w{p.job, layer};
    const bool post = p.c().placement == POST, sandwich = p.c().placement == SANDWICH;
    const int slot = is_mlp ? NORM2 : NORM1;
    const float scale = float(p.c().residual_scale);
    const Rows<T> xn = keep.xn(layer, is_mlp);
    const ScratchState input = keep.input(layer, is_mlp), sum = keep.sum(layer, is_mlp);
    const auto to_operand = [&](int r, int j, float2 x) {
        if (r < keep.n_rows) store(xn.at + int64_t(r) * xn.ld + j, pack<T>(x.x, x.y));
    };
    if (post)
        p.each_pair([&](int r, int j) { to_operand(r, j, tile_pair(p, r, j)); });
    else
        norm(p, w.norm(slot), to_operand);
    if (input.at) p.each_pair([&](int r, int j) { input.set(r, j, tile_pair(p, r, j)); });
    if (!apply) return;
    if (sandwich) clear_tile(p);

    if (is_mlp)
        mlp(p, xn, w, sandwich ? 1.0f : scale, following(p, layer, is_mlp));
    else
        attention(p, xn, w, sandwich ? 1.0f : scale, following(p, layer, is_mlp));
    p.sync_band();

    if (sum.at) p.each_pair([&](int r, int j) { sum.set(r, j, tile_pair(p, r, j)); });
    if (post) norm_in_place(p, w.norm(slot));
    if (sandwich)
        norm(p, w.norm(slot + 2), [&](int r, int j, float2 y) {
            const float2 x = input.get(r, j);
            store(p.tile.row(r) + j, make_float2(x.x + scale * y.x, x.y + scale * y.y));
        });
}

}  // namespace shift_cuda
