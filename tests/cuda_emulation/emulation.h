// A CPU that plays a GPU: what csrc/cuda/tile calls when it is compiled by g++ with SHIFT_EMULATE.
//
// Every CUDA thread is a fiber. Fibers change only where threads wait for one another, in an order drawn from a
// seed: sometimes one warp runs as far ahead as barriers allow, sometimes they mingle. The blocks of a cluster
// live together; clusters run one after another in random order. Shared memory starts as NaN.
//
// A launch ends with a message instead of a result when
//   - an access misses its buffer: shared memory, and device memory that came from shift_emulation_allocate, end at
//     a page that cannot be touched;
//   - a vector access, ldmatrix or cp.async is misaligned, or its address is not in the memory it must be in;
//   - lanes of a warp are at different collectives, or a barrier is not reached by all (reported as the deadlock
//     that it is, with who waits where);
//   - a barrier's count is not what its users agree on.
// What is asynchronous (cp.async, bulk copies, wgmma) happens anywhere between issue and wait, by seed; registers
// that wgmma will write are NaN until waited for.
//
// Compiled with -fsanitize=thread (whose hooks races.cpp defines itself; its runtime library is not used), every
// single access of the kernel is seen, and these end the launch whatever the order in which fibers ran:
//   - a race in shared or allocated device memory: two accesses, one a write, that no barrier orders (happens-before
//     by vector clocks, 2-byte granules), within a block, a cluster, or between clusters of one launch;
//   - an access to bytes that an asynchronous copy is still writing, a write to bytes that wgmma is still reading;
//   - wgmma or a bulk copy of what ordinary writes left without fence_async_proxy;
//   - an access to the shared memory of a block that has returned;
//   - an access outside its buffer by a single byte.
// What it cannot find: races on bytes of one granule; a fragment layout that the emulation and the kernel both have
// wrong (layouts are from the PTX ISA, not from hardware); a block barrier that lanes of one warp reach from
// different lines; wrong sizes of registers; anything about time. Memory is sequentially consistent here, so a
// missing fence shows only where a wrapper knows that one was due.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

namespace emulation {

// The same for a fiber all its life, so that loops need not ask again.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
// Of the launch under way: no functions, since every step of a loop asks.
extern dim3 block_size, grid_size;

// Ends the launch; its message names the thread.
[[noreturn]] void trap(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs the body as every thread of the grid. Null, or what was wrong.
const char* launch(dim3 grid, unsigned threads, size_t shared_bytes, unsigned cluster,
                   const std::function<void()>& body);

// memory
unsigned char* shared_memory();
void check_access(const void* p, size_t bytes, size_t alignment, const char* what);
void copy_async(void* shared, const void* device, int bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// barriers
void sync_warp();
void sync_block();
void sync_threads(int id, int threads);
void arrive_threads(int id, int threads);

// a warp's collectives
uint32_t shuffle(uint32_t value, int from_lane);
uint32_t ballot(bool yes);
enum class Number { BF16, FP16, TF32 };
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number type);

// sm_90
void mbarrier_init(uint64_t* b, int arrivals);
void mbarrier_arrive(uint64_t* b, int expected_bytes);
void mbarrier_arrive_relaxed(uint64_t* b);  // tells of what came before the thread's latest cluster_fence alone
void cluster_fence();
void mbarrier_wait(uint64_t* b, int parity);
void bulk_copy(void* shared, const void* device, int bytes, uint64_t* arrives_at, uint16_t ranks);  // 0: only here
void fence_async_proxy();
int cluster_rank();
int cluster_size();
void sync_cluster();
void* map_shared(void* mine, int rank);
uint32_t shared_offset(const void* shared);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
void wgmma(float* d, int columns, const uint32_t* a_registers, uint64_t a, bool a_mn_major, uint64_t b, bool b_mn_major,
           bool accumulate, Number type);

// numbers
template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
inline float from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t to_fp16(float x) { return bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float from_fp16(uint16_t bits) { return bit_cast<_Float16>(bits); }
inline uint32_t to_tf32(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return 0x7fffffff;
    return (bits + 0x1000) & ~0x1fffu;  // to nearest, ties away; carries into the exponent as it should
}

}  // namespace emulation
