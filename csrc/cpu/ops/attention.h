// Softmax attention of one sequence whose queries, keys and values lie side by side in the rows of qkv.
//
// Scores are kept with the queries side by side, [keys][queries], and computed for one vector of queries at a
// time: maximum and sum over the keys then need no step across a vector, and with a causal mask the keys beyond
// the last of these queries are never touched. Always in single precision: the products are small.
//
// A masked pair's score is -infinity, so that it has weight 0 beside any other score. But 0 times an infinity or
// NaN is NaN: in a sequence that holds one all pairs are visited (`every_pair`), and it spreads as in plain PyTorch.
#pragma once
#include "gemm.h"

namespace {

struct Heads {
    int n_heads, n_kv_heads, head_dim;
    bool causal;
    int ld_qkv, ld_o;
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
    int group() const { return n_heads / n_kv_heads; }
    int width() const { return (n_heads + 2 * n_kv_heads) * head_dim; }
    // columns of a query head, and of a group's keys and values, in qkv
    int q(int h) const { return h * head_dim; }
    int k(int g) const { return (n_heads + g) * head_dim; }
    int v(int g) const { return (n_heads + n_kv_heads + g) * head_dim; }
};

// Epilogue: a head's columns within a wider matrix, whose neighbours are left alone.
struct Head {
    float* c;
    int64_t ld;
    int width;
    bool add;
    void prefetch_next(int, int) const {}
    void prefetch_now(int, int) const {}
    void finish(int i, int j, vf sum) const {
        float* to = c + i * ld + j;
        store_first(to, add ? load(to) + sum : sum, width - j);
    }
};

struct Queries {  // VL of a sequence's n queries, or what is left of them
    int begin, count, keys;  // keys: how many are visited, as a rule those that the last of them may see
    bool causal;
    vi position;
    Queries(const Heads& heads, int n, int i0, bool every_pair)
        : begin(i0), count(n - i0 < VL ? n - i0 : VL), keys(heads.causal && !every_pair ? i0 + count : n),
          causal(heads.causal) {
        for (int i = 0; i < VL; i++) position[i] = i0 + i;
    }
    // x in the queries that may see key j, `masked` in the others
    vf where_seen(int j, vf x, float masked) const {
        return causal && j > begin ? pick(position < j, all(masked), x) : x;
    }
};

// Whether some of n rows of x hold an infinity or NaN (in padding too, which is then as good).
inline bool has_nonfinite(int64_t rows, int width, int64_t ld, const float* x) {
    vf zero = all(0);
    for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < width; j += VL) zero += load_first(x + i * ld + j, width - j) * 0.0f;
    for (int i = 0; i < VL; i++)
        if (zero[i] != 0) return true;
    return false;
}

// VL rows of x, side by side and scaled: [head_dim][VL]; missing rows are zero.
inline void transpose_scaled(const Heads& heads, Queries queries, const float* x, int64_t ld, float scale, float* out) {
    pack_transposed<F32>(x + queries.begin * ld, ld, queries.count, heads.head_dim, VL, out);
    for (int t = 0; t < heads.head_dim; t++) store(out + t * VL, load(out + t * VL) * scale);
}

// Probabilities p[keys][ld] of some queries (transposed, and scaled), zero where a query may not look.
inline void probabilities(const Heads& heads, const Queries& queries, const float* queries_t, const float* k, float* p,
                          int64_t ld) {
    gemm<F32>(queries.keys, VL, heads.head_dim, {k, heads.ld_qkv, 1}, panels<F32>(queries_t, heads.head_dim),
              Store{p, ld});
    vf largest = load(p), total = all(0);
    for (int j = 1; j < queries.keys; j++) {
        const vf score = queries.where_seen(j, load(p + j * ld), -INFINITY);
        store(p + j * ld, score);
        largest = max(largest, score);
    }
    for (int j = 0; j < queries.keys; j++) {
        vf x = exp(load(p + j * ld) - largest);
        x = pick(x < 1e-37f, all(0), x);  // products of smaller numbers take some processors long
        store(p + j * ld, x);
        total += x;
    }
    const vf inverse = 1.0f / total;
    for (int j = 0; j < queries.keys; j++) store(p + j * ld, load(p + j * ld) * inverse);
}

// scratch: VL * (head_dim + n) floats
inline void attend(const Heads& heads, int n, const float* qkv, float* o, float* scratch) {
    const int hd = heads.head_dim;
    float *transposed = scratch, *p = transposed + VL * hd;
    const bool every_pair = heads.causal && has_nonfinite(n, heads.width(), heads.ld_qkv, qkv);
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        for (int i0 = 0; i0 < n; i0 += VL) {
            const Queries queries(heads, n, i0, every_pair);
            transpose_scaled(heads, queries, qkv + heads.q(h), heads.ld_qkv, heads.scale(), transposed);
            probabilities(heads, queries, transposed, qkv + heads.k(g), p, VL);
            gemm<F32>(queries.count, padded(hd), queries.keys, {p, 1, VL}, row_major(qkv + heads.v(g), heads.ld_qkv),
                      Head{o + int64_t(i0) * heads.ld_o + h * hd, heads.ld_o, hd, false});
        }
    }
}

// d_qkv from d_o. scratch: VL * head_dim + 2 * n * padded(n) floats
inline void attend_backward(const Heads& heads, int n, const float* qkv, const float* d_o, float* d_qkv,
                            float* scratch) {
    const int hd = heads.head_dim, hp = padded(hd), np = padded(n), ld = heads.ld_qkv, ldo = heads.ld_o;
    float *transposed = scratch, *p = transposed + VL * hd, *ds = p + int64_t(n) * np;  // p and ds: [keys][queries]
    const bool every_pair = heads.causal && (has_nonfinite(n, heads.width(), ld, qkv) ||
                                             has_nonfinite(n, heads.n_heads * hd, ldo, d_o));
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        const float *q = qkv + heads.q(h), *k = qkv + heads.k(g), *v = qkv + heads.v(g), *d_oh = d_o + h * hd;
        for (int i0 = 0; i0 < n; i0 += VL) {
            const Queries queries(heads, n, i0, every_pair);
            float *pi = p + i0, *dsi = ds + i0;
            transpose_scaled(heads, queries, q, ld, heads.scale(), transposed);
            probabilities(heads, queries, transposed, k, pi, np);
            transpose_scaled(heads, queries, d_oh, ldo, 1.0f, transposed);
            gemm<F32>(queries.keys, VL, hd, {v, ld, 1}, panels<F32>(transposed, hd), Store{dsi, np});
            vf mean = all(0);
            for (int j = 0; j < queries.keys; j++) mean += load(pi + j * np) * load(dsi + j * np);
            for (int j = 0; j < queries.keys; j++) {  // ds = p * (dp - <p, dp>) / sqrt(head_dim)
                const vf step = load(pi + j * np) * (load(dsi + j * np) - mean) * heads.scale();
                store(dsi + j * np, queries.where_seen(j, step, 0));
            }
            gemm<F32>(queries.count, hp, queries.keys, {dsi, 1, np}, row_major(k, ld),
                      Head{d_qkv + int64_t(i0) * ld + heads.q(h), ld, hd, false});
        }
        const bool add = h % heads.group() != 0;  // a group's queries share its keys and values
        for (int j0 = 0; j0 < n; j0 += VL) {
            // the first query to see them
            const int m = n - j0 < VL ? n - j0 : VL, i0 = heads.causal && !every_pair ? j0 : 0;
            const int64_t corner = int64_t(j0) * np + i0, rows = int64_t(j0) * ld;
            gemm<F32>(m, hp, n - i0, {ds + corner, np, 1}, row_major(q + int64_t(i0) * ld, ld),
                      Head{d_qkv + rows + heads.k(g), ld, hd, add});
            gemm<F32>(m, hp, n - i0, {p + corner, np, 1}, row_major(d_oh + int64_t(i0) * ldo, ldo),
                      Head{d_qkv + rows + heads.v(g), ld, hd, add});
        }
    }
}

// Rotate the halves of every query and key head by their position's angle; direction -1 undoes it.
inline void rotate(const Heads& heads, int n, int seq_len, const float* table, float direction, float* qkv) {
    const int half = heads.head_dim / 2;
    const float* sines = table + static_cast<int64_t>(seq_len) * half;
    for (int i = 0; i < n; i++)
        for (int h = 0; h < heads.n_heads + heads.n_kv_heads; h++) {
            float* x = qkv + static_cast<int64_t>(i) * heads.ld_qkv + h * heads.head_dim;
            for (int c = 0; c < half; c++) {
                const float cosine = table[i * half + c], sine = direction * sines[i * half + c];
                const float a = x[c], b = x[c + half];
                x[c] = a * cosine - b * sine;
                x[c + half] = b * cosine + a * sine;
            }
        }
}

}  // namespace
