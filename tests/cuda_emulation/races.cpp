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
    uint8_t in_flight = 0;  // asynchronous copies
    bool read_elsewhere = false;  // by an earlier cluster of this launch
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

[[noreturn]] void race(const Region& r, const void* p, const char* mine, const char* theirs, const std::string& who) {
    trap("race at byte %zd of %s %u: this %s and %s %s that no barrier orders", static_cast<const unsigned char*>(p) - r.begin,
         r.shared ? "shared memory" : "device buffer", r.number, mine, who.c_str(), theirs);
}

std::string name(unsigned thread) {
    return "thread " + std::to_string(thread % machine.threads_per_block) + "'s" +
           (machine.cluster_size > 1 ? " (rank " + std::to_string(thread / machine.threads_per_block) + ")" : "");
}

bool happened(unsigned thread, uint32_t clock) { return thread == current->id || current->clock[thread] >= clock; }

void check_readers(const Region& r, const void* p, const Readers& x) {
    for (uint32_t lanes = x.lanes; lanes; lanes &= lanes - 1) {
        const unsigned reader = x.warp * WARP + __builtin_ctz(lanes);
        if (!happened(reader, x.clock)) race(r, p, "write", "read", name(reader));
    }
}

// A thread's later read stands for its earlier ones: what races with those races with it.
void add_reader(std::vector<Readers>& readers) {
    const uint32_t warp = current->id / WARP, clock = current->clock[current->id], lane = 1u << current->lane;
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

void access(const void* address, size_t bytes, bool write) {
    Region* r = region_of(address);
    if (!r || !bytes) return;
    auto* p = static_cast<const unsigned char*>(address);
    const char* what = write ? "write" : "read";
    check_access(p, bytes, 1, what);
    auto& cells = shadow(*r);
    for (size_t i = (p - r->pages) / GRANULE; i <= size_t(p + bytes - 1 - r->pages) / GRANULE; i++) {
        Cell& c = cells[i];
        const unsigned char* here = std::max(r->begin, r->pages + i * GRANULE);
        if (c.cluster != machine.cluster) {
            const bool same_launch = !r->shared && c.cluster >= machine.launch;
            if (same_launch && c.write_clock) race(*r, here, what, "write", "another cluster's");
            const bool elsewhere = same_launch && (!c.readers.empty() || c.read_elsewhere);
            c = {};
            c.cluster = machine.cluster, c.read_elsewhere = elsewhere;
        }
        if (c.in_flight) trap("%s of byte %td of %s while an asynchronous copy writes it", what, here - r->begin,
                              r->shared ? "shared memory" : "a device buffer");
        if (c.write_clock && !happened(c.writer, c.write_clock)) race(*r, here, what, "write", name(c.writer));
        if (!write) {
            add_reader(c.readers);
            continue;
        }
        if (c.read_elsewhere) race(*r, here, what, "read", "another cluster's");
        for (const Readers& x : c.readers) check_readers(*r, here, x);
        c.readers.clear();
        c.writer = current->id, c.write_clock = current->clock[current->id];
    }
}

}  // namespace

void saw_read(const void* p, size_t bytes) {
    if (watched) access(p, bytes, false);
}

void saw_write(const void* p, size_t bytes) {
    if (watched) access(p, bytes, true);
}

void mark_in_flight(const void* p, size_t bytes, bool in_flight) {
    if (!watched) return;
    Region* r = region_of(p);
    auto& cells = shadow(*r);
    for (size_t i = 0; i < bytes / GRANULE; i++)
        cells[(static_cast<const unsigned char*>(p) - r->pages) / GRANULE + i].in_flight += in_flight ? 1 : -1;
}

}  // namespace emulation

// What g++ -fsanitize=thread calls. The kernel's host code is compiled with it too and has no current thread.
extern "C" {
#define SHIFT_HOOK(name, bytes, write) \
    void __tsan_##name(void* p) {      \
        if (emulation::current) emulation::access(p, bytes, write); \
    }
#define SHIFT_HOOKS(bytes)              \
    SHIFT_HOOK(read##bytes, bytes, false) \
    SHIFT_HOOK(write##bytes, bytes, true) \
    SHIFT_HOOK(unaligned_read##bytes, bytes, false) \
    SHIFT_HOOK(unaligned_write##bytes, bytes, true)
SHIFT_HOOKS(1) SHIFT_HOOKS(2) SHIFT_HOOKS(4) SHIFT_HOOKS(8) SHIFT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
    if (emulation::current) emulation::access(p, bytes, false);
}
void __tsan_write_range(void* p, size_t bytes) {
    if (emulation::current) emulation::access(p, bytes, true);
}
void __tsan_init() { emulation::watched = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
