// What a program (a block of threads that owns some rows) knows: the call, the packed weights, its memory.
//
// Packed weights of a layer, numbers of type T, each matrix [out, in] as torch has it but for the order of rows:
//   qkv [head_chunks of kv_heads][q heads, k heads, v heads][head_dim][d_model]; with rope the halves of q and k heads
//       interleaved by 8, so that a rotation's pair is in one thread's registers
//   out [d_model][n_heads head_dim]
//   up  [ff_pad or 2 ff_pad][d_model]; gates and values interleaved by 8, likewise
//   down [d_model][ff_pad]
// For sm_90a the same matrices, but as subtiles of the parts that are multiplied at once (plan.h, each_pass).
//
// A is the architecture's policy, arch/*.cuh:
//   ROWS_ARE_PADDED    rows are a multiple of 16; else as many as tokens
//   SPLITS             a sequence's rows may be split over the blocks of a cluster
//   OWNERS             threads that own rows; 0: all of the block
//   BANDS              whether bands of rows have warps of their own (Program::bands)
//   multiply           overloads for Program<A, T>; pack_weights likewise
// Packed vectors of a layer, fp32: biases of qkv, of up, of out, of down, then the norms' eight; 0 where absent.
// The loop norm is the first norm of "layer" n_layers.
#pragma once
#include "plan.h"
#include "tile/barrier.cuh"
#include "tile/cluster.cuh"
#include "tile/copy_async.cuh"
#include "tile/ldmatrix.cuh"
#include "tile/math.cuh"
#include "tile/mbarrier.cuh"
#include "tile/memory.cuh"
#include "tile/mma.cuh"
#include "tile/types.cuh"
#include "tile/warp.cuh"

namespace shift_cuda {

using namespace tile;

enum NormSlot { NORM1 = 0, NORM1_POST = 2, NORM2 = 4, NORM2_POST = 6, NORM_SLOTS = 8 };  // a bias behind each weight

// Where a program's shared memory and a layer's packed weights have their parts: bytes, and numbers.
struct Layout {
    int mbarriers, xn, work, remote, normaliser, o_do, moments, spans, sums, tile;  // the ring comes first
    int ld_work;
    int norm_columns;  // whose sums of a norm's gradient fit into work at once
    int64_t scratch, scratch_state;           // bytes of a block's workspace, and of one state there
    int64_t layer, out, up, down;             // weights, in T; for sm_90a only how many a layer has
    int64_t vectors, layer_vectors;           // bytes from where the weights begin; fp32
    int up_bias, out_bias, down_bias, norms;  // fp32 behind qkv's bias
};

constexpr Layout layout(const Call& c, const Plan& p, bool backward) {
    Layout l = {};
    const int64_t d = c.d_model;
    const int ring = int(p.stages * stage_bytes(p, backward));
    const bool beside = operand_in_shared(c, p);  // the weights, in subtiles like theirs
    l.mbarriers = ring + int(beside ? xn_bytes(c, p, backward) : 0);
    l.work = l.mbarriers + int(mbarrier_bytes(p));
    l.remote = l.work + int(work_bytes(c, p, backward));
    l.normaliser = l.remote + int(remote_bytes(c, p, backward));
    l.xn = beside ? ring : l.normaliser;
    l.o_do = l.normaliser + int(scores_bytes(c, p) / 2);
    l.moments = l.normaliser + int(scores_bytes(c, p));
    l.spans = backward ? l.moments + int(p.rows * 8) : l.normaliser + int(beside ? 0 : xn_bytes(c, p, backward));
    l.sums = l.spans + int(p.rows * 8);
    l.tile = l.sums + 128;
    l.ld_work = int(work_columns(c, p, backward));
    l.norm_columns = int(work_bytes(c, p, backward) / norm_sums_bytes(p) * NORM_COLUMNS);
    l.scratch = scratch_bytes(c, p, backward);
    l.scratch_state = scratch_state_bytes(c, p, backward);
    l.layer = p.tiles ? layer_subtiles(c, p) * (SUBTILE / OPERAND) : layer_weights(c, p.ff_pad);
    l.out = qkv_columns(c) * d;
    l.up = l.out + c.n_heads * c.head_dim * d;
    l.down = l.up + hidden_parts(c) * p.ff_pad * d;
    l.vectors = weights_bytes(c, p);
    l.layer_vectors = layer_vectors(c, p.ff_pad);
    l.up_bias = int(qkv_columns(c));
    l.out_bias = l.up_bias + int(hidden_parts(c) * p.ff_pad);
    l.down_bias = l.out_bias + int(d);
    l.norms = l.down_bias + int(d);
    return l;
}

// A kernel's only argument, in constant memory.
struct Job {
    Call call;
    Plan plan;
    Layout at;
    int backward;
};

// A layer's packed weights.
template <class T>
struct Weights {
    const Job& job;
    int layer;
    __device__ unsigned char* base() const { return static_cast<unsigned char*>(job.call.packed); }
    __device__ T* qkv() const { return reinterpret_cast<T*>(base()) + layer * job.at.layer; }
    __device__ T* out() const { return qkv() + job.at.out; }
    __device__ T* up() const { return qkv() + job.at.up; }
    __device__ T* down() const { return qkv() + job.at.down; }
    __device__ float* qkv_bias() const {
        return reinterpret_cast<float*>(base() + job.at.vectors) + layer * job.at.layer_vectors;
    }
    __device__ float* up_bias() const { return qkv_bias() + job.at.up_bias; }
    __device__ float* out_bias() const { return qkv_bias() + job.at.out_bias; }
    __device__ float* down_bias() const { return qkv_bias() + job.at.down_bias; }
    __device__ float* norm(int slot) const { return qkv_bias() + job.at.norms + slot * int(job.call.d_model); }
};

// Row of a matrix whose two halves of `half` rows are interleaved by 8: where packed row i comes from.
__device__ inline int from_halves(int i, int half) { return i / 16 * 8 + i % 8 + (i % 16 < 8 ? 0 : half); }

// Row of in_proj that packed row i of a chunk of heads is.
__device__ inline int qkv_row(const Job& job, int chunk, int i) {
    const Call& c = job.call;
    const int hd = int(c.head_dim), heads = int(job.plan.kv_heads), queries = heads * int(query_group(c));
    const int head = i / hd;
    const int first = head < queries           ? chunk * queries + head
                      : head < queries + heads ? int(c.n_heads) + chunk * heads + head - queries
                                               : int(c.n_heads + c.n_kv_heads) + chunk * heads + head - queries - heads;
    const bool turned = c.position == ROPE && head < queries + heads;
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
    __device__ float2 get(int r, int j) const { return load<float2>(row(r) + j); }
};

// The same, put aside in the workspace in any dtype; or nothing, where `at` is null.
struct ScratchState {
    void* at;
    int ld;
    int64_t dtype;
    __device__ float2 get(int r, int j) const { return load_pair(at, int64_t(r) * ld + j, dtype); }
    __device__ void set(int r, int j, float2 x) const { store_pair(at, int64_t(r) * ld + j, dtype, x); }
};

// A pair of columns: its row, its first column, and, where it is a register, which of the thread's pairs it is.
struct At {
    int row, column, index;
};

// Operand rows of a matrix product. Streamed: in device memory, rows beyond `inside` count as zero.
template <class T>
struct Rows {
    T* at;
    int ld;
    bool streamed;
    __device__ void put(At to, float2 x) const { store(at + int64_t(to.row) * ld + to.column, pack<T>(x.x, x.y)); }
};

template <class A, class T>
struct Program {
    const Job& job;
    int index;      // of the plan's programs
    int first;      // the first row's position in its sequence: not 0 where that is split
    int inside;     // how many of the rows are tokens of the batch (pads included)
    int64_t token;  // the first row in [batch * seq_len]
    Tile tile;      // not computed where it is needed: that is the innermost loop
    // The ring of weight tiles, see matmul.cuh: where the next product's first tile is, and whether it and those
    // behind it are under way.
    mutable int next_tile = 0;
    mutable bool prefetched = false;
    mutable int ring_passes = 0;  // how often the ring has come round; sm_90a
    mutable int sequence_syncs = 0;  // see split.cuh

    __device__ const Call& c() const { return job.call; }
    __device__ const Plan& p() const { return job.plan; }
    __device__ int d() const { return int(job.call.d_model); }
    __device__ int rows() const { return int(job.plan.rows); }
    // How many rows there are from one on, a multiple of 16, if there are any, or that it is 16 at least; whether it is one.
    __device__ int rows_from(int row) const { return A::ROWS_ARE_PADDED || rows() % 16 == 0 ? 16 : rows() - row; }
    __device__ bool exists(int row) const { return A::ROWS_ARE_PADDED || row < rows(); }
    __device__ int split() const { return A::SPLITS ? int(job.plan.split) : 1; }
    __device__ int part() const { return int(blockIdx.x) % split(); }  // which of the split sequence's
    __device__ int sample() const { return index / split() * int(job.plan.sequences); }
    __device__ int position(int row) const { return (first + row) % int(job.call.seq_len); }  // in its sequence
    __device__ int loops() const {  // MAX_LOOPS of Python's is an int
        return int(c().loops ? smaller(c().loops[sample()], c().most_loops) : c().most_loops);
    }

    // Those who own the rows: all of the block, but for the warp that streams weights.
    __device__ int threads() const { return A::OWNERS ? A::OWNERS : int(blockDim.x); }
    __device__ int warps() const { return threads() / 32; }
    __device__ void sync() const {
        if (A::OWNERS)
            sync_threads(1, threads());
        else
            sync_block();
    }

    // Rows lie in bands, each with warps of its own, who do with these rows all that concerns a row alone: norms,
    // products, queries. So a band's warps wait for each other; for other bands' only where attention reads their
    // keys. A product takes 16 rows a warp, on sm_90a 64 a warpgroup: there up to 128 rows are eight bands of 16 with a
    // warp each, up to 64 four with two warps (they share a product's columns), fewer one band, as on other devices,
    // lest warps stand idle.
    __device__ int bands() const { return !A::BANDS || rows() <= 32 ? 1 : rows() <= 64 ? 4 : 8; }
    __device__ int band() const { return warp() % bands(); }  // 0 where there is one
    __device__ int band_begin() const { return 16 * band(); }
    __device__ int band_end() const { return bands() == 1 ? rows() : smaller(band_begin() + 16, rows()); }
    __device__ int band_warps() const { return warps() / bands(); }
    __device__ int warp_in_band() const { return warp() / bands(); }
    __device__ void sync_band() const {
        if (bands() == 1)
            sync();
        else if (band_warps() == 1)
            sync_warp();
        else
            sync_threads(2 + band(), 32 * band_warps());
    }
    __device__ void sync_warpgroup() const { sync_threads(2 + warp() / 4, 128); }
    // Of all bands that have rows of a sequence together: where sequences end with a warpgroup's 64 rows, the warpgroup's.
    // So one warpgroup may compute a softmax or a GELU while the other multiplies.
    __device__ void sync_bands() const {
        if (bands() == 8 && 64 % job.call.seq_len == 0)
            sync_warpgroup();
        else
            sync();
    }

    // Shared memory, see plan.h.
    template <class N>
    __device__ N* shared(int at) const {
        return reinterpret_cast<N*>(shared_memory() + at);
    }
    __device__ unsigned char* ring() const { return shared<unsigned char>(0); }
    // mbarriers, sm_90a: of a split sequence's blocks; see arch/sm90a.cuh.
    __device__ uint64_t* sequence_barrier() const { return shared<uint64_t>(job.at.mbarriers); }
    __device__ uint64_t* full() const { return sequence_barrier() + 2; }             // [stages]
    __device__ uint64_t* empty() const { return full() + job.plan.stages; }          // [stages]
    __device__ uint64_t* again() const { return empty() + job.plan.stages; }         // and an int
    __device__ T* work() const { return shared<T>(job.at.work); }
    __device__ T* remote() const { return shared<T>(job.at.remote); }  // see split.cuh
    __device__ T* xn() const { return shared<T>(job.at.xn); }  // forward alone; the next four backward alone
    __device__ float* normaliser() const { return shared<float>(job.at.normaliser); }  // [query heads][rows]
    __device__ float* o_do() const { return shared<float>(job.at.o_do); }
    __device__ float* mean() const { return shared<float>(job.at.moments); }
    __device__ float* inverse() const { return mean() + rows(); }
    __device__ float* sums() const { return shared<float>(job.at.sums); }  // [32]
    // Row r sees the keys low[r] <= key < high[r], rows counted from where the first row's sequence begins; a pad
    // none: its high is 0.
    __device__ int* low() const { return shared<int>(job.at.spans); }
    __device__ int* high() const { return low() + rows(); }
    __device__ bool valid(int row) const { return high()[row] > 0; }

    // The i-th scratch state, see plan.h.
    __device__ unsigned char* scratch(int i) const {
        unsigned char* block = static_cast<unsigned char*>(c().workspace) + blockIdx.x * job.at.scratch;
        return block + i * job.at.scratch_state;
    }
    __device__ ScratchState scratch_state(int i, int64_t dtype) const { return {scratch(i), d() + int(PAD), dtype}; }

    // Calls f(row) for the rows that this warp takes where a row is one warp's; f(row, column) for this thread's pairs
    // of columns. They are the same in every pass over rows, so that such passes need no barrier among them.
    template <class F>
    __device__ void each_row(F f) const {
        for (int r = band_begin() + warp_in_band(); r < band_end(); r += band_warps()) f(r);
    }
    template <class F>
    __device__ void each_pair(F f) const {
        each_row([&](int r) {
            for (int j = 2 * lane(); j < d(); j += 64) f(r, j);
        });
    }
    // Calls f(item, row) for each of so many items of each 16 rows of the band, shared among the band's warps. Where a
    // sequence is split all warps are called equally often, for they bring others' rows together: with rows that do not
    // exist.
    template <class F>
    __device__ void each_16_rows(int items, F f) const {
        const int tiles = bands() == 1 ? (rows() + 15) / 16 : band_begin() < rows();
        const int all = split() == 1 ? items * tiles : bands() == 1 ? int(ceil_to(items * tiles, warps()))
                                                                    : int(ceil_to(items, band_warps()));
        for (int i = warp_in_band(); i < all; i += band_warps())
            f(i % items, i < items * tiles ? band_begin() + i / items * 16 : int(ceil_to(rows(), 16)));
    }

    __device__ explicit Program(const Job& j) : job(j), first(part() * int(j.plan.rows)) {
        unsigned char* last = scratch(int(scratch_states(j.call, j.backward)));
        tile = {j.plan.residual == IN_SHARED ? shared<float>(j.at.tile) : reinterpret_cast<float*>(last), d() + int(PAD)};
        be(int(blockIdx.x));
    }

    // Becomes the block's next program; false if there is none.
    __device__ bool next() {
        const bool is = index + int(gridDim.x) < job.plan.programs;
        if (is) be(index + int(gridDim.x));
        return is;
    }

    __device__ void be(int program) {
        index = program;
        token = sample() * c().seq_len + first;
        const int64_t left = smaller(job.plan.sequences, c().batch - sample()) * c().seq_len - first;
        inside = int(smaller<int64_t>(rows(), larger<int64_t>(left, 0)));
    }

    __device__ void find_spans() const {
        const Call& c = job.call;
        const int n = int(c.seq_len);
        sync();  // the program before has read its own
        for (int r = threadIdx.x; r < rows(); r += threads()) {
            const int pos = position(r), begin = first + r - pos;
            const int64_t length = r >= inside ? 0 : c.lengths ? smaller<int64_t>(c.lengths[sample() + r / n], n) : n;
            const int last = pos < length ? begin + int(c.causal ? pos + 1 : length) : 0;
            low()[r] = last ? begin : int(MOST_ROWS);
            high()[r] = last;
        }
        sync();
    }
};

}  // namespace shift_cuda
