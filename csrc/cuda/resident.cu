// The resident kernels for sm_80 and newer. An object has one direction and one type of operands (build_native.py), so
// that they compile side by side: SHIFT_BACKWARD is 0 or 1, SHIFT_OPERAND bf16 or fp16.
#include "arch/sm80.cuh"
#include "resident_backward.cuh"
#include "run.cuh"

namespace shift_cuda {

template <class T>
__global__ void __launch_bounds__(512, 1) resident_forward(const __grid_constant__ Job job) {
    forward(Program<Sm80, T>(job), [](int64_t, bool running) { return running; });
}

template <class T>
__global__ void __launch_bounds__(512, 1) resident_backward(const __grid_constant__ Job job) {
    backward(Program<Sm80, T>(job));
}

template <>
const char* run<Sm80, tile::SHIFT_OPERAND, SHIFT_BACKWARD>(const Job& job, void* stream) {
    if constexpr (SHIFT_BACKWARD)
        return launch_programs(job, stream, resident_backward<tile::SHIFT_OPERAND>);
    else
        return launch_programs(job, stream, resident_forward<tile::SHIFT_OPERAND>);
}

}  // namespace shift_cuda
