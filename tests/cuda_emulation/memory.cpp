// Shared memory and device buffers, each between pages that cannot be touched, and what happens at a fault.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace emulation {

namespace {

constexpr size_t PAGE = 4096, SPACE = size_t{1} << 36;  // address space only
constexpr unsigned char POISON = 0xff;  // NaN in every type
constexpr unsigned char MARGIN = 0xa5;  // between a buffer and its pages' ends

struct Space {
    unsigned char* base;
    size_t used = PAGE;
    std::vector<uint16_t> region_of_page;  // 0: none
    std::deque<Region> regions;            // region i + 1

    Space() {
        void* p = mmap(nullptr, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            std::perror("emulation: no address space");
            std::abort();
        }
        base = static_cast<unsigned char*>(p);
    }

    // The last byte is followed by less than `alignment` bytes of margin and a page that cannot be touched.
    Region& add(size_t bytes, size_t alignment, bool shared) {
        const size_t length = (bytes + PAGE - 1) / PAGE * PAGE;
        if (used + length + PAGE > SPACE || regions.size() == 0xffff) {
            std::fprintf(stderr, "emulation: address space is used up; free buffers\n");
            std::abort();
        }
        Region r;
        r.pages = base + used, r.pages_end = r.pages + length;
        r.begin = r.pages_end - (bytes + alignment - 1) / alignment * alignment;
        r.end = r.begin + bytes;
        r.shared = shared;
        r.number = std::count_if(regions.begin(), regions.end(), [&](Region& other) { return other.shared == shared; });
        mprotect(r.pages, length, PROT_READ | PROT_WRITE);
        std::fill(r.pages, r.begin, MARGIN), std::fill(r.end, r.pages_end, MARGIN);
        regions.push_back(r);
        region_of_page.resize((used + length) / PAGE + 1);
        for (size_t page = used / PAGE; page < (used + length) / PAGE; page++) region_of_page[page] = regions.size();
        used += length + PAGE;
        return regions.back();
    }
};

Space space;
std::vector<Region*> shared_regions;  // by rank in the cluster
struct sigaction before_segv, before_bus;
stack_t before_stack;

std::string place(const void* address) {
    auto* p = static_cast<const unsigned char*>(address);
    const Region* nearest = nullptr;
    ptrdiff_t least = PAGE + 1;
    for (const Region& r : space.regions) {
        const ptrdiff_t away = p < r.begin ? r.begin - p : p >= r.end ? p - r.end + 1 : 0;
        if (r.begin < r.end && away < least) least = away, nearest = &r;
    }
    if (!nearest) return "an address in no buffer";
    const Region& r = *nearest;
    const std::string name = (r.shared ? "shared memory" : "device buffer " + std::to_string(r.number)) + " (" +
                             std::to_string(r.end - r.begin) + " bytes)";
    if (p < r.begin) return std::to_string(r.begin - p) + " bytes before " + name;
    if (p >= r.end) return std::to_string(p - r.end) + " bytes past the end of " + name;
    return "byte " + std::to_string(p - r.begin) + " of " + name;
}

void on_fault(int number, siginfo_t* info, void*) {
    if (current && in_stack_guard(info->si_addr)) trap("a thread's stack is full");
    if (current) trap("access out of bounds: %s", place(info->si_addr).c_str());
    signal(number, SIG_DFL);  // not a kernel's: happens again
}

}  // namespace

Region* region_of(const void* address) {
    const size_t offset = static_cast<const unsigned char*>(address) - space.base;
    const size_t page = offset / PAGE;
    if (page >= space.region_of_page.size() || !space.region_of_page[page]) return nullptr;
    return &space.regions[space.region_of_page[page] - 1];
}

void begin_memory() {
    static unsigned char handler_stack[64 << 10];
    stack_t stack = {};
    stack.ss_sp = handler_stack, stack.ss_size = sizeof handler_stack;
    sigaltstack(&stack, &before_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
}

void end_memory() {
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&before_stack, nullptr);
}

unsigned char* begin_shared(unsigned rank, size_t bytes) {
    if (shared_regions.size() <= rank) shared_regions.resize(rank + 1);
    Region*& r = shared_regions[rank];
    if (!r || size_t(r->end - r->begin) != bytes) r = &space.add(bytes, 1024, true);
    std::fill(r->begin, r->end, POISON);
    return r->begin;
}

std::string writes_past_ends() {
    const auto first_write = [](const unsigned char* from, const unsigned char* to) {
        return std::find_if(from, to, [](unsigned char c) { return c != MARGIN; });
    };
    for (const Region& r : space.regions) {
        if (auto p = first_write(r.pages, r.begin); p != r.begin) return "write out of bounds: " + place(p);
        if (auto p = first_write(r.end, r.pages_end); p != r.pages_end) return "write out of bounds: " + place(p);
    }
    return {};
}

unsigned char* shared_memory() { return current->block->shared; }

void check_access(const void* p, size_t bytes, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        trap("misaligned %s: an address that is not a multiple of %zu", what, alignment);
    const Region* r = region_of(p);
    if (r && (p < r->begin || static_cast<const unsigned char*>(p) + bytes > r->end))
        trap("%s of %zu bytes out of bounds: %s", what, bytes, place(p).c_str());
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
    const Region* r = region_of(p);
    if (!r || !r->shared || std::find(shared_regions.begin(), shared_regions.end(), r) == shared_regions.end())
        trap("%s: an address outside shared memory: %s", what, place(p).c_str());
    check_access(p, bytes, alignment, what);
}

// cp.async: section 9.7.9.25.3

namespace {
void land(Copy& c) {
    if (c.landed) return;
    std::memcpy(c.to, c.from, c.bytes);
    std::memset(c.to + c.bytes, 0, 16 - c.bytes);
    c.landed = true;
}
}  // namespace

void copy_async(void* shared, const void* device, int bytes) {
    check_shared(shared, 16, 16, "cp.async");
    if (bytes < 0 || bytes > 16) trap("cp.async of %d bytes; 0 .. 16 are possible", bytes);
    check_access(device, bytes, 16, "cp.async");
    if (const Region* r = region_of(device); r && r->shared) trap("cp.async from shared memory");
    saw_read(device, bytes, as_current());
    saw_write(shared, 16, as_current());
    mark_writing(shared, 16, 1);
    Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(device), bytes, false};
    if (draw(256) < machine.eagerness) land(copy);
    current->uncommitted.push_back(copy);
}

void copy_async_commit() {
    current->groups.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
}

void copy_async_wait(int groups_left) {
    while (int(current->groups.size()) > groups_left) {
        for (Copy& copy : current->groups.front()) {
            land(copy);
            mark_writing(copy.to, 16, -1);
            saw_write(copy.to, 16, as_current());
        }
        current->groups.pop_front();
    }
}

}  // namespace emulation

using namespace emulation;

// Device memory for a kernel's arguments, 16-byte aligned, poisoned.
extern "C" void* shift_emulation_allocate(size_t bytes) {
    Region& r = space.add(bytes, 16, false);
    std::fill(r.begin, r.end, POISON);
    return r.begin;
}

// Gives all of it back; no pointer into it may be used again.
extern "C" void shift_emulation_free() {
    madvise(space.base, space.used, MADV_DONTNEED);
    mprotect(space.base, space.used, PROT_NONE);
    space.used = PAGE;
    space.regions.clear();
    space.region_of_page.clear();
    shared_regions.clear();
}
