// wgmma: d[64, N] (+)= a[64, 16] b[16, N] by a warpgroup (four warps in a row, the first a multiple of four), sm_90a.
//
// b, and a unless it is in registers, are read from shared memory by way of descriptors; d are fp32 registers. It is
// asynchronous: wgmma_fence(); wgmma.. ; wgmma_commit(); wgmma_wait<groups that may still run>(). Until then neither
// d, nor a's registers, nor the shared memory may be touched; between two waits only the first wgmma needs the fence.
// Ordinary writes to the shared memory need fence_async_proxy() (bulk_copy.cuh) before the barrier ahead of this.
// Section 9.7.15 (asynchronous warpgroup level matrix instructions), PTX 8.0.
//
// Registers, 9.7.15.5.1.1, with w = warp % 4, g = lane / 4, t = lane % 4 (each warp's 16 rows as mma.cuh has them):
//   a[0], a[1], a[2], a[3]   rows 16 w + g, + 8, + 0, + 8;   k 2t, 2t+1 (the first two), 2t+8, 2t+9 (the others)
//   d[4 j + i]               row 16 w + g + 8 (i / 2), column 8 j + 2t + i % 2
//
// Shared memory, 9.7.15.5.1.2, in the one arrangement that we use, the 128-byte swizzle: atoms of 8 lines of 128
// bytes, each at a multiple of 1024 bytes; the 16-byte pieces of line r are exchanged by piece ^ r (swizzled()).
//   K_MAJOR   a line is 64 numbers along k of one row of a (column of b). The next 8 rows: 1024 bytes on.
//             The next 16 numbers along k: a descriptor 32 bytes on.
//   MN_MAJOR  a line is 64 rows of a (columns of b) at one k. The next 8 k: 1024 bytes on; `leading`: bytes to
//             the next 64 rows (columns). The next 16 along k: a descriptor 2048 bytes on.
#pragma once
#include <type_traits>

#include "memory.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace tile {

enum Major { K_MAJOR, MN_MAJOR };

// Where byte `byte` (0 .. 127) of line `line` is, from the start of the first atom, atoms one after the other.
__device__ __forceinline__ constexpr int swizzled(int line, int byte) { return line * 128 + (byte ^ (line % 8) * 16); }

// Where a matrix lies in shared memory. Section 9.7.15.5.1.2.2: address, leading and stride in units of 16 bytes at bits 0,
// 16, 32; swizzle at bit 62. The upper half is a constant.
struct WgmmaDescriptor {
    uint32_t low;
    // The same some bytes on, a multiple of 16. Shared memory ends before the address's 14 bits do: there is no carry.
    __device__ __forceinline__ WgmmaDescriptor moved(int bytes) const { return {low + uint32_t(bytes >> 4)}; }
    __device__ __forceinline__ uint64_t whole() const {
        constexpr int STRIDE = 8 * 128;
        return uint64_t{STRIDE >> 4 | 1 << 30} << 32 | low;
    }
};

// The same for all lanes, which the shuffle tells the compiler: so what it adds to it costs no thread an instruction.
__device__ __forceinline__ WgmmaDescriptor wgmma_descriptor(const void* shared, int leading = 1024) {
#if defined(SHIFT_EMULATE)
    const uint32_t address = uint32_t(emulation::shared_offset(shared));
#else
    const uint32_t address = shared_address(shared);
#endif
    return {shuffle((address & 0x3ffff) >> 4 | uint32_t(leading >> 4) << 16, 0)};
}

__device__ __forceinline__ void wgmma_fence() {
#if defined(SHIFT_EMULATE)
    emulation::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(SHIFT_EMULATE)
    emulation::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int GROUPS_LEFT>
__device__ __forceinline__ void wgmma_wait() {
#if defined(SHIFT_EMULATE)
    emulation::wgmma_wait(GROUPS_LEFT);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

#if !defined(SHIFT_EMULATE)

// Eight accumulators as asm operands, and their names in the text.
#define SHIFT_D(i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SHIFT_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SHIFT_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define SHIFT_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define SHIFT_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define SHIFT_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define SHIFT_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define SHIFT_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define SHIFT_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define SHIFT_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define SHIFT_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define SHIFT_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define SHIFT_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define SHIFT_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define SHIFT_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define SHIFT_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define SHIFT_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define SHIFT_NAMES_16 SHIFT_R0
#define SHIFT_OPERANDS_16 SHIFT_D(0)
#define SHIFT_NAMES_32 SHIFT_NAMES_16 ", " SHIFT_R1
#define SHIFT_OPERANDS_32 SHIFT_OPERANDS_16, SHIFT_D(8)
#define SHIFT_NAMES_64 SHIFT_NAMES_32 ", " SHIFT_R2 ", " SHIFT_R3
#define SHIFT_OPERANDS_64 SHIFT_OPERANDS_32, SHIFT_D(16), SHIFT_D(24)
#define SHIFT_NAMES_96 SHIFT_NAMES_64 ", " SHIFT_R4 ", " SHIFT_R5
#define SHIFT_OPERANDS_96 SHIFT_OPERANDS_64, SHIFT_D(32), SHIFT_D(40)
#define SHIFT_NAMES_128 SHIFT_NAMES_96 ", " SHIFT_R6 ", " SHIFT_R7
#define SHIFT_OPERANDS_128 SHIFT_OPERANDS_96, SHIFT_D(48), SHIFT_D(56)
#define SHIFT_NAMES_192 SHIFT_NAMES_128 ", " SHIFT_R8 ", " SHIFT_R9 ", " SHIFT_R10 ", " SHIFT_R11
#define SHIFT_OPERANDS_192 SHIFT_OPERANDS_128, SHIFT_D(64), SHIFT_D(72), SHIFT_D(80), SHIFT_D(88)
#define SHIFT_NAMES_256 SHIFT_NAMES_192 ", " SHIFT_R12 ", " SHIFT_R13 ", " SHIFT_R14 ", " SHIFT_R15
#define SHIFT_OPERANDS_256 SHIFT_OPERANDS_192, SHIFT_D(96), SHIFT_D(104), SHIFT_D(112), SHIFT_D(120)

// X, Y, Z, U, V, W, P: numbers of the operands after the accumulators.
#define SHIFT_WGMMA_SHARED(N, NAME, X, Y, Z, U, V)                                                              \
    if constexpr (COLUMNS == N)                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #Z ", 0;\n"                                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SHIFT_NAMES_##N "}, " \
                     "%" #X ", %" #Y ", p, 1, 1, %" #U ", %" #V "; }"                                           \
                     : SHIFT_OPERANDS_##N                                                                       \
                     : "l"(a.whole()), "l"(b.whole()), "r"(int(accumulate)), "n"(int(A)), "n"(int(B)))
#define SHIFT_WGMMA_REGISTERS(N, NAME, X, Y, Z, U, V, W, P)                                                     \
    if constexpr (COLUMNS == N)                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #W ", 0;\n"                                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SHIFT_NAMES_##N "}, " \
                     "{%" #X ", %" #Y ", %" #Z ", %" #U "}, %" #V ", p, 1, 1, %" #P "; }"                       \
                     : SHIFT_OPERANDS_##N                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.whole()), "r"(int(accumulate)), "n"(int(B)))
#define SHIFT_WGMMA_SHARED_EACH(NAME) \
    SHIFT_WGMMA_SHARED(16, NAME, 8, 9, 10, 11, 12); \
    SHIFT_WGMMA_SHARED(32, NAME, 16, 17, 18, 19, 20); \
    SHIFT_WGMMA_SHARED(64, NAME, 32, 33, 34, 35, 36); \
    SHIFT_WGMMA_SHARED(96, NAME, 48, 49, 50, 51, 52); \
    SHIFT_WGMMA_SHARED(128, NAME, 64, 65, 66, 67, 68); \
    SHIFT_WGMMA_SHARED(192, NAME, 96, 97, 98, 99, 100); \
    SHIFT_WGMMA_SHARED(256, NAME, 128, 129, 130, 131, 132)
#define SHIFT_WGMMA_REGISTERS_EACH(NAME) \
    SHIFT_WGMMA_REGISTERS(16, NAME, 8, 9, 10, 11, 12, 13, 14); \
    SHIFT_WGMMA_REGISTERS(32, NAME, 16, 17, 18, 19, 20, 21, 22); \
    SHIFT_WGMMA_REGISTERS(64, NAME, 32, 33, 34, 35, 36, 37, 38); \
    SHIFT_WGMMA_REGISTERS(96, NAME, 48, 49, 50, 51, 52, 53, 54); \
    SHIFT_WGMMA_REGISTERS(128, NAME, 64, 65, 66, 67, 68, 69, 70); \
    SHIFT_WGMMA_REGISTERS(192, NAME, 96, 97, 98, 99, 100, 101, 102); \
    SHIFT_WGMMA_REGISTERS(256, NAME, 128, 129, 130, 131, 132, 133, 134)

#endif

template <int COLUMNS>
constexpr bool wgmma_takes = COLUMNS == 16 || COLUMNS == 32 || COLUMNS == 64 || COLUMNS == 96 || COLUMNS == 128 ||
                             COLUMNS == 192 || COLUMNS == 256;

// T: bf16 or fp16. A, B: how a and b lie in shared memory. accumulate: whether d counts, or is only written.
template <class T, int COLUMNS, Major A = K_MAJOR, Major B = K_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[COLUMNS / 2], WgmmaDescriptor a, WgmmaDescriptor b, bool accumulate) {
    static_assert(wgmma_takes<COLUMNS>, "add this number of columns to wgmma.cuh");
#if defined(SHIFT_EMULATE)
    constexpr auto TYPE = std::is_same<T, bf16>::value ? emulation::Number::BF16 : emulation::Number::FP16;
    emulation::wgmma(d, COLUMNS, nullptr, a.whole(), A, b.whole(), B, accumulate, TYPE);
#else
    if constexpr (std::is_same<T, bf16>::value) {
        SHIFT_WGMMA_SHARED_EACH("bf16");
    } else {
        SHIFT_WGMMA_SHARED_EACH("f16");
    }
#endif
}

// The same with a in registers.
template <class T, int COLUMNS, Major B = K_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[COLUMNS / 2], const uint32_t (&a)[4], WgmmaDescriptor b,
                                      bool accumulate) {
    static_assert(wgmma_takes<COLUMNS>, "add this number of columns to wgmma.cuh");
#if defined(SHIFT_EMULATE)
    constexpr auto TYPE = std::is_same<T, bf16>::value ? emulation::Number::BF16 : emulation::Number::FP16;
    emulation::wgmma(d, COLUMNS, a, 0, K_MAJOR, b.whole(), B, accumulate, TYPE);
#else
    if constexpr (std::is_same<T, bf16>::value) {
        SHIFT_WGMMA_REGISTERS_EACH("bf16");
    } else {
        SHIFT_WGMMA_REGISTERS_EACH("f16");
    }
#endif
}

}  // namespace tile
