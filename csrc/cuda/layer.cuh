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

template <class X>
__device__ inline void clear(X& x) {
    x.each([&](At at) { x.put(at, make_float2(0.0f, 0.0f)); });
}

// The first weights that the half layer behind this one needs; behind the last, the first layer's in the next loop.
template <class A, class T>
__device__ inline Prefetch<T> following(const Program<A, T>& p, int layer, bool is_mlp) {
    if (!is_mlp && p.c().d_ff) return prefetch_up(p, Weights<T>{p.job, layer}, 0);
    return prefetch_qkv(p, Weights<T>{p.job, layer + 1 < p.c().n_layers ? layer + 1 : 0}, 0);
}

// Keep has: xn(layer, is_mlp), where the branch's input goes as operand; n_rows, how many of its rows exist;
// input(layer, is_mlp) and sum(layer, is_mlp), scratch states for x and for what the second norm reads, or none. apply:
// whether the result is wanted, and not only what is kept before the branch.
template <class X, class Keep>
__device__ __forceinline__ void half_layer(X& x, int layer, bool is_mlp, const Keep& keep, bool apply = true) {
    const auto& p = x.p;
    const Weights<typename X::Operand> w{p.job, layer};
    const bool post = p.c().placement == POST, sandwich = p.c().placement == SANDWICH;
    const int slot = is_mlp ? NORM2 : NORM1;
    const float scale = float(p.c().residual_scale);
    auto xn = keep.xn(layer, is_mlp);
    const ScratchState input = keep.input(layer, is_mlp), sum = keep.sum(layer, is_mlp);
    const auto to_operand = [&](At at, float2 v) {
        if (at.row < keep.n_rows) xn.put(at, v);
    };
    if (post)
        x.each([&](At at) { to_operand(at, x.get(at)); });
    else
        norm(x, w.norm(slot), to_operand);
    if (input.at) x.each([&](At at) { input.set(at.row, at.column, x.get(at)); });
    if (!apply) return;
    if (sandwich) clear(x);

    if (is_mlp)
        mlp(x, xn, w, sandwich ? 1.0f : scale, following(p, layer, is_mlp));
    else
        attention(x, xn, w, sandwich ? 1.0f : scale, following(p, layer, is_mlp));
    p.sync_band();

    if (sum.at) x.each([&](At at) { sum.set(at.row, at.column, x.get(at)); });
    if (post) norm_in_place(x, w.norm(slot));
    if (sandwich)
        norm(x, w.norm(slot + 2), [&](At at, float2 y) {
            const float2 before = input.get(at.row, at.column);
            x.put(at, make_float2(before.x + scale * y.x, before.y + scale * y.y));
        });
}

}  // namespace shift_cuda
