// mbarrier: a barrier in shared memory that also counts bytes which asynchronous copies bring (sm_90).
//
// A phase completes when all arrivals it was initialised with have come and as many bytes as were announced. Phases
// are told apart by parity: phase 0, 1, 2, .. has parity 0, 1, 0, ..; mbarrier_wait(b, p) returns once the latest
// phase of parity p is complete, so at once for p = 1 on a new barrier: how the first producer gets in.
// Section 9.7.13.15 (mbarrier), PTX 8.0.
#pragma once
#include "memory.cuh"

namespace tile {

// By one thread, then mbarrier_init_fence() by it, then a barrier before anybody uses it.
__device__ __forceinline__ void mbarrier_init(uint64_t* b, int arrivals) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_init(b, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
#endif
}

// Makes initialisations visible to the cluster and to asynchronous copies. Section 9.7.13.5 (membar, fence).
__device__ __forceinline__ void mbarrier_init_fence() {
#if defined(SHIFT_EMULATE)
    emulation::fence_async_proxy();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* b) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_arrive(b, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#endif
}

// Arrives, and announces bytes: before they are asked for, or their phase might complete without them.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* b, int bytes) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_arrive(b, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
#endif
}

// Arrives at the barrier that is at the same place in the shared memory of the cluster's block `rank`. Without a scope
// it orders memory within the block alone: for who says "I have read", not "I have written". See cluster_arrive.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* b, int rank) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_arrive(static_cast<uint64_t*>(emulation::map_shared(b, rank)), 0);
#else
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(b)),
        "r"(rank)
        : "memory");
#endif
}

// What threads of this block did before they arrived, and what asynchronous copies brought from anywhere, is visible
// after: the default scope, the block.
__device__ __forceinline__ void mbarrier_wait(uint64_t* b, int parity) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_wait(b, parity);
#else
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_address(b)),
        "r"(parity)
        : "memory");
#endif
}

// The same among the blocks of a cluster, for what they write to be read by each other. A scope of the cluster costs a
// fence of the whole device and all of L1, so it is paid once a meeting: one fence by who arrives (it covers what its
// warp did before a sync_warp), for as many relaxed arrivals as there are blocks; and one acquire by who waits.
// Section 9.7.13.5 (membar, fence).
__device__ __forceinline__ void cluster_fence() {
#if defined(SHIFT_EMULATE)
    emulation::cluster_fence();
#else
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive(uint64_t* b, int rank) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_arrive_relaxed(static_cast<uint64_t*>(emulation::map_shared(b, rank)));
#else
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(b)),
        "r"(rank)
        : "memory");
#endif
}

__device__ __forceinline__ void cluster_wait(uint64_t* b, int parity) {
#if defined(SHIFT_EMULATE)
    emulation::mbarrier_wait(b, parity);
#else
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_address(b)),
        "r"(parity)
        : "memory");
#endif
}

}  // namespace tile
