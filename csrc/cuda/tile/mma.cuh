// mma.sync: c[16, 8] += a[16, k] b[k, 8] by one warp, fp32 accumulators; k = 16 (bf16, fp16) or 8 (float as tf32).
//
// Who holds what, with g = lane / 4 and t = lane % 4:
//   16 bits, sections 9.7.14.5.8 and .14 (m16n8k16), sm_80; each register two neighbours along k
//     a[0] row g,     k 2t, 2t+1      a[1] row g + 8, k 2t, 2t+1
//     a[2] row g,     k 2t+8, 2t+9    a[3] row g + 8, k 2t+8, 2t+9
//     b[0] column g,  k 2t, 2t+1      b[1] column g,  k 2t+8, 2t+9
//   tf32, sections 9.7.14.5.7 and .14 (m16n8k8), sm_80
//     a[0] row g, k t    a[1] row g + 8, k t    a[2] row g, k t+4    a[3] row g + 8, k t+4
//     b[0] column g, k t    b[1] column g, k t+4
//   both: c[0], c[1] row g, columns 2t, 2t+1;  c[2], c[3] row g + 8, columns 2t, 2t+1
// So two neighbouring accumulators, packed, are half of an `a` register pair of the next product.
#pragma once
#include "types.cuh"

namespace tile {

template <class T>
constexpr int MMA_K = 32 / sizeof(T);

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(SHIFT_EMULATE)
#define SHIFT_MMA(T, SHAPE, NAME) emulation::mma(c, a, b, emulation::Number::T)
#else
#define SHIFT_MMA(T, SHAPE, NAME)                                                               \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." NAME "." NAME                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    SHIFT_MMA(BF16, "m16n8k16", "bf16");
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    SHIFT_MMA(FP16, "m16n8k16", "f16");
}
template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    SHIFT_MMA(TF32, "m16n8k8", "tf32");
}

#undef SHIFT_MMA

}  // namespace tile
