// The resident kernels: for sm_80 and newer, and for sm_90a resident_forward.cuh and resident_backward.cuh with another
// way of multiplying, arch/sm90a.cuh. One for any call, or one for a shape that is constant: S.
//
// Block on sm_90a: two warpgroups for up to 64 or 128 rows, and a warp that streams weights, of a warpgroup that gives its
// registers to the two where they hold the residual stream (arch/sm90a_registers.cuh). Shared memory: plan.h. The
// blocks of a cluster (1, 2 or 4) share the weights' way from L2; and 2 or 4 neighbours in it a sequence that is too
// large for the shared memory of one: split.cuh.
#pragma once
#include "arch/sm80.cuh"
#include "arch/sm90a.cuh"
#include "arch/sm90a_registers_backward.cuh"
#include "run.cuh"
#include "shape.h"
#include "tile/registers.cuh"

namespace shift_cuda {

struct AnyShape {
    static constexpr bool IN_REGISTERS = false;
    static constexpr int64_t THREADS_SM90A = CONSUMERS + PRODUCERS;
    __device__ static const Job& job(const Job& given) { return given; }
};

// S::SHAPE is a constant.
template <class S>
struct OneShape {
    static constexpr Shape SHAPE = S::SHAPE;
    static constexpr bool IN_REGISTERS = in_registers(SHAPE.plan);
    static constexpr int64_t THREADS_SM90A = SHAPE.plan.threads;
    // All but the fields that a shape leaves open become constants, once the compiler has it in registers.
    __device__ __forceinline__ static Job job(const Job& given) {
        Job job = given;
        static_cast<Block&>(job.call) = SHAPE.block;
        job.call.seq_len = SHAPE.seq_len, job.call.dtype = SHAPE.dtype;
        job.call.own_loops = SHAPE.own_loops, job.call.halting = SHAPE.halting;
        job.plan = SHAPE.plan;
        job.plan.programs = given.plan.programs, job.plan.blocks = given.plan.blocks;
        job.plan.cluster = given.plan.cluster;
        job.at = layout(job.call, job.plan, SHAPE.backward);
        job.backward = int(SHAPE.backward);
        return job;
    }
};

template <class T, class S>
__global__ void __launch_bounds__(512, 1) resident_forward(const __grid_constant__ Job given) {
    const Job& job = S::job(given);
    const Program<Sm80, T> p(job);
    forward_in_memory(p, [](int64_t, bool running) { return running; });
}

template <class T, class S>
__global__ void __launch_bounds__(512, 1) resident_backward(const __grid_constant__ Job given) {
    const Job& job = S::job(given);
    Program<Sm80, T> p(job);
    const InMemory<Sm80, T> x{p};
    backward_of_all(x, p);
}

// Streams the weights of all programs' loops, loops(program) at most; false for who did that, true for those who own
// the rows.
template <class T, class Loops, class Before>
__device__ inline bool beside_the_weights(const Program<Sm90a, T>& p, Loops loops, Before before) {
    if (threadIdx.x == 0) start_ring(p);
    sync_cluster();
    const bool owns = shuffle(warp(), 0) < p.warps();  // which the compiler then knows to be so for a whole warp
    if (!owns) {
        before();
        if (threadIdx.x == p.threads()) stream_weights(p, loops);
    }
    return owns;
}

template <class T, class S>
__global__ void __launch_bounds__(S::THREADS_SM90A, 1) resident_forward_sm90a(const __grid_constant__ Job given) {
    if constexpr (HAS_SM90A) {
        const Job& job = S::job(given);
        const Program<Sm90a, T> p(job);
        const auto begins = [&](int64_t t, bool running) { return begins_loop(p, t, running); };
        const auto loops = [](const auto& program) { return program.loops(); };
        if constexpr (S::IN_REGISTERS) {
            if (beside_the_weights(p, loops, [] { give_registers<40>(); })) {
                take_registers<232>();
                forward_in_registers<S>(p, begins);
            }
        } else if (beside_the_weights(p, loops, [] {})) {
            forward_in_memory(p, begins);
        }
        sync_cluster();  // others may still arrive here, and bring tiles
    } else {
        asm volatile("trap;");
    }
}

template <class T, class S>
__global__ void __launch_bounds__(S::THREADS_SM90A, 1) resident_backward_sm90a(const __grid_constant__ Job given) {
    if constexpr (HAS_SM90A) {
        const Job& job = S::job(given);
        Program<Sm90a, T> p(job);
        const auto loops = [](const auto& program) { return loops_backward(program); };
        if constexpr (S::IN_REGISTERS) {
            if (beside_the_weights(p, loops, [] { give_registers<40>(); })) {
                take_registers<232>();
                Numbers<S> numbers;
                InRegisters<T, S> x{p, numbers};
                backward_of_all(x, p);
            }
        } else if (beside_the_weights(p, loops, [] {})) {
            const InMemory<Sm90a, T> x{p};
            backward_of_all(x, p);
        }
        sync_cluster();
    } else {
        asm volatile("trap;");
    }
}

template <class A, class T, bool BACKWARD, class S>
const char* launch_kernel(const Job& job, void* stream) {
    constexpr bool HOPPER = std::is_same<A, Sm90a>::value;
    if constexpr (HOPPER && BACKWARD)
        return launch_programs(job, stream, resident_backward_sm90a<T, S>);
    else if constexpr (HOPPER)
        return launch_programs(job, stream, resident_forward_sm90a<T, S>);
    else if constexpr (BACKWARD)
        return launch_programs(job, stream, resident_backward<T, S>);
    else
        return launch_programs(job, stream, resident_forward<T, S>);
}

}  // namespace shift_cuda
