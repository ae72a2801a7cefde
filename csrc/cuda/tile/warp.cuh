// A warp's 32 lanes among themselves. All lanes of the warp take part in each of these.
//
// Only sync_warp orders memory between lanes; shuffles and votes do not.
#pragma once
#include "platform.cuh"

namespace tile {

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }  // blocks are one-dimensional

// The value that another lane gives (T of 4 bytes). Section 9.7.9.6 (shfl.sync).
template <class T>
__device__ __forceinline__ T shuffle(T value, int from_lane) {
    static_assert(sizeof(T) == 4, "a shuffle moves one register");
#if defined(SHIFT_EMULATE)
    return emulation::bit_cast<T>(emulation::shuffle(emulation::bit_cast<uint32_t>(value), from_lane));
#else
    return __shfl_sync(0xffffffffu, value, from_lane);
#endif
}

// The value of lane `lane() ^ bits`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits) {
    static_assert(sizeof(T) == 4, "a shuffle moves one register");
#if defined(SHIFT_EMULATE)
    return shuffle(value, lane() ^ bits);
#else
    return __shfl_xor_sync(0xffffffffu, value, bits);
#endif
}

// Bit l is lane l's answer. Section 9.7.13.9 (vote.sync).
__device__ __forceinline__ uint32_t vote(bool yes) {
#if defined(SHIFT_EMULATE)
    return emulation::ballot(yes);
#else
    return __ballot_sync(0xffffffffu, yes);
#endif
}

// Sum and maximum over lanes that differ in their lowest bits, WIDTH of them (4: those that share an mma's rows), or all
// STEP apart (4: those that share its columns).
template <int WIDTH = 32, int STEP = 1>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
    for (int bits = WIDTH / 2; bits >= STEP; bits /= 2) x += shuffle_xor(x, bits);
    return x;
}

template <int WIDTH = 32>
__device__ __forceinline__ float max_over_lanes(float x) {
#pragma unroll
    for (int bits = WIDTH / 2; bits > 0; bits /= 2) x = fmaxf(x, shuffle_xor(x, bits));
    return x;
}

}  // namespace tile
