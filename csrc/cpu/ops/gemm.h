// C[m, n] = A[m, k] B[k, n], in blocks of MR x NV registers that stay in registers for all of k and are then
// handed to an epilogue: nothing is written twice.
//
// A is addressed by two strides, so a transpose costs nothing; B is read in rows of VL cells: row-major, or in
// panels of VL columns. n is a multiple of VL: buffers are padded to 16 columns with zeros. k counts cells.
#pragma once
#include "../simd/operand.h"

namespace {

template <class P>
struct MatA {  // cell (i, t) at p[i * row + t * col]
    const typename P::cell* p;
    int64_t row, col;
};

template <class P>
struct MatB {  // VL columns from j of row t at p[j / VL * panel + t * row]
    const typename P::cell* p;
    int64_t row, panel;
};

inline MatB<F32> row_major(const float* p, int64_t ld) { return {p, ld, VL}; }

template <class P>
inline MatB<P> panels(const typename P::cell* p, int64_t k) {
    return {p, VL, k * VL};
}

// Epilogues. finish(i, j, sum) gets VL columns of row i from column j on. Memory that is not in a near cache is asked
// for in time: by prefetch_now(i, j) before the product is computed, and by prefetch_next(i, j), for what is needed
// after it, at one of its steps each, for many requests at once would hold it up.
struct Store {
    float* c;
    int64_t ld;
    void prefetch_next(int, int) const {}
    void prefetch_now(int, int) const {}
    void finish(int i, int j, vf sum) const { store(c + i * ld + j, sum); }
};

struct Add {
    float* c;
    int64_t ld;
    void prefetch_next(int, int) const {}
    void prefetch_now(int i, int j) const { prefetch_to_write(c + i * ld + j); }
    void finish(int i, int j, vf sum) const { store(c + i * ld + j, load(c + i * ld + j) + sum); }
};

struct Bias {
    float* c;
    int64_t ld;
    const float* bias;
    void prefetch_next(int, int) const {}
    void prefetch_now(int i, int j) const { prefetch_to_write(c + i * ld + j); }
    void finish(int i, int j, vf sum) const { store(c + i * ld + j, sum + load(bias + j)); }
};

// Unrolled, so that the sums are registers and not an array in memory.
template <class P, int MR, int NV, class Epilogue>
inline void micro(int i0, int j0, int k, MatA<P> a, MatB<P> b, const Epilogue& epilogue) {
    vf acc[MR][NV];
    UNROLLED for (int i = 0; i < MR; i++)
        UNROLLED for (int j = 0; j < NV; j++) epilogue.prefetch_now(i0 + i, j0 + j * VL), acc[i][j] = all(0);
    constexpr int THIRDS = (MR + 2) / 3;  // three rows share a pointer: there are not registers for one each
    const typename P::cell *third[THIRDS], *column = b.p;
    UNROLLED for (int i = 0; i < THIRDS; i++) third[i] = a.p + 3 * i * a.row;
    for (int t = 0; t < k; t++) {
        if (t < MR * NV) epilogue.prefetch_next(i0 + t / NV, j0 + t % NV * VL);
        typename P::cells row[NV];
        UNROLLED for (int j = 0; j < NV; j++) row[j] = load_cells(column + j * b.panel);
        UNROLLED for (int i = 0; i < MR; i++) {
            const typename P::cell x = third[i / 3][i % 3 * a.row];
            UNROLLED for (int j = 0; j < NV; j++) acc[i][j] = P::multiply_add(x, row[j], acc[i][j]);
        }
        UNROLLED for (int i = 0; i < THIRDS; i++) third[i] += a.col;
        column += b.row;
    }
    UNROLLED for (int i = 0; i < MR; i++)
        UNROLLED for (int j = 0; j < NV; j++) epilogue.finish(i0 + i, j0 + j * VL, acc[i][j]);
}

template <class P, int NV, class Epilogue>
inline void rows(int m, int j, int k, MatA<P> a, MatB<P> b, const Epilogue& epilogue) {
    constexpr int MR = VL == 16 ? 8 : VL == 8 ? 6 : 4;
    const auto from = [&](int i) { return MatA<P>{a.p + i * a.row, a.row, a.col}; };
    int i = 0;
    if (NV == 1)  // enough sums in flight, with one vector each
        for (; i + 2 * MR <= m; i += 2 * MR) micro<P, 2 * MR, NV>(i, j, k, from(i), b, epilogue);
    for (; i + MR <= m; i += MR) micro<P, MR, NV>(i, j, k, from(i), b, epilogue);
    if (VL == 8)  // the columns of a weight gradient are 6 + 6 + 4
        for (; i + 4 <= m; i += 4) micro<P, 4, NV>(i, j, k, from(i), b, epilogue);
    for (; i + 2 <= m; i += 2) micro<P, 2, NV>(i, j, k, from(i), b, epilogue);
    for (; i < m; i++) micro<P, 1, NV>(i, j, k, from(i), b, epilogue);
}

// Columns of C from `first` on.
template <class P, class Epilogue>
inline void gemm(int m, int n, int k, MatA<P> a, MatB<P> b, const Epilogue& epilogue, int first = 0) {
    const auto from = [&](int j) { return MatB<P>{b.p + j / VL * b.panel, b.row, b.panel}; };
    int j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL) rows<P, 2>(m, first + j, k, a, from(j), epilogue);
    for (; j < n; j += VL) rows<P, 1>(m, first + j, k, a, from(j), epilogue);
}

// A matrix of the caller's: its numbers are float, or bfloat16.
struct Matrix {
    const void* numbers;
    bool bf16;

    // f(the numbers)
    template <class F>
    void visit(F f) const {
        bf16 ? f(static_cast<const uint16_t*>(numbers)) : f(static_cast<const float*>(numbers));
    }
};

// B[k, n] of a product with a weight. It is packed in panels; or `packed` is null and so many columns of it are packed
// as they are used: where that is a few times, it costs less than memory for all of them would.
constexpr int UNPACKED_COLUMNS = 64;
template <class P>
struct WeightOperand {
    const typename P::cell* packed;
    int k, n;
    Matrix w;  // B's transpose, or B
    int64_t ld;
    bool transposed;
};

// scratch: for UNPACKED_COLUMNS * cells_of(k)
template <class P, class Epilogue>
inline void product(int m, MatA<P> a, const WeightOperand<P>& b, typename P::cell* scratch, const Epilogue& epilogue) {
    const int k = cells_of<P>(b.k);
    if (b.packed) return gemm<P>(m, b.n, k, a, panels<P>(b.packed, k), epilogue);
    for (int j = 0; j < b.n; j += UNPACKED_COLUMNS) {
        const int n = b.n - j < UNPACKED_COLUMNS ? b.n - j : UNPACKED_COLUMNS;
        b.w.visit([&](const auto* w) {
            if (b.transposed)
                pack_transposed<P>(w + j * b.ld, b.ld, n, b.k, n, scratch);
            else
                pack_rows<P>(w + j, b.ld, b.k, n, n, b.k, scratch);
        });
        gemm<P>(m, n, k, a, panels<P>(scratch, k), epilogue, j);
    }
}

// A = the rows of x[m, width], of which k cells count.
template <class P>
inline MatA<P> row_operand(const typename P::number* x, int width) {
    return {reinterpret_cast<const typename P::cell*>(x), width / P::NUMBERS, 1};
}

constexpr int COLUMNS = 16;  // of a weight gradient that are computed together

// A = COLUMNS columns of x[rows, ...], transposed: where the sum runs over rows. `scratch` for as many cells, side by
// side: in x one column's numbers are so far apart that few of them have room in L1.
template <class P, class Number>
inline MatA<P> column_operand(int rows, const Number* x, int64_t ld, typename P::cell* scratch) {
    typename P::cell* out = scratch;
    for (int t = 0; t < rows; t += P::NUMBERS)
        for (int j = 0; j < COLUMNS; j += VL, out += VL) {
            const Number* from = x + t * ld + j;
            store_cells(out, P::pack(load(from), t + 1 < rows ? load(from + ld) : all(0)));
        }
    return {scratch, 1, COLUMNS};
}

}  // namespace
