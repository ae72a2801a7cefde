// Barriers, shuffles, and the warp's matrix instructions with their layouts.
#include <map>

#include "machine.h"

namespace emulation {

void order_lanes(Warp& w) {
    if (!watched) return;
    Clock all;
    for (unsigned i = 0; i < WARP; i++) join(all, w.threads[i].clock);
    for (unsigned i = 0; i < WARP; i++) w.threads[i].clock = all, w.threads[i].clock[w.threads[i].id]++;
}

void sync_warp() { warp_collective("sync_warp", nullptr, order_lanes); }

// How often a barrier of so many threads was passed, since the program began.
std::map<unsigned, uint64_t> meetings;

// Section 9.7.13.1: the barrier of that many threads is done, and all who wait go on, when the last has come.
void meet(Barrier& b, unsigned threads, bool wait, const char* name) {
    if (b.arrived && b.expected != threads)
        trap("%s: this barrier is awaited by %u threads and by %u", name, b.expected, threads);
    b.expected = threads;
    release_into(b.joined);
    if (++b.arrived < threads) {
        if (wait) b.waiting.push_back(current), suspend(name);
        return;
    }
    meetings[threads]++;
    if (wait) acquire_from(b.joined);
    for (Thread* t : b.waiting) {
        if (watched) join(t->clock, b.joined);
        wake(*t);
    }
    b = {};
}

namespace {

Barrier& named(int id, unsigned threads, const char* name) {
    if (id < 1 || id > 15) trap("%s: barrier %d; 1 .. 15 are possible", name, id);
    if (!threads || threads % WARP || threads > machine.threads_per_block)
        trap("%s: barrier %d of %u threads in a block of %u", name, id, threads, machine.threads_per_block);
    return current->block->barriers[id];
}

}  // namespace

void sync_block() { meet(current->block->barriers[0], machine.threads_per_block, true, "sync_block"); }

void sync_threads(int id, int threads) { meet(named(id, threads, "sync_threads"), threads, true, "sync_threads"); }

void arrive_threads(int id, int threads) {
    meet(named(id, threads, "arrive_threads"), threads, false, "arrive_threads");
}

uint32_t shuffle(uint32_t value, int from_lane) {
    struct {
        uint32_t value;
        int from;
        uint32_t result;
    } mine{value, from_lane, 0};
    using Mine = decltype(mine);
    if (from_lane < 0 || from_lane >= int(WARP)) trap("shuffle from lane %d", from_lane);
    warp_collective("shuffle", &mine, [](Warp& w) {
        for (void* each : w.operands) {
            auto& m = *static_cast<Mine*>(each);
            m.result = static_cast<Mine*>(w.operands[m.from])->value;
        }
    });
    return mine.result;
}

uint32_t ballot(bool yes) {
    uint32_t mine = yes;
    warp_collective("ballot", &mine, [](Warp& w) {
        uint32_t votes = 0;
        for (unsigned i = 0; i < WARP; i++) votes |= *static_cast<uint32_t*>(w.operands[i]) << i;
        for (void* each : w.operands) *static_cast<uint32_t*>(each) = votes;
    });
    return mine;
}

// Section 9.7.14.5.15: lane 8 i + r gives row r of matrix i; lane l takes row l / 4, numbers 2 (l % 4) and + 1.
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
    struct {
        uint32_t* r;
        const uint16_t* row;
    } mine{r, static_cast<const uint16_t*>(row)};
    using Mine = decltype(mine);
    check_shared(row, 16, 16, "ldmatrix");
    saw_read(row, 16, as_current());
    const auto run = [](Warp& w, bool transposed) {
        for (unsigned l = 0; l < WARP; l++)
            for (unsigned i = 0; i < 4; i++) {
                const auto number = [&](unsigned row, unsigned column) -> uint32_t {
                    return static_cast<Mine*>(w.operands[8 * i + row])->row[column];
                };
                const unsigned g = l / 4, t = l % 4;
                static_cast<Mine*>(w.operands[l])->r[i] = transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16
                                                                     : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
            }
    };
    if (transposed) return warp_collective("ldmatrix_transposed", &mine, [&](Warp& w) { run(w, true); });
    warp_collective("ldmatrix", &mine, [&](Warp& w) { run(w, false); });
}

namespace {

// Register i of a 16-bit fragment holds two numbers, of a tf32 fragment one (whose lower bits do not count).
template <Number TYPE>
float number(uint32_t reg, unsigned half) {
    if (TYPE == Number::TF32) return bit_cast<float>(reg & ~0x1fffu);
    const uint16_t bits = half ? reg >> 16 : reg & 0xffff;
    return TYPE == Number::BF16 ? from_bf16(bits) : from_fp16(bits);
}

struct Mma {
    float* c;
    const uint32_t *a, *b;
};

// Sections 9.7.14.5.7 (tf32, m16n8k8) and 9.7.14.5.8 (16 bits, m16n8k16): a register's place in its matrix is the
// same for both, counted in registers: a[i] at row g + 8 (i % 2), k t + 4 (i / 2); b[i] at k t + 4 i, column g.
template <Number TYPE>
void multiply(Warp& w) {
    constexpr unsigned PER = TYPE == Number::TF32 ? 1 : 2, K = 8 * PER;
    float a[16][K], b[K][8], c[16][8];
    for (unsigned l = 0; l < WARP; l++) {
        const unsigned g = l / 4, t = l % 4;
        const Mma& lane = *static_cast<Mma*>(w.operands[l]);
        for (unsigned half = 0; half < PER; half++) {
            for (unsigned i = 0; i < 4; i++)
                a[g + 8 * (i % 2)][(t + 4 * (i / 2)) * PER + half] = number<TYPE>(lane.a[i], half);
            for (unsigned i = 0; i < 2; i++) b[(t + 4 * i) * PER + half][g] = number<TYPE>(lane.b[i], half);
        }
        for (unsigned i = 0; i < 4; i++) c[g + 8 * (i / 2)][2 * t + i % 2] = lane.c[i];
    }
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < K; k++)
            for (unsigned column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (unsigned l = 0; l < WARP; l++)
        for (unsigned i = 0; i < 4; i++)
            static_cast<Mma*>(w.operands[l])->c[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

}  // namespace

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number type) {
    Mma mine{c, a, b};
    switch (type) {
        case Number::BF16:
            return warp_collective("mma bf16", &mine, multiply<Number::BF16>);
        case Number::FP16:
            return warp_collective("mma fp16", &mine, multiply<Number::FP16>);
        case Number::TF32:
            return warp_collective("mma tf32", &mine, multiply<Number::TF32>);
    }
}

}  // namespace emulation

extern "C" uint64_t shift_emulation_meetings(unsigned threads) { return emulation::meetings[threads]; }
