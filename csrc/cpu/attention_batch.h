// Attention by itself (attention_call.h), a kv head and its queries at a time.
#pragma once
#include "attention_call.h"
#include "scratch.h"
#include "share.h"

namespace {

struct AttentionSizes {  // of one sample
    int queries, keys, first, begin;  // first: position of query 0; before query `begin` none sees a key

    AttentionSizes(const AttentionCall& c, int64_t sample)
        : queries(c.q_lens[sample]), keys(c.k_lens[sample]), first(keys - queries) {
        const int64_t ahead = c.causal ? 0 : c.window ? c.window - 1 : c.k_len + c.q_len;
        begin = keys ? int(std::min<int64_t>(std::max<int64_t>(-first - ahead, 0), queries)) : queries;
    }
};

inline Scoring scoring_of(const AttentionCall& c) {
    return {float(c.scale), float(c.softcap), int(c.window), c.causal != 0};
}

// The rows of sample b's queries of kv head g.
inline GroupRows group_rows(const AttentionCall& c, const AttentionSizes& n, int64_t b, int64_t g) {
    const int64_t group = c.n_heads / c.n_kv_heads, head = c.q_len * c.head_dim, first = b * c.n_heads + g * group;
    const int64_t keys = (b * c.n_kv_heads + g) * c.k_len * c.head_dim, q = first * head;
    return {int(group), n.queries, n.first,
            c.q + q, c.o + q, c.kept + first * c.q_len * KEPT_OF_SCORES, c.d_o ? c.d_o + q : nullptr,
            c.dq ? c.dq + q : nullptr,
            c.head_dim, head, c.head_dim, head, KEPT_OF_SCORES, c.q_len * KEPT_OF_SCORES,
            c.k + keys, c.v + keys, c.dk ? c.dk + keys : nullptr, c.dv ? c.dv + keys : nullptr, c.head_dim, n.keys};
}

inline bool group_visits_every_pair(const AttentionCall& c, const GroupRows& r) {
    if (!c.causal && !c.window) return false;
    const int hd = int(c.head_dim);
    bool found = has_nonfinite(r.n_keys, hd, hd, r.k) || has_nonfinite(r.n_keys, hd, hd, r.v);
    for (int h = 0; h < r.n_heads && !found; h++)
        found = has_nonfinite(r.n_queries, hd, hd, r.q + h * r.head_q) ||
                (r.d_o && has_nonfinite(r.n_queries, hd, hd, r.d_o + h * r.head_o));
    return found;
}

// A part of the queries of a kv head. Rows that are no whole vectors are packed: the last one ends where memory may.
inline void attend_group(const AttentionCall& c, int64_t b, int64_t g, const Share& share, float* scratch) {
    const AttentionSizes n(c, b);
    const GroupRows r = group_rows(c, n, b, g);
    const int hd = int(c.head_dim), width = padded(hd);
    const Range own = share.part(n.queries - n.begin, ROWS_PER_CHUNK);
    if (own.begin == own.end) return;
    float *k = scratch, *v = k + int64_t(n.keys) * width, *rest = v + int64_t(n.keys) * width;
    KeysValues keys{r.k, r.v, hd, n.keys};
    if (hd != width) {
        pack_head(n.keys, hd, r.k, hd, k), pack_head(n.keys, hd, r.v, hd, v);
        keys = {k, v, width, n.keys};
    }
    const bool every_pair = group_visits_every_pair(c, r);
    for (int h = 0; h < r.n_heads; h++) {
        const int64_t head = (b * c.n_heads + g * r.n_heads + h) * c.q_len;
        const HeadRows rows{r.q + h * r.head_q, r.ld_q, c.o + head * hd, r.ld_o, c.kept + head * KEPT_OF_SCORES,
                            KEPT_OF_SCORES, n.first};
        attend_head(scoring_of(c), hd, rows, n.begin + own.begin, n.begin + own.end, every_pair, keys, rest);
    }
}

// Both return 0, or 1 where memory ran out.
inline int attention_forward(const AttentionCall& c) {
    const int64_t groups = c.batch * c.n_kv_heads, floats = 2 * c.k_len * padded(c.head_dim) + attend_scratch(c.head_dim);
    const int64_t parts = std::min<int64_t>(groups < 4 * c.n_threads ? 4 * c.n_threads : 1, c.q_len / ROWS_PER_CHUNK + 1);
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1)
    {
        Arena memory(floats, false);
        if (!memory.ok()) failed = 1;
        float* const scratch = memory.ok() ? memory.place(0) : nullptr;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups * parts; i++)  // the last parts, which take longest, first
            if (scratch)
                attend_group(c, i % groups / c.n_kv_heads, i % c.n_kv_heads,
                             {int(parts - 1 - i / groups), int(parts)}, scratch);
    }
    return failed;
}

inline int attention_backward(const AttentionCall& c) {
    const int64_t groups = c.batch * c.n_kv_heads, floats = attend_backward_scratch(c.k_len, c.head_dim);
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1)
    {
        Arena memory(floats, false);
        if (!memory.ok()) failed = 1;
        float* const scratch = memory.ok() ? memory.place(0) : nullptr;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups; i++) {
            const AttentionSizes n(c, i / c.n_kv_heads);
            if (!scratch || n.begin == n.queries) continue;
            const GroupRows r = group_rows(c, n, i / c.n_kv_heads, i % c.n_kv_heads);
            attend_backward(scoring_of(c), int(c.head_dim), r, n.begin, group_visits_every_pair(c, r), scratch);
        }
    }
    return failed;
}

}  // namespace
