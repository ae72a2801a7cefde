// Softmax attention in blocks: no score outlives the block of keys that it was computed for, so that memory grows
// with the number of tokens and not with its square.
//
// Scores are kept with the queries side by side, [keys][queries], and computed for one vector of queries, a panel, at
// a time: maximum and sum over the keys then need no step across a vector. From block to block a panel keeps its
// largest score, the sum of e^(score - largest) and the values summed by these weights, and scales the last two
// where the largest score grows. The backward computes the weights again, from the largest score and the sum, which
// the forward keeps of each query and head. Always in single precision: the products are small.
//
// Keys that no query of a panel may see are not visited. A masked pair's score is -infinity, so that it has weight 0
// beside any other score. But 0 times an infinity or NaN is NaN: in a sequence that holds one all pairs are visited
// (`every_pair`), and it spreads as in plain PyTorch.
#pragma once
#include <algorithm>

#include "gemm.h"

namespace {

constexpr int KEYS_PER_BLOCK = 128;                       // of the forward, in L1 beside a panel's scores
constexpr int BACKWARD_BLOCK = 64;                        // queries and keys: two squares of it in L1
constexpr int PANELS = BACKWARD_BLOCK / VL;

struct Heads {
    int n_heads, n_kv_heads, head_dim, rotary_pairs;
    int ld_qkv, ld_o;
    int group() const { return n_heads / n_kv_heads; }
    int width() const { return (n_heads + 2 * n_kv_heads) * head_dim; }
    // columns of a query head, and of a group's keys and values, in qkv
    int q(int h) const { return h * head_dim; }
    int k(int g) const { return (n_heads + g) * head_dim; }
    int v(int g) const { return (n_heads + n_kv_heads + g) * head_dim; }
};

// Which keys a query sees, and how a score comes about.
struct Scoring {
    float scale, softcap;  // softcap 0: none
    int window;            // of positions, 0: none
    bool causal;
};

// Keys and values of a head: rows in order of their positions, with zeros from head_dim to padded(head_dim).
struct KeysValues {
    const float *k, *v;
    int64_t ld;
    int count;
};

// Epilogues: a head's columns within a wider matrix, whose neighbours are left alone.
struct Fold {  // sums that are scaled, row by row, before more is added; without `keep` the first
    float* c;
    int64_t ld;
    const float* keep;
    void prefetch_next(int, int) const {}
    void prefetch_now(int, int) const {}
    void finish(int i, int j, vf sum) const {
        float* to = c + i * ld + j;
        store(to, keep ? load(to) * keep[i] + sum : sum);
    }
};

// Up to VL queries at neighbouring positions, and the keys they see.
struct Panel {
    int count;
    int begin, end;          // keys that some of them may see, or all (every_pair)
    int all_begin, all_end;  // keys that all of them may see
    vi first, last;          // of each

    Panel(const Scoring& s, int n_keys, int position, int n, bool every_pair) : count(n) {
        const int behind = s.window ? s.window - 1 : n_keys + position + n;  // how far a query looks back,
        const int ahead = s.causal ? 0 : behind;                             // and how far ahead
        const int end_position = position + n - 1;
        const auto within = [&](int key) { return std::min(std::max(key, 0), n_keys); };
        begin = every_pair ? 0 : within(position - behind), end = every_pair ? n_keys : within(end_position + ahead + 1);
        all_begin = within(end_position - behind), all_end = within(position + ahead + 1);
        for (int i = 0; i < VL; i++) first[i] = position + i - behind, last[i] = position + i + ahead;
    }
    bool all_see(int key) const { return key >= all_begin && key < all_end; }
    // x in the queries that may see the key, `masked` in the others
    vf where_seen(int key, vf x, float masked) const {
        return all_see(key) ? x : pick((first <= key) & (last >= key), x, all(masked));
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

// A head's columns of n rows, side by side in rows of padded(head_dim), with zeros beyond.
inline void pack_head(int n, int head_dim, const float* x, int64_t ld, float* out) {
    const int width = padded(head_dim);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < width; j += VL) store(out + int64_t(i) * width + j, load_first(x + i * ld + j, head_dim - j));
}
inline void unpack_head(int n, int head_dim, const float* x, float* out, int64_t ld) {
    const int width = padded(head_dim);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < head_dim; j += VL) store_first(out + i * ld + j, load(x + int64_t(i) * width + j), head_dim - j);
}

// Up to VL rows of x, side by side and scaled: [head_dim][VL]; missing rows are zero.
inline void transpose_scaled(int rows, int head_dim, const float* x, int64_t ld, float scale, float* out) {
    pack_transposed<F32>(x, ld, rows, head_dim, VL, out);
    for (int t = 0; t < head_dim; t++) store(out + t * VL, load(out + t * VL) * scale);
}

// softcap * tanh(score / softcap), and its slope
struct Capped {
    vf score, slope;
};
inline Capped cap(vf score, float softcap) {
    if (softcap == 0) return {score, all(1)};
    const vf x = score / softcap, square = x * x, e = exp(-2.0f * max(x, -x));  // in this order a NaN stays one
    const vf far = (1.0f - e) / (1.0f + e), near = ((-17.0f / 315 * square + 2.0f / 15) * square - 1.0f / 3) * square + 1.0f;
    const vf tanh = pick(square < 0.04f, x * near, pick(x < 0.0f, -far, far));
    return {tanh * softcap, 1.0f - tanh * tanh};
}

inline vf without_tiny(vf x) { return pick(x < 1e-37f, all(0), x); }  // their products take some processors long

// What is kept of a query and head, beside each other: the largest score, and 1 / the sum of weights.
constexpr int KEPT_OF_SCORES = 2;

// A panel of queries (transposed and scaled) over a head's keys. o [count][ld_o], kept [count][ld_kept].
// scratch: VL * (KEYS_PER_BLOCK + padded(head_dim)) floats
inline void attend_panel(const Scoring& s, const Panel& panel, int head_dim, const float* queries_t, KeysValues keys,
                         float* o, int64_t ld_o, float* kept, int64_t ld_kept, float* scratch) {
    const int width = padded(head_dim);
    float *scores = scratch, *sums = scores + VL * KEYS_PER_BLOCK, row_scale[16], row_largest[16];
    vf largest = all(-INFINITY), total = all(0), base = all(0);
    for (int begin = panel.begin; begin < panel.end; begin += KEYS_PER_BLOCK) {
        const int n = std::min(KEYS_PER_BLOCK, panel.end - begin);
        gemm<F32>(n, VL, head_dim, {keys.k + begin * keys.ld, keys.ld, 1}, panels<F32>(queries_t, head_dim),
                  Store{scores, VL});
        vf most = largest;
        for (int j = 0; j < n; j++) {
            vf score = load(scores + j * VL);
            if (s.softcap != 0) score = cap(score, s.softcap).score;
            score = panel.where_seen(begin + j, score, -INFINITY);
            store(scores + j * VL, score);
            most = max(most, score);
        }
        base = pick(most == -INFINITY, all(0), most);  // nothing seen yet
        const vf keep = exp(largest - base);
        vf sum = all(0);
        for (int j = 0; j < n; j++) {
            const vf weight = without_tiny(exp(load(scores + j * VL) - base));
            store(scores + j * VL, weight);
            sum += weight;
        }
        total = total * keep + sum, largest = most;
        store(row_scale, keep);
        gemm<F32>(panel.count, width, n, {scores, 1, VL}, row_major(keys.v + begin * keys.ld, keys.ld),
                  Fold{sums, width, begin == panel.begin ? nullptr : row_scale});
    }
    store(row_scale, 1.0f / total), store(row_largest, base);
    for (int i = 0; i < panel.count; i++) {
        for (int j = 0; j < head_dim; j += VL)
            store_first(o + i * ld_o + j, load(sums + i * width + j) * row_scale[i], head_dim - j);
        kept[i * ld_kept] = row_largest[i], kept[i * ld_kept + 1] = row_scale[i];
    }
}

// One query over a head's keys, with keys side by side where the panel has queries. Else as attend_panel().
inline void attend_one(const Scoring& s, const Panel& panel, int head_dim, const float* q, KeysValues keys, float* o,
                       float* kept, float* scratch) {
    const int width = padded(head_dim);
    float *query = scratch, *scores = query + width, *sums_of = scores + KEYS_PER_BLOCK;
    for (int c = 0; c < width; c += VL) store(query + c, load_first(q + c, head_dim - c) * s.scale);
    std::memset(sums_of, 0, width * sizeof(float));
    float largest = -INFINITY, total = 0;
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    for (int begin = panel.begin; begin < panel.end; begin += KEYS_PER_BLOCK) {
        const int n = std::min(KEYS_PER_BLOCK, panel.end - begin);
        vf most = all(largest), sum = all(0);
        for (int j = 0; j < n; j += VL) {
            vf products[VL] = {};
            for (int i = 0; i < std::min(VL, n - j); i++) {
                const float* k = keys.k + (begin + j + i) * keys.ld;
                for (int c = 0; c < head_dim; c += VL) products[i] += load_first(k + c, head_dim - c) * load(query + c);
            }
            vf score = sums(products);
            if (s.softcap != 0) score = cap(score, s.softcap).score;
            score = pick((lane < n - j) & (lane >= panel.all_begin - begin - j) & (lane < panel.all_end - begin - j), score,
                         all(-INFINITY));
            store(scores + j, score);
            most = max(most, score);
        }
        float now = -INFINITY;  // a NaN is lost here, and found again in the sum
        for (int i = 0; i < VL; i++) now = most[i] > now ? most[i] : now;
        const float base = now == -INFINITY ? 0 : now, keep = exp(all(largest - base))[0];
        for (int j = 0; j < n; j += VL) {
            const vf weight = without_tiny(exp(load(scores + j) - base));
            store(scores + j, weight);
            sum += weight;
        }
        float added = 0;
        for (int i = 0; i < VL; i++) added += sum[i];
        total = total * keep + added, largest = now;
        for (int c = 0; c < head_dim; c += VL) {
            vf part[4] = {load(sums_of + c) * keep};  // several additions under way
            const float* v = keys.v + begin * keys.ld + c;
            int j = 0;
            for (; j + 4 <= n; j += 4)
                UNROLLED for (int i = 0; i < 4; i++) part[i] += scores[j + i] * load_first(v + (j + i) * keys.ld, head_dim - c);
            for (; j < n; j++) part[0] += scores[j] * load_first(v + j * keys.ld, head_dim - c);
            store(sums_of + c, (part[0] + part[1]) + (part[2] + part[3]));
        }
    }
    for (int c = 0; c < head_dim; c += VL) store_first(o + c, load(sums_of + c) / total, head_dim - c);
    kept[0] = largest == -INFINITY ? 0 : largest, kept[1] = 1 / total;
}

constexpr int64_t attend_scratch(int64_t head_dim) {
    return 16 * (KEYS_PER_BLOCK + padded(head_dim) + head_dim);  // 16: the widest vector
}

// A head's queries in rows, where its results go, and what is kept of its scores. Query i is at position `first` + i of
// the keys.
struct HeadRows {
    const float* q;
    int64_t ld_q;
    float* o;
    int64_t ld_o;
    float* kept;
    int64_t ld_kept;
    int first;
};

// Queries begin .. end of a head. scratch: attend_scratch()
inline void attend_head(const Scoring& s, int head_dim, const HeadRows& rows, int begin, int end, bool every_pair,
                        KeysValues keys, float* scratch) {
    float *transposed = scratch, *rest = transposed + VL * head_dim;
    for (int i = begin; i < end; i += VL) {
        const Panel panel(s, keys.count, rows.first + i, std::min(VL, end - i), every_pair);
        const float* q = rows.q + i * rows.ld_q;
        float *o = rows.o + i * rows.ld_o, *kept = rows.kept + i * rows.ld_kept;
        if (panel.count == 1) {
            attend_one(s, panel, head_dim, q, keys, o, kept, scratch);
            continue;
        }
        transpose_scaled(panel.count, head_dim, q, rows.ld_q, s.scale, transposed);
        attend_panel(s, panel, head_dim, transposed, keys, o, rows.ld_o, kept, rows.ld_kept, rest);
    }
}

// Where the keys and values of a sequence's kv heads are: head g's rows from k + g * head (and v) on.
struct HeadStore {
    float *k, *v;
    int64_t ld, head;
    int columns;  // of a row that are written: head_dim, or padded with zeros
};

// Rows of a sequence's keys and values to their places, from its row `first` on.
inline void store_keys_values(const Heads& heads, int rows, const float* qkv, const HeadStore& to, int64_t first) {
    for (int g = 0; g < heads.n_kv_heads; g++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < to.columns; j += VL) {
                const float* row = qkv + int64_t(i) * heads.ld_qkv + j;
                const int64_t at = g * to.head + (first + i) * to.ld + j;
                store_first(to.k + at, load_first(row + heads.k(g), heads.head_dim - j), to.columns - j);
                store_first(to.v + at, load_first(row + heads.v(g), heads.head_dim - j), to.columns - j);
            }
}

// Queries begin .. end of a sequence whose rows of qkv, o and kept these are, the first of them at position `first`,
// over its `count` keys. scratch: attend_scratch()
inline void attend(const Heads& heads, const Scoring& s, int first, int begin, int end, bool every_pair, HeadRows rows,
                   const HeadStore& keys, int count, float* scratch) {
    const HeadRows of_sequence = rows;
    for (int h = 0; h < heads.n_heads; h++) {
        const int64_t at = h / heads.group() * keys.head;
        rows.q = of_sequence.q + heads.q(h), rows.o = of_sequence.o + h * heads.head_dim;
        rows.kept = of_sequence.kept + h * KEPT_OF_SCORES, rows.first = first;
        attend_head(s, heads.head_dim, rows, begin, end, every_pair, {keys.k + at, keys.v + at, keys.ld, count}, scratch);
    }
}

// Some queries of a head, with what their gradients need.
struct QueryBlock {
    int begin, count;
    float *q, *d_o, *dq;      // [count][padded(head_dim)]
    float *q_t, *d_o_t;       // by panels, [head_dim][VL]; q_t scaled
    float *weights, *d_scores;  // [keys][BACKWARD_BLOCK]
    vf largest[PANELS], inverse[PANELS], along[PANELS];  // along: <o, d_o>
};

// One block of queries over keys begin .. end of its head: adds to dq, dk and dv.
inline void attend_block_backward(const Scoring& s, int hd, QueryBlock& b, KeysValues keys, int begin, int end,
                                  bool every_pair, float* dk, float* dv) {
    const int width = padded(hd), n = end - begin;
    int seen_from[PANELS], seen_to[PANELS];  // by each panel, whole vectors of keys, within this block
    for (int a = 0; a * VL < b.count; a++) {
        const Panel panel(s, keys.count, b.begin + a * VL, std::min(VL, b.count - a * VL), every_pair);
        const int from = std::max(panel.begin - begin, 0) / VL * VL;
        const int to = std::min((std::max(panel.end - begin, 0) + VL - 1) / VL * VL, n);
        seen_from[a] = from, seen_to[a] = std::max(from, to);
        if (from >= to) continue;
        float *weights = b.weights + a * VL, *d_scores = b.d_scores + a * VL;
        const int64_t ld = BACKWARD_BLOCK, first = begin + from;
        gemm<F32>(to - from, VL, hd, {keys.k + first * keys.ld, keys.ld, 1}, panels<F32>(b.q_t + a * VL * hd, hd),
                  Store{weights + from * ld, ld});
        gemm<F32>(to - from, VL, hd, {keys.v + first * keys.ld, keys.ld, 1}, panels<F32>(b.d_o_t + a * VL * hd, hd),
                  Store{d_scores + from * ld, ld});
        for (int j = from; j < to; j++) {
            const Capped capped = cap(load(weights + j * ld), s.softcap);
            const vf score = panel.where_seen(begin + j, capped.score, -INFINITY);
            const vf weight = without_tiny(exp(score - b.largest[a])) * b.inverse[a];
            vf step = weight * (load(d_scores + j * ld) - b.along[a]) * s.scale;
            if (s.softcap != 0) step *= capped.slope;
            store(weights + j * ld, weight);
            store(d_scores + j * ld, panel.where_seen(begin + j, step, 0));
        }
        gemm<F32>(panel.count, width, to - from, {d_scores + from * ld, 1, ld},
                  row_major(keys.k + first * keys.ld, keys.ld), Add{b.dq + int64_t(a) * VL * width, width});
    }
    for (int j = 0; j < n; j += VL) {
        int from = 0, to = (b.count + VL - 1) / VL;  // panels that see these keys
        while (from < to && !(seen_from[from] <= j && j < seen_to[from])) from++;
        while (to > from && !(seen_from[to - 1] <= j && j < seen_to[to - 1])) to--;
        const int first = from * VL, count = std::min(to * VL, b.count) - first, m = std::min(VL, n - j);
        if (from == to) continue;
        const int64_t corner = j * BACKWARD_BLOCK + first, row = (begin + j) * int64_t(width);
        gemm<F32>(m, width, count, {b.d_scores + corner, BACKWARD_BLOCK, 1}, row_major(b.q + first * width, width),
                  Add{dk + row, width});
        gemm<F32>(m, width, count, {b.weights + corner, BACKWARD_BLOCK, 1}, row_major(b.d_o + first * width, width),
                  Add{dv + row, width});
    }
}

// What the backward of kv heads' groups takes: their keys, values and the gradients of these, and a block's.
constexpr int64_t attend_backward_scratch(int64_t n, int64_t head_dim) {
    return 4 * n * padded(head_dim) + BACKWARD_BLOCK * (3 * padded(head_dim) + 3 * head_dim + 2 * BACKWARD_BLOCK);
}

// Query heads that share a kv head, in rows; from one head to the next q, o and what is kept are so far apart.
struct GroupRows {
    int n_heads, n_queries, first;  // first: position of the first query
    const float *q, *o, *kept, *d_o;
    float* dq;
    int64_t ld_q, head_q, ld_o, head_o, ld_kept, head_kept;
    const float *k, *v;
    float *dk, *dv;
    int64_t ld_k;
    int n_keys;
};

// dq, dk and dv of a group, from d_o; of the queries from `begin` on. scratch: attend_backward_scratch()
inline void attend_backward(const Scoring& s, int hd, const GroupRows& r, int begin, bool every_pair, float* scratch) {
    const int width = padded(hd);
    const int64_t size = int64_t(r.n_keys) * width;
    float *k = scratch, *v = k + size, *dk = v + size, *dv = dk + size, *at = dv + size;
    const auto place = [&](int64_t floats) { return at += floats, at - floats; };
    QueryBlock b;
    b.q = place(BACKWARD_BLOCK * width), b.d_o = place(BACKWARD_BLOCK * width), b.dq = place(BACKWARD_BLOCK * width);
    b.q_t = place(BACKWARD_BLOCK * hd), b.d_o_t = place(BACKWARD_BLOCK * hd);
    b.weights = place(BACKWARD_BLOCK * BACKWARD_BLOCK), b.d_scores = place(BACKWARD_BLOCK * BACKWARD_BLOCK);
    float* const o_t = place(VL * hd);
    pack_head(r.n_keys, hd, r.k, r.ld_k, k), pack_head(r.n_keys, hd, r.v, r.ld_k, v);
    std::memset(dk, 0, 2 * size * sizeof(float));
    for (int h = 0; h < r.n_heads; h++)
        for (int row = begin; row < r.n_queries; row += BACKWARD_BLOCK) {
            b.begin = r.first + row, b.count = std::min(BACKWARD_BLOCK, r.n_queries - row);
            pack_head(b.count, hd, r.q + row * r.ld_q + h * r.head_q, r.ld_q, b.q);
            pack_head(b.count, hd, r.d_o + row * r.ld_o + h * r.head_o, r.ld_o, b.d_o);
            std::memset(b.dq, 0, int64_t(b.count) * width * sizeof(float));
            for (int a = 0; a * VL < b.count; a++) {
                const int rows = std::min(VL, b.count - a * VL);
                const float* d_oa = b.d_o + int64_t(a) * VL * width;
                transpose_scaled(rows, hd, b.q + int64_t(a) * VL * width, width, s.scale, b.q_t + a * VL * hd);
                pack_transposed<F32>(d_oa, width, rows, hd, VL, b.d_o_t + a * VL * hd);
                pack_transposed<F32>(r.o + (row + a * VL) * r.ld_o + h * r.head_o, r.ld_o, rows, hd, VL, o_t);
                // In the order of the products with v: where one weight is 1, their difference is 0 and not a rounding.
                b.along[a] = all(0);
                for (int c = 0; c < hd; c++) b.along[a] += load(o_t + c * VL) * load(b.d_o_t + (a * hd + c) * VL);
                b.largest[a] = b.inverse[a] = all(0);
                for (int i = 0; i < rows; i++) {
                    const int64_t query = row + a * VL + i;
                    const float* of_scores = r.kept + query * r.ld_kept + h * r.head_kept;
                    b.largest[a][i] = of_scores[0], b.inverse[a][i] = of_scores[1];
                }
            }
            const Panel all_of_them(s, r.n_keys, b.begin, b.count, every_pair);
            for (int j = all_of_them.begin / VL * VL; j < all_of_them.end; j += BACKWARD_BLOCK)
                attend_block_backward(s, hd, b, {k, v, width, r.n_keys}, j, std::min(j + BACKWARD_BLOCK, r.n_keys),
                                      every_pair, dk, dv);
            unpack_head(b.count, hd, b.dq, r.dq + row * r.ld_q + h * r.head_q, r.ld_q);
        }
    unpack_head(r.n_keys, hd, dk, r.dk, r.ld_k), unpack_head(r.n_keys, hd, dv, r.dv, r.ld_k);
}

// Rotate the pairs of every query and key head of rows at positions begin .. end by their position's angle, column c
// with column c + rotary_pairs; direction -1 undoes it.
inline void rotate(const Heads& heads, int begin, int end, int seq_len, const float* table, float direction, float* qkv) {
    const int half = heads.rotary_pairs;
    const float* sines = table + static_cast<int64_t>(seq_len) * half;
    for (int i = begin; i < end; i++)
        for (int h = 0; h < heads.n_heads + heads.n_kv_heads; h++) {
            float* x = qkv + static_cast<int64_t>(i - begin) * heads.ld_qkv + h * heads.head_dim;
            for (int c = 0; c < half; c++) {
                const float cosine = table[i * half + c], sine = direction * sines[i * half + c];
                const float a = x[c], b = x[c + half];
                x[c] = a * cosine - b * sine;
                x[c + half] = b * cosine + a * sine;
            }
        }
}

}  // namespace
