// out = a b^T with a [rows, k] in shared memory and the weights b streamed from L2, for sm_90a.
//
// A warp of its own has the weights of all products of all layers and loops brought through the ring, in the order of
// use (plan.h, each_product), tiles of 128 n x 64 k; it never waits for a product, only for room. The blocks of a
// cluster are at the same product at about the same time, so each brings its share of a tile to all of them. Where
// the ring holds the whole block's weights it brings them once.
//
// Two warpgroups: of up to 128 rows each takes 64 and all columns of a tile, of up to 64 rows 64 of the columns; what
// is computed of rows that do not exist goes nowhere. wgmma with a in registers (by ldmatrix, so that the operand's
// layout is the other kernels'), b in the ring. No barrier between tiles but each stage's own.
#pragma once

namespace shift_cuda {

template <class T>
__device__ inline bool reads_weights_once(const Program<T>& p) {
    return p.c().n_layers * p.p().tiles == p.p().stages;
}

// Full: bytes have arrived. Empty: every warp with rows, in every block of the cluster, is done with the stage.
template <class T>
__device__ inline void start_ring(const Program<T>& p) {
    for (int s = 0; s < p.p().stages; s++) {
        mbarrier_init(p.full() + s, 1);
        mbarrier_init(p.empty() + s, p.warps() * int(p.p().cluster));
    }
    mbarrier_init(p.again(), 1);
    mbarrier_init(p.met(), p.warps() * p.split());
    mbarrier_init_fence();
}

// By one thread. With halting only those who own the rows know whether another loop comes: begins_loop says so.
template <class T>
__device__ inline void stream_weights(const Program<T>& p) {
    const Call& c = p.c();
    const int stages = int(p.p().stages), blocks = int(p.p().cluster), share = int(SWIZZLED_TILE) / blocks;
    const int64_t tiles = c.n_layers * p.p().tiles;
    const int64_t most = c.loops ? smaller(c.loops[p.sample()], c.most_loops) : c.most_loops;
    const unsigned char* weights = static_cast<const unsigned char*>(c.workspace);
    const int offset = cluster_rank() * share;
    int s = 0, round = 0;
    for (int64_t t = 0; t < (reads_weights_once(p) ? smaller<int64_t>(most, 1) : most); t++) {
        if (c.halting) {
            mbarrier_wait(p.again(), int(t % 2));
            if (!*reinterpret_cast<int*>(p.again() + 1)) return;
        }
        for (int64_t i = 0; i < tiles; i++) {
            mbarrier_wait(p.empty() + s, round % 2 ^ 1);
            mbarrier_arrive_expect(p.full() + s, int(SWIZZLED_TILE));
            unsigned char* to = p.ring() + s * SWIZZLED_TILE + offset;
            const unsigned char* from = weights + i * SWIZZLED_TILE + offset;
            if (blocks == 1)
                bulk_copy(to, from, share, p.full() + s);
            else
                bulk_copy_multicast(to, from, share, p.full() + s, uint16_t((1 << blocks) - 1));
            if (++s == stages) s = 0, round++;
        }
    }
}

template <class T>
__device__ inline bool begins_loop(const Program<T>& p, int64_t t, bool running) {
    if (p.c().halting && threadIdx.x == 0 && (t == 0 || !reads_weights_once(p))) {
        *reinterpret_cast<int*>(p.again() + 1) = running;
        mbarrier_arrive(p.again());
    }
    return running;
}

// acc[h] += a b^T for a tile's columns 64 h to 64 h + 63, h < HALVES, whose lines begin at b. Beyond k both are zero.
template <class T, int HALVES>
__device__ inline void add_products(float (&acc)[2][32], const uint32_t (&a)[4][4], const unsigned char* b) {
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wgmma<T, 64>(acc[half], a[kk], wgmma_descriptor(b + half * 64 * 128 + kk * 32), true);
    wgmma_commit();
    wgmma_wait<0>();
}

// As the other multiply; where b is in memory, and what follows, only the producer knows.
template <bool ROWS_ALONG_N, class T, class Out>
__device__ inline void multiply(const Program<T>& p, Rows<T> a, const T*, int64_t, int n, int k, Out out,
                                Ahead<T> = {}) {
    static_assert(!ROWS_ALONG_N, "weights are packed as the forward reads them");
    const bool once = reads_weights_once(p);
    const int tiles_k = tiles_along(k, TILE_K), tiles = tiles_along(n, TILE_N) * tiles_k;
    const bool beside = p.rows() <= 64;  // the warpgroups share the columns, 64 each; else the rows
    const int row = (beside ? 0 : warp() / 4 * 64) + warp() % 4 * 16, column = beside ? warp() / 4 * 64 : 0;
    const T* at = a.at + smaller(row + lane() % 16, p.rows() - 1) * a.ld + lane() / 16 * 8;  // as load_a
    float acc[2][32] = {};
    p.sync();
    for (int i = 0; i < tiles; i++) {
        const int s = p.next_tile, phase = once ? 0 : p.round % 2;
        const int n0 = i / tiles_k * int(TILE_N), k0 = i % tiles_k * int(TILE_K);
        mbarrier_wait(p.full() + s, phase);
        uint32_t fa[4][4] = {};
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            if (k0 + 16 * kk < k) ldmatrix(fa[kk], at + k0 + 16 * kk);
        const unsigned char* b = p.ring() + s * SWIZZLED_TILE + column * 128;
        if (n0 + 64 < n && !beside)  // two whole paths, so that no register moves while wgmma owns it
            add_products<T, 2>(acc, fa, b);
        else
            add_products<T, 1>(acc, fa, b);
        if (++p.next_tile == p.p().stages) p.next_tile = 0, p.round++;
        if (!once && lane() == 0)
            for (int rank = 0; rank < p.p().cluster; rank++) mbarrier_arrive_at(p.empty() + s, rank);
        if (i % tiles_k < tiles_k - 1) continue;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (n0 + column + 16 * j < n && (j < 4 || !beside)) {
                const float* x = acc[j / 4] + j % 4 * 8;
                const int r = row + lane() / 4, col = n0 + column + 16 * j + lane() % 4 * 2;
                if (p.exists(r)) out(r, col, make_float2(x[0], x[1]), make_float2(x[4], x[5]));
                if (p.exists(r + 8)) out(r + 8, col, make_float2(x[2], x[3]), make_float2(x[6], x[7]));
            }
#pragma unroll
        for (int j = 0; j < 64; j++) acc[j / 32][j % 32] = 0.0f;
    }
}

}  // namespace shift_cuda
