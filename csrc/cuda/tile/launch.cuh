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
    bool at_once = false;     // no more blocks than the device runs at once: they share all work among them
};

#if !defined(SHIFT_EMULATE)
// A multiple of the cluster; 0 if not even one cluster would run.
inline cudaError_t most_blocks_at_once(const void* kernel, const cudaLaunchConfig_t& config, unsigned& most) {
    int device = 0, processors = 0, found = 0;
    cudaError_t error;
    if (config.numAttrs) {
        error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
        most = unsigned(found) * config.attrs->val.clusterDim.x;
    } else {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, int(config.blockDim.x),
                                                              config.dynamicSmemBytes);
        if (error == cudaSuccess) error = cudaGetDevice(&device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        most = unsigned(found * processors);
    }
    return error;
}
#endif

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
    if (l.at_once) {
        unsigned most = 0;
        error = most_blocks_at_once(reinterpret_cast<const void*>(kernel), config, most);
        if (error != cudaSuccess) return cudaGetErrorString(error);
        if (most && most < l.grid.x) config.gridDim.x = most;
    }
    error = cudaLaunchKernelEx(&config, kernel, P(args)...);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace tile
