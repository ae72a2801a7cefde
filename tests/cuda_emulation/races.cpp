// Sees every access of a kernel compiled with -fsanitize=thread, by defining that option's hooks, and says which
// two no barrier orders.
//
// For each two bytes: who wrote last, who read since, and at which step of theirs. An access is safe if the
// current thread's clock has reached those steps (happens-before; FastTrack's idea, readers kept as lanes of a warp).
#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace emulation {

namespace {

struct Readers {
    uint32_t warp, clock, lanes;
};

struct Cell {
    uint32_t cluster = 0;  // that the rest is about
    uint32_t write_clock = 0;  // 0: nobody wrote
    uint16_t writer = 0;
    bool ordinary_write = false;
    bool read_elsewhere = false;  // by an earlier cluster of this launch
    uint16_t being_written = 0, being_read = 0;  // by so many asynchronous operations
    std::vector<Readers> readers;
};

constexpr size_t GRANULE = 2;
std::unordered_map<const unsigned char*, std::vector<Cell>> shadows;  // by the region's pages

std::vector<Cell>& shadow(const Region& r) {
    static const unsigned char* last;
    static std::vector<Cell>* cells;
    if (last == r.pages && cells && cells->size() == size_t(r.pages_end - r.pages) / GRANULE) return *cells;
    last = r.pages;
    cells = &shadows[r.pages];
    cells->resize((r.pages_end - r.pages) / GRANULE);
    return *cells;
}

std::string name(unsigned thread) {
    return "thread " + std::to_string(thread % machine.threads_per_block) +
           (machine.cluster_size > 1 ? " of rank " + std::to_string(thread / machine.threads_per_block) : "");
}

std::string place(const Region& r, const unsigned char* p) {
    const std::string which = r.shared ? "shared memory " : "device buffer ";
    return "byte " + std::to_string(p - r.begin) + " of " + which + std::to_string(r.number);
}

// One access of an actor to one cell.
struct Access {
    const Region& region;
    const unsigned char* byte;
    const Actor& by;
    bool write;

    [[noreturn]] void race(const char* what, const std::string& whose) const {
        trap("race at %s: a %s by %s and a %s by %s, which no barrier orders", place(region, byte).c_str(),
             write ? "write" : "read", name(by.thread).c_str(), what, whose.c_str());
    }
    bool after(unsigned thread, uint32_t clock) const { return by.clock[thread] >= clock; }
    void check_reader(const Readers& x) const {
        for (uint32_t lanes = x.lanes; lanes; lanes &= lanes - 1) {
            const unsigned reader = x.warp * WARP + __builtin_ctz(lanes);
            if (!after(reader, x.clock)) race("read", name(reader));
        }
    }
    void check(Cell& c) const;
};

// A thread's later read stands for its earlier ones: what races with those races with it.
void add_reader(std::vector<Readers>& readers, const Actor& by) {
    const uint32_t warp = by.thread / WARP, clock = by.clock[by.thread], lane = 1u << by.thread % WARP;
    Readers *mine = nullptr, *empty = nullptr;
    for (Readers& x : readers) {
        if (x.warp != warp) continue;
        if (x.clock == clock) {
            mine = &x;
        } else {
            x.lanes &= ~lane;
            if (!x.lanes) empty = &x;
        }
    }
    if (mine)
        mine->lanes |= lane;
    else if (empty)
        *empty = {warp, clock, lane};
    else
        readers.push_back({warp, clock, lane});
}

void Access::check(Cell& c) const {
    if (c.cluster != machine.cluster) {
        const bool same_launch = !region.shared && c.cluster >= machine.launch;
        if (same_launch && c.write_clock) race("write", "another cluster");
        const bool elsewhere = same_launch && (!c.readers.empty() || c.read_elsewhere);
        c = {};
        c.cluster = machine.cluster, c.read_elsewhere = elsewhere;
    }
    if (c.being_written)
        trap("%s of %s while an asynchronous copy writes it", write ? "write" : "read", place(region, byte).c_str());
    if (write && c.being_read) trap("write of %s while wgmma reads it", place(region, byte).c_str());
    if (c.write_clock && !after(c.writer, c.write_clock)) race("write", name(c.writer));
    if (by.asynchronous && !write && c.ordinary_write && machine.threads[c.writer].fenced <= c.write_clock)
        trap("asynchronous read of %s, which %s wrote and did not follow by fence_async_proxy",
             place(region, byte).c_str(), name(c.writer).c_str());
    if (!write) return add_reader(c.readers, by);
    if (c.read_elsewhere) race("read", "another cluster");
    for (const Readers& x : c.readers) check_reader(x);
    c.readers.clear();
    c.writer = by.thread, c.write_clock = by.clock[by.thread], c.ordinary_write = !by.asynchronous;
}

template <class F>
void each_cell(const Region& r, const unsigned char* p, size_t bytes, F f) {
    auto& cells = shadow(r);
    for (size_t i = (p - r.pages) / GRANULE; i <= size_t(p + bytes - 1 - r.pages) / GRANULE; i++)
        f(cells[i], std::max(r.begin, r.pages + i * GRANULE));
}

void access(const void* address, size_t bytes, bool write, const Actor& by) {
    Region* r = region_of(address);
    if (!r || !bytes) return;
    auto* p = static_cast<const unsigned char*>(address);
    check_access(p, bytes, 1, write ? "write" : "read");
    if (r->shared && r->begin != current->block->shared)
        for (const Block& b : machine.blocks)
            if (b.shared == r->begin && !b.running)
                trap("%s of the shared memory of rank %u, which has returned", write ? "write" : "read", b.rank);
    each_cell(*r, p, bytes, [&](Cell& c, const unsigned char* byte) { Access{*r, byte, by, write}.check(c); });
}

void mark(const void* p, size_t bytes, int change, uint16_t Cell::*count) {
    if (!watched) return;
    const auto* at = static_cast<const unsigned char*>(p);
    each_cell(*region_of(p), at, bytes, [&](Cell& c, const unsigned char*) { c.*count += change; });
}

}  // namespace

void saw_read(const void* p, size_t bytes, Actor by) {
    if (watched) access(p, bytes, false, by);
}

void saw_write(const void* p, size_t bytes, Actor by) {
    if (watched) access(p, bytes, true, by);
}

void mark_writing(const void* p, size_t bytes, int change) { mark(p, bytes, change, &Cell::being_written); }
void mark_reading(const void* p, size_t bytes, int change) { mark(p, bytes, change, &Cell::being_read); }

}  // namespace emulation

// What g++ -fsanitize=thread calls. The kernel's host code is compiled with it too and has no current thread.
extern "C" {
#define SHIFT_HOOK(name, bytes, write) \
    void __tsan_##name(void* p) {      \
        if (emulation::current) emulation::access(p, bytes, write, emulation::as_current()); \
    }
#define SHIFT_HOOKS(bytes)              \
    SHIFT_HOOK(read##bytes, bytes, false) \
    SHIFT_HOOK(write##bytes, bytes, true) \
    SHIFT_HOOK(unaligned_read##bytes, bytes, false) \
    SHIFT_HOOK(unaligned_write##bytes, bytes, true)
SHIFT_HOOKS(1) SHIFT_HOOKS(2) SHIFT_HOOKS(4) SHIFT_HOOKS(8) SHIFT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
    if (emulation::current) emulation::access(p, bytes, false, emulation::as_current());
}
void __tsan_write_range(void* p, size_t bytes) {
    if (emulation::current) emulation::access(p, bytes, true, emulation::as_current());
}
void __tsan_init() { emulation::watched = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
