// Memory: of the largest tile, and of a thread; and what is kept for the backward.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "sequences.h"
#include "share.h"
#include "weights.h"

namespace {

// One allocation cut into pieces, each on a cache line and with slack that vector loads may touch.
class Arena {
  public:
    explicit Arena(int64_t floats, bool zeroed = true)
        : base_(zeroed ? std::calloc(bytes(floats), 1) : std::malloc(bytes(floats))), at_(aligned(base_)) {}
    ~Arena() { std::free(base_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    bool ok() const { return base_ != nullptr; }
    float* place(int64_t floats) {
        float* piece = at_;
        at_ += size(floats);
        return piece;
    }
    static int64_t size(int64_t floats) { return (floats + 16 + 15) / 16 * 16; }

  private:
    static size_t bytes(int64_t floats) { return (floats + 32) * sizeof(float); }
    static float* aligned(void* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }
    void* base_;  // fresh pages are zero without being touched
    float* at_;
};

struct Cursor {  // as Arena, over memory that is there
    float* at;
    float* place(int64_t floats) {
        float* piece = at;
        at += Arena::size(floats);
        return piece;
    }
};

struct Counter {  // as Arena, but only adds up what would be taken
    int64_t floats = 0;
    float* place(int64_t n) {
        floats += Arena::size(n);
        return nullptr;
    }
};

// Of one layer, [rows, width]: y1, y2 normed inputs, z1, z2 branch outputs (with post-norm: the sums). The
// backward computes y1, y2 and act again, for they are cheap. What only products read again is rounded as their
// operands are; attention works on qkv as they are: in single precision the same memory as what is kept.
template <class P>
struct Saved {
    typedef typename P::number Number;
    float *in, *y1, *qkv, *o, *scores, *z1, *mid, *y2, *z2;
    Number *saved_qkv, *qk, *u, *act;  // qk: queries and keys before their norm, where a backward follows
    // Whether y1, y2 and act, and z1, mid, z2 and u, have room for all rows, or for a chunk's alone.
    bool whole_inputs, whole_results;
};

// Of one thread, for a chunk: products' operands; and for attention.
template <class P>
struct OperandScratch {
    typename P::number* rows;
    typename P::cell *columns, *panels, *weight;  // weight: columns of one that is not packed
    float *attention, *dy, *qk;  // qk: two heads, and all of them

    template <class Memory>
    OperandScratch(const Call& c, const Shape& s, const Plan& plan, Memory& m, bool backward) {
        const int64_t widest = std::max({s.model_cols, s.qkv_cols, s.query_cols, s.ff_cols, s.hidden_cols});
        const int64_t most = std::min<int64_t>(plan.most_rows, ROWS_PER_CHUNK);
        const auto cells = [&](int64_t n) { return reinterpret_cast<typename P::cell*>(m.place(cells_of<P>(most) * n)); };
        rows = reinterpret_cast<typename P::number*>(m.place(most * widest / P::NUMBERS));
        const int64_t longest = std::min(plan.most_rows, c.seq_len);
        const int64_t gradients = backward ? attend_backward_scratch(longest, c.head_dim) : 0;
        attention = m.place(std::max(attend_scratch(c.head_dim), gradients));
        qk = s.qk_cols ? m.place(most * (2 * padded(c.head_dim) + s.qk_cols)) : nullptr;
        weight = plan.few_uses ? reinterpret_cast<typename P::cell*>(m.place(UNPACKED_COLUMNS * cells_of<P>(widest)))
                               : nullptr;
        columns = panels = nullptr, dy = nullptr;
        if (!backward) return;
        columns = cells(COLUMNS), panels = cells(std::max({s.model_cols, s.query_cols, s.ff_cols}));
        dy = m.place(most * s.model_cols);
    }
};

// [rows, width] each. kv: keys and values as attention reads them. nonfinite: of a row 1 where its qkv (in the backward
// or d_o) hold an infinity or NaN. dz, dz_mlp: of the branches' outputs. norms: [chunks][norms][2][norm_cols].
struct Temporaries {
    float *kv, *nonfinite, *dz, *dz_mlp, *d_o, *d_qkv, *du, *norms;
};

// Memory for n numbers as the operands of products are.
template <class P, class Memory>
typename P::number* place_numbers(Memory& m, int64_t n) {
    return reinterpret_cast<typename P::number*>(m.place(n / P::NUMBERS));
}

template <class P, class Memory>
Saved<P> place_saved(Memory& m, const Shape& s, const Plan& plan, bool backward) {
    const int64_t rows = plan.most_rows;
    Saved<P> k{};
    k.in = m.place(rows * s.model_cols), k.qkv = m.place(rows * s.qkv_cols);
    k.o = m.place(rows * s.query_cols), k.scores = m.place(rows * s.score_cols);
    k.whole_inputs = k.whole_results = backward || plan.together;  // chunks of several threads are under way
    const int64_t some = k.whole_inputs ? rows : std::min<int64_t>(rows, ROWS_PER_CHUNK);
    k.y1 = m.place(some * s.model_cols), k.y2 = m.place(some * s.model_cols), k.mid = m.place(some * s.model_cols);
    k.z1 = m.place(some * s.model_cols), k.z2 = m.place(some * s.model_cols);
    k.u = place_numbers<P>(m, some * s.hidden_cols), k.act = place_numbers<P>(m, some * s.ff_cols);
    if constexpr (P::NUMBERS == 1)
        k.saved_qkv = k.qkv;
    else if (backward)
        k.saved_qkv = place_numbers<P>(m, rows * s.qkv_cols);
    if (backward && s.qk_cols) k.qk = place_numbers<P>(m, rows * s.qk_cols);
    return k;
}

// From a row on.
template <class P>
Saved<P> from_row(Saved<P> k, const Shape& s, int64_t row) {
    k.in += row * s.model_cols, k.qkv += row * s.qkv_cols, k.o += row * s.query_cols, k.scores += row * s.score_cols;
    if (k.saved_qkv) k.saved_qkv += row * s.qkv_cols;
    if (k.qk) k.qk += row * s.qk_cols;
    if (k.whole_inputs) k.y1 += row * s.model_cols, k.y2 += row * s.model_cols, k.act += row * s.ff_cols;
    if (k.whole_results) {
        k.z1 += row * s.model_cols, k.mid += row * s.model_cols, k.z2 += row * s.model_cols;
        k.u += row * s.hidden_cols;
    }
    return k;
}

// A layer's keys and values in the cache, in one loop; k is null without a cache.
struct Cached {
    float *k, *v;
    int64_t len;
    const int64_t *before, *positions;

    Cached(const Call& c, int64_t loop, int64_t layer) : k(nullptr), v(nullptr), len(c.cache_len), before(c.before), positions(c.positions) {
        if (!c.cache) return;
        const int64_t size = c.batch * c.n_kv_heads * c.cache_len * c.head_dim;
        k = c.cache + ((loop - 1) % c.cache_loops * c.n_layers + layer) * 2 * size, v = k + size;
    }
    HeadStore of_sample(const Heads& heads, int64_t sample) const {
        const int64_t head = len * heads.head_dim, at = sample * heads.n_kv_heads * head;
        return {k + at, v + at, heads.head_dim, head, heads.head_dim};
    }
};

template <class Memory>
Temporaries place_temporaries(Memory& m, const Shape& s, int64_t rows, bool backward) {
    Temporaries t{};
    t.kv = m.place(rows * s.kv_cols), t.nonfinite = m.place(rows);
    if (!backward) return t;
    t.dz = m.place(rows * s.model_cols), t.dz_mlp = m.place(rows * s.model_cols), t.d_o = m.place(rows * s.query_cols);
    t.d_qkv = m.place(rows * s.qkv_cols), t.du = m.place(rows * s.hidden_cols);
    t.norms = m.place((rows / ROWS_PER_CHUNK + 1) * s.norms * 2 * s.norm_cols);
    return t;
}

// A chunk's own sums of a norm's gradients.
inline NormGrads norm_grads_of_chunk(const Shape& s, const Temporaries& t, int row, int which) {
    float* at = t.norms + (int64_t(row / ROWS_PER_CHUNK) * s.norms + which) * 2 * s.norm_cols;
    return {at, at + s.norm_cols};
}

// What a tile needs.
template <class P>
struct Workspace {
    Saved<P> own[MOST_LAYERS], layers[MOST_LAYERS];  // layers: where the current loop's are
    float *e, *h, *own_u, *u;                        // u: what the last layer left, before the loop norm
    float *own_state, *state;                        // h as the loop found it, where the injection's backward reads it
    float* row_scale;                                // [rows]
    float *next, *dh, *de;                           // next: of h in the forward, of dh in the backward
    Temporaries t;

    template <class Memory>
    Workspace(const Call& c, const Shape& s, const Plan& plan, Memory& m, bool backward) {
        const int64_t rows = plan.most_rows;
        for (int l = 0; l < c.n_layers; l++) own[l] = layers[l] = place_saved<P>(m, s, plan, backward);
        e = m.place(rows * s.model_cols), h = m.place(rows * s.model_cols), own_u = u = m.place(rows * s.model_cols);
        own_state = state = reads_state(c) ? m.place(rows * s.model_cols) : nullptr;
        row_scale = m.place(rows), next = m.place(rows * s.model_cols);
        t = place_temporaries(m, s, rows, backward);
        if (backward) dh = m.place(rows * s.model_cols), de = m.place(rows * s.model_cols);
    }
};

// Floats that a structure takes of memory.
template <class Placed>
int64_t floats_of(const Call& c, const Shape& s, const Plan& plan, bool backward) {
    Counter count;
    Placed(c, s, plan, count, backward);
    return count.floats;
}

// Let ws.layers and ws.u point at what is kept of loop t, from the tile's row `from` on.
template <class P>
void bind(const Call& c, const Shape& s, const Sequences& tile, int64_t t, int64_t from, Workspace<P>& ws) {
    if (!c.kept) return;
    float* at = c.kept + (tile.rows_before * c.most_loops + (t - 1) * tile.rows) * kept_floats(c, P::NUMBERS == 2);
    const auto place = [&](int width) {
        float* piece = at + from * width;
        at += int64_t(tile.rows) * width;
        return piece;
    };
    for (int l = 0; l < c.n_layers; l++) {
        Saved<P>& k = ws.layers[l];
        k = ws.own[l], k.whole_results = true;
        k.in = place(s.model_cols), k.mid = place(s.model_cols);
        k.o = place(s.query_cols), k.scores = place(s.score_cols);
        if (s.placement != PRE) k.z1 = place(s.model_cols), k.z2 = place(s.model_cols);
        auto* numbers = reinterpret_cast<typename P::number*>(at);
        k.saved_qkv = numbers + from * s.qkv_cols, numbers += int64_t(tile.rows) * s.qkv_cols;
        k.u = numbers + from * s.hidden_cols, numbers += int64_t(tile.rows) * s.hidden_cols;
        if (s.qk_cols) k.qk = numbers + from * s.qk_cols;
        if constexpr (P::NUMBERS == 1) k.qkv = k.saved_qkv;
        at += int64_t(tile.rows) * padded((s.qkv_cols + s.hidden_cols + s.qk_cols) / P::NUMBERS);
    }
    ws.u = c.loop_norm ? place(s.model_cols) : ws.own_u;
    if (reads_state(c)) ws.state = place(s.model_cols);
}

}  // namespace
