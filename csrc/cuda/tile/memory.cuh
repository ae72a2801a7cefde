// Shared memory, and loads and stores of several numbers at once.
#pragma once
#include "platform.cuh"

namespace tile {

// The block's dynamic shared memory, the only shared memory that kernels use: 1024-byte aligned, its size given
// at launch. Its content is undefined at first (in emulation: NaN).
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(SHIFT_EMULATE)
    return emulation::shared_memory();
#else
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
#endif
}

#if !defined(SHIFT_EMULATE)
// What ld.shared and its kin take for an address. Section 9.7.9.20 (cvta.to.shared).
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// One V (float2, float4, uint2, uint4, ...) from shared or device memory, at an address that is a multiple of its
// size. Sections 9.7.9.8 (ld), 9.7.9.12 (st): a misaligned address is an error.
template <class V>
__device__ __forceinline__ V load(const void* from) {
#if defined(SHIFT_EMULATE)
    emulation::check_access(from, sizeof(V), sizeof(V), "load");
#endif
    return *static_cast<const V*>(from);
}

template <class V>
__device__ __forceinline__ void store(void* to, V value) {
#if defined(SHIFT_EMULATE)
    emulation::check_access(to, sizeof(V), sizeof(V), "store");
#endif
    *static_cast<V*>(to) = value;
}

}  // namespace tile
