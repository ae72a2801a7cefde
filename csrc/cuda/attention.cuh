// Self-attention of the rows, `kv_heads` key/value heads (with all their query heads) at a time:
//
//     [q | k | v] = xn Wqkv^T + b          rotated in registers, to work
//     o = softmax(q k^T / sqrt(hd)) v      over each row's span of keys, to work in place of q
//     x += scale (o Wo^T + b)
//
// Scores and probabilities live in registers, a warp 16 rows x 16 keys at a time (X::KEYS), with a running maximum. Where
// the sequence is split the block goes over the other blocks' keys too, 16 at a time (split.cuh).
#pragma once
#include "residual.cuh"
#include "split.cuh"

namespace shift_cuda {

// Columns of a head chunk's heads in work: q heads, k heads, v heads.
struct HeadChunk {
    int first_query_column;  // of the chunk in [n_heads head_dim]
    int kv_heads, queries, head_dim, columns, ld;
    int group;
    template <class A, class T>
    __device__ HeadChunk(const Program<A, T>& p, int chunk)
        : kv_heads(int(p.p().kv_heads)), head_dim(int(p.c().head_dim)), group(int(query_group(p.c()))) {
        queries = kv_heads * group;
        first_query_column = chunk * queries * head_dim;
        columns = (queries + 2 * kv_heads) * head_dim;
        ld = p.job.at.ld_work;
    }
    __device__ int q(int head) const { return head * head_dim; }
    __device__ int k(int kv_head) const { return (queries + kv_head) * head_dim; }
    __device__ int v(int kv_head) const { return (queries + kv_heads + kv_head) * head_dim; }
};

// Turns the pair (x, y) of a head's halves by the angle of the row's position; back: by the opposite angle.
template <class A, class T>
__device__ inline void rotate(const Program<A, T>& p, int row, int column_in_head, bool back, float2& x, float2& y) {
    const int half = int(p.c().head_dim) / 2, n = int(p.c().seq_len);
    const float* at = p.c().rotary + p.position(row) * half + column_in_head / 16 * 8 + column_in_head % 8;
    const float2 cos = load<float2>(at);
    float2 sin = load<float2>(at + n * half);
    if (back) sin = make_float2(-sin.x, -sin.y);
    const float2 a = x, b = y;
    x = make_float2(a.x * cos.x - b.x * sin.x, a.y * cos.y - b.y * sin.y);
    y = make_float2(b.x * cos.x + a.x * sin.x, b.y * cos.y + a.y * sin.y);
}

// A head chunk's Wqkv, for the product before it.
template <class A, class T>
__device__ inline Prefetch<T> prefetch_qkv(const Program<A, T>& p, const Weights<T>& w, int chunk) {
    const HeadChunk of(p, chunk);
    return {w.qkv() + int64_t(chunk) * of.columns * p.d(), p.d(), of.columns, p.d()};
}

template <class A, class T, class Xn>
__device__ __forceinline__ void project_qkv(const Program<A, T>& p, const Xn& xn, const Weights<T>& w, int chunk,
                                            Prefetch<T> prefetch = {}) {
    const HeadChunk of(p, chunk);
    const float* bias = w.qkv_bias() + chunk * of.columns;
    const int turned = p.c().position == ROPE ? of.v(0) : 0;  // columns of q and k
    multiply<false>(p, xn, w.qkv() + int64_t(chunk) * of.columns * p.d(), p.d(), of.columns, p.d(),
                    [&](int r, int j, float2 x, float2 y) {
                        const float2 bx = load<float2>(bias + j), by = load<float2>(bias + j + 8);
                        x = make_float2(x.x + bx.x, x.y + bx.y);
                        y = make_float2(y.x + by.x, y.y + by.y);
                        if (j < turned) rotate(p, r, j % of.head_dim, false, x, y);
                        store(p.work() + r * of.ld + j, pack<T>(x.x, x.y));
                        store(p.work() + r * of.ld + j + 8, pack<T>(y.x, y.y));
                    },
                    prefetch);
}

// The keys low <= key < high that a row sees; none, if the row is a pad or does not exist.
template <class A, class T>
__device__ inline void span_of(const Program<A, T>& p, int row, int& low, int& high) {
    low = p.exists(row) ? p.low()[row] : int(MOST_ROWS);
    high = p.exists(row) ? p.high()[row] : 0;
}

// The keys that any of 16 rows sees.
template <class A, class T>
__device__ inline void span_of_16(const Program<A, T>& p, int row0, int& low, int& high) {
    span_of(p, row0 + lane() % 16, low, high);
    low = int(-max_over_lanes<16>(-float(low)));
    high = int(max_over_lanes<16>(float(high)));
}

// Up to 16 keys of a head, and their values: where they are, and how many there are.
template <class T>
struct Keys {
    const T *k, *v;
    int ld, rows;
};

template <class A, class T>
__device__ inline Keys<T> local_keys(const Program<A, T>& p, const HeadChunk& of, int kv_head, int key) {
    const T* row = p.work() + key * of.ld;
    return {row + of.k(kv_head), row + of.v(kv_head), of.ld, p.rows_from(key)};
}

// Of the rows from `key` to `last` of another block, which come remote_rows at a time, by all who own rows in this one.
template <class A, class T>
__device__ inline Keys<T> remote_keys(const Program<A, T>& p, const HeadChunk& of, int kv_head, int part, int key,
                                      int last) {
    const int columns = 2 * of.kv_heads * of.head_dim, ld = columns + int(PAD), at_once = int(p.p().remote_rows);
    if (key % at_once == 0) {
        p.sync();  // all are done with those before
        const int rows = smaller(last - key, at_once);
        copy_from_part(p, part, p.work() + key * of.ld + of.k(0), of.ld, p.remote(), ld, rows, columns);
        p.sync();
    }
    const T* k = p.remote() + key % at_once * ld + kv_head * of.head_dim;
    return {k, k + of.kv_heads * of.head_dim, ld, smaller(last - key, 16)};
}

// Calls f(key, its Keys) for each KEYS keys of the sequence with any from begin to end. They are counted from where the
// first row's sequence begins.
template <int KEYS, class A, class T, class F>
__device__ inline void each_keys(const Program<A, T>& p, const HeadChunk& of, int kv_head, int begin, int end, F f) {
    const int parts = p.c().causal ? p.part() + 1 : p.split();
#pragma unroll 1
    for (int part = 0; part < parts; part++) {
        const bool own = part == p.part();
        const int first = part * p.rows(), last = own ? smaller(end - first, p.rows()) : rows_of(p, part);
#pragma unroll 1
        for (int row = own ? larger(begin - first, 0) / 16 * 16 : 0; row < last; row += KEYS) {
            const Keys<T> keys = own ? local_keys(p, of, kv_head, row)
                                     : remote_keys(p, of, kv_head, part, row, last);
            if (begin < first + row + KEYS && first + row < end) f(first + row, keys);
        }
    }
}

// c [16, 16] = a b^T over a head's columns; a and b are rows of work, of which some exist (see load_a).
template <class T>
__device__ inline void scores_16(float (&c)[2][4], const T* a, const T* b, int lda, int ldb, int head_dim,
                                 int rows_a, int rows_b) {
#pragma unroll
    for (int i = 0; i < 4; i++) c[0][i] = c[1][i] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < head_dim; k += 16) {
        uint32_t fa[4], fb[4];
        load_a(fa, a + k, lda, rows_a);
        load_b(fb, b + k, ldb, rows_b);
        mma_16<T>(c[0], c[1], fa, fb);
    }
}

// [16, 16] accumulators as the left operand of the next product.
template <class T>
__device__ inline void as_left(uint32_t (&a)[4], const float (&c)[2][4]) {
    a[0] = pack<T>(c[0][0], c[0][1]), a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]), a[3] = pack<T>(c[1][2], c[1][3]);
}

// Whether any of a thread's numbers of an operand is NaN or inf.
template <class T>
__device__ inline bool has_nonfinite(const uint32_t (&b)[4]) {
    constexpr uint32_t EXPONENT = std::is_same<T, bf16>::value ? 0x7f80 : 0x7c00;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; i++)
        found |= (b[i] & EXPONENT) == EXPONENT || (b[i] >> 16 & EXPONENT) == EXPONENT;
    return found;
}

// c [16, 16] += a b for 16 rows from row0 on, over 16 rows from k0 on, of all of which a row counts those of its own
// sequence: a is 0 at others. Sequences may share these 16 (unless they are multiples of 16 long), and where b has a NaN
// or inf, 0 times that would reach the neighbours: then each sequence is multiplied for its own rows alone.
template <class A, class T>
__device__ inline void mma_16_of_sequences(const Program<A, T>& p, float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[4], int row0, int k0) {
    const int n = int(p.c().seq_len);
    if (p.p().sequences == 1 || n % 16 == 0 || !vote(has_nonfinite<T>(b))) return mma_16<T>(c0, c1, a, b);
#pragma unroll 1
    for (int sequence = k0 / n; sequence <= (k0 + 15) / n; sequence++) {
        uint32_t own[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = k0 + lane() % 4 * 2 + i % 2 * 8;
            own[i] = b[i] & ((k / n == sequence ? 0xffffu : 0) | ((k + 1) / n == sequence ? 0xffff0000u : 0));
        }
        float x[4] = {}, y[4] = {};
        mma_16<T>(x, y, a, own);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if ((row0 + lane() / 4 + i / 2 * 8) / n == sequence) c0[i] += x[i], c1[i] += y[i];
    }
}

// One query head for 16 rows, by a warp, KEYS keys at a time: calls out(row, column in head, x, y) as multiply does, with
// o; then rest(row, normaliser in base 2). Where the sequence is split all warps call it together, even for rows that do
// not exist.
template <int KEYS, class A, class T, class Out, class Rest>
__device__ __forceinline__ void attend_16(const Program<A, T>& p, const HeadChunk& of, int head, int row0, Out out,
                                          Rest rest) {
    constexpr int BLOCKS = int(MOST_HEAD_DIM) / 16, KEY_BLOCKS = KEYS / 16;
    const T* q = p.work() + row0 * of.ld + of.q(head);
    const float scale = LOG2_E * rsqrt_approx(float(of.head_dim));
    const int r[2] = {row0 + lane() / 4, row0 + lane() / 4 + 8};
    int low[2], high[2];
    for (int h = 0; h < 2; h++) span_of(p, r[h], low[h], high[h]);
    float o[BLOCKS][2][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};  // top: before it is scaled
    uint32_t fq[KEYS > 16 ? BLOCKS : 1][4];  // q, where it is needed more than once
#pragma unroll
    for (int b = 0; KEYS > 16 && b < BLOCKS; b++)
        if (16 * b < of.head_dim) load_a(fq[b], q + 16 * b, of.ld, p.rows_from(row0));
    int begin, end;
    span_of_16(p, row0, begin, end);
    each_keys<KEYS>(p, of, head / of.group, begin, end, [&](int key, const Keys<T>& keys) {
        // Scores, and each row's running maximum and sum.
        const int last = smaller(end, KEYS > 16 ? p.rows() : key + keys.rows);
        const auto is_there = [&](int i) { return i == 0 || p.c().seq_len % KEYS == 0 || key + 16 * i < last; };
        float s[KEY_BLOCKS][2][4] = {}, factor[2];
        if (KEYS == 16) scores_16(s[0], q, keys.k, of.ld, keys.ld, of.head_dim, p.rows_from(row0), keys.rows);
#pragma unroll
        for (int i = 0; KEYS > 16 && i < KEY_BLOCKS; i++)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (16 * b < of.head_dim && is_there(i)) {
                    uint32_t fk[4];
                    load_b(fk, keys.k + 16 * (i * keys.ld + b), keys.ld, p.rows_from(key + 16 * i));
                    mma_16<T>(s[i][0], s[i][1], fq[KEYS > 16 ? b : 0], fk);
                }
        const bool all_see_all = larger(low[0], low[1]) <= key && key + KEYS <= smaller(high[0], high[1]);
        if (KEYS == 16 || vote(all_see_all) != 0xffffffffu)
#pragma unroll
            for (int i = 0; i < 8 * KEY_BLOCKS; i++) {
                const int at = key + i / 4 * 8 + lane() % 4 * 2 + i % 2, h = i / 2 % 2;
                float& x = s[i / 8][i / 4 % 2][i % 4];
                x = low[h] <= at && at < smaller(high[h], last) ? x : -INFINITY;
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {  // the two rows of this thread
            float most = top[h];
#pragma unroll
            for (int i = 0; i < 4 * KEY_BLOCKS; i++)  // may miss a NaN; its own term, and so the total, does not
                most = fmaxf(most, s[i / 4][i / 2 % 2][2 * h + i % 2]);
            most = max_over_lanes<4>(most);
            const float base = most == -INFINITY ? 0.0f : most * scale;
            factor[h] = exp2_approx(top[h] * scale - base);
            top[h] = most;
            total[h] *= factor[h];
#pragma unroll
            for (int i = 0; i < 4 * KEY_BLOCKS; i++) {
                float& x = s[i / 4][i / 2 % 2][2 * h + i % 2];
                x = exp2_approx(x * scale - base);
                total[h] += x;
            }
        }
        // o = o factor + p v
#pragma unroll
        for (int i = 0; i < KEY_BLOCKS; i++) {
            uint32_t fp[4];
            as_left<T>(fp, s[i]);
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (16 * b < of.head_dim && is_there(i)) {
#pragma unroll
                    for (int j = 0; i == 0 && j < 8; j++) o[b][j / 4][j % 4] *= factor[j % 4 / 2];
                    uint32_t fv[4];
                    load_b_rows_along_n(fv, keys.v + 16 * (i * keys.ld + b), keys.ld,
                                        KEYS > 16 ? p.rows_from(key + 16 * i) : keys.rows);
                    mma_16_of_sequences(p, o[b][0], o[b][1], fp, fv, row0, key + 16 * i);
                }
        }
    });
    // Divide by the sum.
    sync_warp();  // all lanes have read q, which out may overwrite
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] = sum_over_lanes<4>(total[h]);
        // A pad sees nothing, and gets 0. Who sees keys, but all with scores of -inf, gets NaN, as from a softmax.
        const bool sees = low[h] < high[h];
        const float share = sees ? reciprocal_approx(total[h]) : 0.0f;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            if (16 * b < of.head_dim && p.exists(r[h])) {
                const float(&x)[4] = o[b][0];
                const float(&y)[4] = o[b][1];
                out(r[h], 16 * b + lane() % 4 * 2, make_float2(x[2 * h] * share, x[2 * h + 1] * share),
                    make_float2(y[2 * h] * share, y[2 * h + 1] * share));
            }
        rest(r[h], sees ? top[h] * scale + log2f(total[h]) : INFINITY);
    }
}

// x += scale self_attention(xn). after: the weights of the product that follows.
template <class X, class Xn, class T>
__device__ __forceinline__ void attention(X& x, const Xn& xn, const Weights<T>& w, float scale, Prefetch<T> after) {
    const auto& p = x.p;
    const int head_chunks = int(p.c().n_kv_heads / p.p().kv_heads), attn = int(p.c().n_heads * p.c().head_dim);
    const float* const bias = left_of_bias(x, w.out_bias(), scale);
#pragma unroll 1
    for (int chunk = 0; chunk < head_chunks; chunk++) {
        const HeadChunk of(p, chunk);
        const Prefetch<T> out = {w.out() + of.first_query_column, attn, p.d(), of.queries * of.head_dim};
        // q, k, v to work
        project_qkv(p, xn, w, chunk, xn.streamed ? Prefetch<T>{} : out);
        sync_sequence(p);
        // o to work, in place of q: a head and 16 rows a warp
        p.each_16_rows(of.queries, [&](int head, int row0) {
            const auto to_work = [&](int r, int j, float2 u, float2 v) {
                store(p.work() + r * of.ld + of.q(head) + j, pack<T>(u.x, u.y));
                store(p.work() + r * of.ld + of.q(head) + j + 8, pack<T>(v.x, v.y));
            };
            attend_16<X::KEYS>(p, of, head, row0, to_work, [](int, float) {});
        });
        // x += scale (o Wo^T + b)
        add_product<false>(x, Rows<T>{p.work(), of.ld, false}, out, scale, chunk ? nullptr : bias,
                           xn.streamed ? Prefetch<T>{} : chunk + 1 < head_chunks ? prefetch_qkv(p, w, chunk + 1) : after);
        if (p.bands() > 1 || p.split() > 1) sync_sequence(p);  // others have read the keys and values
    }
}

}  // namespace shift_cuda
