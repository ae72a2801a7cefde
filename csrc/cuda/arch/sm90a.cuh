// out = a b with a [rows, k] in shared memory (or streamed) and the weights b streamed from L2, for sm_90a.
//
// A warp of its own has the weights of all products of all layers and loops brought through the ring, in the order of
// use (plan.h, each_product); it never waits for a product, only for room. A stage is 64 k x 128 n (or 64 n, plan.h), two
// subtiles as they are packed: of rows one below the other for xn W^T, where wgmma reads them along k; side by side for
// the backward's dy W, where it reads the same subtiles along n. The blocks of a cluster are at the same product at about
// the same time, so each brings its share of a subtile to all of them. Where the ring holds a loop's weights they are
// brought once.
//
// Two warpgroups: of up to 128 rows each takes 64 and all columns of a tile, of up to 64 rows 64 of the columns; what
// is computed of rows that do not exist goes nowhere. wgmma with a in registers: by ldmatrix, so that the operand's
// layout is the other kernels'; or, streamed, as the block itself wrote it to device memory. The next tile's are on
// their way while this one's weights are waited for. No barrier between tiles but each stage's own.
#pragma once
#include "../matmul.cuh"
#include "../split.cuh"
#include "../tile/bulk_copy.cuh"
#include "../tile/wgmma.cuh"

namespace shift_cuda {

// Whether this compilation is for sm_90a (or emulates it): elsewhere its kernels are a trap that no plan leads to.
#if defined(SHIFT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HAS_SM90A = true;
#else
constexpr bool HAS_SM90A = false;
#endif

struct Sm90a {
    static constexpr bool ROWS_ARE_PADDED = false, SPLITS = true, BANDS = true;
    static constexpr int OWNERS = int(CONSUMERS);  // all but those who stream weights

    // All parts of a layer's weights as subtiles that wgmma reads, swizzled. number_at(weight, row, column).
    template <class T, class Number>
    __device__ static void pack_weights(const Job& job, const Weights<T>& w, Number number_at) {
        T* const to = w.qkv();
        const auto pack_part = [&](const Part& of) {
            const int64_t across = subtiles_along(of.k), some = subtiles_along(of.n) * across;
            for (int64_t i = blockIdx.x; i < some; i += gridDim.x)
                for (int pair = threadIdx.x; pair < SUBTILE_SIDE * SUBTILE_SIDE / 2; pair += blockDim.x) {
                    const int line = pair / int(SUBTILE_SIDE / 2), at = pair % int(SUBTILE_SIDE / 2) * 2;
                    const int64_t r = i / across * SUBTILE_SIDE + line, j = i % across * SUBTILE_SIDE + at;
                    const bool is = r < of.n && j < of.k;
                    const float x = is ? number_at(of.weight, of.row + r, of.column + j) : 0.0f;
                    const float y = is ? number_at(of.weight, of.row + r, of.column + j + 1) : 0.0f;
                    T* subtile = to + (of.subtile + i) * (SUBTILE / OPERAND);
                    store(subtile + swizzled(line, at * 2) / int(OPERAND), pack<T>(x, y));
                }
        };
        for (int half = 0; half < halves(job.call); half++)
            each_pass(job.call, job.plan, half != 0, [&](const Part& to_hidden, const Part& back) {
                pack_part(to_hidden);
                pack_part(back);
            });
    }
};

template <class T>
__device__ inline bool reads_weights_once(const Program<Sm90a, T>& p) {
    return p.p().tiles == p.p().stages;
}

// Full: bytes have arrived. Empty: every warp with rows, in every block of the cluster, is done with the stage.
//
// Neither needs the cluster's scope, though blocks of a cluster arrive at each other's `empty`. What full hands over
// lies in the waiting block's own shared memory, brought by copies whose completion the wait acquires. What empty hands
// over is no data: consumers have only read the stage, and their reads are done, as wgmma_wait has returned before they
// arrive. A copy that then writes to it is issued after the arrival was seen.
template <class T>
__device__ inline void start_ring(const Program<Sm90a, T>& p) {
    for (int s = 0; s < p.p().stages; s++) {
        mbarrier_init(p.full() + s, 1);
        mbarrier_init(p.empty() + s, p.warps() * int(p.p().cluster));
    }
    mbarrier_init(p.again(), 1);
    mbarrier_init(p.sequence_barrier(), p.warps() * p.split());
    mbarrier_init_fence();
}

// By one thread, for all programs of the block. With halting, where a block has one, only those who own the rows know
// whether another loop comes: begins_loop says so.
template <class T, class Loops>
__device__ inline void stream_weights(Program<Sm90a, T> p, Loops loops) {
    const Call& c = p.c();
    const int stages = int(p.p().stages), blocks = int(p.p().cluster), share = int(SUBTILE) / blocks;
    const int offset = cluster_rank() * share, columns = int(p.p().tile_columns), stage = int(stage_bytes(p.p(), false));
    int s = 0, passes = 0;
    const auto bring = [&](unsigned char* to, const unsigned char* from) {
        if (blocks == 1)
            bulk_copy(to, from, share, p.full() + s);
        else
            bulk_copy_multicast(to, from, share, p.full() + s, uint16_t((1 << blocks) - 1));
    };
    const auto stream = [&](int64_t layer, const Part& of, bool transposed) {
        const unsigned char* subtiles = reinterpret_cast<unsigned char*>(Weights<T>{p.job, int(layer)}.qkv());
        const int below = int(subtiles_along(of.k) * SUBTILE), beside = int(SUBTILE);
        const int n = int(transposed ? of.k : of.n), to_next_n = transposed ? beside : below;
        const int k = int(transposed ? of.n : of.k), to_next_k = transposed ? below : beside;
        const bool along_k = tiles_lie_along_k(p.p(), of, transposed);
        const int side = int(SUBTILE_SIDE), step_n = along_k ? side : columns, step_k = along_k ? columns : side;
#pragma unroll 1
        for (int n0 = 0; n0 < n; n0 += step_n)
#pragma unroll 1
            for (int k0 = 0; k0 < k; k0 += step_k) {
                const int some = tiles_along(smaller(along_k ? k - k0 : n - n0, columns), side);
                unsigned char* to = p.ring() + s * stage + offset;
                const unsigned char* from = subtiles + of.subtile * SUBTILE + offset;
                from += n0 / side * to_next_n + k0 / side * to_next_k;
                mbarrier_wait(p.empty() + s, passes % 2 ^ 1);
                mbarrier_arrive_expect(p.full() + s, some * int(SUBTILE));
#pragma unroll 1
                for (int i = 0; i < some; i++) bring(to + i * SUBTILE, from + i * (along_k ? to_next_k : to_next_n));
                if (++s == stages) s = 0, passes++;
            }
    };
    do {
        int n = loops(p);
        if (reads_weights_once(p)) n = smaller(n, 1 - passes);
#pragma unroll 1
        for (int t = 0; t < n; t++) {
            if (c.halting) {
                mbarrier_wait(p.again(), t % 2);
                if (!*reinterpret_cast<int*>(p.again() + 1)) return;
            }
            each_product(c, p.p(), p.job.backward, stream);
        }
    } while (p.next());
}

template <class T>
__device__ inline bool begins_loop(const Program<Sm90a, T>& p, int64_t t, bool running) {
    if (p.c().halting && threadIdx.x == 0 && (t == 0 || !reads_weights_once(p))) {
        *reinterpret_cast<int*>(p.again() + 1) = running;
        mbarrier_arrive(p.again());
    }
    return running;
}

// What a thread holds of a [16, 64] operand, from `row` and column k0 on, for four products; 0 beyond k.
template <class T>
__device__ inline void load_a_64(uint32_t (&fa)[4][4], const Program<Sm90a, T>& p, const Rows<T>& a, int row, int k0,
                                  int k) {
    const T* at = a.at + int64_t(smaller(row + lane() % 16, p.rows() - 1)) * a.ld + lane() / 16 * 8;  // as load_a
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        const int j = k0 + 16 * kk;
        if (!a.streamed && j < k && p.exists(row))
            ldmatrix(fa[kk], at + j);
        else
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row + lane() / 4 + i % 2 * 8, column = j + lane() % 4 * 2 + i / 2 * 8;
                fa[kk][i] = j < k && r < p.inside ? load<uint32_t>(a.at + int64_t(r) * a.ld + column) : 0;
            }
    }
}

// The stage of the next weights, which have arrived.
template <class T>
__device__ inline int next_stage(const Program<Sm90a, T>& p) {
    const int s = p.next_tile;
    mbarrier_wait(p.full() + s, reads_weights_once(p) ? 0 : p.ring_passes & 1);
    if (++p.next_tile == p.p().stages) p.next_tile = 0, p.ring_passes++;
    return s;
}

template <class T>
__device__ inline const unsigned char* stage_at(const Program<Sm90a, T>& p, int s) {
    return p.ring() + s * int(stage_bytes(p.p(), false));
}

// By a warp that is done with it.
template <class T>
__device__ inline void give_back(const Program<Sm90a, T>& p, int s) {
    if (!reads_weights_once(p) && lane() == 0)
#pragma unroll 1
        for (int rank = 0; rank < p.p().cluster; rank++) mbarrier_arrive_at(p.empty() + s, rank);
}

template <Major B>
constexpr int NEXT_16_K = B == K_MAJOR ? 32 : 16 * 128;  // bytes

// acc[h] = a b for a tile's columns 64 h to 64 h + 63, h < HALVES, whose subtiles begin at b; or with `add` += a b. Beyond
// k both are zero. What acc was is dropped by wgmma's own scale-d: zeros would be 64 moves a tile, for which ptxas then
// waits (C7520).
template <Major B, class T, int HALVES>
__device__ inline void start_products(float (*acc)[32], const uint32_t (&a)[4][4], WgmmaDescriptor b, bool add) {
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wgmma<T, 64, B>(acc[half], a[kk], b.moved(half * int(SUBTILE) + kk * NEXT_16_K<B>), add || kk > 0);
}

template <Major B, class T, int HALVES>
__device__ inline void add_products(float (*acc)[32], const uint32_t (&a)[4][4], const unsigned char* b, bool add) {
    wgmma_fence();
    start_products<B, T, HALVES>(acc, a, wgmma_descriptor(b), add);
    wgmma_commit();
    wgmma_wait<0>();
}

// What is done goes out, 16 columns at a time: 16 rows from `row`, and of n columns those from `column` on, at most 64.
template <class T, class Out>
__device__ inline void hand_out(const Program<Sm90a, T>& p, const float (&acc)[32], int row, int column, int n, Out out) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (n % int(SUBTILE_SIDE) ? column + 16 * j < n : column < n) {
            const float* x = acc + 8 * j;
            const int r = row + lane() / 4, col = column + 16 * j + lane() % 4 * 2;
            if (p.exists(r)) out(r, col, make_float2(x[0], x[1]), make_float2(x[4], x[5]));
            if (p.exists(r + 8)) out(r + 8, col, make_float2(x[2], x[3]), make_float2(x[6], x[7]));
        }
}

// As the other multiply; where b is in memory, and what follows, only the producer knows. Whoever calls it is inlined
// into the kernel too: in a function of its own ptxas would wait for each wgmma (C7510).
template <bool ROWS_ALONG_N, class T, class Out>
__device__ __forceinline__ void multiply(const Program<Sm90a, T>& p, Rows<T> a, const T*, int64_t, int n, int k, Out out,
                                         Prefetch<T> = {}) {
    constexpr Major B = ROWS_ALONG_N ? MN_MAJOR : K_MAJOR;
    const int columns = int(p.p().tile_columns);
    const bool beside = p.rows() <= 64;  // the warpgroups share the columns, 64 each; else the rows
    const int row = (beside ? 0 : warp() / 4 * 64) + warp() % 4 * 16, column = beside ? warp() / 4 * 64 : 0;
    uint32_t fa[4][4], next[4][4];
    float acc[2][32] = {};
    p.sync_band();
    load_a_64(next, p, a, row, 0, k);
#pragma unroll 1
    for (int n0 = 0; n0 < n; n0 += columns) {
#pragma unroll 1
        for (int k0 = 0; k0 < k; k0 += int(TILE_K)) {
            // this tile's operand; the next one's, on its way meanwhile
#pragma unroll
            for (int j = 0; j < 16; j++) fa[j / 4][j % 4] = next[j / 4][j % 4];
            const bool last_k = k0 + int(TILE_K) >= k;
            if (!last_k || n0 + columns < n) load_a_64(next, p, a, row, last_k ? 0 : k0 + int(TILE_K), k);
            const int s = next_stage(p);
            const unsigned char* b = stage_at(p, s) + column * 128;
            // Two whole paths, so that no register moves while wgmma owns it.
            if (columns > 64 && n0 + 64 < n && !beside)
                add_products<B, T, 2>(acc, fa, b, k0 > 0);
            else if (n0 + column < n)
                add_products<B, T, 1>(acc, fa, b, k0 > 0);
            else
                sync_warp();  // before one lane says that all are done with what they have waited for
            give_back(p, s);
        }
        hand_out(p, acc[0], row, n0 + column, n, out);
        if (columns > 64 && !beside) hand_out(p, acc[1], row, n0 + 64, n, out);
    }
}

}  // namespace shift_cuda
