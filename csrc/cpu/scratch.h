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
    float* take(int64_t floats) {
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
    float* take(int64_t floats) {
        float* piece = at;
        at += Arena::size(floats);
        return piece;
    }
};

struct Counter {  // as Arena, but only adds up what would be taken
    int64_t floats = 0;
    float* take(int64_t n) {
        floats += Arena::size(n);
        return nullptr;
    }
};

// Of one layer, [rows, width]: y1, y2 normed inputs, z1, z2 branch outputs (with post-norm: the sums). The
// backward computes y1, y2 and act again, for they are cheap. What only products read again is rounded as their
// operands are; attention works on qkv and o as they are: in single precision the same memory as what is kept.
template <class P>
struct Kept {
    typedef typename P::number Number;
    float *in, *y1, *qkv, *o, *z1, *mid, *y2, *z2;
    Number *kept_qkv, *kept_o, *u, *act;
};

// Room for products' operands and for attention, of one thread.
template <class P>
struct Room {
    typename P::number* rows;
    typename P::cell *columns, *panels;
    float* attention;
};

struct Temporaries {  // [rows, width] each
    float *dz, *dy, *d_o, *d_qkv, *du;
};

// Memory for n numbers as the operands of products are.
template <class P, class Memory>
typename P::number* take_numbers(Memory& m, int64_t n) {
    return reinterpret_cast<typename P::number*>(m.take(n / P::NUMBERS));
}

template <class P, class Memory>
Kept<P> take_kept(Memory& m, const Shape& s, int64_t rows, bool backward) {
    Kept<P> k{};
    k.in = m.take(rows * s.dp), k.y1 = m.take(rows * s.dp), k.qkv = m.take(rows * s.qp), k.o = m.take(rows * s.ap);
    k.z1 = m.take(rows * s.dp), k.mid = m.take(rows * s.dp), k.y2 = m.take(rows * s.dp), k.z2 = m.take(rows * s.dp);
    k.u = take_numbers<P>(m, rows * s.up), k.act = take_numbers<P>(m, rows * s.fp);
    if constexpr (P::NUMBERS == 1) {
        k.kept_qkv = k.qkv, k.kept_o = k.o;
    } else {
        if (backward) k.kept_qkv = take_numbers<P>(m, rows * s.qp);
        k.kept_o = take_numbers<P>(m, rows * s.ap);
    }
    return k;
}

template <class Memory>
Temporaries take_temporaries(Memory& m, const Shape& s, int64_t rows) {
    return {m.take(rows * s.dp), m.take(rows * s.dp), m.take(rows * s.ap), m.take(rows * s.qp), m.take(rows * s.up)};
}

// What one thread needs for the largest tile.
template <class P>
struct Workspace {
    Kept<P> own[MOST_LAYERS], layers[MOST_LAYERS];  // layers: where the current loop's are
    float *e, *h, *own_u, *u;                    // u: what the last layer left, before the loop norm
    Room<P> room;
    Temporaries t;
    float *dh, *de, *dx;

    template <class Memory>
    Workspace(const Call& c, const Shape& s, int64_t rows, Memory& m, bool backward) {
        for (int l = 0; l < c.n_layers; l++) own[l] = layers[l] = take_kept<P>(m, s, rows, backward);
        e = m.take(rows * s.dp), h = m.take(rows * s.dp), own_u = u = m.take(rows * s.dp);
        const int64_t n = c.seq_len, np = padded(n);
        const int64_t widest = std::max({s.dp, s.qp, s.ap, s.fp, s.up});
        room.rows = take_numbers<P>(m, rows * widest);
        if (backward) {
            const auto take = [&](int64_t n) { return reinterpret_cast<typename P::cell*>(m.take(n)); };
            const int64_t k = cells_of<P>(rows);
            room.columns = take(k * VL), room.panels = take(k * std::max(s.dp, s.ap));
        }
        room.attention = m.take(16 * (c.head_dim + n) + (backward ? 2 * n * np : 0));  // 16: the widest vector
        if (backward) {
            t = take_temporaries(m, s, rows);
            dh = m.take(rows * s.dp), de = m.take(rows * s.dp), dx = m.take(rows * s.dp);
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
void bind(const Call& c, const Shape& s, const Tile& tile, int64_t t, int64_t from, Workspace<P>& ws) {
    if (!c.kept) return;
    float* at = c.kept + (tile.rows_before * c.most_loops + (t - 1) * tile.rows) * kept_floats(c, P::NUMBERS == 2);
    const auto take = [&](int width) {
        float* piece = at + from * width;
        at += int64_t(tile.rows) * width;
        return piece;
    };
    for (int l = 0; l < c.n_layers; l++) {
        Kept<P>& k = ws.layers[l];
        k = ws.own[l];
        k.in = take(s.dp), k.mid = take(s.dp);
        if (s.placement != PRE) k.z1 = take(s.dp), k.z2 = take(s.dp);
        auto* numbers = reinterpret_cast<typename P::number*>(at);
        k.kept_qkv = numbers + from * s.qp, numbers += int64_t(tile.rows) * s.qp;
        k.kept_o = numbers + from * s.ap, numbers += int64_t(tile.rows) * s.ap;
        k.u = numbers + from * s.up;
        if constexpr (P::NUMBERS == 1) k.qkv = k.kept_qkv, k.o = k.kept_o;
        at += int64_t(tile.rows) * padded((s.qp + s.ap + s.up) / P::NUMBERS);
    }
    ws.u = c.loop_norm ? take(s.dp) : ws.own_u;
}

}  // namespace
