// Softmax attention of one sequence whose queries, keys and values lie side by side in the rows of qkv.
//
// Scores are kept with the queries side by side, [keys][queries], and computed for one vector of queries at a
// time: maximum and sum over the keys then need no step across a vector, and with a causal mask the keys beyond
// the last of these queries are never touched. Always in single precision: the products are small.
#pragma once
#include "gemm.h"

namespace {

struct Heads {
    int n_heads, n_kv_heads, head_dim;
    bool causal;
    int ld_qkv, ld_o;
    int group() const { return n_heads / n_kv_heads; }
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
    void soon(int, int) const {}
    void ahead(int, int) const {}
    void take(int i, int j, vf sum) const {
        float* to = c + i * ld + j;
        store_first(to, add ? load(to) + sum : sum, width - j);
    }
};

struct Queries {  // VL of a sequence's n queries, or what is left of them
    int begin, count, keys;  // keys: how many they may look at, as a rule of the last of them
    Queries(const Heads& heads, int n, int i0)
        : begin(i0), count(n - i0 < VL ? n - i0 : VL), keys(heads.causal ? i0 + count : n) {}
};

// VL rows of x, side by side: [head_dim][VL]; missing rows are zero.
inline void turn(const Heads& heads, Queries some, const float* x, int64_t ld, float* out) {
    pack_transposed<F32>(x + some.begin * ld, ld, some.count, heads.head_dim, VL, out);
}

// Probabilities p[keys][ld] of some queries, zero where a query may not look.
inline void probabilities(const Heads& heads, Queries some, const float* turned_q, const float* k, float* p,
                          int64_t ld) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim));
    gemm<F32>(some.keys, VL, heads.head_dim, {k, heads.ld_qkv, 1}, panels<F32>(turned_q, heads.head_dim), Store{p, ld});
    if (heads.causal) {
        vi query;
        for (int i = 0; i < VL; i++) query[i] = some.begin + i;
        for (int j = some.begin; j < some.keys; j++) store(p + j * ld, pick(query < j, all(-1e30f), load(p + j * ld)));
    }
    vf top = load(p), total = all(0);
    for (int j = 1; j < some.keys; j++) top = max(top, load(p + j * ld));
    for (int j = 0; j < some.keys; j++) {
        const vf x = exp((load(p + j * ld) - top) * scale);
        store(p + j * ld, x);
        total += x;
    }
    const vf inverse = 1.0f / total;
    // What is masked is e^-87 by now, which is nothing to the sum; the backward wants a clean zero.
    for (int j = 0; j < some.keys; j++) {
        const vf x = load(p + j * ld);
        store(p + j * ld, pick(x < 1e-37f, all(0), x * inverse));
    }
}

// scratch: VL * (head_dim + n) floats
inline void attend(const Heads& heads, int n, const float* qkv, float* o, float* scratch) {
    const int hd = heads.head_dim;
    float *turned = scratch, *p = turned + VL * hd;
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        for (int i0 = 0; i0 < n; i0 += VL) {
            const Queries some(heads, n, i0);
            turn(heads, some, qkv + heads.q(h), heads.ld_qkv, turned);
            probabilities(heads, some, turned, qkv + heads.k(g), p, VL);
            gemm<F32>(some.count, padded(hd), some.keys, {p, 1, VL}, row_major(qkv + heads.v(g), heads.ld_qkv),
                      Head{o + int64_t(i0) * heads.ld_o + h * hd, heads.ld_o, hd, false});
        }
    }
}

// d_qkv from d_o. scratch: VL * head_dim + 2 * n * padded(n) floats
inline void attend_backward(const Heads& heads, int n, const float* qkv, const float* d_o, float* d_qkv,
                            float* scratch) {
    const int hd = heads.head_dim, hp = padded(hd), np = padded(n), ld = heads.ld_qkv, ldo = heads.ld_o;
    const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
    float *turned = scratch, *p = turned + VL * hd, *ds = p + int64_t(n) * np;  // p and ds: [keys][queries]
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        const float *q = qkv + heads.q(h), *k = qkv + heads.k(g), *v = qkv + heads.v(g), *d_oh = d_o + h * hd;
        for (int i0 = 0; i0 < n; i0 += VL) {
            const Queries some(heads, n, i0);
            float *pi = p + i0, *dsi = ds + i0;
            turn(heads, some, q, ld, turned);
            probabilities(heads, some, turned, k, pi, np);
            turn(heads, some, d_oh, ldo, turned);
            gemm<F32>(some.keys, VL, hd, {v, ld, 1}, panels<F32>(turned, hd), Store{dsi, np});
            vf mean = all(0);
            for (int j = 0; j < some.keys; j++) mean += load(pi + j * np) * load(dsi + j * np);
            for (int j = 0; j < some.keys; j++)  // ds = p * (dp - <p, dp>) / sqrt(head_dim)
                store(dsi + j * np, load(pi + j * np) * (load(dsi + j * np) - mean) * scale);
            gemm<F32>(some.count, hp, some.keys, {dsi, 1, np}, row_major(k, ld),
                      Head{d_qkv + int64_t(i0) * ld + heads.q(h), ld, hd, false});
        }
        const bool add = h % heads.group() != 0;  // a group's queries share its keys and values
        for (int j0 = 0; j0 < n; j0 += VL) {
            const int m = n - j0 < VL ? n - j0 : VL, i0 = heads.causal ? j0 : 0;  // the first query to see them
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
