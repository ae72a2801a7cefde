// sm_80 and newer, by mma.sync: four warps side by side for 32 rows, all of them owners of rows and copiers of weights.
//
// multiply streams the weights b from L2 through a ring.
// The weight tiles of 128 columns x 64 k of all n and k are one sequence: while a tile is multiplied the next
// ones are under way (cp.async), at the end of a product those of the product that is known to follow, so that
// they arrive while its operand is still being computed. Four warps side by side take 32 columns each, for 32
// rows; 32 accumulators a thread. One barrier a tile.
#pragma once
#include "../matmul.cuh"

namespace shift_cuda {

struct Sm80 {
    static constexpr bool ROWS_ARE_PADDED = true, SPLITS = false, BANDS = false;
    static constexpr int OWNERS = 0;

    // A layer's weights as matrices [out, in]. number_at(weight, row, column) of the packed rows; 0 where there is none.
    template <class T, class Number>
    __device__ static void pack_weights(const Job& job, const Weights<T>& w, Number number_at) {
        const Call& c = job.call;
        const int64_t d = c.d_model, ff = job.plan.ff_pad, attn = c.n_heads * c.head_dim;
        const auto pack_matrix = [&](T* to, Weight weight, int64_t rows, int64_t columns) {
            const int64_t step = int64_t(gridDim.x) * blockDim.x;
            for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * columns / 2; i += step) {
                const int64_t r = 2 * i / columns, j = 2 * i % columns;
                store(to + 2 * i, pack<T>(number_at(weight, r, j), number_at(weight, r, j + 1)));
            }
        };
        pack_matrix(w.qkv(), QKV_W, qkv_columns(c), d);
        pack_matrix(w.out(), OUT_W, d, attn);
        if (ff) pack_matrix(w.up(), UP_W, hidden_parts(c) * ff, d);
        if (ff) pack_matrix(w.down(), DOWN_W, d, ff);
    }
};

constexpr int LD_N = int(TILE_K + PAD);  // leading dimension of a [128 n][64 k] tile and of a streamed a tile
constexpr int LD_K = int(TILE_N + PAD);  // of a [64 k][128 n] tile, which is smaller
static_assert(TILE_K * LD_K <= TILE_N * LD_N, "both kinds of tile share a stage");

// Copies [rows][columns] (columns a multiple of 8) into shared memory, 16 bytes a thread; beyond `inside` zeros.
template <class T>
__device__ inline void copy_tile(T* to, int ld_to, const T* from, int64_t ld_from, int rows, int columns, int inside) {
    const int chunks = columns / 8;
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
        const int r = i / chunks, j = i % chunks * 8;
        const bool is = r < inside;
        copy_async(to + r * ld_to + j, from + (is ? r * ld_from + j : 0), is ? 16 : 0);
    }
}

// See matmul.cuh.
template <bool ROWS_ALONG_N, class T, class Out>
__device__ __forceinline__ void multiply(const Program<Sm80, T>& p, Rows<T> a, const T* b, int64_t ld_b, int n, int k,
                                           Out out, Prefetch<T> prefetch = {}) {
    const int stages = int(p.p().stages), stage = int(stage_bytes(p.p(), p.job.backward));
    const int tiles_k = tiles_along(k, TILE_K), tiles = tiles_along(n, TILE_N) * tiles_k;
    const int next_k = tiles_along(prefetch.k, TILE_K), next = prefetch.b ? tiles_along(prefetch.n, TILE_N) * next_k : 0;
    const int first = p.next_tile;
    const auto b_tile = [&](int i) { return p.template shared<T>((first + i) % stages * stage); };
    const auto issue = [&](int i) {
        if (i >= tiles && i - tiles < next) {
            const int n0 = (i - tiles) / next_k * int(TILE_N), k0 = (i - tiles) % next_k * int(TILE_K);
            const int some_n = smaller(prefetch.n - n0, int(TILE_N)), some_k = smaller(prefetch.k - k0, int(TILE_K));
            copy_tile(b_tile(i), LD_N, prefetch.b + n0 * prefetch.ld + k0, prefetch.ld, some_n, some_k, some_n);
        }
        if (i < tiles) {
            const int n0 = i / tiles_k * int(TILE_N), k0 = i % tiles_k * int(TILE_K);
            const int some_n = smaller(n - n0, int(TILE_N)), some_k = smaller(k - k0, int(TILE_K));
            T* to = b_tile(i);
            if (ROWS_ALONG_N)
                copy_tile(to, LD_K, b + k0 * ld_b + n0, ld_b, some_k, some_n, some_k);
            else
                copy_tile(to, LD_N, b + n0 * ld_b + k0, ld_b, some_n, some_k, some_n);
            if (a.streamed) copy_tile(to + TILE_N * LD_N, LD_N, a.at + k0, a.ld, p.rows(), some_k, p.inside);
        }
        copy_async_commit();  // an empty group too, so that their number tells which have arrived
    };
    const int row = warp() / 4 * 32, column = warp() % 4 * 32;
    float acc[2][4][4] = {};
    int under_way = 0;
    if (p.prefetched)
        under_way = smaller(tiles, stages - 1);
    else
        sync_block();  // a, if streamed, is written; and everyone is done with the ring
    for (int i = under_way; i < stages - 1; i++) issue(i);
    for (int i = 0; i < tiles; i++) {
        if (stages == 2) copy_async_wait<0>();
        if (stages == 3) copy_async_wait<1>();
        if (stages == 4) copy_async_wait<2>();
        sync_block();  // tile i has arrived, and everyone is done with tile i - 1, whose stage is the next to fill
        issue(i + stages - 1);
        const int n0 = i / tiles_k * int(TILE_N) + column, k0 = i % tiles_k * int(TILE_K);
        const T* bs = b_tile(i);
        const T* as = a.streamed ? bs + TILE_N * LD_N + row * LD_N : a.at + row * a.ld + k0;
        const int lda = a.streamed ? LD_N : a.ld;
#pragma unroll 1
        for (int kk = 0; kk < smaller(k - k0, int(TILE_K)); kk += 16) {
            uint32_t fa[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
                if (row + 16 * m < p.rows()) load_a(fa[m], as + 16 * m * lda + kk, lda, p.rows_from(row + 16 * m));
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (n0 + 16 * j < n) {
                    uint32_t fb[4];
                    if (ROWS_ALONG_N)
                        load_b_rows_along_n(fb, bs + kk * LD_K + column + 16 * j, LD_K);
                    else
                        load_b(fb, bs + (column + 16 * j) * LD_N + kk, LD_N);
#pragma unroll
                    for (int m = 0; m < 2; m++)
                        if (row + 16 * m < p.rows()) mma_16<T>(acc[m][2 * j], acc[m][2 * j + 1], fa[m], fb);
                }
        }
        if (i % tiles_k < tiles_k - 1) continue;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (row + 16 * m < p.rows() && n0 + 16 * j < n) {
                    float(&x)[4] = acc[m][2 * j];
                    float(&y)[4] = acc[m][2 * j + 1];
                    const int r = row + 16 * m + lane() / 4, col = n0 + 16 * j + lane() % 4 * 2;
                    if (p.exists(r)) out(r, col, make_float2(x[0], x[1]), make_float2(y[0], y[1]));
                    if (p.exists(r + 8)) out(r + 8, col, make_float2(x[2], x[3]), make_float2(y[2], y[3]));
#pragma unroll
                    for (int v = 0; v < 4; v++) x[v] = y[v] = 0.0f;
                }
    }
    p.next_tile = (first + tiles) % stages;
    p.prefetched = next > 0;
}

}  // namespace shift_cuda
