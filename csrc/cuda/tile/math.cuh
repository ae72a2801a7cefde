// The fast functions of one number that the hardware has. Results differ from the exact ones in the last bits.
#pragma once
#include "platform.cuh"

namespace tile {

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x; error below 2^-22, subnormal results become zero. Section 9.7.3.21 (ex2.approx.ftz.f32).
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(SHIFT_EMULATE)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / sqrt(x); relative error below 2^-22.9. Section 9.7.3.17 (rsqrt.approx.f32).
__device__ __forceinline__ float rsqrt_approx(float x) {
#if defined(SHIFT_EMULATE)
    return 1.0f / sqrtf(x);
#else
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x within one unit of the last place; subnormal numbers count as zero. Section 9.7.3.13 (rcp.approx.ftz.f32).
__device__ __forceinline__ float reciprocal_approx(float x) {
#if defined(SHIFT_EMULATE)
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

}  // namespace tile
