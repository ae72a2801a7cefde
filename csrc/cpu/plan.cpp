// Compiled for any machine: puts the samples into tiles, picks the instruction set, and is what Python calls.
#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>
#include <vector>

#include "call.h"

extern "C" {
int shift_forward_portable(const Call*, const Plan*);
int shift_backward_portable(const Call*, const Plan*);
#if defined(__x86_64__)
int shift_forward_avx2(const Call*, const Plan*);
int shift_backward_avx2(const Call*, const Plan*);
int shift_forward_avx512(const Call*, const Plan*);
int shift_backward_avx512(const Call*, const Plan*);
int shift_forward_avx512bf16(const Call*, const Plan*);
int shift_backward_avx512bf16(const Call*, const Plan*);
#endif
}

namespace {

// The call with its loops and lengths read once, and held to their limits: whatever another thread writes into the
// caller's memory meanwhile, what is read and written here follows from one set of numbers.
struct Tiles {
    std::vector<int64_t> loops, lengths, order, begins, rows_before;
    Call call;
    Plan plan;

    // Samples that loop longest come first; a tile is closed once it has rows_per_tile rows.
    Tiles(const Call& c, int64_t rows_per_tile)
        : loops(c.loops, c.loops + c.batch), lengths(c.lengths, c.lengths + c.batch), order(c.batch), begins{0},
          call(c), plan{} {
        for (int64_t& x : loops) x = std::clamp<int64_t>(x, 0, c.most_loops);
        for (int64_t& x : lengths) x = std::clamp<int64_t>(x, 0, c.seq_len);
        call.loops = loops.data(), call.lengths = lengths.data();
        std::iota(order.begin(), order.end(), int64_t{0});
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return loops[a] > loops[b]; });
        int64_t rows = 0, total = 0;
        for (int64_t i = 0; i < c.batch; i++) {
            rows += lengths[order[i]];
            const bool full = c.halting || rows >= rows_per_tile || i + 1 == c.batch;
            if (!full) continue;
            plan.most_rows = std::max(plan.most_rows, rows);
            plan.most_samples = std::max(plan.most_samples, i + 1 - begins.back());
            begins.push_back(i + 1);
            rows_before.push_back(total);
            total += rows;
            rows = 0;
        }
        plan.order = order.data(), plan.tiles = begins.data(), plan.rows_before = rows_before.data();
        plan.n_tiles = begins.size() - 1;
    }
};

}  // namespace

extern "C" {

// 3: avx512bf16, 2: avx512, 1: avx2, 0: portable
int shift_best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

// Compiler, instruction sets and threading of this build, in words.
const char* shift_build_info() {
    return
#if defined(__clang__)
        "clang " __clang_version__
#else
        "g++ " __VERSION__
#endif
#if defined(__x86_64__)
        "; avx512bf16, avx512, avx2, portable"
#else
        "; portable"
#endif
#if defined(_OPENMP)
        "; OpenMP";
#else
        "; one thread (no OpenMP)";
#endif
}

int64_t shift_call_size() { return sizeof(Call); }

// 0, or 1 where memory ran out.
int shift_run(const Call* given, int backward, int isa, int64_t rows_per_tile) try {
    const Tiles tiles(*given, rows_per_tile);
    const Call* c = &tiles.call;
#if defined(__x86_64__)
    if (isa == 3) return (backward ? shift_backward_avx512bf16 : shift_forward_avx512bf16)(c, &tiles.plan);
    if (isa == 2) return (backward ? shift_backward_avx512 : shift_forward_avx512)(c, &tiles.plan);
    if (isa == 1) return (backward ? shift_backward_avx2 : shift_forward_avx2)(c, &tiles.plan);
#endif
    return (backward ? shift_backward_portable : shift_forward_portable)(c, &tiles.plan);
} catch (const std::bad_alloc&) {
    return 1;
}
}
