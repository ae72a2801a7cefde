// cp.async.bulk: one thread has the copy engine bring whole rows from device to shared memory (sm_90).
//
// The bytes are reported to an mbarrier, which must have been told to expect them; who waited there may read them.
// Nobody may touch the destination in between, and whoever read or wrote it before must be known to be done.
// Section 9.7.9.25.4 (cp.async.bulk), PTX 8.0. Addresses and sizes are multiples of 16.
#pragma once
#include "mbarrier.cuh"

namespace tile {

__device__ __forceinline__ void bulk_copy(void* shared, const void* device, int bytes, uint64_t* arrives_at) {
#if defined(SHIFT_EMULATE)
    emulation::bulk_copy(shared, device, bytes, arrives_at, 0);
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(device), "r"(bytes), "r"(shared_address(arrives_at))
                 : "memory");
#endif
}

// The same bytes to all blocks of the cluster whose bit is set in `ranks`: there, destination and mbarrier are at the
// same places of their own shared memory.
__device__ __forceinline__ void bulk_copy_multicast(void* shared, const void* device, int bytes, uint64_t* arrives_at,
                                                    uint16_t ranks) {
#if defined(SHIFT_EMULATE)
    emulation::bulk_copy(shared, device, bytes, arrives_at, ranks);
#else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
        "l"(device), "r"(bytes), "r"(shared_address(arrives_at)), "h"(ranks)
        : "memory");
#endif
}

// Between ordinary writes to shared memory and wgmma or a bulk copy that reads or replaces them: by the writer, before
// the barrier that tells the reader. Section 9.7.13.5 (fence.proxy.async).
__device__ __forceinline__ void fence_async_proxy() {
#if defined(SHIFT_EMULATE)
    emulation::fence_async_proxy();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace tile
