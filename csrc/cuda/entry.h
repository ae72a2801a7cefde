// What the CUDA kernels offer to Python's module; plain C, as nvcc and g++ link it alike.
#pragma once
#include "call.h"

extern "C" {
// Fills the plan; reads no address.
void shift_cuda_plan(const Call*, int backward, Plan*);
// What a plan's refusal means.
const char* shift_cuda_reason(int refusal);
// Brings `weights` into the order in which the kernels read them, to `packed`: for a plan of this call, either way.
const char* shift_cuda_pack(const Call*, const Plan*, void* stream);
// Launches on a cudaStream_t, as shift_cuda_plan has planned it; null, or what went wrong. All tensors are contiguous,
// on one device, and at a multiple of 16 bytes.
const char* shift_cuda_run(const Call*, const Plan*, int backward, void* stream);
// What this library was built by and for (as nvcc names architectures, by spaces; none: an emulation).
const char* shift_cuda_build_info();
const char* shift_cuda_archs();
// Whether the driver cannot run what this CUDA toolkit compiles.
int shift_cuda_driver_is_too_old();
}
