// The resident kernels for sm_90a: resident_forward.cuh and resident_backward.cuh with another way of multiplying,
// arch/sm90a.cuh. For bf16 alone; an object has one direction, SHIFT_BACKWARD 0 or 1 (build_native.py).
//
// Block: two warpgroups for up to 64 or 128 rows, and a warp that streams weights. Shared memory: plan.h. The blocks of
// a cluster (1, 2 or 4) share the weights' way from L2; and 2 or 4 neighbours in it a sequence that is too large for
// the shared memory of one: split.cuh.
#include "arch/sm90a.cuh"
#include "resident_backward.cuh"
#include "run.cuh"

namespace shift_cuda {

// Streams the weights of so many loops, at most; false for who did that, true for those who own the rows.
template <class T>
__device__ inline bool beside_the_weights(const Program<Sm90a, T>& p, int64_t loops) {
    if (threadIdx.x == 0) start_ring(p);
    sync_cluster();
    const bool streams = shuffle(warp(), 0) == p.warps();  // which the compiler then knows to be so for a whole warp
    if (!streams) p.find_spans();
    if (streams && lane() == 0) stream_weights(p, loops);
    return !streams;
}

template <class T>
__global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1) resident_forward_sm90a(const __grid_constant__ Job job) {
    if constexpr (HAS_SM90A) {
        const Program<Sm90a, T> p(job);
        if (beside_the_weights(p, p.loops()))
            forward(p, [&](int64_t t, bool running) { return begins_loop(p, t, running); });
        sync_cluster();  // others may still arrive here, and bring tiles
    } else {
        asm volatile("trap;");
    }
}

template <class T>
__global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1) resident_backward_sm90a(const __grid_constant__ Job job) {
    if constexpr (HAS_SM90A) {
        const Program<Sm90a, T> p(job);
        if (beside_the_weights(p, loops_backward(p))) backward(p);
        sync_cluster();
    } else {
        asm volatile("trap;");
    }
}

template <>
const char* run<Sm90a, tile::bf16, SHIFT_BACKWARD>(const Job& job, void* stream) {
    if constexpr (SHIFT_BACKWARD)
        return launch_programs(job, stream, resident_backward_sm90a<tile::bf16>);
    else
        return launch_programs(job, stream, resident_forward_sm90a<tile::bf16>);
}

}  // namespace shift_cuda
