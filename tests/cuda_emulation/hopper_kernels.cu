// Small kernels that show each sm_90a wrapper of csrc/cuda/tile, some with one mistake. For test_cuda_tile_hopper.py.
#include "tile/barrier.cuh"
#include "tile/bulk_copy.cuh"
#include "tile/cluster.cuh"
#include "tile/launch.cuh"
#include "tile/mbarrier.cuh"
#include "tile/registers.cuh"
#include "tile/warp.cuh"
#include "tile/wgmma.cuh"

using namespace tile;

enum Mistake {
    NONE,
    NO_FENCE,         // before wgmma
    NO_PROXY_FENCE,   // between stores and wgmma
    NO_WAIT,          // for wgmma, or for a copy
    EARLY_STORE,      // to what wgmma reads
    CHANGED_OPERAND,  // registers that wgmma reads
    NO_RELEASE_WAIT,  // of a stage that is filled again
    WRONG_BYTES,      // expected
    NO_SYNC_BEFORE,   // reading another block's memory
    NO_SYNC_AFTER,
    NO_CLUSTER_FENCE,  // before relaxed arrivals
};

constexpr int K = 128;  // of the products

// Where number (line along mn, k) of a matrix with `rows` rows (columns) is, in numbers from its start.
template <Major MAJOR>
__device__ int place(int mn, int k, int rows) {
    return MAJOR == K_MAJOR ? k / 64 * rows * 64 + swizzled(mn, k % 64 * 2) / 2
                            : mn / 64 * K * 64 + swizzled(k, mn % 64 * 2) / 2;
}

template <Major MAJOR>
__device__ WgmmaDescriptor descriptor(const unsigned char* matrix, int k, int rows) {
    return MAJOR == K_MAJOR ? wgmma_descriptor(matrix + k / 64 * rows * 128 + k % 64 * 2)
                            : wgmma_descriptor(matrix + k / 8 * 1024, K * 128);
}

// c[64, N] = 1 + a[64, K] b[N, K]^T by one warpgroup, in two groups.
template <class T, int N, bool REGISTERS, Major A, Major B, Mistake MISTAKE = NONE>
__global__ void product(const T* a, const T* b, float* c) {
    unsigned char* shared_a = shared_memory();
    unsigned char* shared_b = shared_a + 64 * K * 2;
    for (int i = threadIdx.x; i < 64 * K; i += 128) reinterpret_cast<T*>(shared_a)[place<A>(i / K, i % K, 64)] = a[i];
    for (int i = threadIdx.x; i < N * K; i += 128) reinterpret_cast<T*>(shared_b)[place<B>(i / K, i % K, N)] = b[i];
    if (MISTAKE != NO_PROXY_FENCE) fence_async_proxy();
    sync_block();
    float d[N / 2];
    for (float& x : d) x = 1;
    const int row = warp() * 16 + lane() / 4, column = lane() % 4 * 2;
    uint32_t fragments[K / 16][4];
    for (int k = 0; k < K; k += 16)
        for (int i = 0; i < 4; i++)
            fragments[k / 16][i] = load<uint32_t>(a + (row + i % 2 * 8) * K + k + column + i / 2 * 8);
    if (MISTAKE != NO_FENCE) wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        if constexpr (REGISTERS)
            wgmma<T, N, B>(d, fragments[k / 16], descriptor<B>(shared_b, k, N), true);
        else
            wgmma<T, N, A, B>(d, descriptor<A>(shared_a, k, 64), descriptor<B>(shared_b, k, N), true);
        if (k == K / 2) wgmma_commit();
    }
    if (MISTAKE == CHANGED_OPERAND) fragments[1][2] ^= 1;
    if (MISTAKE == EARLY_STORE && threadIdx.x == 5) store(shared_b, uint32_t(0));
    wgmma_commit();
    if (MISTAKE != NO_WAIT) wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
    if (MISTAKE == NO_WAIT) wgmma_wait<0>();
}

// y[block, i] = sum over tiles of x[tile, i]: one warp has tiles of 128 floats copied into a ring of stages, the others
// (four) add them up. In a cluster each block has its share of a tile copied to all.
constexpr int TILE = 128, STAGES = 3;
template <Mistake MISTAKE>
__global__ void ring(const float* x, float* y, int tiles) {
    float* stages = reinterpret_cast<float*>(shared_memory());
    uint64_t* full = reinterpret_cast<uint64_t*>(stages + STAGES * TILE);
    uint64_t* empty = full + STAGES;
    const int blocks = cluster_size(), rank = cluster_rank(), share = TILE / blocks;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, 4 * blocks);  // a consumer warp's lane 0 for each
        }
        mbarrier_init_fence();
    }
    sync_cluster();
    if (warp() == 4) {
        give_registers<24>();
        for (int tile = 0; tile < tiles && lane() == 0; tile++) {
            const int s = tile % STAGES;
            if (MISTAKE != NO_RELEASE_WAIT) mbarrier_wait(empty + s, tile / STAGES % 2 ^ 1);
            mbarrier_arrive_expect(full + s, MISTAKE == WRONG_BYTES ? TILE * 4 + 16 : TILE * 4);
            float* to = stages + s * TILE + rank * share;
            const float* from = x + tile * TILE + rank * share;
            if (blocks == 1)
                bulk_copy(to, from, share * 4, full + s);
            else
                bulk_copy_multicast(to, from, share * 4, full + s, (1 << blocks) - 1);
        }
    } else {
        take_registers<240>();
        float sum = 0;
        for (int tile = 0; tile < tiles; tile++) {
            const int s = tile % STAGES;
            if (MISTAKE != NO_WAIT) mbarrier_wait(full + s, tile / STAGES % 2);
            sum += stages[s * TILE + threadIdx.x];
            sync_warp();
            if (lane() == 0)
                for (int to = 0; to < blocks; to++) mbarrier_arrive_at(empty + s, to);
        }
        y[blockIdx.x * TILE + threadIdx.x] = sum;
    }
    sync_cluster();
}

// y[block, i] = x of the next block of the cluster, through its shared memory.
template <Mistake MISTAKE>
__global__ void neighbour(const float* x, float* y) {
    float* mine = reinterpret_cast<float*>(shared_memory());
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    mine[threadIdx.x] = x[i];
    if (MISTAKE != NO_SYNC_BEFORE) sync_cluster();
    const float* theirs = map_shared(mine, (cluster_rank() + 1) % cluster_size());
    if (MISTAKE == NO_SYNC_AFTER && cluster_rank()) return;
    y[i] = theirs[threadIdx.x];
    if (MISTAKE != NO_SYNC_AFTER) sync_cluster();
}

// The same, but the blocks meet at an mbarrier, each warp by relaxed arrivals behind one fence.
template <Mistake MISTAKE>
__global__ void neighbour_by_mbarrier(const float* x, float* y) {
    float* mine = reinterpret_cast<float*>(shared_memory());
    uint64_t* met = reinterpret_cast<uint64_t*>(mine + blockDim.x);
    if (threadIdx.x == 0) {
        mbarrier_init(met, cluster_size());
        mbarrier_init_fence();
    }
    sync_cluster();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    mine[threadIdx.x] = x[i];
    sync_warp();
    if (lane() == 0) {
        if (MISTAKE != NO_CLUSTER_FENCE) cluster_fence();
        for (int rank = 0; rank < cluster_size(); rank++) cluster_arrive(met, rank);
    }
    cluster_wait(met, 0);
    y[i] = map_shared(mine, (cluster_rank() + 1) % cluster_size())[threadIdx.x];
    sync_cluster();
}

// Threads in turn, by the phases of one mbarrier each: out = the turns in order.
__global__ void turns(int* out, int rounds) {
    uint64_t* turn = reinterpret_cast<uint64_t*>(shared_memory());
    int* count = reinterpret_cast<int*>(turn + blockDim.x);
    mbarrier_init(turn + threadIdx.x, 1);
    if (threadIdx.x == 0) *count = 0;
    sync_block();
    for (int round = 0; round < rounds; round++) {
        const bool first = round == 0 && threadIdx.x == 0;
        if (!first) mbarrier_wait(turn + threadIdx.x, (threadIdx.x ? round : round - 1) % 2);
        out[*count] = threadIdx.x;
        *count += 1;
        mbarrier_arrive(turn + (threadIdx.x + 1) % blockDim.x);
    }
}

template <class T, int N, bool REGISTERS, Major A, Major B, Mistake MISTAKE = NONE>
const char* go(const void* a, const void* b, float* c) {
    const size_t lines_b = B == K_MAJOR ? N * K / 64 : (N + 63) / 64 * K;
    const auto kernel = product<T, N, REGISTERS, A, B, MISTAKE>;
    return launch({1, 128, 64 * K * 2 + lines_b * 128}, kernel, static_cast<const T*>(a), static_cast<const T*>(b), c);
}

template <class T, int N>
const char* each_layout(int64_t a_in, int64_t b_major, const void* a, const void* b, float* c) {
    const auto run = a_in == 0   ? (b_major ? go<T, N, false, K_MAJOR, MN_MAJOR> : go<T, N, false, K_MAJOR, K_MAJOR>)
                     : a_in == 1 ? (b_major ? go<T, N, false, MN_MAJOR, MN_MAJOR> : go<T, N, false, MN_MAJOR, K_MAJOR>)
                                 : (b_major ? go<T, N, true, K_MAJOR, MN_MAJOR> : go<T, N, true, K_MAJOR, K_MAJOR>);
    return run(a, b, c);
}

extern "C" {
const char* run_layouts(int64_t fp16s, int64_t a_in, int64_t b_major, const void* a, const void* b, float* c) {
    return fp16s ? each_layout<fp16, 32>(a_in, b_major, a, b, c) : each_layout<bf16, 128>(a_in, b_major, a, b, c);
}
const char* run_columns(int64_t n, const void* a, const void* b, float* c) {
    if (n == 16) return go<bf16, 16, false, K_MAJOR, K_MAJOR>(a, b, c);
    if (n == 32) return go<bf16, 32, false, K_MAJOR, K_MAJOR>(a, b, c);
    if (n == 64) return go<bf16, 64, false, K_MAJOR, K_MAJOR>(a, b, c);
    if (n == 96) return go<bf16, 96, false, K_MAJOR, K_MAJOR>(a, b, c);
    if (n == 128) return go<bf16, 128, false, K_MAJOR, K_MAJOR>(a, b, c);
    if (n == 192) return go<bf16, 192, true, K_MAJOR, K_MAJOR>(a, b, c);
    return go<bf16, 256, true, K_MAJOR, K_MAJOR>(a, b, c);
}
const char* run_bad_product(int64_t mistake, const void* a, const void* b, float* c) {
    if (mistake == NO_FENCE) return go<bf16, 32, false, K_MAJOR, K_MAJOR, NO_FENCE>(a, b, c);
    if (mistake == NO_PROXY_FENCE) return go<bf16, 32, false, K_MAJOR, K_MAJOR, NO_PROXY_FENCE>(a, b, c);
    if (mistake == NO_WAIT) return go<bf16, 32, false, K_MAJOR, K_MAJOR, NO_WAIT>(a, b, c);
    if (mistake == EARLY_STORE) return go<bf16, 32, false, K_MAJOR, K_MAJOR, EARLY_STORE>(a, b, c);
    return go<bf16, 32, true, K_MAJOR, K_MAJOR, CHANGED_OPERAND>(a, b, c);
}
const char* run_ring(int64_t mistake, int64_t grid, int64_t cluster, const float* x, float* y, int64_t tiles) {
    const auto kernel = mistake == NO_WAIT           ? ring<NO_WAIT>
                        : mistake == NO_RELEASE_WAIT ? ring<NO_RELEASE_WAIT>
                        : mistake == WRONG_BYTES     ? ring<WRONG_BYTES>
                                                     : ring<NONE>;
    return launch({unsigned(grid), 160, STAGES * (TILE * 4 + 16), unsigned(cluster)}, kernel, x, y, int(tiles));
}
const char* run_neighbour(int64_t mistake, int64_t grid, int64_t cluster, const float* x, float* y) {
    const auto kernel = mistake == NO_SYNC_BEFORE  ? neighbour<NO_SYNC_BEFORE>
                        : mistake == NO_SYNC_AFTER ? neighbour<NO_SYNC_AFTER>
                                                   : neighbour<NONE>;
    return launch({unsigned(grid), 32, 128, unsigned(cluster)}, kernel, x, y);
}
const char* run_neighbour_by_mbarrier(int64_t mistake, int64_t grid, int64_t cluster, const float* x, float* y) {
    const auto kernel = mistake == NO_CLUSTER_FENCE ? neighbour_by_mbarrier<NO_CLUSTER_FENCE> : neighbour_by_mbarrier<NONE>;
    return launch({unsigned(grid), 32, 32 * 4 + 8, unsigned(cluster)}, kernel, x, y);
}
const char* run_turns(int* out, int64_t rounds) { return launch({1, 32, 32 * 8 + 4}, turns, out, int(rounds)); }
}
