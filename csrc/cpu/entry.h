// What the CPU kernels offer to Python's module.
#pragma once
#include <vector>

#include "attention_call.h"
#include "call.h"

namespace shift_cpu {

constexpr const char* ISAS[] = {"portable", "avx2", "avx512", "avx512bf16"};  // each holds those before it
int best_isa();  // of this processor, and at most $SHIFT_KERNELS_CPU_ISA, as an index of ISAS

// Compiler, instruction sets and threading of this build, in words.
const char* build_info();

// The call with its loops and lengths read once, and held to their limits: whatever another thread writes into the
// caller's memory meanwhile, what is read and written follows from one set of numbers. And how it is cut up.
struct Planned {
    explicit Planned(const Call& c);
    Planned(const Planned&) = delete;
    Planned& operator=(const Planned&) = delete;

    std::vector<int64_t> loops, lengths, order, begins, rows_before;
    Call call;
    Plan plan;
};

enum Outcome { DONE, NO_MEMORY, STOPPED };

// signalled: asks Python whether the call is to end (team.h).
Outcome run(const Planned& planned, bool backward, int isa, bool (*signalled)());

Outcome attention(const AttentionCall& call, bool backward, int isa);

}  // namespace shift_cpu
