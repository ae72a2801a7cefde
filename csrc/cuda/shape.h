// A kernel may be compiled for any call, or for one shape: then sizes, options and plan are constants, and most
// instructions go. Batch and loops are not part of a shape, nor where tensors are.
#pragma once
#include "call.h"

namespace shift_cuda {

// Fields of 8 bytes without gaps, so that it can be written as a list of numbers and compared as memory.
struct Shape {
    Block block;
    int64_t seq_len, own_loops, halting, dtype, backward;
    Plan plan;  // but for what follows from the batch: 0
};

constexpr int64_t SHAPE_WORDS = sizeof(Shape) / 8;
static_assert(alignof(Shape) == 8 && sizeof(Shape) % 8 == 0, "a gap would have any value");

constexpr Shape shape_of(const Call& c, const Plan& p, bool backward) {
    Shape s = {c, c.seq_len, c.own_loops, c.halting, c.dtype, backward, p};
    s.plan.programs = s.plan.blocks = s.plan.cluster = s.plan.packed_bytes = s.plan.workspace_bytes = 0;
    return s;
}

}  // namespace shift_cuda
