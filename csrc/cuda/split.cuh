// A sequence whose rows are split over neighbours in a cluster (plan.h): how its blocks meet, and what they read of
// each other. Block i has the rows i rows .. (i + 1) rows - 1 and does all that they need; only attention needs more,
// the others' keys and values.
#pragma once
#include "program.cuh"

namespace shift_cuda {

// In another block with rows of this sequence: the same place of its shared memory.
template <class T, class N>
__device__ inline N* in_part(const Program<T>& p, N* mine, int part) {
    return map_shared(mine, cluster_rank() - p.part() + part);
}

// A barrier of all who own rows of the sequence, and who own them in this block.
template <class T>
__device__ inline void meet(const Program<T>& p) {
    if (p.split() == 1) return p.sync();
    sync_warp();
    if (lane() == 0)
        for (int part = 0; part < p.split(); part++) mbarrier_arrive_at(p.met(), cluster_rank() - p.part() + part);
    mbarrier_wait(p.met(), p.meetings++ % 2);
}

// Copies [rows][columns] at `from` in another block (columns a multiple of 8) to others(), by all who own rows here,
// once they are done with what was there.
template <class T>
__device__ inline void bring_rows(const Program<T>& p, int part, T* from, int ld_from, int ld, int rows, int columns) {
    const T* there = in_part(p, from, part);
    const int pieces = columns / 8;
    p.sync();
    for (int i = threadIdx.x; i < rows * pieces; i += p.threads()) {
        const int r = i / pieces, j = i % pieces * 8;
        store(p.others() + r * ld + j, load<uint4>(there + r * ld_from + j));
    }
    p.sync();
}

}  // namespace shift_cuda
