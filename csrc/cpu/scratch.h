// Memory: one allocation a thread, cut into the buffers of its largest tile; and what is kept for the backward.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "sequences.h"
#include "weights.h"

namespace {

// One allocation cut into pieces, each on a cache line and with slack that vector loads may touch.
class Arena {
  public:
    explicit Arena(int64_t floats, bool zeroed = true)
        : base_(static_cast<float*>(std::aligned_alloc(64, bytes(floats)))), at_(base_) {
        if (base_ && zeroed) std::memset(base_, 0, bytes(floats));
    }
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
    static size_t bytes(int64_t floats) { return (floats + 16) / 16 * 64; }
    float *base_, *at_;
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
// operands are; attention works on qkv and o as they are: in single precision the same memory as what is kept.
template <class P>
struct Saved {
    typedef typename P::number Number;
    float *in, *y1, *qkv, *o, *z1, *mid, *y2, *z2;
    Number *saved_qkv, *saved_o, *u, *act;
};

// OperandScratch for products' operands and for attention, of one thread.
template <class P>
struct OperandScratch {
    typename P::number* rows;
    typename P::cell *columns, *panels;
    float* attention;
};

struct Temporaries {  // [rows, width] each
    float *dz, *dy, *d_o, *d_qkv, *du;
};

// Memory for n numbers as the operands of products are.
template <class P, class Memory>
typename P::number* place_numbers(Memory& m, int64_t n) {
    return reinterpret_cast<typename P::number*>(m.place(n / P::NUMBERS));
}

template <class P, class Memory>
Saved<P> place_saved(Memory& m, const Shape& s, int64_t rows, bool backward) {
    Saved<P> k{};
    k.in = m.place(rows * s.model_cols), k.y1 = m.place(rows * s.model_cols), k.qkv = m.place(rows * s.qkv_cols);
    k.o = m.place(rows * s.query_cols);
    k.z1 = m.place(rows * s.model_cols), k.mid = m.place(rows * s.model_cols), k.y2 = m.place(rows * s.model_cols);
    k.z2 = m.place(rows * s.model_cols);
    k.u = place_numbers<P>(m, rows * s.hidden_cols), k.act = place_numbers<P>(m, rows * s.ff_cols);
    if constexpr (P::NUMBERS == 1) {
        k.saved_qkv = k.qkv, k.saved_o = k.o;
    } else {
        if (backward) k.saved_qkv = place_numbers<P>(m, rows * s.qkv_cols);
        k.saved_o = place_numbers<P>(m, rows * s.query_cols);
    }
    return k;
}

template <class Memory>
Temporaries place_temporaries(Memory& m, const Shape& s, int64_t rows) {
    return {m.place(rows * s.model_cols), m.place(rows * s.model_cols), m.place(rows * s.query_cols),
            m.place(rows * s.qkv_cols), m.place(rows * s.hidden_cols)};
}

// What one thread needs for the largest tile.
template <class P>
struct Workspace {
    Saved<P> own[MOST_LAYERS], layers[MOST_LAYERS];  // layers: where the current loop's are
    float *e, *h, *own_u, *u;                    // u: what the last layer left, before the loop norm
    float *own_state, *state;                    // h as the loop found it, where the injection's backward reads it
    float* row_scale;                            // [rows]
    OperandScratch<P> scratch;
    Temporaries t;
    float *dh, *de, *dx;

    template <class Memory>
    Workspace(const Call& c, const Shape& s, int64_t rows, Memory& m, bool backward) {
        for (int l = 0; l < c.n_layers; l++) own[l] = layers[l] = place_saved<P>(m, s, rows, backward);
        e = m.place(rows * s.model_cols), h = m.place(rows * s.model_cols), own_u = u = m.place(rows * s.model_cols);
        own_state = state = reads_state(c) ? m.place(rows * s.model_cols) : nullptr;
        row_scale = m.place(rows);
        const int64_t n = c.seq_len, np = padded(n);
        const int64_t widest = std::max({s.model_cols, s.qkv_cols, s.query_cols, s.ff_cols, s.hidden_cols});
        scratch.rows = place_numbers<P>(m, rows * widest);
        if (backward) {
            const auto place = [&](int64_t n) { return reinterpret_cast<typename P::cell*>(m.place(n)); };
            const int64_t k = cells_of<P>(rows);
            scratch.columns = place(k * VL), scratch.panels = place(k * std::max(s.model_cols, s.query_cols));
        }
        scratch.attention = m.place(16 * (c.head_dim + n) + (backward ? 2 * n * np : 0));  // 16: the widest vector
        if (backward) {
            t = place_temporaries(m, s, rows);
            dh = m.place(rows * s.model_cols), de = m.place(rows * s.model_cols), dx = m.place(rows * s.model_cols);
        }
    }
};

template <class P>
int64_t workspace_floats(const Call& c, const Shape& s, int64_t rows, bool backward) {
    Counter count;
    Workspace<P>(c, s, rows, count, backward);
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
        k = ws.own[l];
        k.in = place(s.model_cols), k.mid = place(s.model_cols);
        if (s.placement != PRE) k.z1 = place(s.model_cols), k.z2 = place(s.model_cols);
        auto* numbers = reinterpret_cast<typename P::number*>(at);
        k.saved_qkv = numbers + from * s.qkv_cols, numbers += int64_t(tile.rows) * s.qkv_cols;
        k.saved_o = numbers + from * s.query_cols, numbers += int64_t(tile.rows) * s.query_cols;
        k.u = numbers + from * s.hidden_cols;
        if constexpr (P::NUMBERS == 1) k.qkv = k.saved_qkv, k.o = k.saved_o;
        at += int64_t(tile.rows) * padded((s.qkv_cols + s.query_cols + s.hidden_cols) / P::NUMBERS);
    }
    ws.u = c.loop_norm ? place(s.model_cols) : ws.own_u;
    if (reads_state(c)) ws.state = place(s.model_cols);
}

}  // namespace
