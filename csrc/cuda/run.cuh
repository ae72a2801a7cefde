// Launching a resident kernel; resident.cu defines a specialisation an object.
#pragma once
#include "program.cuh"
#include "tile/launch.cuh"

namespace shift_cuda {

// Runs a job whose weights are packed; null, or what went wrong.
template <class A, class T, bool BACKWARD>
const char* run(const Job& job, void* stream);

inline const char* launch_programs(const Job& job, void* stream, void (*kernel)(Job)) {
    tile::Launch grid;
    grid.grid = dim3(unsigned(job.plan.blocks)), grid.threads = unsigned(job.plan.threads);
    grid.shared_bytes = size_t(job.plan.shared_bytes), grid.cluster = unsigned(job.plan.cluster), grid.stream = stream;
    grid.at_once = job.plan.blocks < job.plan.programs;
    return tile::launch(grid, kernel, job);
}

}  // namespace shift_cuda
