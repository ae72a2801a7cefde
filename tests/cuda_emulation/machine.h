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
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;
};

struct Warp {
    Thread* threads;  // 32
    uint32_t ready;   // bit per lane
    // the collective under way
    const char* collective = nullptr;
    uint32_t arrived = 0;
    void* operands[WARP];
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
    std::map<int, Barrier> barriers;
};

struct Machine {
    dim3 grid;
    unsigned threads_per_block;
    unsigned cluster_size;
    uint32_t cluster, launch;  // number of this cluster, and of this launch's first, since the program began
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    unsigned done;
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

// races.cpp: accesses that an instruction makes on the current thread's behalf
void saw_read(const void* p, size_t bytes);
void saw_write(const void* p, size_t bytes);
void mark_in_flight(const void* p, size_t bytes, bool in_flight);

}  // namespace emulation
