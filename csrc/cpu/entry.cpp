// Compiled for any machine: cuts a call up into tiles and slices, and picks the instruction set.
#include "entry.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>

#include "team.h"

// block.cpp, once for each instruction set. Both return 0, or 1 where memory ran out.
extern "C" {
#define SHIFT_KERNELS_OF(isa)                                         \
    int shift_forward_##isa(const Call*, const Plan*, Team*);         \
    int shift_backward_##isa(const Call*, const Plan*, Team*);        \
    int shift_attention_##isa(const AttentionCall*, bool);
SHIFT_KERNELS_OF(portable)
#if defined(__x86_64__)
SHIFT_KERNELS_OF(avx2)
SHIFT_KERNELS_OF(avx512)
SHIFT_KERNELS_OF(avx512bf16)
#endif
}

namespace shift_cpu {

namespace {

constexpr int64_t ROWS_PER_TILE = 64;  // enough for the matrix products, few for L2
constexpr int64_t LONG_TILE = 256;     // rows of which each thread has some, and that take longer than threads' meetings

// Few slices, for each has to be zeroed and added.
constexpr int64_t MOST_SLICES = 16, ROW_LOOPS_PER_SLICE = 1024;
constexpr int64_t FEW_ROW_LOOPS = 256;  // of all tiles: four uses of a weight, for 64 rows each

}  // namespace

namespace {

int isa_of_processor() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

}  // namespace

int best_isa() {
    static const int best = [] {
        const char* most = std::getenv("SHIFT_KERNELS_CPU_ISA");
        const auto named = std::find_if(std::begin(ISAS), std::end(ISAS), [&](const char* isa) {
            return most && std::strcmp(isa, most) == 0;
        });
        const int limit = named == std::end(ISAS) ? int(std::size(ISAS)) - 1 : int(named - std::begin(ISAS));
        return std::min(limit, isa_of_processor());
    }();
    return best;
}

const char* build_info() {
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

// Samples that loop longest come first; a tile is closed once it has ROWS_PER_TILE rows.
Planned::Planned(const Call& c)
    : loops(c.loops, c.loops + c.batch), lengths(c.lengths, c.lengths + c.batch), order(c.batch), begins{0},
      call(c), plan{} {
    for (int64_t& x : loops) x = std::clamp<int64_t>(x, 0, c.most_loops);
    for (int64_t& x : lengths) x = std::clamp<int64_t>(x, 0, c.seq_len);
    call.loops = loops.data(), call.lengths = lengths.data();
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return loops[a] > loops[b]; });
    int64_t rows = 0, total = 0, row_loops = 0, work = 0, most_work = 0;
    for (int64_t i = 0; i < c.batch; i++) {
        rows += lengths[order[i]];
        row_loops += lengths[order[i]] * loops[order[i]];
        const bool full = c.halting || rows >= ROWS_PER_TILE || i + 1 == c.batch;
        if (!full) continue;
        plan.most_rows = std::max(plan.most_rows, rows);
        plan.most_samples = std::max(plan.most_samples, i + 1 - begins.back());
        begins.push_back(i + 1);
        rows_before.push_back(total);
        total += rows, work += rows * rows, most_work = std::max(most_work, rows * rows);
        rows = 0;
    }
    plan.order = order.data(), plan.tiles = begins.data(), plan.rows_before = rows_before.data();
    plan.n_tiles = rows_before.size();
    // Otherwise the others would wait for whoever has the longest tile.
    plan.together = c.n_threads > 1 && !c.halting && plan.most_rows >= LONG_TILE && most_work * c.n_threads * 2 > work;
    plan.few_uses = row_loops <= FEW_ROW_LOOPS;
    plan.n_slices = std::clamp<int64_t>(row_loops / ROW_LOOPS_PER_SLICE, 1, MOST_SLICES);
}

Outcome run(const Planned& planned, bool backward, int isa, bool (*signalled)()) {
    Team team(signalled);
    Call call = planned.call;
    call.n_threads = threads_that_fit(int(call.n_threads));
    const auto kernel =
#if defined(__x86_64__)
        isa == 3   ? backward ? shift_backward_avx512bf16 : shift_forward_avx512bf16
        : isa == 2 ? backward ? shift_backward_avx512 : shift_forward_avx512
        : isa == 1 ? backward ? shift_backward_avx2 : shift_forward_avx2
                   :
#endif
                   backward ? shift_backward_portable : shift_forward_portable;
    const int no_memory = kernel(&call, &planned.plan, &team);
    return no_memory ? NO_MEMORY : team.stopped() ? STOPPED : DONE;
}

Outcome attention(const AttentionCall& given, bool backward, int isa) {
    AttentionCall call = given;
    call.n_threads = threads_that_fit(int(call.n_threads));
    // Read once, and held to their limits, as of a looped block.
    std::vector<int64_t> q_lens(call.q_lens, call.q_lens + call.batch), k_lens(call.k_lens, call.k_lens + call.batch);
    for (int64_t& x : q_lens) x = std::clamp<int64_t>(x, 0, call.q_len);
    for (int64_t& x : k_lens) x = std::clamp<int64_t>(x, 0, call.k_len);
    call.q_lens = q_lens.data(), call.k_lens = k_lens.data();
    const auto kernel =
#if defined(__x86_64__)
        isa == 3 ? shift_attention_avx512bf16 : isa == 2 ? shift_attention_avx512 : isa == 1 ? shift_attention_avx2 :
#endif
        shift_attention_portable;
    return kernel(&call, backward) ? NO_MEMORY : DONE;
}

}  // namespace shift_cpu
