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
template <class A, class T>
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
    __device__ Rows<T> xn(int layer, bool is_mlp) const { return rows(is_mlp ? p.c().xn2 : p.c().xn, p.d(), layer); }
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
    __device__ float* at(int r, int j) const { return of_batch + (p.token + r) * p.d() + j; }
    __device__ float2 get(int r, int j) const {
        return r < p.inside ? load<float2>(at(r, j)) : make_float2(0.0f, 0.0f);
    }
    __device__ void set(int r, int j, float2 x) const {
        if (r < p.inside) store(at(r, j), x);
    }
    __device__ void add(int r, int j, float2 x) const {
        const float2 old = get(r, j);
        set(r, j, make_float2(old.x + x.x, old.y + x.y));
    }
};

// dh becomes the gradient of the half layer's input.
template <class A, class T>
__device__ __forceinline__ void half_layer_backward(const Program<A, T>& p, int layer, bool is_mlp,
                                                    const BackwardKeep<A, T>& keep, const Gradient<A, T>& dh) {
    const Call& c = p.c();
    const Weights<T> w{p.job, layer};
    const int d = p.d(), slot = is_mlp ? NORM2 : NORM1;
    const float scale = float(c.residual_scale);
    float* dv = c.dv + ((blockIdx.x * (c.n_layers + 1) + layer) * NORM_SLOTS + slot) * d;
    const Rows<T> xn = keep.xn(layer, is_mlp), dy = keep.dy(layer, is_mlp);
    const auto get = [&](int r, int j) { return dh.get(r, j); };
    const auto scaled = [&](int r, int j) {
        const float2 x = dh.get(r, j);
        return make_float2(scale * x.x, scale * x.y);
    };
    const auto to_dy = [&](int r, int j, float2 x) {
        if (r < p.inside) store(dy.at + int64_t(r) * dy.ld + j, pack<T>(x.x, x.y));
    };
    // The norm behind the branch, if there is one; dy.
    if (c.placement == POST)
        norm_backward(p, keep.sum(layer, is_mlp), w.norm(slot), dv, get,
                      [&](int r, int j, float2 x) { dh.set(r, j, x); });
    if (c.placement == SANDWICH)
        norm_backward(p, keep.sum(layer, is_mlp), w.norm(slot + 2), dv + 2 * d, scaled, to_dy);
    else
        p.each_pair([&](int r, int j) { to_dy(r, j, scaled(r, j)); });
    // The branch: its input's gradient, in the tile.
    const InMemory<A, T> gradient{p};
    clear(gradient);
    if (is_mlp)
        mlp_backward(p, xn, dy, w, keep.rows(c.act, p.p().ff_pad, layer),
                     keep.rows(c.dpre, hidden_parts(c) * p.p().ff_pad, layer));
    else
        attention_backward(p, xn, dy, w, keep.rows(c.dqkv, qkv_columns(c), layer),
                           keep.rows(c.o, c.n_heads * c.head_dim, layer));
    p.sync_band();

    // The norm before it; dh takes both ways.
    if (c.placement == POST)
        p.each_pair([&](int r, int j) { dh.add(r, j, p.tile.get(r, j)); });
    else
        norm_backward(
            p, keep.input(layer, is_mlp), w.norm(slot), dv, [&](int r, int j) { return p.tile.get(r, j); },
            [&](int r, int j, float2 x) { dh.add(r, j, x); });
}

// Loop t again from its boundary, and dh from the gradient of h_t to that of h_{t-1}.
template <class A, class T>
__device__ __forceinline__ void loop_backward(const Program<A, T>& p, int t, const Gradient<A, T>& dh) {
    const Call& c = p.c();
    const BackwardKeep<A, T> keep{p, p.inside, t - 1 - c.low};
    const int layers = int(c.n_layers), last = layers * int(halves(c)) - 1;
    const int64_t boundary = ((t - int64_t{1}) * c.batch * c.seq_len + p.token) * p.d();
    // The loop again; inputs of its half layers stay in scratch states.
    const InMemory<A, T> x{p};
    begin_loop(x, [&](At at) {
        return load_pair(c.boundaries, boundary + int64_t(at.row) * p.d() + at.column, c.dtype);
    });
    for (int i = 0; i <= last; i++)
        half_layer(x, i / int(halves(c)), c.d_ff && i % 2, keep, i < last || needs_last_half(c));
    // The loop norm.
    if (c.loop_norm) {
        const ScratchState u = p.scratch_state(int(scratch_states(c, true)) - 1, c.dtype);
        p.each_pair([&](int r, int j) { u.set(r, j, p.tile.get(r, j)); });
        norm_backward(
            p, u, Weights<T>{p.job, layers}.norm(NORM1),
            c.dv + (blockIdx.x * (c.n_layers + 1) + layers) * NORM_SLOTS * p.d(),
            [&](int r, int j) { return dh.get(r, j); }, [&](int r, int j, float2 x) { dh.set(r, j, x); });
    }
    // Half layers, the last first.
    for (int i = last; i >= 0; i--) half_layer_backward(p, i / int(halves(c)), c.d_ff && i % 2, keep, dh);
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

template <class A, class T>
__device__ __forceinline__ void backward(const Program<A, T>& p) {
    const Call& c = p.c();
    const Gradient<A, T> dh{p, c.dh}, de{p, c.de};
    const int last = p.loops(), first = loops_without_gradient(p);
    p.find_spans();
    for (int t = int(c.high); t > larger(int(c.low), first); t--) {
        if (c.return_all) {
            const int64_t at = ((t - int64_t{1}) * c.batch * c.seq_len + p.token) * p.d();
            p.each_pair([&](int r, int j) {
                if (p.valid(r)) dh.add(r, j, load_pair(c.grad_out, at + int64_t(r) * p.d() + j, c.dtype));
            });
        }
        if (t > last) continue;
        loop_backward(p, t, dh);
        if (c.injection) p.each_pair([&](int r, int j) { de.add(r, j, dh.get(r, j)); });
    }
    if (first > c.low) p.each_pair([&](int r, int j) { dh.set(r, j, make_float2(0.0f, 0.0f)); });
}

}  // namespace shift_cuda
