// What this library was built by and for, and whether the driver is new enough for it.
#include "entry.h"
#include "tile/platform.cuh"

#define SHIFT_TEXT_(x) #x
#define SHIFT_TEXT(x) SHIFT_TEXT_(x)

extern "C" {

#if defined(SHIFT_EMULATE)
const char* shift_cuda_build_info() { return "the host's compiler: an emulation on the CPU"; }
const char* shift_cuda_archs() { return ""; }
int shift_cuda_driver_is_too_old() { return 0; }
#else
const char* shift_cuda_build_info() {
    return "nvcc " SHIFT_TEXT(__CUDACC_VER_MAJOR__) "." SHIFT_TEXT(__CUDACC_VER_MINOR__) " for " SHIFT_ARCHS;
}

// As nvcc names them, by spaces; none: an emulation.
const char* shift_cuda_archs() { return SHIFT_ARCHS; }

// A driver runs what was built with its own CUDA version or an older one, and later minor versions of its own.
int shift_cuda_driver_is_too_old() {
    int version = 0;
    return cudaDriverGetVersion(&version) != cudaSuccess || version / 1000 < CUDART_VERSION / 1000;
}
#endif
}
