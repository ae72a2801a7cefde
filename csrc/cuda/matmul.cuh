// out = a b with a [rows, k] in shared memory (or streamed) and the weights b streamed from L2 through a ring.
//
// The weight tiles of 128 columns x 64 k of all n and k are one sequence: while a tile is multiplied the next
// ones are under way (cp.async), at the end of a product those of the product that is known to follow, so that
// they arrive while its operand is still being computed. Four warps side by side take 32 columns each, for 32
// rows; 32 accumulators a thread. One barrier a tile.
#pragma once
#include "program.cuh"

namespace shift_cuda {

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

// A thread's part of a [16, 16] operand at p: what mma wants for a, from rows along k. Of the 16 rows at p, here and
// below, only so many exist, and the last that does stands for the others (with 0 or less it is ahead of p).
template <class T>
__device__ inline void load_a(uint32_t (&a)[4], const T* p, int ld, int rows) {
    ldmatrix(a, p + smaller(lane() % 16, rows - 1) * ld + lane() / 16 * 8);
}
// b [16 k, 16 n] for two products, from rows along k (one for each n), or from rows along n (one for each k).
template <class T>
__device__ inline void load_b(uint32_t (&b)[4], const T* p, int ld, int rows = 16) {
    ldmatrix(b, p + smaller(lane() % 8 + lane() / 16 * 8, rows - 1) * ld + lane() / 8 % 2 * 8);
}
template <class T>
__device__ inline void load_b_rows_along_n(uint32_t (&b)[4], const T* p, int ld, int rows = 16) {
    ldmatrix_transposed(b, p + smaller(lane() % 16, rows - 1) * ld + lane() / 16 * 8);
}

// c [16, 16] += a b.
template <class T>
__device__ inline void mma_16(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma<T>(c0, a, first);
    mma<T>(c1, a, second);
}

// The weights of the product that follows: b [n][k], or null where it is not known or is of another kind.
template <class T>
struct Ahead {
    const T* b = nullptr;
    int64_t ld = 0;
    int n = 0, k = 0;
};

constexpr int tiles_along(int n, int64_t side) { return (n + int(side) - 1) / int(side); }

#if !defined(SHIFT_SM90A)  // there: matmul_sm90a.cuh

// ROWS_ALONG_N false: b is [n][k], a weight as torch has it; true: [k][n]. n and k are multiples of 16.
// out(row, column, x, y): x are columns column and + 1, y column + 8 and + 9 of the same 16. Ends without a
// barrier: what out wrote may be read after the next one. multiply has one before it reads a.
template <bool ROWS_ALONG_N, class T, class Out>
__device__ SHIFT_OUT_OF_LINE void multiply(const Program<T>& p, Rows<T> a, const T* b, int64_t ld_b, int n, int k,
                                           Out out, Ahead<T> ahead = {}) {
    const int stages = int(p.p().stages), stage = int(stage_bytes(p.p(), p.job.backward));
    const int tiles_k = tiles_along(k, TILE_K), tiles = tiles_along(n, TILE_N) * tiles_k;
    const int next_k = tiles_along(ahead.k, TILE_K), next = ahead.b ? tiles_along(ahead.n, TILE_N) * next_k : 0;
    const int first = p.next_tile;
    const auto b_tile = [&](int i) { return p.template shared<T>((first + i) % stages * stage); };
    const auto issue = [&](int i) {
        if (i >= tiles && i - tiles < next) {
            const int n0 = (i - tiles) / next_k * int(TILE_N), k0 = (i - tiles) % next_k * int(TILE_K);
            const int some_n = smaller(ahead.n - n0, int(TILE_N)), some_k = smaller(ahead.k - k0, int(TILE_K));
            copy_tile(b_tile(i), LD_N, ahead.b + n0 * ahead.ld + k0, ahead.ld, some_n, some_k, some_n);
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
    if (p.begun)
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
    p.begun = next > 0;
}

#endif

// Adds scale (x + bias) to the tile; bias may be null.
__device__ inline void add_to_tile(Tile tile, int row, int column, float2 x, float2 y, float scale, const float* bias) {
    float* at = tile.row(row) + column;
    const float2 none = make_float2(0.0f, 0.0f);
    const float2 bx = bias ? load<float2>(bias + column) : none, by = bias ? load<float2>(bias + column + 8) : none;
    const float2 u = load<float2>(at), v = load<float2>(at + 8);
    store(at, make_float2(u.x + scale * (x.x + bx.x), u.y + scale * (x.y + bx.y)));
    store(at + 8, make_float2(v.x + scale * (y.x + by.x), v.y + scale * (y.y + by.y)));
}

}  // namespace shift_cuda

#if defined(SHIFT_SM90A)
#include "matmul_sm90a.cuh"
#endif
