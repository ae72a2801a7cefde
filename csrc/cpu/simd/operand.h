// What matrix products read: single precision as it is, or bfloat16, two numbers to a cell.
//
// A product runs over cells. One cell holds as many successive numbers of the summed index as one instruction
// takes: one float, or a pair of bfloat16 (vdpbf16ps multiplies 16 pairs and adds them in single precision;
// where it is missing, a pair is taken apart by a shift and a mask, which gives two floats for two products).
//
//   rows     [n, width]                 as they are; a cell is a float, or two neighbours of a row
//   panels   [width / VL][cells][VL]    B of a product: VL columns side by side
#pragma once
#include "vec.h"

namespace {

struct F32 {
    typedef float number;
    typedef float cell;
    typedef vf cells;
    static constexpr int NUMBERS = 1;  // to a cell
    static cells pack(vf x, vf) { return x; }
    static vf multiply_add(cell a, cells b, vf sum) { return sum + a * b; }
};

// Bits of the nearest bfloat16 (ties to even) in the upper half of each lane; what is below is not cleared.
inline vu rounded_bits(vf x) {
    vu bits;
    std::memcpy(&bits, &x, sizeof x);
    const vu up = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? up : (bits | 0x400000);  // a NaN's payload could carry over into an infinity
}

struct BF16 {
    typedef uint16_t number;
    typedef uint32_t cell;
    typedef vu cells;
    static constexpr int NUMBERS = 2;
    static cells pack(vf low, vf high) {
#if defined(__AVX512BF16__)
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // low half: low's 16 numbers
        const __m512i halves = (__m512i)both;
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                               22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (cells)_mm512_permutexvar_epi16(order, halves);
#else
        return (rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u);
#endif
    }
    static vf multiply_add(cell a, cells b, vf sum) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
        const vu pairs = a - (vu){};
        const vu a_low = pairs << 16, a_high = pairs & 0xffff0000u, b_low = b << 16, b_high = b & 0xffff0000u;
        vf x, y, u, v;
        std::memcpy(&x, &a_low, sizeof x), std::memcpy(&y, &b_low, sizeof x);
        std::memcpy(&u, &a_high, sizeof x), std::memcpy(&v, &b_high, sizeof x);
        return sum + x * y + u * v;
#endif
    }
};

// Vectors of bfloat16 in memory, beside those of vec.h.
typedef uint16_t halves __attribute__((vector_size(VL * 2)));
inline vf load(const uint16_t* p) {
    halves x;
    std::memcpy(&x, p, sizeof x);
    const vu bits = __builtin_convertvector(x, vu) << 16;
    vf wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline vf load_first(const uint16_t* p, int n) {
    if (n >= VL) return load(p);
    uint16_t numbers[VL] = {};
    if (n > 0) std::memcpy(numbers, p, n * sizeof *p);
    return load(numbers);
}
inline void store(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
#else
    const halves narrow = __builtin_convertvector(rounded_bits(x) >> 16, halves);
#endif
    std::memcpy(p, &narrow, sizeof narrow);
}

template <class P>
constexpr int cells_of(int numbers) {
    return (numbers + P::NUMBERS - 1) / P::NUMBERS;
}

inline F32::cells load_cells(const float* p) { return load(p); }
inline BF16::cells load_cells(const uint32_t* p) {
    vu x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store_cells(float* p, vf x) { store(p, x); }
inline void store_cells(uint32_t* p, vu x) { std::memcpy(p, &x, sizeof x); }

// B = W^T of a row-major W[n, k] in panels; columns n .. n_padded are zero.
template <class P, class Number>
inline void pack_transposed(const Number* w, int64_t ldw, int n, int k, int n_padded, typename P::cell* out) {
    for (int j = 0; j < n_padded; j += VL)
        for (int t = 0; t < k; t += VL) {
            vf block[VL + 1] = {};
            for (int i = 0; i < VL; i++)
                if (j + i < n) block[i] = load_first(w + (j + i) * ldw + t, k - t);
            transpose(block);
            for (int i = 0; i < VL && t + i < k; i += P::NUMBERS, out += VL)
                store_cells(out, P::pack(block[i], block[i + 1]));
        }
}

// B = row-major W[k, n] in panels of `k_total` rows; columns n .. n_padded are zero.
template <class P, class Number>
inline void pack_rows(const Number* w, int64_t ldw, int k, int n, int n_padded, int k_total, typename P::cell* out) {
    for (int t = 0; t < k; t += P::NUMBERS)  // along the rows of w, which may be pages apart
        for (int j = 0; j < n_padded; j += VL) {
            const Number* from = w + t * ldw + j;
            store_cells(out + int64_t(j) * cells_of<P>(k_total) + t / P::NUMBERS * VL,
                        P::pack(load_first(from, n - j), t + 1 < k ? load_first(from + ldw, n - j) : all(0)));
        }
}

// x[rows, width] (width a multiple of VL) stacked to cells in panels: both operands of a weight gradient.
template <class P, class Number>
inline void stack(int rows, int width, const Number* x, int64_t ld, typename P::cell* out) {
    for (int j = 0; j < width; j += VL)
        for (int t = 0; t < rows; t += P::NUMBERS, out += VL) {
            const Number* from = x + t * ld + j;
            store_cells(out, P::pack(load(from), t + 1 < rows ? load(from + ld) : all(0)));
        }
}

// x rounded to numbers of an operand in `scratch`; in single precision x itself.
inline const float* rounded(int64_t, const float* x, float*) { return x; }
inline const uint16_t* rounded(int64_t n, const float* x, uint16_t* scratch) {
    for (int64_t i = 0; i < n; i += VL) store(scratch + i, load(x + i));
    return scratch;
}

// x becomes what its numbers are as operands.
template <class P>
inline void round_numbers(int64_t n, float* x) {
    if constexpr (P::NUMBERS == 1) return;
    for (int64_t i = 0; i < n; i += VL) {
        const vu bits = rounded_bits(load(x + i)) & 0xffff0000u;
        std::memcpy(x + i, &bits, sizeof bits);
    }
}

// Back to single precision; in single precision the two are one.
inline void widen(int64_t, const float*, float*) {}
inline void widen(int64_t n, const uint16_t* x, float* out) {
    for (int64_t i = 0; i < n; i += VL) store(out + i, load(x + i));
}

}  // namespace
