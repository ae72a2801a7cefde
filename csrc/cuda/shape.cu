// The kernel for one shape, a library of its own. SHIFT_SHAPE is a file that has the shape as the module's shape()
// lists it, SHIFT_ARCH and SHIFT_OPERAND are as for resident.cu.
#include <cstring>

#include "kernels.cuh"

namespace {

using namespace shift_cuda;

struct Words {
    int64_t at[SHAPE_WORDS];
};
constexpr Words WORDS = {{
#include SHIFT_SHAPE
}};
struct Constants {
    static constexpr Shape SHAPE = __builtin_bit_cast(Shape, WORDS);
};

}  // namespace

// As shift_cuda_run, for calls of this shape.
extern "C" const char* shift_cuda_run_shape(const Call* call, const Plan* plan, int backward, void* stream) {
    const Shape asked = shape_of(*call, *plan, backward != 0), here = Constants::SHAPE;
    if (std::memcmp(&asked, &here, sizeof asked) != 0) return "this kernel was compiled for another shape";
    const Job job = {*call, *plan, layout(*call, *plan, backward != 0), backward};
    return launch_kernel<SHIFT_ARCH, tile::SHIFT_OPERAND, Constants::SHAPE.backward, OneShape<Constants>>(job, stream);
}
