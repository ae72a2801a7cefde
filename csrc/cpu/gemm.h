// C[m, n] (+)= A[m, k] B[k, n], in blocks of MR x NV registers that stay in registers for all of k.
//
// A is addressed by two strides, so a transpose costs nothing; B is read in rows of VL numbers: row-major,
// or packed in panels of VL columns. n is a multiple of VL: buffers are padded to 16 columns with zeros.
#pragma once
#include "vec.h"

namespace {

struct MatA {  // element (i, k) at p[i * row + k * col]
    const float* p;
    int64_t row, col;
};

struct MatB {  // VL columns from j of row k at p[j / VL * panel + k * row]
    const float* p;
    int64_t row, panel;
};

inline MatB row_major(const float* p, int64_t ld) { return {p, ld, VL}; }
inline MatB panels(const float* p, int64_t k) { return {p, VL, k * VL}; }

template <int MR, int NV>
inline void micro(int k, MatA a, MatB b, float* c, int64_t ldc, bool accumulate) {
    vf acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? load(c + i * ldc + j * VL) : all(0);
    for (int t = 0; t < k; t++) {
        vf row[NV];
        for (int j = 0; j < NV; j++) row[j] = load(b.p + t * b.row + j * b.panel);
        for (int i = 0; i < MR; i++) {
            const float x = a.p[i * a.row + t * a.col];
            for (int j = 0; j < NV; j++) acc[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) store(c + i * ldc + j * VL, acc[i][j]);
}

template <int NV>
inline void rows(int m, int k, MatA a, MatB b, float* c, int64_t ldc, bool accumulate) {
    constexpr int MR = VL == 16 ? 8 : VL == 8 ? 6 : 4;
    int i = 0;
    for (; i + MR <= m; i += MR) micro<MR, NV>(k, {a.p + i * a.row, a.row, a.col}, b, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2) micro<2, NV>(k, {a.p + i * a.row, a.row, a.col}, b, c + i * ldc, ldc, accumulate);
    for (; i < m; i++) micro<1, NV>(k, {a.p + i * a.row, a.row, a.col}, b, c + i * ldc, ldc, accumulate);
}

inline void gemm(int m, int n, int k, MatA a, MatB b, float* c, int64_t ldc, bool accumulate = false) {
    int j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL)
        rows<2>(m, k, a, {b.p + j / VL * b.panel, b.row, b.panel}, c + j, ldc, accumulate);
    for (; j < n; j += VL)
        rows<1>(m, k, a, {b.p + j / VL * b.panel, b.row, b.panel}, c + j, ldc, accumulate);
}

// B = W^T of a row-major W[n, k], packed; columns n .. n_padded are zero.
inline void pack_transposed(const float* w, int64_t ldw, int n, int k, int n_padded, float* out) {
    for (int j = 0; j < n_padded; j += VL)
        for (int t = 0; t < k; t++)
            for (int i = 0; i < VL; i++) *out++ = j + i < n ? w[(j + i) * ldw + t] : 0.0f;
}

// B = row-major x[k, n], packed; columns n .. n_padded are zero. `k_total`: rows that a panel of `out` has.
inline void pack_rows(const float* x, int64_t ldx, int k, int n, int n_padded, int k_total, float* out) {
    for (int j = 0; j < n_padded; j += VL, out += int64_t(k_total) * VL)
        for (int t = 0; t < k; t++)
            for (int i = 0; i < VL; i++) out[t * VL + i] = j + i < n ? x[t * ldx + j + i] : 0.0f;
}

// C[m, n] += A[k, m]^T B[k, n] for few k and many m: a block of A's columns stays in L1 while B passes by.
inline void gemm_outer(int m, int n, int k, const float* a, int64_t lda, MatB b, float* c, int64_t ldc) {
    constexpr int STEP = 24;  // a multiple of every MR
    for (int i = 0; i < m; i += STEP)
        gemm(m - i < STEP ? m - i : STEP, n, k, {a + i, 1, lda}, b, c + i * ldc, ldc, true);
}

}  // namespace
