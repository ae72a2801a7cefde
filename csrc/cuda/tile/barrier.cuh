// Barriers of a warp, a block, and some warps of a block. All of them order memory among those who meet.
#pragma once
#include "platform.cuh"

namespace tile {

// Section 9.7.13.4 (bar.warp.sync).
__device__ __forceinline__ void sync_warp() {
#if defined(SHIFT_EMULATE)
    emulation::sync_warp();
#else
    __syncwarp();
#endif
}

// Section 9.7.13.1 (barrier.sync 0).
__device__ __forceinline__ void sync_block() {
#if defined(SHIFT_EMULATE)
    emulation::sync_block();
#else
    __syncthreads();
#endif
}

// Barrier `id` (1 .. 15; 0 is sync_block's) of `threads` threads, a multiple of 32, who arrive or sync: whoever
// syncs goes on when all have come, whoever arrives goes on at once. Section 9.7.13.1 (barrier.sync, .arrive).
__device__ __forceinline__ void sync_threads(int id, int threads) {
#if defined(SHIFT_EMULATE)
    emulation::sync_threads(id, threads);
#else
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void arrive_threads(int id, int threads) {
#if defined(SHIFT_EMULATE)
    emulation::arrive_threads(id, threads);
#else
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace tile
