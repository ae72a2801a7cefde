// The kernel for any call, of one direction, one type of operands and one family of architectures: an object of its own,
// so that they compile side by side (build_native.py). SHIFT_ARCH is Sm80 or Sm90a, SHIFT_OPERAND bf16 or fp16,
// SHIFT_BACKWARD 0 or 1.
#include "kernels.cuh"

namespace shift_cuda {

template <>
const char* run<SHIFT_ARCH, tile::SHIFT_OPERAND, SHIFT_BACKWARD>(const Job& job, void* stream) {
    return launch_kernel<SHIFT_ARCH, tile::SHIFT_OPERAND, SHIFT_BACKWARD, AnyShape>(job, stream);
}

}  // namespace shift_cuda
