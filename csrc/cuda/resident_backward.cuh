// Backward of the looped block from the loop boundaries, all loops of a chunk in one launch:
//
//     for t = high .. low + 1:   x = h_{t-1} (+ e);  each half layer again, its input put aside in L2
//         for each half layer from the last:   dh += norm'(x, branch'(dh))     one chunk at a time
//
// Weight gradients are not accumulated here: each matmul's two operands go to device memory, and one library
// matmul a weight contracts them over all loops x tokens. Norm weights' gradients are summed in a buffer of the
// program's own. No atomics: the result is the same bits every time.
// Shared memory: one fp32 tile (x, then the branch's input gradient), one chunk's intermediates, weight
// tiles and (but for sm_90a) tiles of xn and dy under way (bytes: plan.h). L2: the weights; what the loop put aside;
// dh; and the fp32 tile where it is too large. Device memory: one h_t a loop in, the operands out.
// Grid: plan.h `blocks` of `threads` (sm_90a: kernels.cuh), each for one of `programs` after the other.
#pragma once
#include "attention_backward.cuh"
#include "mlp_backward.cuh"
#include "norm_backward.cuh"
#include "resident_forward.cuh"

namespace shift_cuda {

// What the loop that is computed again leaves behind: normalised inputs as weight-gradient operands.
// Kept: those rows alone, or registers too.
template <class A, class T, class Kept>
struct BackwardKeep {
    const Program<A, T>& p;
    int n_rows;
    int64_t loop;  // counted from the launch's first

    // This program's rows of an operand [n_layers, loops, tokens, columns].
    __device__ Rows<T> rows(void* operand, int64_t columns, int layer) const {
        const Call& c = p.c();
        const int64_t first = ((layer * (c.high - c.low) + loop) * c.batch * c.seq_len + p.token) * columns;
        return {static_cast<T*>(operand) + first, int(columns), true};
    }
    __device__ Rows<T> xn_rows(int layer, bool is_mlp) const { return rows(is_mlp ? p.c().xn2 : p.c().xn, p.d(), layer); }
    __device__ Kept xn(int layer, bool is_mlp) const { return {xn_rows(layer, is_mlp)}; }
    __device__ Rows<T> dy(int layer, bool is_mlp) const { return rows(is_mlp ? p.c().dy2 : p.c().dy, p.d(), layer); }
    // What the norm before the branch has read, and what the one behind it has.
    __device__ ScratchState input(int layer, bool is_mlp) const {
        return p.c().placement == POST ? ScratchState{} : state(layer, is_mlp, 0);
    }
    __device__ ScratchState sum(int layer, bool is_mlp) const {
        return p.c().placement == PRE ? ScratchState{} : state(layer, is_mlp, p.c().placement == SANDWICH);
    }
    __device__ ScratchState state(int layer, bool is_mlp, int norm) const {
        const int half = layer * int(halves(p.c())) + is_mlp;
        return p.scratch_state(half * int(norms_of_half_layer(p.c())) + norm, p.c().dtype);
    }
};

// dh of this program's tokens, in device memory; 0 in rows that are none.
template <class A, class T>
struct Gradient {
    const Program<A, T>& p;
    float* of_batch;
    __device__ float* address(At at) const { return of_batch + (p.token + at.row) * p.d() + at.column; }
    __device__ float2 get(At at) const {
        return at.row < p.inside ? load<float2>(address(at)) : make_float2(0.0f, 0.0f);
    }
    __device__ void set(At at, float2 x) const {
        if (at.row < p.inside) store(address(at), x);
    }
    __device__ void add(At at, float2 x) const {
        const float2 old = get(at);
        set(at, make_float2(old.x + x.x, old.y + x.y));
    }
};

// dh becomes the gradient of the half layer's input; dx is a place for the branch's.
template <class X, class Keep, class A, class T>
__device__ __forceinline__ void half_layer_backward(X& dx, int layer, bool is_mlp, const Keep& keep,
                                                    const Gradient<A, T>& dh) {
    const Program<A, T>& p = dx.p;
    const Call& c = p.c();
    const Weights<T> w{p.job, layer};
    const int d = p.d(), slot = is_mlp ? NORM2 : NORM1;
    const float scale = float(c.residual_scale);
    float* dv = c.dv + ((blockIdx.x * (c.n_layers + 1) + layer) * NORM_SLOTS + slot) * d;
    const Rows<T> xn = keep.xn_rows(layer, is_mlp), dy = keep.dy(layer, is_mlp);
    const auto get = [&](At at) { return dh.get(at); };
    const auto scaled = [&](At at) {
        const float2 x = dh.get(at);
        return make_float2(scale * x.x, scale * x.y);
    };
    const auto to_dy = [&](At at, float2 x) {
        if (at.row < p.inside) dy.put(at, x);
    };
    // The norm behind the branch, if there is one; dy.
    if (c.placement == POST)
        norm_backward(dx, keep.sum(layer, is_mlp), w.norm(slot), dv, get, [&](At at, float2 x) { dh.set(at, x); });
    if (c.placement == SANDWICH)
        norm_backward(dx, keep.sum(layer, is_mlp), w.norm(slot + 2), dv + 2 * d, scaled, to_dy);
    else
        dx.each([&](At at) { to_dy(at, scaled(at)); });
    // The branch.
    clear(dx);
    if (is_mlp)
        mlp_backward(dx, xn, dy, w, keep.rows(c.act, p.p().ff_pad, layer),
                     keep.rows(c.dpre, hidden_parts(c) * p.p().ff_pad, layer));
    else
        attention_backward(dx, xn, dy, w, keep.rows(c.dqkv, qkv_columns(c), layer),
                           keep.rows(c.o, c.n_heads * c.head_dim, layer));
    p.sync_band();

    // The norm before it; dh takes both ways.
    if (c.placement == POST)
        dx.each([&](At at) { dh.add(at, dx.get(at)); });
    else
        norm_backward(dx, keep.input(layer, is_mlp), w.norm(slot), dv, [&](At at) { return dx.get(at); },
                      [&](At at, float2 x) { dh.add(at, x); });
}

// Loop t again from its boundary, and dh from the gradient of h_t to that of h_{t-1}.
template <class X, class A, class T>
__device__ __forceinline__ void loop_backward(X& x, int t, const Gradient<A, T>& dh) {
    const Program<A, T>& p = x.p;
    const Call& c = p.c();
    const BackwardKeep<A, T, typename X::Kept> keep{p, p.inside, t - 1 - c.low};
    const int layers = int(c.n_layers), last = layers * int(halves(c)) - 1;
    const int64_t boundary = ((t - int64_t{1}) * c.batch * c.seq_len + p.token) * p.d();
    // The loop again; inputs of its half layers stay in scratch states.
    begin_loop(x, [&](At at) {
        return load_pair(c.boundaries, boundary + int64_t(at.row) * p.d() + at.column, c.dtype);
    });
    for (int i = 0; i <= last; i++)
        half_layer(x, i / int(halves(c)), c.d_ff && i % 2, keep, i < last || needs_last_half(c));
    // The loop norm.
    if (c.loop_norm) {
        const ScratchState u = p.scratch_state(int(scratch_states(c, true)) - 1, c.dtype);
        x.each([&](At at) { u.set(at.row, at.column, x.get(at)); });
        norm_backward(
            x, u, Weights<T>{p.job, layers}.norm(NORM1),
            c.dv + (blockIdx.x * (c.n_layers + 1) + layers) * NORM_SLOTS * p.d(),
            [&](At at) { return dh.get(at); }, [&](At at, float2 y) { dh.set(at, y); });
    }
    // Half layers, the last first.
    for (int i = last; i >= 0; i--) half_layer_backward(x, i / int(halves(c)), c.d_ff && i % 2, keep, dh);
}

// Up to this loop of the program's no gradient is carried.
template <class A, class T>
__device__ inline int loops_without_gradient(const Program<A, T>& p) {
    const int n = int(p.c().n_grad_loops);
    return n ? larger(p.loops() - n, 0) : 0;
}

// How many loops of this launch the program goes through.
template <class A, class T>
__device__ inline int loops_backward(const Program<A, T>& p) {
    return smaller(p.loops(), int(p.c().high)) - larger(int(p.c().low), loops_without_gradient(p));
}

// x: a place for the residual stream, and for gradients of branches' inputs.
template <class X, class A, class T>
__device__ __forceinline__ void backward(X& x, const Program<A, T>& p) {
    const Call& c = p.c();
    const Gradient<A, T> dh{p, c.dh}, de{p, c.de};
    const int last = p.loops(), first = loops_without_gradient(p);
    p.find_spans();
    for (int t = int(c.high); t > larger(int(c.low), first); t--) {
        if (c.return_all) {
            const int64_t at = ((t - int64_t{1}) * c.batch * c.seq_len + p.token) * p.d();
            x.each([&](At of) {
                if (p.valid(of.row))
                    dh.add(of, load_pair(c.grad_out, at + int64_t(of.row) * p.d() + of.column, c.dtype));
            });
        }
        if (t > last) continue;
        loop_backward(x, t, dh);
        if (c.injection) x.each([&](At of) { de.add(of, dh.get(of)); });
    }
    if (first > c.low) x.each([&](At of) { dh.set(of, make_float2(0.0f, 0.0f)); });
}

// Of all of the block's programs.
template <class X, class A, class T>
__device__ __forceinline__ void backward_of_all(X& x, Program<A, T>& p) {
    do backward(x, p);
    while (p.next());
}

}  // namespace shift_cuda
