// A sequence whose rows are split over neighbours in a cluster (plan.h): their barrier, and what they read of
// each other. Block i has the rows i rows .. (i + 1) rows - 1 and does all that they need; only attention needs what
// the others have, keys and values (backward: queries and their gradients too).
#pragma once
#include "program.cuh"

namespace shift_cuda {

// In another block with rows of this sequence: the same place of its shared memory.
template <class A, class T, class N>
__device__ inline N* in_part(const Program<A, T>& p, N* mine, int part) {
    return map_shared(mine, cluster_rank() - p.part() + part);
}

// How many rows of the sequence another block has.
template <class A, class T>
__device__ inline int rows_of(const Program<A, T>& p, int part) {
    return smaller(int(p.c().seq_len) - part * p.rows(), p.rows());
}

// A barrier of all who own rows of a sequence; where it is not split, of those in this block.
// Here alone a block reads what others wrote by ordinary stores, so here alone the scope is the cluster: lane 0's fence
// covers its warp's stores, which sync_warp has ordered before it; what a lane reads of others comes after its own wait.
template <class A, class T>
__device__ inline void sync_sequence(const Program<A, T>& p) {
    if (p.split() == 1) return p.sync_bands();
    sync_warp();
    if (lane() == 0) {
        cluster_fence();
#pragma unroll 1
        for (int part = 0; part < p.split(); part++)
            cluster_arrive(p.sequence_barrier(), cluster_rank() - p.part() + part);
    }
    cluster_wait(p.sequence_barrier(), p.sequence_syncs++ % 2);
}

// Copies [rows][columns] at `from` in another block (columns a multiple of 8) to `to` in this one, by all who own rows
// here. Ends without a barrier.
template <class A, class T>
__device__ inline void copy_from_part(const Program<A, T>& p, int part, T* from, int ld_from, T* to, int ld, int rows,
                                      int columns) {
    const T* there = in_part(p, from, part);
    const int pieces = columns / 8;
#pragma unroll 1  // or four loads' registers are spilled around it
    for (int i = threadIdx.x; i < rows * pieces; i += p.threads()) {
        const int r = i / pieces, j = i % pieces * 8;
        store(to + r * ld + j, load<uint4>(there + r * ld_from + j));
    }
}

}  // namespace shift_cuda
