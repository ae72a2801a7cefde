// Fibers, their order, launches, and how a launch ends badly.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <string>

namespace emulation {

Machine machine;
dim3 block_size, grid_size;
Thread* current;
bool watched;

namespace {

constexpr size_t STACK = 128 << 10, GUARD = 4096;
std::vector<unsigned char*> stacks;  // kept for later launches
void* main_stack_pointer;
const std::function<void()>* kernel;
std::string message;
bool failed;
uint64_t seed, random_state;
uint32_t patience;  // of 256: how often the scheduler stays with a warp that can go on
Warp* favoured;
uint32_t clusters_run;

}  // namespace

// Saves the callee's registers on the stack, exchanges stacks, restores.
extern "C" void shift_emulation_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl shift_emulation_switch
.hidden shift_emulation_switch
.type shift_emulation_switch, @function
shift_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shift_emulation_switch, .-shift_emulation_switch
)");
constexpr int RETURN_AT = 6, FRAME = 8;
#elif defined(__aarch64__)
asm(R"(
.text
.globl shift_emulation_switch
.hidden shift_emulation_switch
.type shift_emulation_switch, %function
shift_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int RETURN_AT = 11, FRAME = 20;
#else
#error "the emulation needs a context switch for this processor"
#endif

uint32_t draw(uint32_t below) {
    random_state += 0x9e3779b97f4a7c15;  // splitmix64
    uint64_t z = random_state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return ((z ^ z >> 31) >> 32) * below >> 32;
}

namespace {

Thread* next_thread() {
    Warp* w = favoured;
    if (!w || !w->ready || draw(256) >= patience) {
        const size_t n = machine.warps.size(), first = draw(n);
        w = nullptr;
        for (size_t i = 0; i < n && !w; i++)
            if (Warp& candidate = machine.warps[(first + i) % n]; candidate.ready) w = &candidate;
        if (!w) return nullptr;
        favoured = w;
    }
    const unsigned r = draw(WARP);
    const uint32_t turned = w->ready >> r | (r ? w->ready << (WARP - r) : 0);
    const unsigned lane = (__builtin_ctz(turned) + r) % WARP;
    return w->threads + lane;
}

// Leaves the current fiber (or the launcher, whose `save` is main's) for the next that can run, or the launcher.
void go_on(void** save) {
    if (machine.eagerness && draw(256) < machine.eagerness) land_a_copy();
    Thread* next = next_thread();
    while (!next && land_a_copy()) next = next_thread();
    if (next == current && next) {
        next->warp->ready &= ~(1u << next->lane);
        return;
    }
    current = next;
    if (next) next->warp->ready &= ~(1u << next->lane);
    shift_emulation_switch(save, next ? next->stack_pointer : main_stack_pointer);
}

void enter_fiber() {
    (*kernel)();
    current->done = true;
    current->block->running--;
    machine.done++;
    void* nowhere;
    go_on(&nowhere);
    __builtin_unreachable();
}

void prepare(Thread& t, unsigned char* stack) {
    void** top = reinterpret_cast<void**>(stack + GUARD + STACK) - FRAME;
    std::fill(top, top + FRAME, nullptr);
    top[RETURN_AT] = reinterpret_cast<void*>(&enter_fiber);
    t.stack_pointer = top;
}

unsigned char* stack(size_t i) {
    while (stacks.size() <= i) {
        const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* p = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, kind, -1, 0);
        if (p == MAP_FAILED) {
            std::perror("emulation: no memory for a fiber's stack");
            std::abort();
        }
        mprotect(p, GUARD, PROT_NONE);
        stacks.push_back(static_cast<unsigned char*>(p));
    }
    return stacks[i];
}

void say_deadlock() {
    std::map<std::string, unsigned> at;
    for (Thread& t : machine.threads) at[t.done ? "have returned" : std::string("wait at ") + t.waits]++;
    message = "deadlock:";
    for (auto& [where, n] : at) message += " " + std::to_string(n) + " threads " + where + ",";
    message.back() = '.';
    failed = true;
}

void run_cluster(uint3 first_block, size_t shared_bytes) {
    Machine& m = machine;
    const unsigned per_block = m.threads_per_block, n = per_block * m.cluster_size;
    m.cluster = ++clusters_run;
    m.done = 0;
    m.cluster_barrier = {};
    m.bulk_copies.clear();
    m.blocks.assign(m.cluster_size, {});
    m.threads.assign(n, {});
    m.warps.assign(n / WARP, {});
    for (unsigned b = 0; b < m.cluster_size; b++) {
        Block& block = m.blocks[b];
        block.index = {first_block.x + b, first_block.y, first_block.z};
        block.rank = b;
        block.running = per_block;
        block.shared = begin_shared(b, shared_bytes);
    }
    for (unsigned i = 0; i < n; i++) {
        Thread& t = m.threads[i];
        t.id = i, t.lane = i % WARP, t.index = {i % per_block, 0, 0};
        t.warp = &m.warps[i / WARP], t.block = &m.blocks[i / per_block];
        t.warp->threads = &m.threads[i / WARP * WARP];
        t.warp->ready = ALL_LANES;
        if (watched) t.clock.assign(n, 0), t.clock[i] = 1;
        prepare(t, stack(i));
    }
    favoured = nullptr;
    go_on(&main_stack_pointer);
    if (!failed && m.done < n) say_deadlock();
    if (!failed) message = left_undone(), failed = !message.empty();
}

}  // namespace

bool in_stack_guard(const void* p) {
    const unsigned char* guard = stacks[current->id];
    return p >= guard && p < guard + GUARD;
}

void suspend(const char* at) {
    current->waits = at;
    go_on(&current->stack_pointer);
    current->waits = nullptr;
}

void wake(Thread& t) { t.warp->ready |= 1u << t.lane; }

void join(Clock& into, const Clock& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

void release_into(Clock& clock) {
    if (!watched) return;
    join(clock, current->clock);
    current->clock[current->id]++;
}

void acquire_from(const Clock& clock) {
    if (watched) join(current->clock, clock);
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }

void trap(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    message = text;
    const uint3 b = current->block->index;
    message += " (block " + std::to_string(b.x) + " " + std::to_string(b.y) + " " + std::to_string(b.z) + ", thread " +
               std::to_string(current->index.x) + ")";
    failed = true;
    current = nullptr;
    void* nowhere;
    shift_emulation_switch(&nowhere, main_stack_pointer);
    __builtin_unreachable();
}

const char* launch(dim3 grid, unsigned threads, size_t shared_bytes, unsigned cluster,
                   const std::function<void()>& body) {
    constexpr size_t MOST_SHARED = 227 << 10;
    message.clear();
    failed = false;
    if (!threads || threads % WARP || threads > 1024) return "a block must have 32, 64, .. 1024 threads";
    if (!cluster || cluster > 16 || grid.x % cluster) return "the grid's x must be a multiple of the cluster, 1 .. 16";
    if (shared_bytes > MOST_SHARED) return "a block can have at most 227 KB of shared memory";
    block_size = threads, grid_size = grid;
    machine.threads_per_block = threads, machine.cluster_size = cluster;
    kernel = &body;
    machine.launch = clusters_run + 1;
    random_state = seed;
    constexpr uint32_t PATIENCE[] = {256, 250, 128};
    constexpr unsigned EAGERNESS[] = {0, 64, 256};
    patience = PATIENCE[draw(3)];
    machine.eagerness = EAGERNESS[draw(3)];
    std::vector<unsigned> order(grid.x / cluster * grid.y * grid.z);  // of the clusters
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    begin_memory();
    for (unsigned i : order) {
        const unsigned across = grid.x / cluster;
        run_cluster({i % across * cluster, i / across % grid.y, i / across / grid.y}, shared_bytes);
        if (failed) break;
    }
    if (!failed) message = writes_past_ends(), failed = !message.empty();
    end_memory();
    current = nullptr;
    return failed ? message.c_str() : nullptr;
}

}  // namespace emulation

// The order of all later launches' fibers, and when their asynchronous copies land.
extern "C" void shift_emulation_seed(uint64_t seed) { emulation::seed = seed * 0x2545f4914f6cdd1d + 1; }
