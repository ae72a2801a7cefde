// What a program (a block of threads that owns some rows) knows: the call, the packed weights, its memory.
//
// Packed weights of a layer, numbers of type T, each matrix [out, in] as torch has it but for the order of rows:
//   qkv [rounds of kv_heads][q heads, k heads, v heads][head_dim][d_model]; with rope the halves of q and k heads
//       interleaved by 8, so that a rotation's pair is in one thread's registers
//   out [d_model][n_heads head_dim]
//   up  [ff_pad or 2 ff_pad][d_model]; with swiglu gates and values interleaved by 8, likewise
//   down [d_model][ff_pad]
// Packed vectors of a layer, fp32: biases of qkv, of up, of out, of down, then the norms' eight; 0 where absent.
// The loop norm is the first norm of "layer" n_layers.
#pragma once
#include "plan.h"
#include "tile/barrier.cuh"
#include "tile/copy_async.cuh"
#include "tile/ldmatrix.cuh"
#include "tile/math.cuh"
#include "tile/memory.cuh"
#include "tile/mma.cuh"
#include "tile/types.cuh"
#include "tile/warp.cuh"

namespace shift_cuda {

using namespace tile;

constexpr float LOG2_E = 1.4426950408889634f;

enum NormSlot { NORM1 = 0, NORM1_POST = 2, NORM2 = 4, NORM2_POST = 6, NORM_SLOTS = 8 };  // a bias behind each weight

// A kernel's only argument.
struct Job {
    Call call;
    Plan plan;
    int backward;
};

// Where the workspace's parts are.
template <class T>
struct Weights {
    const T *qkv, *out, *up, *down;
    const float *qkv_bias, *up_bias, *out_bias, *down_bias, *norms;
};

template <class T>
__device__ inline Weights<T> layer_of(const Job& job, int layer) {
    const Call& c = job.call;
    const int64_t ff = job.plan.ff_pad, d = c.d_model;
    unsigned char* base = static_cast<unsigned char*>(c.workspace);
    Weights<T> w;
    w.qkv = reinterpret_cast<T*>(base) + layer * layer_weights(c, ff);
    w.out = w.qkv + qkv_columns(c) * d;
    w.up = w.out + c.n_heads * c.head_dim * d;
    w.down = w.up + hidden_parts(c) * ff * d;
    w.qkv_bias = reinterpret_cast<float*>(base + weights_bytes(c, ff)) + layer * layer_vectors(c, ff);
    w.up_bias = w.qkv_bias + qkv_columns(c);
    w.out_bias = w.up_bias + hidden_parts(c) * ff;
    w.down_bias = w.out_bias + d;
    w.norms = w.down_bias + d;
    return w;
}

// Row of a matrix whose two halves of `half` rows are interleaved by 8: where packed row i comes from.
__device__ inline int from_halves(int i, int half) { return i / 16 * 8 + i % 8 + (i % 16 < 8 ? 0 : half); }

// Row of in_proj that packed row i is.
__device__ inline int qkv_row(const Job& job, int i) {
    const Call& c = job.call;
    const int hd = int(c.head_dim), heads = int(job.plan.kv_heads), queries = heads * int(query_group(c));
    const int round = i / int(round_columns(c, heads)), head = i % int(round_columns(c, heads)) / hd;
    const int first = head < queries           ? round * queries + head
                      : head < queries + heads ? int(c.n_heads) + round * heads + head - queries
                                               : int(c.n_heads + c.n_kv_heads) + round * heads + head - queries - heads;
    const bool turned = c.rope && head < queries + heads;
    return first * hd + (turned ? from_halves(i % hd, hd / 2) : i % hd);
}

// Two neighbouring numbers of a tensor whose type is known at run time.
__device__ inline float2 load_pair(const void* from, int64_t at, int64_t dtype) {
    if (dtype == FLOAT32) return load<float2>(static_cast<const float*>(from) + at);
    const uint32_t pair = load<uint32_t>(static_cast<const uint16_t*>(from) + at);
    return dtype == BFLOAT16 ? unpack<bf16>(pair) : unpack<fp16>(pair);
}

__device__ inline void store_pair(void* to, int64_t at, int64_t dtype, float2 x) {
    if (dtype == FLOAT32)
        store(static_cast<float*>(to) + at, x);
    else
        store(static_cast<uint16_t*>(to) + at, dtype == BFLOAT16 ? pack<bf16>(x.x, x.y) : pack<fp16>(x.x, x.y));
}

// [rows, d_model] fp32 of this program, with its leading dimension; in shared or device memory.
struct Tile {
    float* at;
    int ld;
    __device__ float* row(int r) const { return at + int64_t(r) * ld; }
};

// Operand rows of a matrix product. Streamed: in device memory, rows beyond `inside` count as zero.
template <class T>
struct Rows {
    T* at;
    int ld;
    bool streamed;
};

template <class T>
struct Program {
    const Job& job;
    // of the program
    int rows, inside;      // rows of the tile; how many of them are tokens of the batch (pads included)
    int sample;            // the first sequence
    int64_t token;         // the first row in [batch * seq_len]
    // shared memory, see plan.h
    Tile tile;
    int *low, *high;       // [rows] row r sees the rows low[r] <= key < high[r]; a pad none: high 0
    float* sums;           // [32]
    T *xn, *work;          // xn: forward alone
    float *normaliser, *o_do;  // [query heads][rows], backward alone
    float *mean, *inverse;     // [rows], backward alone
    unsigned char* ring;

    __device__ const Call& c() const { return job.call; }
    __device__ const Plan& p() const { return job.plan; }
    __device__ int d() const { return int(job.call.d_model); }
    __device__ bool valid(int row) const { return high[row] > 0; }
    __device__ int warps() const { return int(blockDim.x) / 32; }

    // The i-th state put aside, see plan.h.
    __device__ Tile aside(int i) const {
        const int64_t states = states_aside(c(), job.backward) + !p().tile_in_shared;
        unsigned char* base = static_cast<unsigned char*>(c().workspace) + weights_bytes(c(), p().ff_pad) +
                              vectors_bytes(c(), p().ff_pad);
        const int64_t bytes = tile_bytes(c(), rows);
        return {reinterpret_cast<float*>(base + (blockIdx.x * states + i) * bytes), d() + int(PAD)};
    }

    // Calls f(row, column) for this thread's pairs of columns. They are the same in every pass over rows, here
    // and in norm.cuh, so that such passes need no barrier among them.
    template <class F>
    __device__ void each_pair(F f) const {
        for (int r = warp(); r < rows; r += warps())
            for (int j = 2 * lane(); j < d(); j += 64) f(r, j);
    }

    __device__ explicit Program(const Job& j) : job(j) {
        const Call& c = j.call;
        rows = int(p().rows);
        sample = int(blockIdx.x * p().sequences);
        token = int64_t(sample) * c.seq_len;
        inside = int(smaller<int64_t>(p().sequences, c.batch - sample) * c.seq_len);
        unsigned char* at = shared_memory();
        const auto take = [&at](int64_t bytes) {
            unsigned char* mine = at;
            at += bytes;
            return mine;
        };
        ring = take(p().stages * stage_bytes(p(), j.backward));
        work = reinterpret_cast<T*>(take(work_bytes(c, p(), j.backward)));
        if (j.backward) {
            normaliser = reinterpret_cast<float*>(take(scores_bytes(c, p())));
            o_do = normaliser + scores_bytes(c, p()) / 8;
            mean = reinterpret_cast<float*>(take(rows * 8));
            inverse = mean + rows;
        } else {
            xn = reinterpret_cast<T*>(take(rows * (c.d_model + PAD) * OPERAND));
        }
        low = reinterpret_cast<int*>(take(rows * 8));
        high = low + rows;
        sums = reinterpret_cast<float*>(take(128));
        tile = p().tile_in_shared ? Tile{reinterpret_cast<float*>(at), d() + int(PAD)}
                                  : aside(int(states_aside(c, j.backward)));
        const int n = int(c.seq_len);
        for (int r = threadIdx.x; r < rows; r += blockDim.x) {
            const int pos = r % n;
            const int64_t length = r >= inside ? 0 : c.lengths ? smaller<int64_t>(c.lengths[sample + r / n], n) : n;
            const int last = pos < length ? r - pos + int(c.causal ? pos + 1 : length) : 0;
            low[r] = last ? r - pos : int(MOST_ROWS);
            high[r] = last;
        }
        sync_block();
    }
};

}  // namespace shift_cuda
