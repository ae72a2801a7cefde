// cp.async: 16 bytes from device to shared memory past the registers, without waiting.
//
// A thread's copies since its last commit form a group. Only after copy_async_wait<N>, which leaves at most N of
// the thread's groups under way, may that thread read the bytes of the others; other threads only after a barrier
// on top. Nobody may touch them in between. Section 9.7.9.25.3 (cp.async), PTX 7.0, sm_80.
#pragma once
#include "memory.cuh"

namespace tile {

// Both addresses are multiples of 16. Of the source `bytes` (0 .. 16) are read, the rest of the 16 becomes zero.
__device__ __forceinline__ void copy_async(void* shared, const void* device, int bytes = 16) {
#if defined(SHIFT_EMULATE)
    emulation::copy_async(shared, device, bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(device), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(SHIFT_EMULATE)
    emulation::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int GROUPS_LEFT>
__device__ __forceinline__ void copy_async_wait() {
#if defined(SHIFT_EMULATE)
    emulation::copy_async_wait(GROUPS_LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

}  // namespace tile
