// What the library was built by, and whether the driver is new enough for it.
#pragma once
#include "platform.cuh"

#define SHIFT_TEXT_(x) #x
#define SHIFT_TEXT(x) SHIFT_TEXT_(x)

namespace tile {

#if defined(SHIFT_EMULATE)
inline const char* build_info() { return "the host's compiler: an emulation on the CPU"; }
inline bool driver_is_too_old() { return false; }
#else
inline const char* build_info() {
    return "nvcc " SHIFT_TEXT(__CUDACC_VER_MAJOR__) "." SHIFT_TEXT(__CUDACC_VER_MINOR__) " for " SHIFT_ARCHS;
}

// A driver runs what was built with its own CUDA version or an older one, and later minor versions of its own.
inline bool driver_is_too_old() {
    int version = 0;
    return cudaDriverGetVersion(&version) != cudaSuccess || version / 1000 < CUDART_VERSION / 1000;
}
#endif

}  // namespace tile
