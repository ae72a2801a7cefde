// Forward of the looped block: all T loops in one launch, the residual stream on chip.
//
//     for t = 1 .. T, for each layer:   x += attention(norm(x));   x += mlp(norm(x))
//
// one chunk of heads, or one chunk of hidden columns, at a time, so that nothing but x lives across them.
// Shared memory: the fp32 tile x, its 16-bit normalised copy, one chunk's intermediates, weight tiles
// under way (bytes: plan.h). L2: the weights, read by every program in every loop, and the tile where it is too
// large for shared memory. Device memory: e in (with injection once a loop), h_T out; in training one h_t a loop.
// Grid: plan.h `programs` blocks of `threads`: four warps for 32 rows (sm_90a: kernels.cuh). Where a sequence is
// split over blocks, they meet twice in a chunk of heads, and where halting asks how much it changed; within a block
// bands of rows meet where blocks do (Program::bands).
#pragma once
#include "layer.cuh"

namespace shift_cuda {

template <class A, class T, class Xn>
struct ForwardKeep {
    const Program<A, T>& p;
    int n_rows;
    Xn operand;  // a place for it
    __device__ Xn xn(int, bool) const { return operand; }
    __device__ ScratchState input(int, bool) const {
        return p.c().placement == SANDWICH ? p.scratch_state(0, FLOAT32) : ScratchState{};
    }
    __device__ ScratchState sum(int, bool) const { return {}; }
};

// x as h_{at + 1} or h_T in a [.., batch, seq_len, d_model] tensor; pads become 0.
template <class X>
__device__ inline void store_state(X& x, void* to, int64_t at_state) {
    const auto& p = x.p;
    const int64_t first = (at_state * p.c().batch * p.c().seq_len + p.token) * p.d();
    x.each([&](At at) {
        if (at.row < p.inside)
            store_pair(to, first + int64_t(at.row) * p.d() + at.column, p.c().dtype,
                       p.valid(at.row) ? x.get(at) : make_float2(0.0f, 0.0f));
    });
}

// x becomes what a loop starts from: h (+ e), 0 in pads. h(at) gives h.
template <class X, class H>
__device__ inline void begin_loop(X& x, H h) {
    const auto& p = x.p;
    x.each([&](At at) {
        float2 v = make_float2(0.0f, 0.0f);  // pads too, or without a norm they could grow without bound
        if (p.valid(at.row)) {
            v = h(at);
            if (p.c().injection) {
                const float2 e = load_pair(p.c().e, (p.token + at.row) * p.d() + at.column, p.c().dtype);
                v = make_float2(v.x + e.x, v.y + e.y);
            }
        }
        x.put(at, v);
    });
}

// Sum of two numbers a thread, over all who own rows of the program's one sequence, for every such thread.
template <class A, class T>
__device__ inline float2 sequence_sum(const Program<A, T>& p, float2 x) {
    x = make_float2(sum_over_lanes(x.x), sum_over_lanes(x.y));
    p.sync();
    if (lane() == 0) store(p.sums() + 2 * warp(), x);
    sync_sequence(p);
    float2 total = make_float2(0.0f, 0.0f);
    for (int part = 0; part < p.split(); part++) {
        const float* sums = p.split() > 1 ? in_part(p, p.sums(), part) : p.sums();
        for (int i = 0; i < p.warps(); i++) {
            const float2 some = load<float2>(sums + 2 * i);
            total = make_float2(total.x + some.x, total.y + some.y);
        }
    }
    return total;  // attention meets before anybody writes sums again
}

// Whether rms(h_t - h_{t-1}) < threshold rms(h_{t-1}) over the program's one sequence.
template <class X>
__device__ inline bool settled(X& x, ScratchState before) {
    const auto& p = x.p;
    float2 squares = make_float2(0.0f, 0.0f);  // of the change, of h_{t-1}
    x.each([&](At at) {
        if (!p.valid(at.row)) return;
        const float2 h = before.get(at.row, at.column), v = x.get(at);
        squares.x += (v.x - h.x) * (v.x - h.x) + (v.y - h.y) * (v.y - h.y);
        squares.y += h.x * h.x + h.y * h.y;
    });
    squares = sequence_sum(p, squares);
    return sqrtf(squares.x) < float(p.c().halt_threshold) * sqrtf(squares.y);  // a NaN runs on
}

// begins(t, running) is told before each loop, and at the end, whether there is one; it returns that.
template <class X, class Keep, class Begins>
__device__ __forceinline__ void forward(X& x, const Keep& keep, Begins begins) {
    typedef typename X::Operand T;
    const auto& p = x.p;
    const Call& c = p.c();
    const ScratchState before = p.scratch_state(c.placement == SANDWICH, FLOAT32);  // with halting
    const int64_t most = p.loops();
    p.find_spans();
    x.each([&](At at) {
        float2 h = make_float2(0.0f, 0.0f);
        if (!c.injection && p.valid(at.row)) h = load_pair(c.e, (p.token + at.row) * p.d() + at.column, c.dtype);
        x.put(at, h);
    });
    int64_t t = 0;
    for (bool running = most > 0; begins(t, running);) {
        if (c.save) store_state(x, c.boundaries, t);
        if (c.halting) x.each([&](At at) { before.set(at.row, at.column, x.get(at)); });
        begin_loop(x, [&](At at) { return x.get(at); });
        for (int layer = 0; layer < c.n_layers; layer++) {
            half_layer(x, layer, false, keep);
            if (c.d_ff) half_layer(x, layer, true, keep);
        }
        if (c.loop_norm) norm_in_place(x, Weights<T>{p.job, int(c.n_layers)}.norm(NORM1));
        if (c.return_all) store_state(x, c.out, t);
        t++;
        running = t < most && !(c.halting && settled(x, before));
    }
    copy_async_wait<0>();  // the weights of a loop that nobody asked for
    if (c.halting && threadIdx.x == 0 && p.part() == 0) c.used[p.sample()] = t;
    if (!c.return_all) store_state(x, c.out, 0);
    for (; c.return_all && t < c.most_loops; t++) store_state(x, c.out, t);
}

template <class A, class T, class Begins>
__device__ __forceinline__ void forward_in_memory(const Program<A, T>& p, Begins begins) {
    const InMemory<A, T> x{p};
    forward(x, ForwardKeep<A, T, Rows<T>>{p, p.rows(), {p.xn(), p.d() + int(PAD), false}}, begins);
}

}  // namespace shift_cuda
