// Softmax attention of one sequence whose queries, keys and values lie side by side in the rows of qkv.
#pragma once
#include "gemm.h"

namespace {

struct Heads {
    int n_heads, n_kv_heads, head_dim;
    bool causal;
    int ld_qkv, ld_o;
    const float* q(const float* qkv, int h) const { return qkv + h * head_dim; }
    const float* k(const float* qkv, int g) const { return qkv + (n_heads + g) * head_dim; }
    const float* v(const float* qkv, int g) const { return qkv + (n_heads + n_kv_heads + g) * head_dim; }
    int group() const { return n_heads / n_kv_heads; }
};

constexpr int BLOCK = 32;  // query rows that share one causal cut

// Probabilities [n, padded(n)] of one head; zero where a query may not look.
inline void probabilities(const Heads& heads, int n, const float* q, const float* keys_t, float* p) {
    const int np = padded(n);
    const float scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim));
    for (int i0 = 0; i0 < n; i0 += BLOCK) {
        const int m = n - i0 < BLOCK ? n - i0 : BLOCK;
        const int seen = heads.causal ? padded(i0 + m) : np;
        gemm(m, seen, heads.head_dim, {q + i0 * heads.ld_qkv, heads.ld_qkv, 1}, panels(keys_t, heads.head_dim),
             p + i0 * np, np);
        for (int i = i0; i < i0 + m; i++) {
            float* row = p + i * np;
            const int allowed = heads.causal ? i + 1 : n;
            for (int j = allowed; j < seen; j++) row[j] = -1e30f;
            vf top = load(row);
            for (int j = VL; j < seen; j += VL) top = max(top, load(row + j));
            const float highest = largest(top);
            for (int j = 0; j < seen; j += VL) store(row + j, exp((load(row + j) - highest) * scale));
            for (int j = allowed; j < np; j++) row[j] = 0;
            vf total = all(0);
            for (int j = 0; j < seen; j += VL) total += load(row + j);
            const float inverse = 1.0f / sum(total);
            for (int j = 0; j < seen; j += VL) store(row + j, load(row + j) * inverse);
        }
    }
}

inline void copy_columns(int n, int columns, const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    for (int i = 0; i < n; i++) std::memcpy(to + i * ld_to, from + i * ld_from, columns * sizeof(float));
}

// scratch: padded(n) * (head_dim + n) + n * padded(head_dim) floats
inline void attend(const Heads& heads, int n, const float* qkv, float* o, float* scratch) {
    const int np = padded(n), hp = padded(heads.head_dim);
    float *keys_t = scratch, *p = keys_t + np * heads.head_dim, *result = p + n * np;
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        if (h % heads.group() == 0) pack_transposed(heads.k(qkv, g), heads.ld_qkv, n, heads.head_dim, np, keys_t);
        probabilities(heads, n, heads.q(qkv, h), keys_t, p);
        for (int i0 = 0; i0 < n; i0 += BLOCK) {
            const int m = n - i0 < BLOCK ? n - i0 : BLOCK;
            gemm(m, hp, heads.causal ? i0 + m : n, {p + i0 * np, np, 1}, row_major(heads.v(qkv, g), heads.ld_qkv),
                 result + i0 * hp, hp);
        }
        copy_columns(n, heads.head_dim, result, hp, o + h * heads.head_dim, heads.ld_o);
    }
}

// d_qkv from d_o. scratch: 2 * padded(n) * (head_dim + n) + 3 * n * padded(head_dim) floats
inline void attend_backward(const Heads& heads, int n, const float* qkv, const float* d_o, float* d_qkv,
                            float* scratch) {
    const int np = padded(n), hd = heads.head_dim, hp = padded(hd);
    const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
    float *keys_t = scratch, *values_t = keys_t + np * hd, *p = values_t + np * hd, *ds = p + n * np;
    float *dq = ds + n * np, *dk = dq + n * hp, *dv = dk + n * hp;
    for (int h = 0; h < heads.n_heads; h++) {
        const int g = h / heads.group();
        const bool first = h % heads.group() == 0, last = (h + 1) % heads.group() == 0;
        if (first) {
            pack_transposed(heads.k(qkv, g), heads.ld_qkv, n, hd, np, keys_t);
            pack_transposed(heads.v(qkv, g), heads.ld_qkv, n, hd, np, values_t);
        }
        const float* d_oh = d_o + h * hd;
        probabilities(heads, n, heads.q(qkv, h), keys_t, p);
        gemm(n, np, hd, {d_oh, heads.ld_o, 1}, panels(values_t, hd), ds, np);
        for (int i = 0; i < n; i++) {  // ds = p * (dp - <p, dp>) / sqrt(head_dim)
            vf dot = all(0);
            for (int j = 0; j < np; j += VL) dot += load(p + i * np + j) * load(ds + i * np + j);
            const float mean = sum(dot);
            for (int j = 0; j < np; j += VL)
                store(ds + i * np + j, load(p + i * np + j) * (load(ds + i * np + j) - mean) * scale);
        }
        gemm(n, hp, n, {ds, np, 1}, row_major(heads.k(qkv, g), heads.ld_qkv), dq, hp);
        gemm(n, hp, n, {ds, 1, np}, row_major(heads.q(qkv, h), heads.ld_qkv), dk, hp, !first);
        gemm(n, hp, n, {p, 1, np}, row_major(d_oh, heads.ld_o), dv, hp, !first);
        copy_columns(n, hd, dq, hp, d_qkv + h * hd, heads.ld_qkv);
        if (last) {
            copy_columns(n, hd, dk, hp, d_qkv + (heads.n_heads + g) * hd, heads.ld_qkv);
            copy_columns(n, hd, dv, hp, d_qkv + (heads.n_heads + heads.n_kv_heads + g) * hd, heads.ld_qkv);
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
