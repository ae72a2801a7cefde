// The blocks of a cluster (sm_90): who is who, a barrier of all their threads, and each other's shared memory.
#pragma once
#include "memory.cuh"

namespace tile {

// Section 10 (special registers %cluster_ctarank, %cluster_nctarank).
__device__ __forceinline__ int cluster_rank() {
#if defined(SHIFT_EMULATE)
    return emulation::cluster_rank();
#else
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if defined(SHIFT_EMULATE)
    return emulation::cluster_size();
#else
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
#endif
}

// Orders memory, shared and device, among all threads of the cluster; lanes may come one by one. Section 9.7.13.3
// (barrier.cluster).
__device__ __forceinline__ void sync_cluster() {
#if defined(SHIFT_EMULATE)
    emulation::sync_cluster();
#else
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of block `rank`, to load from and store to. That block must not have returned:
// the last such access is followed by a sync_cluster. Section 9.7.9.23 (mapa).
template <class T>
__device__ __forceinline__ T* map_shared(T* mine, int rank) {
#if defined(SHIFT_EMULATE)
    return static_cast<T*>(emulation::map_shared(mine, rank));
#else
    uint64_t theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
    return reinterpret_cast<T*>(theirs);
#endif
}

}  // namespace tile
