// The resident forward for sm_90a: resident_forward.cuh with another way of multiplying, matmul_sm90a.cuh.
//
// Block: two warpgroups for up to 64 or 128 rows, and a warp that streams weights. Shared memory: plan.h. The blocks of
// a cluster (1, 2 or 4) share the weights' way from L2; and 2 or 4 neighbours in it a sequence that is too large for
// the shared memory of one: split.cuh.
#define SHIFT_SM90A
#define shift_cuda shift_cuda_sm90a  // the same sources, but other functions
#include "pack.cuh"
#include "resident_forward.cuh"

namespace shift_cuda {

template <class T>
__global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1) resident_forward_sm90a(const __grid_constant__ Job job) {
#if defined(SHIFT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Program<T> p(job);
    if (threadIdx.x == 0) start_ring(p);
    sync_cluster();
    if (shuffle(warp(), 0) == p.warps()) {  // which the compiler then knows to be the same for a whole warp
        if (lane() == 0) stream_weights(p);
    } else {
        p.find_spans();
        forward(p, [&](int64_t t, bool running) { return begins_loop(p, t, running); });
    }
    sync_cluster();  // others may still arrive here, and bring tiles
#else
    asm volatile("trap;");  // compiled for another architecture; nobody plans for it there
#endif
}

}  // namespace shift_cuda

// As shift_cuda_run with a plan that has tiles.
extern "C" const char* shift_cuda_forward_sm90a(const Call* call, const Plan* plan, void* stream) {
    using namespace shift_cuda;
    const Job job = {*call, *plan, layout(*call, *plan, false), 0};
    using namespace tile;
    return call->compute_dtype == BFLOAT16 ? pack_and_launch<bf16>(job, stream, resident_forward_sm90a<bf16>)
                                           : pack_and_launch<fp16>(job, stream, resident_forward_sm90a<fp16>);
}
