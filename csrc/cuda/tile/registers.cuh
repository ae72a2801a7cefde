// What a thread keeps in registers.
//
// setmaxnreg: a warpgroup gives registers back, or waits for and takes some that others gave (sm_90a). All its 128
// threads take part. COUNT: registers a thread from then on, 24 .. 256, a multiple of 8. Section 9.7.19.5, PTX 8.0.
#pragma once
#include "platform.cuh"

namespace tile {

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    static_assert(24 <= COUNT && COUNT <= 256 && COUNT % 8 == 0, "24, 32, .. 256 registers");
#if !defined(SHIFT_EMULATE)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    static_assert(24 <= COUNT && COUNT <= 256 && COUNT % 8 == 0, "24, 32, .. 256 registers");
#if !defined(SHIFT_EMULATE)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// x, of which the compiler does not know what it is: so it keeps nothing that follows from x from one place for another,
// nor computes that ahead of a loop, where registers are scarce.
__device__ __forceinline__ int forgotten(int x) {
#if !defined(SHIFT_EMULATE)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

}  // namespace tile
