// Starting a kernel, the same on a GPU and in emulation, so that host code is shared too.
#pragma once
#include "platform.cuh"

#if defined(SHIFT_EMULATE)
#include <tuple>
#endif

namespace tile {

struct Launch {
    dim3 grid;
    unsigned threads;         // a block; a multiple of 32
    size_t shared_bytes;      // dynamic shared memory a block
    unsigned cluster = 1;     // blocks a cluster, neighbours in x (sm_90)
    void* stream = nullptr;   // a cudaStream_t; emulation runs the kernel before it returns
};

// Starts kernel(args...). Returns null, or what went wrong, in words that stay valid until the next launch.
template <class... P, class... A>
const char* launch(const Launch& l, void (*kernel)(P...), A... args) {
#if defined(SHIFT_EMULATE)
    const std::tuple<P...> values(args...);
    return emulation::launch(l.grid, l.threads, l.shared_bytes, l.cluster, [&] { std::apply(kernel, values); });
#else
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = l.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid, config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared_bytes, config.stream = static_cast<cudaStream_t>(l.stream);
    config.attrs = &cluster, config.numAttrs = l.cluster > 1;
    error = cudaLaunchKernelEx(&config, kernel, P(args)...);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace tile
