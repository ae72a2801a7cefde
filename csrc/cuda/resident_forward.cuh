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

template <class A, class T>
struct ForwardKeep {
    const Program<A, T>& p;
    int n_rows;
    __device__ Rows<T> xn(int, bool) const { return {p.xn(), p.d() + int(PAD), false}; }
    __device__ ScratchState input(int, bool) const {
        return p.c().placement == SANDWICH ? p.scratch_state(0, FLOAT32) : ScratchState{};
    }
    __device__ ScratchState sum(int, bool) const { return {}; }
};

// The tile as h_{at + 1} or h_T in a [.., batch, seq_len, d_model] tensor; pads become 0.
template <class A, class T>
__device__ inline void store_state(const Program<A, T>& p, void* to, int64_t at) {
    const int64_t first = (at * p.c().batch * p.c().seq_len + p.token) * p.d();
    p.each_pair([&](int r, int j) {
        if (r < p.inside)
            store_pair(to, first + int64_t(r) * p.d() + j, p.c().dtype,
                       p.valid(r) ? tile_pair(p, r, j) : make_float2(0.0f, 0.0f));
    });
}

// The tile becomes what a loop starts from: h (+ e), 0 in pads. h(row, column) gives h.
template <class A, class T, class H>
__device__ inline void begin_loop(const Program<A, T>& p, H h) {
    const int d = p.d();
    p.each_pair([&](int r, int j) {
        float2 x = make_float2(0.0f, 0.0f);  // pads too, or without a norm they could grow without bound
        if (p.valid(r)) {
            x = h(r, j);
            if (p.c().injection) {
                const float2 e = load_pair(p.c().e, (p.token + r) * d + j, p.c().dtype);
                x = make_float2(x.x + e.x, x.y + e.y);
            }
        }
        store(p.tile.row(r) + j, x);
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
template <class A, class T>
__device__ inline bool settled(const Program<A, T>& p, ScratchState before) {
    float2 squares = make_float2(0.0f, 0.0f);  // of the change, of h_{t-1}
    p.each_pair([&](int r, int j) {
        if (!p.valid(r)) return;
        const float2 h = before.get(r, j), x = tile_pair(p, r, j);
        squares.x += (x.x - h.x) * (x.x - h.x) + (x.y - h.y) * (x.y - h.y);
        squares.y += h.x * h.x + h.y * h.y;
    });
    squares = sequence_sum(p, squares);
    return sqrtf(squares.x) < float(p.c().halt_threshold) * sqrtf(squares.y);  // a NaN runs on
}

// begins(t, running) is told before each loop, and at the end, whether there is one; it returns that.
template <class A, class T, class Begins>
__device__ __forceinline__ void forward(const Program<A, T>& p, Begins begins) {
    const Call& c = p.c();
    const ForwardKeep<A, T> keep{p, p.rows()};
    const ScratchState before = p.scratch_state(c.placement == SANDWICH, FLOAT32);  // with halting
    const int64_t most = p.loops();
    p.find_spans();
    p.each_pair([&](int r, int j) {
        float2 h = make_float2(0.0f, 0.0f);
        if (!c.injection && p.valid(r)) h = load_pair(c.e, (p.token + r) * p.d() + j, c.dtype);
        store(p.tile.row(r) + j, h);
    });
    int64_t t = 0;
    for (bool running = most > 0; begins(t, running);) {
        if (c.save) store_state(p, c.boundaries, t);
        if (c.halting) p.each_pair([&](int r, int j) { before.set(r, j, tile_pair(p, r, j)); });
        begin_loop(p, [&](int r, int j) { return tile_pair(p, r, j); });
        for (int layer = 0; layer < c.n_layers; layer++) {
            half_layer(p, layer, false, keep);
            if (c.d_ff) half_layer(p, layer, true, keep);
        }
        if (c.loop_norm) norm_in_place(p, Weights<T>{p.job, int(c.n_layers)}.norm(NORM1));
        if (c.return_all) store_state(p, c.out, t);
        t++;
        running = t < most && !(c.halting && settled(p, before));
    }
    copy_async_wait<0>();  // the weights of a loop that nobody asked for
    if (c.halting && threadIdx.x == 0 && p.part() == 0) c.used[p.sample()] = t;
    if (!c.return_all) store_state(p, c.out, 0);
    for (; c.return_all && t < c.most_loops; t++) store_state(p, c.out, t);
}

}  // namespace shift_cuda
