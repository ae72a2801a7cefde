// Small kernels that show each wrapper of csrc/cuda/tile, and kernels with one mistake each. For test_cuda_tile.py.
#include "activation.cuh"
#include "tile/barrier.cuh"
#include "tile/copy_async.cuh"
#include "tile/launch.cuh"
#include "tile/ldmatrix.cuh"
#include "tile/math.cuh"
#include "tile/memory.cuh"
#include "tile/mma.cuh"
#include "tile/types.cuh"
#include "tile/warp.cuh"

using namespace tile;

// c[16, 8] = a[16, 16] b[16, 8] by one warp; a row-major, b as its transpose [8, 16] or (TRANSPOSED) as it is.
template <class T, bool TRANSPOSED>
__global__ void product(const T* a, const T* b, float* c) {
    constexpr int K = 16;
    T* sa = reinterpret_cast<T*>(shared_memory());
    T* sb = sa + 16 * K;
    for (int i = lane(); i < 16 * K; i += 32) sa[i] = a[i];
    for (int i = lane(); i < 8 * K; i += 32) sb[i] = b[i];
    sync_warp();
    float acc[4] = {};
    for (int k = 0; k < K; k += MMA_K<T>) {
        constexpr int HALF = MMA_K<T> / 2;  // 16 bytes
        uint32_t fa[4], both[4];
        ldmatrix(fa, sa + (lane() % 16) * K + k + lane() / 16 * HALF);
        if (TRANSPOSED)
            ldmatrix_transposed(both, sb + (k + lane() % 16) * 8);
        else
            ldmatrix(both, sb + lane() % 8 * K + k + lane() / 8 % 2 * HALF);
        const uint32_t fb[2] = {both[0], both[1]};
        mma<T>(acc, fa, fb);
    }
    for (int i = 0; i < 4; i++) c[(lane() / 4 + 8 * (i / 2)) * 8 + lane() % 4 * 2 + i % 2] = acc[i];
}

template <class T>
__global__ void convert(const float* x, T* rounded, float* back, int n) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    const uint32_t pair = pack<T>(x[i], x[i + 1]);
    store(rounded + i, pair);
    const float2 both = unpack<T>(pair);
    back[i] = both.x;
    back[i + 1] = to_float(from_float<T>(x[i + 1]));
}

__global__ void round_tf32(const float* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = bits_to_float(to_tf32(x[i]));
}

// y = gelu(x), and dx its slope.
__global__ void gelu(const float* x, float* y, float* dx, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        dx[i] = 1.0f;
        y[i] = shift_cuda::activate(GELU, x[i]);
        shift_cuda::activate_backward(GELU, x[i], dx[i]);
    }
}

__global__ void lanes(const float* x, float* y) {
    const float mine = x[threadIdx.x];
    y[threadIdx.x] = sum_over_lanes(mine);
    y[threadIdx.x + 64] = max_over_lanes<4>(mine);
    y[threadIdx.x + 128] = shuffle(mine, (lane() + 5) % 32);
    y[threadIdx.x + 192] = float(vote(mine > 0) >> 16);
}

__global__ void maths(const float* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[i] = exp2_approx(x[i]);
        y[n + i] = rsqrt_approx(x[i]);
        y[2 * n + i] = reciprocal_approx(x[i]);
    }
}

// Reverses x[n] through shared memory, two groups of copies under way; MISSING: what is left out.
enum Missing { NOTHING, WAIT, BARRIER, COMMIT };
template <Missing MISSING>
__global__ void reversed(const float* x, float* y, int n) {
    float* s = reinterpret_cast<float*>(shared_memory());
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) copy_async(s + i, x + i, 4 * (n - i < 4 ? n - i : 4));
    if (MISSING != COMMIT) copy_async_commit();
    copy_async_commit();  // an empty group may stay
    if (MISSING != WAIT) copy_async_wait<1>();
    if (MISSING != BARRIER) sync_block();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = s[n - 1 - i];
}

// Warps hand a number round: each adds its index when its predecessor has arrived at its named barrier.
__global__ void relay(int* out) {
    int* sum = reinterpret_cast<int*>(shared_memory());
    const int warps = blockDim.x / 32;
    if (warp() == 0 && lane() == 0) *sum = 0;
    if (warp() > 0) sync_threads(warp(), 64);
    if (lane() == 0) *sum += warp() + 1;
    if (warp() + 1 < warps) arrive_threads(warp() + 1, 64);
    sync_block();
    if (threadIdx.x == 0) *out = *sum;
}

// Mistakes.
__global__ void racy_sum(const float* x, float* y) {
    float* s = reinterpret_cast<float*>(shared_memory());
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[threadIdx.x] + s[threadIdx.x ^ 32];  // of the other warp, not waited for
}
__global__ void racy_lanes(const float* x, float* y) {
    float* s = reinterpret_cast<float*>(shared_memory());
    s[threadIdx.x] = x[threadIdx.x];
    const float mine = shuffle(x[threadIdx.x], 0);  // lanes meet, but a shuffle orders no memory
    y[threadIdx.x] = s[threadIdx.x ^ 1] + mine;
}
__global__ void late_reader(const float* x, float* y) {  // a buffer is overwritten while others may still read it
    float* s = reinterpret_cast<float*>(shared_memory());
    for (int round = 0; round < 2; round++) {
        s[threadIdx.x] = x[threadIdx.x] + round;
        sync_block();
        y[threadIdx.x] += s[(threadIdx.x + 32) % blockDim.x];
    }
}
__global__ void same_output(float* y) { y[threadIdx.x] = float(blockIdx.x); }
__global__ void half_a_barrier(float* y) {
    if (threadIdx.x < 32) sync_block();
    y[threadIdx.x] = 0;
}
__global__ void parted_lanes(float* y) {
    if (lane() < 16)
        sync_warp();
    else
        y[threadIdx.x] = shuffle(1.0f, 0);
}
__global__ void miscounted(float* y) {
    sync_threads(1, threadIdx.x < 32 ? 64 : 96);
    y[threadIdx.x] = 0;
}
__global__ void touch(float* y, int shared_floats, int at) {  // one number of shared memory, or (none) of y
    float* s = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x == 3) (shared_floats ? s : y)[at] = 1;
}
__global__ void peek(float* y, int shared_floats, int at) {
    float* s = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x == 3) y[0] = (shared_floats ? s : y)[at];
}
__global__ void misaligned(float* y, int instruction) {
    unsigned char* s = shared_memory();
    uint32_t r[4] = {};
    if (instruction == 0) y[0] = load<float4>(y + 1).x;
    if (instruction == 1) ldmatrix(r, s + 8);
    if (instruction == 2) copy_async(s + 4, y);
    if (instruction == 3) ldmatrix(r, y);
    y[threadIdx.x] = bits_to_float(r[0]);
}
__global__ void uninitialised(float* y) { y[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x]; }
__device__ int deep(int n, volatile int* seen) {
    volatile int here[64];
    here[n % 64] = n;
    return n ? deep(n - 1, here) + here[n % 64] : *seen;
}
__global__ void bottomless(int* out, int n) {
    volatile int start = 0;
    *out = deep(n, &start);
}

extern "C" {

const char* run_product(int64_t type, int64_t transposed, const void* a, const void* b, float* c) {
    const Launch l{1, 32, 24 * 16 * 4};
    const auto go = [&](auto kernel, auto zero) {
        using T = decltype(zero);
        return launch(l, kernel, static_cast<const T*>(a), static_cast<const T*>(b), c);
    };
    if (type == 0) return transposed ? go(product<bf16, true>, bf16{}) : go(product<bf16, false>, bf16{});
    if (type == 1) return transposed ? go(product<fp16, true>, fp16{}) : go(product<fp16, false>, fp16{});
    return go(product<float, false>, float{});
}
const char* run_convert(int64_t type, const float* x, void* rounded, float* back, int64_t n) {
    const Launch l{unsigned(n + 127) / 128, 64, 0};
    if (type == 0) return launch(l, convert<bf16>, x, static_cast<bf16*>(rounded), back, int(n));
    return launch(l, convert<fp16>, x, static_cast<fp16*>(rounded), back, int(n));
}
const char* run_tf32(const float* x, float* y, int64_t n) { return launch({1, 64, 0}, round_tf32, x, y, int(n)); }
const char* run_lanes(const float* x, float* y) { return launch({1, 64, 0}, lanes, x, y); }
const char* run_maths(const float* x, float* y, int64_t n) { return launch({1, 64, 0}, maths, x, y, int(n)); }
const char* run_reversed(int64_t missing, const float* x, float* y, int64_t n) {
    const Launch l{1, 64, size_t(n + 3) / 4 * 16};
    const auto kernel = missing == WAIT      ? reversed<WAIT>
                        : missing == BARRIER ? reversed<BARRIER>
                        : missing == COMMIT  ? reversed<COMMIT>
                                             : reversed<NOTHING>;
    return launch(l, kernel, x, y, int(n));
}
const char* run_relay(int* out, int64_t warps) { return launch({1, unsigned(warps) * 32, 4}, relay, out); }

const char* run_gelu(const float* x, float* y, float* dx, int64_t n) {
    return launch({1, 32, 0}, gelu, x, y, dx, int(n));
}
const char* run_racy_sum(const float* x, float* y) { return launch({1, 64, 256}, racy_sum, x, y); }
const char* run_racy_lanes(const float* x, float* y) { return launch({1, 32, 128}, racy_lanes, x, y); }
const char* run_late_reader(const float* x, float* y) { return launch({1, 128, 512}, late_reader, x, y); }
const char* run_same_output(float* y) { return launch({3, 32, 0}, same_output, y); }
const char* run_half_a_barrier(float* y) { return launch({1, 64, 0}, half_a_barrier, y); }
const char* run_parted_lanes(float* y) { return launch({1, 32, 0}, parted_lanes, y); }
const char* run_miscounted(float* y) { return launch({1, 96, 0}, miscounted, y); }
const char* run_touch(float* y, int64_t shared_floats, int64_t at) {
    return launch({1, 32, size_t(shared_floats) * 4}, touch, y, int(shared_floats), int(at));
}
const char* run_peek(float* y, int64_t shared_floats, int64_t at) {
    return launch({1, 32, size_t(shared_floats) * 4}, peek, y, int(shared_floats), int(at));
}
const char* run_misaligned(float* y, int64_t instruction) {
    return launch({1, 32, 1024}, misaligned, y, int(instruction));
}
const char* run_uninitialised(float* y) { return launch({1, 32, 128}, uninitialised, y); }
const char* run_bottomless(int* out, int64_t n) { return launch({1, 32, 0}, bottomless, out, int(n)); }
const char* run_too_large() { return launch({1, 32, 228 << 10}, uninitialised, static_cast<float*>(nullptr)); }
}
