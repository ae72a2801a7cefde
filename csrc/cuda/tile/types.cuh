// The 16-bit numbers as plain storage, pairs of them in a register, and their conversions.
//
// A register holds two neighbours, the one with the lower index (address) in the lower half, as in memory.
#pragma once
#include "platform.cuh"

namespace tile {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

// Two floats to a register of two T, to nearest even. Sections 9.7.9.22 (cvt), PTX 7.0, sm_80.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

// The two numbers of a register, exact. A bf16 is the upper half of a float.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
#if defined(SHIFT_EMULATE)
    return emulation::to_bf16(low) | uint32_t(emulation::to_bf16(high)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
#if defined(SHIFT_EMULATE)
    return emulation::to_fp16(low) | uint32_t(emulation::to_fp16(high)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#if defined(SHIFT_EMULATE)
    return emulation::bit_cast<float>(bits);
#else
    return __uint_as_float(bits);
#endif
}

__device__ __forceinline__ uint32_t float_to_bits(float x) {
#if defined(SHIFT_EMULATE)
    return emulation::bit_cast<uint32_t>(x);
#else
    return __float_as_uint(x);
#endif
}

template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t pair) {
    return make_float2(bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack<fp16>(uint32_t pair) {
#if defined(SHIFT_EMULATE)
    return make_float2(emulation::from_fp16(pair & 0xffff), emulation::from_fp16(pair >> 16));
#else
    float low, high;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
    return make_float2(low, high);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) { return unpack<fp16>(x.bits).x; }

// One float to T, to nearest even (and as it is where T is float).
template <class T>
__device__ __forceinline__ T from_float(float x) {
    return T{uint16_t(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

// A float rounded to tf32 (10 bits of mantissa, to nearest, ties away), which mma<float> multiplies; it
// truncates what was not rounded. Section 9.7.9.22 (cvt.rna.tf32.f32), PTX 7.0, sm_80.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(SHIFT_EMULATE)
    return emulation::to_tf32(x);
#else
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#endif
}

}  // namespace tile
