// Which machine the tiles are for: a GPU (nvcc), or a CPU that plays one (g++ -DSHIFT_EMULATE).
//
// Kernels are written in CUDA C++ against tile/*.cuh alone. tile/ wraps every PTX instruction once and, under
// SHIFT_EMULATE, calls tests/cuda_emulation instead; so one source is what the GPU runs and what the CPU tests.
// What a kernel may use besides tile/: threadIdx, blockIdx, blockDim, gridDim, and <cmath> in single precision.
// Sections cited in tile/ are those of NVIDIA's "PTX ISA", versions 9.0 to 9.2.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(SHIFT_EMULATE)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif
