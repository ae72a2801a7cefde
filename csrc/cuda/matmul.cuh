// What the products of every architecture share (arch/*.cuh multiplies): operands of mma from shared memory, the weights
// that are known to be needed next, and where results go.
//
// multiply<ROWS_ALONG_N>(p, a, b, ld_b, n, k, out, prefetch): out = a b with a [rows, k] in shared memory (or streamed).
// ROWS_ALONG_N false: b is [n][k], a weight as torch has it; true: [k][n]. n and k are multiples of 16.
// out(row, column, x, y): x are columns column and + 1, y column + 8 and + 9 of the same 16. Ends without a
// barrier: what out wrote may be read after the next one. multiply has one before it reads a.
#pragma once
#include "program.cuh"

namespace shift_cuda {

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
struct Prefetch {
    const T* b = nullptr;
    int64_t ld = 0;
    int n = 0, k = 0;
};

constexpr int tiles_along(int n, int64_t side) { return (n + int(side) - 1) / int(side); }

// Declared for the products' callers; each architecture defines its own.
struct NoArch;
template <bool ROWS_ALONG_N, class T, class Out>
__device__ void multiply(const Program<NoArch, T>& p, Rows<T> a, const T* b, int64_t ld_b, int n, int k, Out out,
                         Prefetch<T> prefetch = {});

}  // namespace shift_cuda
