// The looped block on CUDA: what the library exports (call.h says how). nvcc needs --expt-relaxed-constexpr.
#include "pack.cuh"
#include "resident_backward.cuh"
#include "tile/launch.cuh"

namespace shift_cuda {

template <class T>
const char* run(const Job& job, void* stream) {
    const Call& c = job.call;
    for (int layer = 0; layer <= c.n_layers; layer++) {
        PackJob pack = {job, layer, {}};
        const int there = layer < c.n_layers ? WEIGHTS : 2;
        for (int i = 0; i < there; i++)
            pack.from[layer < c.n_layers ? i : N1_W + i] = c.weights[layer * WEIGHTS + i];
        if (layer == c.n_layers && !c.loop_norm) break;
        tile::Launch grid;
        grid.grid = dim3(unsigned(2 * c.n_sms)), grid.threads = 256, grid.shared_bytes = 0, grid.stream = stream;
        if (const char* error = tile::launch(grid, pack_layer<T>, pack)) return error;
    }
    tile::Launch grid;
    grid.grid = dim3(unsigned(job.plan.programs)), grid.threads = unsigned(job.plan.threads);
    grid.shared_bytes = size_t(job.plan.shared_bytes), grid.stream = stream;
    return tile::launch(grid, job.backward ? resident_backward<T> : resident_forward<T>, job);
}

}  // namespace shift_cuda

extern "C" {

int64_t shift_cuda_call_size() { return sizeof(Call); }
int64_t shift_cuda_plan_size() { return sizeof(Plan); }

int shift_cuda_plan(const Call* call, int backward, Plan* plan) {
    *plan = shift_cuda::plan(*call, backward != 0);
    return int(plan->refusal);
}

const char* shift_cuda_reason(int refusal) { return shift_cuda::reason(refusal); }

int64_t shift_cuda_workspace_bytes(const Call* call, int backward) {
    return shift_cuda::plan(*call, backward != 0).workspace_bytes;
}

const char* shift_cuda_run(const Call* call, int backward, void* stream) {
    const Plan plan = shift_cuda::plan(*call, backward != 0);
    const shift_cuda::Job job = {*call, plan, shift_cuda::layout(*call, plan, backward != 0), backward};
    if (plan.refusal) return shift_cuda::reason(plan.refusal);
    return call->compute_dtype == BFLOAT16 ? shift_cuda::run<tile::bf16>(job, stream)
                                           : shift_cuda::run<tile::fp16>(job, stream);
}
}
