// Gradient of self-attention's input, `kv_heads` key/value heads (with all their query heads) at a time:
//
//     do = dy Wo     q, k, v, o again     p = softmax(q k^T / sqrt(hd))
//     ds = p (do v^T - sum(o do)) / sqrt(hd)      dq = ds k     dk = ds^T q     dv = p^T do
//     dx += [dq | dk | dv] Wqkv
//
// Scores are computed once with a warp owning 16 queries (dq) and once with it owning 16 keys (dk, dv), so that
// every sum stays within a warp. o, dq, dk and dv go to device memory too, for the weights' gradients. Where the
// sequence is split (split.cuh) the block goes over the others' keys and values too, and then over their queries.
#pragma once
#include "attention.cuh"

namespace shift_cuda {

// Columns of a head whose gradient a warp holds at a time.
constexpr int HELD_COLUMNS = 64;

// A chunk's columns in work behind q, k and v.
template <class T>
struct ChunkGradients {
    T *d_o, *dqkv;
    template <class A>
    __device__ ChunkGradients(const Program<A, T>& p, const HeadChunk& of)
        : d_o(p.work() + of.columns), dqkv(d_o + of.queries * of.head_dim) {}
};

// Stores the gradient of columns j and j + 8 of a head chunk's q, k or v: for the next product, and in in_proj's order.
template <class A, class T>
__device__ inline void keep_dqkv(const Program<A, T>& p, const HeadChunk& of, const ChunkGradients<T>& g, int chunk,
                                 Rows<T> dqkv, int r, int j, float2 x, float2 y) {
    if (p.c().position == ROPE && j < of.v(0)) rotate(p, r, j % of.head_dim, true, x, y);
    const uint32_t first = pack<T>(x.x, x.y), second = pack<T>(y.x, y.y);
    store(g.dqkv + r * of.ld + j, first);
    store(g.dqkv + r * of.ld + j + 8, second);
    if (r < p.inside) {
        store(dqkv.at + int64_t(r) * dqkv.ld + qkv_row(p.job, chunk, j), first);
        store(dqkv.at + int64_t(r) * dqkv.ld + qkv_row(p.job, chunk, j + 8), second);
    }
}

// c [16, columns from `first` on] += a b, b's rows along n. row0, k0: as in mma_16_of_sequences.
template <class A, class T>
__device__ inline void accumulate(const Program<A, T>& p, float (&c)[HELD_COLUMNS / 16][2][4], const float (&left)[2][4],
                                  const T* b, int ld, int columns, int rows_b, int row0, int k0) {
    uint32_t fa[4];
    as_left<T>(fa, left);
#pragma unroll
    for (int i = 0; i < HELD_COLUMNS / 16; i++)
        if (16 * i < columns) {
            uint32_t fb[4];
            load_b_rows_along_n(fb, b + 16 * i, ld, rows_b);
            mma_16_of_sequences(p, c[i][0], c[i][1], fa, fb, row0, k0);
        }
}

// Calls out(row, column, x, y) for [16, columns] accumulators, as multiply does.
template <class A, class T, class Out>
__device__ inline void give_out(const Program<A, T>& p, const float (&c)[HELD_COLUMNS / 16][2][4], int row0, int columns,
                                Out out) {
#pragma unroll
    for (int i = 0; i < HELD_COLUMNS / 16; i++)
        if (16 * i < columns)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row0 + lane() / 4 + 8 * h;
                if (p.exists(r))
                    out(r, 16 * i + lane() % 4 * 2, make_float2(c[i][0][2 * h], c[i][0][2 * h + 1]),
                        make_float2(c[i][1][2 * h], c[i][1][2 * h + 1]));
            }
}

// Up to 16 queries of a head chunk's heads, and do: where they are, and how many there are.
template <class T>
struct Queries {
    const T *q, *d_o;
    int ld, rows;
};

template <class A, class T>
__device__ inline Queries<T> local_queries(const Program<A, T>& p, const HeadChunk& of, const ChunkGradients<T>& g,
                                            int row) {
    return {p.work() + row * of.ld, g.d_o + row * of.ld, of.ld, p.rows_from(row)};
}

// As remote_keys.
template <class A, class T>
__device__ inline Queries<T> remote_queries(const Program<A, T>& p, const HeadChunk& of, const ChunkGradients<T>& g,
                                             int part, int row, int last) {
    const int columns = of.queries * of.head_dim, ld = 2 * columns + int(PAD), at_once = int(p.p().remote_rows);
    if (row % at_once == 0) {
        p.sync();
        const int rows = smaller(last - row, at_once);
        copy_from_part(p, part, p.work() + row * of.ld, of.ld, p.remote(), ld, rows, columns);
        copy_from_part(p, part, g.d_o + row * of.ld, of.ld, p.remote() + columns, ld, rows, columns);
        p.sync();
    }
    const T* q = p.remote() + row % at_once * ld;
    return {q, q + columns, ld, smaller(last - row, 16)};
}

// dq of one head for 16 queries, by a warp; this and the next are called as attend_16 is.
template <class A, class T, class Out>
__device__ __forceinline__ void queries_16(const Program<A, T>& p, const HeadChunk& of, const ChunkGradients<T>& g,
                                           int head, int row0, Out out) {
    const int kv = head / of.group, hd = of.head_dim;
    const T *q = p.work() + row0 * of.ld + of.q(head), *d_o = g.d_o + row0 * of.ld + of.q(head);
    const float factor = rsqrt_approx(float(hd));
    int low[2], high[2], begin, end;
    float normaliser[2], o_do[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row0 + lane() / 4 + 8 * h, at = head * p.rows() + (p.exists(r) ? r : 0);
        span_of(p, r, low[h], high[h]);
        normaliser[h] = p.normaliser()[at], o_do[h] = p.o_do()[at];
    }
    span_of_16(p, row0, begin, end);
    for (int first = 0; first < hd; first += HELD_COLUMNS) {
        float dq[HELD_COLUMNS / 16][2][4] = {};
        each_keys<16>(p, of, kv, begin, end, [&](int key, const Keys<T>& keys) {
            float s[2][4], dp[2][4];
            scores_16(s, q, keys.k, of.ld, keys.ld, hd, p.rows_from(row0), keys.rows);
            scores_16(dp, d_o, keys.v, of.ld, keys.ld, hd, p.rows_from(row0), keys.rows);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int h = i % 4 / 2, at = key + i / 4 * 8 + lane() % 4 * 2 + i % 2;
                float& x = s[i / 4][i % 4];
                const bool seen = low[h] <= at && at < smaller(high[h], key + keys.rows);
                const float share = seen ? exp2_approx(x * (factor * LOG2_E) - normaliser[h]) : 0.0f;
                x = seen ? share * (dp[i / 4][i % 4] - o_do[h]) * factor : 0.0f;
            }
            accumulate(p, dq, s, keys.k + first, keys.ld, hd - first, keys.rows, row0, key);
        });
        give_out(p, dq, row0, hd - first,
                 [&](int r, int j, float2 x, float2 y) { out(r, of.q(head) + first + j, x, y); });
    }
}

// dk and dv of one key/value head for 16 keys, by a warp: the sum over all queries that see them.
template <class A, class T, class Out>
__device__ __forceinline__ void keys_16(const Program<A, T>& p, const HeadChunk& of, const ChunkGradients<T>& g, int kv,
                                          int key0, Out out) {
    const int hd = of.head_dim;
    const float factor = rsqrt_approx(float(hd));
    const T *k = p.work() + key0 * of.ld + of.k(kv), *v = p.work() + key0 * of.ld + of.v(kv);
    const int rows_k = smaller(p.rows_from(key0), p.rows() - key0), position0 = p.first + key0;
    for (int first = 0; first < hd; first += HELD_COLUMNS) {
        float dk[HELD_COLUMNS / 16][2][4] = {}, dv[HELD_COLUMNS / 16][2][4] = {};
#pragma unroll 1
        for (int part = p.c().causal ? p.part() : 0; part < p.split(); part++) {
            const bool own = part == p.part();
            const int *low = own ? p.low() : in_part(p, p.low(), part), *high = low + p.rows();
            const float *normaliser = own ? p.normaliser() : in_part(p, p.normaliser(), part);
            const float *o_do = own ? p.o_do() : in_part(p, p.o_do(), part);
            const int rows = own ? p.rows() : rows_of(p, part);
#pragma unroll 1
            for (int row = 0; row < rows; row += 16) {
                const Queries<T> queries = own ? local_queries(p, of, g, row)
                                               : remote_queries(p, of, g, part, row, rows);
                const int r = row + lane() % 16;
                if (!vote(r < rows && low[r] < position0 + 16 && position0 < high[r])) continue;
                for (int head = kv * of.group; head < (kv + 1) * of.group; head++) {
                    const T *q = queries.q + of.q(head), *d_o = queries.d_o + of.q(head);
                    float s[2][4], ds[2][4];
                    scores_16(s, k, q, of.ld, queries.ld, hd, rows_k, queries.rows);
                    scores_16(ds, v, d_o, of.ld, queries.ld, hd, rows_k, queries.rows);
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const int key = position0 + lane() / 4 + i % 4 / 2 * 8;
                        const int query = row + i / 4 * 8 + lane() % 4 * 2 + i % 2, at = head * p.rows() + query;
                        float &x = s[i / 4][i % 4], &dx = ds[i / 4][i % 4];
                        const bool seen = (A::ROWS_ARE_PADDED || query < rows) && low[query] <= key && key < high[query];
                        x = seen ? exp2_approx(x * (factor * LOG2_E) - normaliser[at]) : 0.0f;
                        dx = seen ? x * (dx - o_do[at]) * factor : 0.0f;
                    }
                    accumulate(p, dv, s, d_o + first, queries.ld, hd - first, queries.rows, key0, row);
                    accumulate(p, dk, ds, q + first, queries.ld, hd - first, queries.rows, key0, row);
                }
            }
        }
        give_out(p, dk, key0, hd - first,
                 [&](int r, int j, float2 x, float2 y) { out(r, of.k(kv) + first + j, x, y); });
        give_out(p, dv, key0, hd - first,
                 [&](int r, int j, float2 x, float2 y) { out(r, of.v(kv) + first + j, x, y); });
    }
}

// dx += gradient of xn. dqkv, o: rows of this program.
template <class X, class T>
__device__ __forceinline__ void attention_backward(X& dx, Rows<T> xn, Rows<T> dy, const Weights<T>& w,
                                                   Rows<T> dqkv, Rows<T> o) {
    const auto& p = dx.p;
    const int head_chunks = int(p.c().n_kv_heads / p.p().kv_heads);
#pragma unroll 1
    for (int chunk = 0; chunk < head_chunks; chunk++) {
        const HeadChunk of(p, chunk);
        const ChunkGradients<T> g(p, of);
        // do = dy Wo; q, k, v again
        multiply<true>(p, loaded(dx, dy), w.out() + of.first_query_column, int64_t(o.ld), of.queries * of.head_dim, p.d(),
                       [&](int r, int j, float2 x, float2 y) {
                           store(g.d_o + r * of.ld + j, pack<T>(x.x, x.y));
                           store(g.d_o + r * of.ld + j + 8, pack<T>(y.x, y.y));
                       });
        project_qkv(p, loaded(dx, xn), w, chunk);
        sync_sequence(p);
        // o again, and each row's normaliser and sum of o do
        p.each_16_rows(of.queries, [&](int head, int row0) {
            float o_do = 0.0f;
            const auto with_do = [&](int r, int j, float2 x, float2 y) {
                const float2 u = unpack<T>(load<uint32_t>(g.d_o + r * of.ld + of.q(head) + j));
                const float2 v = unpack<T>(load<uint32_t>(g.d_o + r * of.ld + of.q(head) + j + 8));
                o_do += x.x * u.x + x.y * u.y + y.x * v.x + y.y * v.y;
                if (r >= p.inside) return;
                T* to = o.at + int64_t(r) * o.ld + of.first_query_column + of.q(head) + j;
                store(to, pack<T>(x.x, x.y));
                store(to + 8, pack<T>(y.x, y.y));
            };
            attend_16<X::KEYS>(p, of, head, row0, with_do, [&](int r, float normaliser) {
                o_do = sum_over_lanes<4>(o_do);
                const int at = head * p.rows() + r;
                if (lane() % 4 == 0 && p.exists(r)) p.normaliser()[at] = normaliser, p.o_do()[at] = o_do;
                o_do = 0.0f;
            });
        });
        sync_sequence(p);
        // dq for 16 queries a warp, then dk and dv for 16 keys a warp
        const auto keep = [&](int r, int j, float2 x, float2 y) { keep_dqkv(p, of, g, chunk, dqkv, r, j, x, y); };
        p.each_16_rows(of.queries, [&](int head, int row0) { queries_16(p, of, g, head, row0, keep); });
        p.each_16_rows(of.kv_heads, [&](int head, int row0) { keys_16(p, of, g, head, row0, keep); });
        // dx += [dq | dk | dv] Wqkv
        add_product<true>(dx, Rows<T>{g.dqkv, of.ld, false},
                          {w.qkv() + int64_t(chunk) * of.columns * p.d(), p.d(), p.d(), of.columns}, 1.0f, nullptr, {});
        if (p.bands() > 1 || p.split() > 1) sync_sequence(p);  // others have read what the next chunk replaces
    }
}

}  // namespace shift_cuda
