// The residual stream in registers, for kernels of one shape with up to 256 columns and 65 to 128 rows (plan.h): a warp
// has its 16 rows of x as wgmma's accumulators, so
//
//     norm      needs the four lanes of a row alone
//     xn        packed, is the left operand of the next products as it is; of more than 128 columns it lies in shared
//               memory, as wgmma reads it there
//     x +=      is what wgmma does
//     MLP       64 hidden columns come out of one product and go into the next: also nothing but registers
//
// q, k, v and o are in shared memory, as ever. Registers, of 232 a thread: x d / 2, xn d / 4 or none, a product's result
// 32, and 16 of hidden columns. x += act W2^T of one chunk is under way with the xn W1^T of the next.
#pragma once
#include "../mlp.cuh"
#include "../norm.cuh"
#include "../tile/registers.cuh"
#include "sm90a.cuh"

namespace shift_cuda {

// A warp's [16, 64 TILES] as left operand; pair i of a thread as InRegisters has it.
template <class T, int TILES>
struct Fragments {
    static constexpr bool streamed = false;
    uint32_t of[TILES][4][4] = {};
    __device__ uint32_t& word(int i) { return of[i / 16][i % 16 / 4][i % 4]; }
    __device__ void put(At at, float2 x) { word(at.index) = pack<T>(x.x, x.y); }
};

// The same as 64 columns of the 64 rows of a warpgroup, one piece after the other, in shared memory: what one warp has put
// the others read, too.
template <class T, int TILES>
struct SharedOperand {
    static constexpr bool streamed = false;
    int at, first;  // bytes of shared memory: where the warpgroup's begins, and where the thread's first pair is
    __device__ SharedOperand(const Program<Sm90a, T>& p) : at(p.job.at.xn + warp() / 4 * TILES * int(SUBTILE)) {
        first = at + swizzled(warp() % 4 * 16 + lane() / 4, lane() % 4 * 4);
        // Columns beyond d_model, which nobody puts again: they meet weights that are 0.
#pragma unroll
        for (int i = p.d() / 8 * 2; i < 16 * TILES; i++) put(At{0, 0, i}, make_float2(0.0f, 0.0f));
    }
    // 8 columns on are the next 16 bytes of the line, 8 rows on the next 1024 bytes.
    __device__ void put(At to, float2 x) const {
        const int j = to.index / 2, second = to.index % 2;
        unsigned char* const line = shared_memory() + (forgotten(first) ^ j % 8 * 16);
        store(line + j / 8 * int(SUBTILE) + second * 1024, pack<T>(x.x, x.y));
    }
    __device__ WgmmaDescriptor descriptor() const { return wgmma_descriptor(shared_memory() + forgotten(at)); }
};

// The same of rows that are in device memory too.
template <class T, int TILES>
struct KeptFragments : Fragments<T, TILES> {
    Rows<T> rows;
    __device__ KeptFragments(Rows<T> kept) : rows(kept) {}
    __device__ void put(At at, float2 x) {
        Fragments<T, TILES>::put(at, x);
        rows.put(at, x);
    }
};

// A thread's numbers of d_model columns. S::SHAPE: sizes, options and plan (kernels.cuh).
template <class S>
struct Numbers {
    static constexpr int D = int(S::SHAPE.block.d_model), TILES = tiles_along(D, SUBTILE_SIDE);
    float of[32 * TILES] = {};
};

// It only refers to them: beside an array that is not yet registers the compiler would know `p`, and with it all of a
// shape's constants, too late.
template <class T, class S>
struct InRegisters {
    typedef T Operand;
    static constexpr int D = Numbers<S>::D, TILES = Numbers<S>::TILES;
    static constexpr int ROWS = int(S::SHAPE.plan.rows);
    static constexpr int PARTS = int(hidden_parts(S::SHAPE.block));
    static constexpr int O_COLUMNS = int(query_columns(S::SHAPE.block, S::SHAPE.plan.kv_heads));  // a chunk of heads'
    static constexpr int QKV_COLUMNS = int(head_chunk_columns(S::SHAPE.block, S::SHAPE.plan.kv_heads));
    typedef KeptFragments<T, TILES> Kept;
    static constexpr int KEYS = S::SHAPE.seq_len <= 16 ? 16 : 32;  // more would be masked for nothing where it is causal
    const Program<Sm90a, T>& p;
    Numbers<S>& numbers;
    // Pair i is of columns 8 (i / 2) + 2 (lane % 4) and + 1, row lane / 4 + 8 (i % 2) of the warp's.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        const int row = p.band_begin() + lane() / 4;
#pragma unroll
        for (int j = 0; 8 * j < D; j++)  // both rows' at once, or what f loads for a column is kept for d_model of them
#pragma unroll
            for (int second = 0; second < 2; second++)
                if (ROWS == MOST_ROWS || row + 8 * second < ROWS)
                    f(At{row + 8 * second, 8 * j + lane() % 4 * 2, 2 * j + second});
    }
    __device__ float2 get(At at) const {
        const float* x = numbers.of + 2 * at.index;
        return make_float2(x[0], x[1]);
    }
    __device__ void put(At at, float2 x) {
        float* to = numbers.of + 2 * at.index;
        to[0] = x.x, to[1] = x.y;
    }
};

// Of the thread's two rows.
template <class T, class S>
__device__ __forceinline__ void moments(const InRegisters<T, S>& x, Moments (&m)[2]) {
    const Call& c = x.p.c();
    const auto add_up = [&](auto of_one) {
        float2 sums = make_float2(0.0f, 0.0f);
        x.each([&](At at) {
            const float2 v = x.get(at);
            (at.index % 2 ? sums.y : sums.x) += of_one(v.x, m[at.index % 2]) + of_one(v.y, m[at.index % 2]);
        });
        return make_float2(sum_over_lanes<4>(sums.x) / x.D, sum_over_lanes<4>(sums.y) / x.D);
    };
    if (c.norm == LAYERNORM) {
        const float2 mean = add_up([](float v, Moments) { return v; });
        m[0].mean = mean.x, m[1].mean = mean.y;
    }
    const float2 squares = add_up([](float v, Moments of) { return (v - of.mean) * (v - of.mean); });
    m[0].inverse = rsqrt_approx(squares.x + float(c.eps)), m[1].inverse = rsqrt_approx(squares.y + float(c.eps));
    // Or the compiler would keep each x - mean for the caller, d / 2 registers.
    m[0].mean = shuffle(m[0].mean, lane()), m[1].mean = shuffle(m[1].mean, lane());
}

template <class T, class S, class Out>
__device__ __forceinline__ void norm(const InRegisters<T, S>& x, const float* weight, Out out) {
    const Call& c = x.p.c();
    Moments m[2] = {};
    if (c.norm != NO_NORM) moments(x, m);
    x.each([&](At at) {
        const float2 v = x.get(at);
        out(at, c.norm == NO_NORM ? v : normed(v, m[at.index % 2], weight, at.column, x.D));
    });
}

// Before products by an operand that the warp has put, and before the next is put.
template <class T, int TILES>
__device__ __forceinline__ void is_put(const Program<Sm90a, T>&, const Fragments<T, TILES>&) {}
template <class T, int TILES>
__device__ __forceinline__ void is_put(const Program<Sm90a, T>& p, const SharedOperand<T, TILES>&) {
    fence_async_proxy();
    p.sync_warpgroup();
}
template <class T, int TILES>
__device__ __forceinline__ void is_read(const Program<Sm90a, T>&, const Fragments<T, TILES>&) {}
template <class T, int TILES>
__device__ __forceinline__ void is_read(const Program<Sm90a, T>& p, const SharedOperand<T, TILES>&) {
    p.sync_warpgroup();
}

// acc = a b for 64 columns of b, subtiles one behind the other along k.
template <Major B, class T, int TILES>
__device__ __forceinline__ void start_product(float (&acc)[32], const Fragments<T, TILES>& a, WgmmaDescriptor b) {
#pragma unroll
    for (int i = 0; i < TILES; i++) start_products<B, T, 1>(&acc, a.of[i], b.moved(i * int(SUBTILE)), i > 0);
}
template <Major B, class T, int TILES>
__device__ __forceinline__ void start_product(float (&acc)[32], const SharedOperand<T, TILES>& a, WgmmaDescriptor b) {
    static_assert(B == K_MAJOR, "a forward's operand");
    const WgmmaDescriptor first = a.descriptor();
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) {
        const int at = i / 4 * int(SUBTILE) + i % 4 * NEXT_16_K<B>;
        wgmma<T, 64>(acc, first.moved(at), b.moved(at), i > 0);
    }
}

// acc = a b for the next 64 columns of b. What was under way before is done too.
template <Major B, class T, int TILES, template <class, int> class Operand>
__device__ __forceinline__ void project_64(const Program<Sm90a, T>& p, float (&acc)[32], const Operand<T, TILES>& a) {
    const int stage = next_stage(p);
    wgmma_fence();
    start_product<B>(acc, a, wgmma_descriptor(stage_at(p, stage)));
    wgmma_commit();
    wgmma_wait<0>();
    give_back(p, stage);
}

// x += a b for 64 k of b, all columns at once.
template <Major B, class T, int COLUMNS_PER_THREAD>
__device__ __forceinline__ void start_sum(float (&x)[COLUMNS_PER_THREAD], const uint32_t (&a)[4][4],
                                          const unsigned char* b) {
    const WgmmaDescriptor first = wgmma_descriptor(b, int(SUBTILE));
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma<T, 2 * COLUMNS_PER_THREAD, B>(x, a[kk], first.moved(kk * NEXT_16_K<B>), true);
}

// As the other multiply.
template <bool ROWS_ALONG_N, class T, int TILES, template <class, int> class Operand, class Out>
__device__ __forceinline__ void multiply(const Program<Sm90a, T>& p, const Operand<T, TILES>& a, const T*, int64_t,
                                         int n, int, Out out, Prefetch<T> = {}) {
    float acc[32];
    is_put(p, a);
#pragma unroll 1
    for (int n0 = 0; n0 < n; n0 += int(SUBTILE_SIDE)) {
        project_64<ROWS_ALONG_N ? MN_MAJOR : K_MAJOR>(p, acc, a);
        hand_out(p, acc, p.band_begin(), n0, n, out);
    }
}

// x += scale bias
template <class T, class S>
__device__ __forceinline__ void add_bias(InRegisters<T, S>& x, const float* bias, float scale) {
    x.each([&](At at) {
        const float2 v = x.get(at), b = load<float2>(bias + at.column);
        x.put(at, make_float2(v.x + scale * b.x, v.y + scale * b.y));
    });
}

template <class T, class S>
__device__ __forceinline__ const float* left_of_bias(InRegisters<T, S>& x, const float* bias, float scale) {
    add_bias(x, bias, scale);
    return nullptr;
}

// a: of a chunk of heads; forward o, backward dq, dk and dv. Here scale is the operand's: its numbers are rounded once
// more.
template <bool ROWS_ALONG_N, class T, class S>
__device__ __forceinline__ void add_product(InRegisters<T, S>& x, Rows<T> a, Prefetch<T>, float scale,
                                            const float*, Prefetch<T>) {
    constexpr int K = ROWS_ALONG_N ? InRegisters<T, S>::QKV_COLUMNS : InRegisters<T, S>::O_COLUMNS;
    const Program<Sm90a, T>& p = x.p;
    p.sync_band();
    const T* rows = a.at + p.band_begin() * a.ld;
    const bool any = x.ROWS > MOST_ROWS - 16 || p.band_begin() < x.ROWS;  // of the warp's rows exist
    uint32_t both[2][4][4] = {};  // the operand of the product under way, and the next one's
    int before = 0;               // the stage of that product
#pragma unroll
    for (int k0 = 0; k0 < K; k0 += int(TILE_K)) {
        uint32_t(&fa)[4][4] = both[k0 / int(TILE_K) % 2];
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            if (k0 + 16 * kk < K && any)
                load_a(fa[kk], rows + k0 + 16 * kk, a.ld, p.rows_from(p.band_begin()));
            else
                fa[kk][0] = fa[kk][1] = fa[kk][2] = fa[kk][3] = 0;
#pragma unroll
        for (int j = 0; scale != 1.0f && j < 16; j++) {
            const float2 v = unpack<T>(fa[j / 4][j % 4]);
            fa[j / 4][j % 4] = pack<T>(scale * v.x, scale * v.y);
        }
        const int stage = next_stage(p);
        if (k0 > 0) {
            wgmma_wait<0>();
            give_back(p, before);
        }
        wgmma_fence();
        start_sum<ROWS_ALONG_N ? MN_MAJOR : K_MAJOR, T>(x.numbers.of, fa, stage_at(p, stage));
        wgmma_commit();
        before = stage;
    }
    wgmma_wait<0>();
    give_back(p, before);
}

// Chunks of 64 hidden columns (plan.h).
template <class T, class S, int TILES, template <class, int> class Operand>
__device__ __forceinline__ void mlp(InRegisters<T, S>& x, const Operand<T, TILES>& xn, const Weights<T>& w, float scale,
                                    Prefetch<T>) {
    constexpr int SIDE = int(SUBTILE_SIDE);
    const Program<Sm90a, T>& p = x.p;
    constexpr int parts = InRegisters<T, S>::PARTS;
    const int ff = int(p.p().ff_pad);
    const int64_t f = p.c().activation;
    is_put(p, xn);
    Fragments<T, 1> hidden;
    float acc[32];
    int down = 0;  // the stage of the W2 under way
#pragma unroll 1
    for (int first = 0; first < ff; first += SIDE) {
        const int n = parts * (ff % SIDE ? smaller(SIDE, ff - first) : SIDE);
#pragma unroll
        for (int part = 0; part < parts; part++) {
            if (SIDE * part < n) project_64<K_MAJOR>(p, acc, xn);
            if (part == 0 && first > 0) give_back(p, down);
            // Of 16 columns the thread's pairs: hidden columns; or 8 gates and their values.
            const float* bias = w.up_bias() + parts * first + SIDE * part + lane() % 4 * 2;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int columns = i / 2 * 16, pair = i / 2 * 4 + i % 2;
                float2 u = make_float2(0.0f, 0.0f), v = u;
                if (SIDE * part + columns < n) {
                    const float2 bu = load<float2>(bias + columns), bv = load<float2>(bias + columns + 8);
                    u = make_float2(acc[2 * pair] + bu.x, acc[2 * pair + 1] + bu.y);
                    v = make_float2(acc[2 * pair + 4] + bv.x, acc[2 * pair + 5] + bv.y);
                    u = make_float2(scale * activate(f, u.x), scale * activate(f, u.y));
                    if (!is_gated(f)) v = make_float2(scale * activate(f, v.x), scale * activate(f, v.y));
                }
                if (is_gated(f)) {
                    hidden.put(At{0, 0, part * 8 + i}, make_float2(u.x * v.x, u.y * v.y));
                } else {
                    hidden.put(At{0, 0, pair}, u);
                    hidden.put(At{0, 0, pair + 2}, v);
                }
            }
        }
        down = next_stage(p);
        wgmma_fence();
        start_sum<K_MAJOR, T>(x.numbers.of, hidden.of[0], stage_at(p, down));
        wgmma_commit();
    }
    wgmma_wait<0>();
    give_back(p, down);
    is_read(p, xn);
    add_bias(x, w.down_bias(), scale);  // ahead of the loop it makes ptxas spill (C7512)
}

template <class S, class T, class Begins>
__device__ __forceinline__ void forward_in_registers(const Program<Sm90a, T>& p, Begins begins) {
    Numbers<S> numbers;
    InRegisters<T, S> x{p, numbers};
    constexpr int TILES = InRegisters<T, S>::TILES;
    if constexpr (operand_in_shared(S::SHAPE.block, S::SHAPE.plan))
        forward(x, ForwardKeep<Sm90a, T, SharedOperand<T, TILES>>{p, p.rows(), {p}}, begins);
    else
        forward(x, ForwardKeep<Sm90a, T, Fragments<T, TILES>>{p, p.rows(), {}}, begins);
}

}  // namespace shift_cuda
