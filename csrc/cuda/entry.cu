// What the library exports (entry.h says how): the planner, packing, and which kernel a plan is for.
#include "arch/sm80.cuh"
#include "arch/sm90a.cuh"
#include "entry.h"
#include "pack.cuh"
#include "run.cuh"
#include "tile/driver.cuh"

namespace shift_cuda {

using tile::bf16;
using tile::fp16;

// Each is an object of its own.
template <>
const char* run<Sm80, bf16, false>(const Job&, void*);
template <>
const char* run<Sm80, bf16, true>(const Job&, void*);
template <>
const char* run<Sm80, fp16, false>(const Job&, void*);
template <>
const char* run<Sm80, fp16, true>(const Job&, void*);
template <>
const char* run<Sm90a, bf16, false>(const Job&, void*);
template <>
const char* run<Sm90a, bf16, true>(const Job&, void*);

}  // namespace shift_cuda

using namespace shift_cuda;

extern "C" {

void shift_cuda_plan(const Call* call, int backward, Plan* found) { *found = plan(*call, backward != 0); }

const char* shift_cuda_reason(int refusal) { return reason(refusal); }

const char* shift_cuda_pack(const Call* call, const Plan* plan, void* stream) {
    if (plan->refusal) return reason(plan->refusal);
    const Job job = {*call, *plan, layout(*call, *plan, false), 0};
    if (plan->tiles) return pack<Sm90a, bf16>(job, stream);
    return call->compute_dtype == BFLOAT16 ? pack<Sm80, bf16>(job, stream) : pack<Sm80, fp16>(job, stream);
}

const char* shift_cuda_run(const Call* call, const Plan* plan, int backward, void* stream) {
    if (plan->refusal) return reason(plan->refusal);
    const Job job = {*call, *plan, layout(*call, *plan, backward != 0), backward};
    if (plan->tiles) return (backward ? run<Sm90a, bf16, true> : run<Sm90a, bf16, false>)(job, stream);
    if (call->compute_dtype == BFLOAT16) return (backward ? run<Sm80, bf16, true> : run<Sm80, bf16, false>)(job, stream);
    return (backward ? run<Sm80, fp16, true> : run<Sm80, fp16, false>)(job, stream);
}

const char* shift_cuda_build_info() { return tile::build_info(); }
const char* shift_cuda_archs() { return SHIFT_ARCHS; }
int shift_cuda_driver_is_too_old() { return tile::driver_is_too_old(); }
}
