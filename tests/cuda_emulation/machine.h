// The emulated GPU's state: threads as fibers, warps, blocks, and the cluster of blocks that runs now.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr unsigned WARP = 32;
constexpr uint32_t ALL_LANES = ~0u;

// What a thread knows of each thread of its cluster: the latest of its steps that happened before now. Empty when
// nobody watches accesses (races.cpp).
using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from);

// A cp.async under way.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;  // of 16; the rest is zero
    bool landed;
};

struct Block;
struct Warp;

struct Thread {
    void* stack_pointer;  // while it does not run
    unsigned id;          // in the cluster
    unsigned lane;
    uint3 index;
    Warp* warp;
    Block* block;
    const char* waits;  // at what, or null
    bool done;
    Clock clock;
    Clock released;     // at its latest cluster_fence
    uint32_t fenced;  // its writes before this step are visible to asynchronous operations
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;
};

// One warp's share of a wgmma under way: 16 of the 64 rows.
struct Product {
    uint32_t a[WARP][4];
    const uint32_t* a_registers[WARP];  // null: a is in shared memory
    uint64_t a_descriptor, b_descriptor;
    bool a_mn_major, b_mn_major, accumulate, done;
    int columns;
    Number type;
    float* d[WARP];
};

// What the accumulators at one place will be: kept here until waited for.
struct Accumulators {
    int columns, products;
    std::vector<float> values;  // [32][columns / 2]
};

struct WgmmaState {
    bool fenced = false;
    uint64_t history = 0;  // the same for the four warps of a warpgroup in the end
    std::vector<Product> uncommitted;
    std::deque<std::vector<Product>> groups;
    std::map<float*, Accumulators> accumulators;  // by lane 0's
};

struct Warp {
    Thread* threads;  // 32
    uint32_t ready;   // bit per lane
    // the collective under way
    const char* collective = nullptr;
    uint32_t arrived = 0;
    void* operands[WARP];
    WgmmaState wgmma;
};

// Section 9.7.13.15: a phase is complete when no arrival and no byte is outstanding.
struct Mbarrier {
    int arrivals, pending, bytes;
    uint32_t phase;
    std::vector<Thread*> waiting;
    Clock joined, completed;  // of this phase; of the one before
};

// A bulk copy under way.
struct BulkCopy {
    Thread* issuer;
    Clock clock;
    const unsigned char* from;
    int bytes;
    std::vector<unsigned char*> to;
    std::vector<Mbarrier*> arrives_at;
};

struct Barrier {
    unsigned expected = 0, arrived = 0;
    std::vector<Thread*> waiting;
    Clock joined;
};

struct Block {
    uint3 index;
    unsigned rank;  // in the cluster
    unsigned char* shared;
    unsigned running;
    std::map<int, Barrier> barriers;
    std::map<const void*, Mbarrier> mbarriers;
};

struct Machine {
    unsigned threads_per_block;
    unsigned cluster_size;
    uint32_t cluster, launch;  // number of this cluster, and of this launch's first, since the program began
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    unsigned done;
    Barrier cluster_barrier;
    std::deque<BulkCopy> bulk_copies;
    unsigned eagerness;  // of what is asynchronous, of 256 each time it could happen; 0: as late as possible
};

extern Machine machine;
extern Thread* current;  // null outside kernels
extern bool watched;     // the kernel was compiled so that races.cpp sees its accesses

uint32_t draw(uint32_t below);  // from the seed

bool in_stack_guard(const void* p);  // the current thread's

void suspend(const char* at);  // until somebody wakes it
void wake(Thread& thread);

// The current thread's own step ends: what others learn of it from now on includes all until here.
void release_into(Clock& clock);
void acquire_from(const Clock& clock);
void order_lanes(Warp& w);  // each knows what the others did
void meet(Barrier& b, unsigned threads, bool wait, const char* name);

// Lanes meet; the last one to come runs the operation for all, given every lane's operands.
template <class F>
void warp_collective(const char* name, void* operands, F run) {
    Warp& w = *current->warp;
    if (w.arrived && w.collective != name)
        trap("lanes of one warp part ways: this lane is at %s, others at %s", name, w.collective);
    w.collective = name;
    w.operands[current->lane] = operands;
    w.arrived |= 1u << current->lane;
    if (w.arrived != ALL_LANES) return suspend(name);
    w.arrived = 0;
    run(w);
    for (unsigned i = 0; i < WARP; i++)
        if (i != current->lane) wake(w.threads[i]);
}

// memory.cpp: buffers that end at a page which cannot be touched
struct Region {
    unsigned char *begin, *end;  // what kernels may touch
    unsigned char *pages, *pages_end;
    bool shared;
    unsigned number;
};
Region* region_of(const void* p);  // the one whose pages hold the address, or null
void begin_memory();
void end_memory();
std::string writes_past_ends();  // empty if there were none
unsigned char* begin_shared(unsigned rank, size_t bytes);
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what);

// races.cpp: accesses that an instruction makes on a thread's behalf, at a step of its clock; in the asynchronous
// proxy or like ordinary ones
struct Actor {
    unsigned thread;
    const Clock& clock;
    bool asynchronous;
};
inline Actor as_current() { return {current->id, current->clock, false}; }
void saw_read(const void* p, size_t bytes, Actor by);
void saw_write(const void* p, size_t bytes, Actor by);
void mark_writing(const void* p, size_t bytes, int change);  // asynchronous copies to it under way
void mark_reading(const void* p, size_t bytes, int change);  // wgmmas that read it under way

// wgmma.cpp, bulk_copy.cpp
bool land_a_copy();  // false: there was none
std::string left_undone();  // at a cluster's end; empty: nothing

}  // namespace emulation
