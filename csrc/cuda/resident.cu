// The looped block on CUDA: what the library exports (entry.h says how). nvcc needs --expt-relaxed-constexpr.
#include "arch/sm80.cuh"
#include "entry.h"
#include "pack.cuh"
#include "resident_backward.cuh"

// resident_sm90a.cu: what a plan with tiles is for.
extern "C" const char* shift_cuda_run_sm90a(const Call*, const Plan*, int backward, void* stream);

namespace shift_cuda {

template <class T>
__global__ void __launch_bounds__(512, 1) resident_forward(const __grid_constant__ Job job) {
    forward(Program<Sm80, T>(job), [](int64_t, bool running) { return running; });
}

template <class T>
__global__ void __launch_bounds__(512, 1) resident_backward(const __grid_constant__ Job job) {
    backward(Program<Sm80, T>(job));
}

template <class T>
const char* run_sm80(const Job& job, void* stream) {
    return pack_and_launch<Sm80, T>(job, stream, job.backward ? resident_backward<T> : resident_forward<T>);
}

}  // namespace shift_cuda

extern "C" {

void shift_cuda_plan(const Call* call, int backward, Plan* plan) { *plan = shift_cuda::plan(*call, backward != 0); }

const char* shift_cuda_reason(int refusal) { return shift_cuda::reason(refusal); }

const char* shift_cuda_run(const Call* call, const Plan* plan, int backward, void* stream) {
    if (plan->refusal) return shift_cuda::reason(plan->refusal);
    if (plan->tiles) return shift_cuda_run_sm90a(call, plan, backward, stream);
    const shift_cuda::Job job = {*call, *plan, shift_cuda::layout(*call, *plan, backward != 0), backward};
    return call->compute_dtype == BFLOAT16 ? shift_cuda::run_sm80<tile::bf16>(job, stream)
                                           : shift_cuda::run_sm80<tile::fp16>(job, stream);
}
}
