// What a core can do at most: multiply-adds of registers, as many under way at a time as it can use. Prints GFLOP/s
// in float32, and in bfloat16 (with sums in float32) where the processor multiplies pairs of those, else 0.
#include <chrono>
#include <cstdio>
#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif

#if defined(__x86_64__)
#define REGISTER "+v"
#else
#define REGISTER "+w"
#endif

typedef float vf __attribute__((vector_size(BYTES)));
constexpr int SUMS = BYTES == 64 ? 24 : 12, STEPS = 2000000, ROUNDS = 20;

struct Float32 {
    static constexpr int FLOPS = 2 * BYTES / 4;
    static vf step(vf sum, vf x) { return sum + sum * x; }
};
#if defined(__AVX512BF16__)
struct BFloat16 {
    static constexpr int FLOPS = 2 * BYTES / 2;
    static vf step(vf sum, vf x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)x); }
};
#endif

template <class Kind>
double peak() {
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        vf sums[SUMS] = {}, x = {};
        const auto start = std::chrono::steady_clock::now();
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 32
            for (int i = 0; i < SUMS; i++) {
                sums[i] = Kind::step(sums[i], x);
                asm volatile("" : REGISTER(sums[i]));  // is computed, in a register, every time
            }
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        const double rate = 1e-9 * Kind::FLOPS * SUMS * STEPS / took.count();
        best = rate > best ? rate : best;
    }
    return best;
}

int main() {
#if defined(__AVX512BF16__)
    const double bfloat16 = peak<BFloat16>();
#else
    const double bfloat16 = 0;
#endif
    std::printf("%.1f %.1f\n", peak<Float32>(), bfloat16);
}
