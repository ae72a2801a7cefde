// The looped block, all T loops in one call, for the instruction set that this file is compiled for.
//
// A tile is a few sequences whose rows together fill the cache, longest-looping first, so that the rows still
// running are always the first ones. A thread takes a tile through all its loops before it takes the next:
// the residual stream and everything a loop computes stay in L2 (about 150 d_model bytes a row), the packed
// weights are read T times from there too. The backward walks the loops down from what the forward kept of
// each (about 40 d_model bytes a row and loop, in bfloat16 24), or from the boundaries alone, computing each
// again. Weight gradients are summed within a slice (a fixed share of the tiles) in order, and over the slices
// in order, each as soon as those before it are: the same bits for any number of threads. All code is there
// twice: matrix products with weights in float32, or with operands rounded to bfloat16 (P in operand.h); what is
// not such a product is float32 in both.
#include <algorithm>
#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "layer.h"
#include "team.h"

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)

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

template <class Memory>
NormWeights take_norm(Memory& m, const Shape& s) {
    const float* gain = m.take(s.dp);
    return {gain, m.take(s.dp)};
}

template <class P, class Memory>
LayerWeights<P> take_weights(Memory& m, const Shape& s, bool backward) {
    const auto take = [&](int k, int n) {
        return reinterpret_cast<const typename P::cell*>(m.take(int64_t(cells_of<P>(k)) * n));
    };
    LayerWeights<P> w{};
    w.qkv = take(s.d, s.qp), w.out = take(s.a, s.dp), w.up = take(s.d, s.up), w.down = take(s.f, s.dp);
    w.qkv_bias = m.take(s.qp), w.out_bias = m.take(s.dp), w.up_bias = m.take(s.up), w.down_bias = m.take(s.dp);
    w.n1 = take_norm(m, s), w.n1_post = take_norm(m, s), w.n2 = take_norm(m, s), w.n2_post = take_norm(m, s);
    if (backward) {
        w.qkv_t = take(s.qkv, s.dp), w.out_t = take(s.d, s.ap);
        w.up_t = take(s.up, s.dp), w.down_t = take(s.d, s.fp);
    }
    return w;
}

template <class Memory>
LayerGrads take_grads(Memory& m, const Shape& s) {
    LayerGrads g;
    g.qkv = m.take(int64_t(s.qp) * s.dp), g.qkv_bias = m.take(s.qp);
    g.out = m.take(int64_t(s.dp) * s.ap), g.out_bias = m.take(s.dp);
    g.up = m.take(int64_t(s.up) * s.dp), g.up_bias = m.take(s.up);
    g.down_t = m.take(int64_t(s.fp) * s.dp), g.down_bias = m.take(s.dp);
    for (NormGrads* n : {&g.n1, &g.n1_post, &g.n2, &g.n2_post}) n->gain = m.take(s.dp), n->shift = m.take(s.dp);
    return g;
}

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

template <class T>
T* mut(const T* p) {  // our own buffers, being filled
    return const_cast<T*>(p);
}

void copy_vector(const float* from, int n, const float* to) {
    if (from) std::memcpy(mut(to), from, n * sizeof(float));
}

void fill_norm(const float* gain, const float* shift, int d, NormWeights w) {
    copy_vector(gain, d, w.gain), copy_vector(shift, d, w.shift);
}

template <class P>
void fill_weights(const Shape& s, const float* const* from, bool backward, LayerWeights<P> w) {
    pack_transposed<P>(from[QKV_W], s.d, s.qkv, s.d, s.qp, mut(w.qkv));
    pack_transposed<P>(from[OUT_W], s.a, s.d, s.a, s.dp, mut(w.out));
    copy_vector(from[QKV_B], s.qkv, w.qkv_bias), copy_vector(from[OUT_B], s.d, w.out_bias);
    fill_norm(from[N1_W], from[N1_B], s.d, w.n1), fill_norm(from[N1P_W], from[N1P_B], s.d, w.n1_post);
    if (backward) {
        pack_rows<P>(from[QKV_W], s.d, s.qkv, s.d, s.dp, s.qkv, mut(w.qkv_t));
        pack_rows<P>(from[OUT_W], s.a, s.d, s.a, s.ap, s.d, mut(w.out_t));
    }
    if (!s.f) return;
    for (int half = 0; half < s.up / s.fp; half++) {  // swiglu: gate, then values
        const float* rows = from[UP_W] + int64_t(half) * s.f * s.d;
        pack_transposed<P>(rows, s.d, s.f, s.d, s.fp, mut(w.up) + int64_t(half) * s.fp * cells_of<P>(s.d));
        if (from[UP_B]) copy_vector(from[UP_B] + half * s.f, s.f, w.up_bias + half * s.fp);
        if (backward)
            pack_rows<P>(rows, s.d, s.f, s.d, s.dp, s.up, mut(w.up_t) + int64_t(half) * cells_of<P>(s.fp) * VL);
    }
    pack_transposed<P>(from[DOWN_W], s.f, s.d, s.f, s.dp, mut(w.down));
    copy_vector(from[DOWN_B], s.d, w.down_bias);
    fill_norm(from[N2_W], from[N2_B], s.d, w.n2), fill_norm(from[N2P_W], from[N2P_B], s.d, w.n2_post);
    if (backward) pack_rows<P>(from[DOWN_W], s.f, s.d, s.f, s.fp, s.d, mut(w.down_t));
}

template <class P>
struct Model {
    Shape shape;
    LayerWeights<P> layers[MOST_LAYERS];
    NormWeights loop_norm;

    template <class Memory>
    Model(const Call& c, Memory& m, bool backward) : shape(c) {
        for (int l = 0; l < c.n_layers; l++) layers[l] = take_weights<P>(m, shape, backward);
        loop_norm = take_norm(m, shape);
    }
    void fill(const Call& c, bool backward) {
        for (int l = 0; l < c.n_layers; l++) fill_weights<P>(shape, c.weights + l * WEIGHTS, backward, layers[l]);
        const float* const* last = c.weights + c.n_layers * WEIGHTS;
        if (c.loop_norm) fill_norm(last[0], last[1], shape.d, loop_norm);
    }
};

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

void copy_columns(int n, int columns, const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    for (int i = 0; i < n; i++) std::memcpy(to + i * ld_to, from + i * ld_from, columns * sizeof(float));
}

// The sequences of one tile, in the order they finish in, last first.
struct Tile {
    const Call& c;
    int dp, count, rows;
    const int64_t* samples;
    int* lengths;
    int* starts;  // [count + 1] first row of each
    int64_t rows_before;  // in the tiles before this one

    Tile(const Call& call, const Plan& plan, int64_t index, int* room) : c(call), dp(padded(call.d_model)) {
        samples = plan.order + plan.tiles[index];
        count = plan.tiles[index + 1] - plan.tiles[index];
        rows_before = plan.rows_before[index];
        lengths = room, starts = room + count;
        rows = 0;
        for (int i = 0; i < count; i++) {
            starts[i] = rows;
            lengths[i] = c.lengths[samples[i]];
            rows += lengths[i];
        }
        starts[count] = rows;
    }
    int64_t loops(int i) const { return c.loops[samples[i]]; }
    int running(int64_t t) const {  // how many samples run loop t: the first ones
        int n = 0;
        while (n < count && loops(n) >= t) n++;
        return n;
    }
    int truncated(int64_t t) const {  // how many of them do so without gradient: again the first ones
        int n = 0;
        if (c.n_grad_loops)
            while (n < count && loops(n) - c.n_grad_loops >= t) n++;
        return n;
    }
    const float* at(const float* x, int i) const { return x + samples[i] * c.seq_len * c.d_model; }
    float* at(float* x, int i) const { return x + samples[i] * c.seq_len * c.d_model; }

    void gather(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++)
            copy_columns(lengths[i], c.d_model, at(from, i), c.d_model, to + int64_t(starts[i]) * dp, dp);
    }
    void gather_add(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++) {
            const float* x = at(from, i);
            for (int r = starts[i]; r < starts[i + 1]; r++, x += c.d_model)
                for (int j = 0; j < c.d_model; j++) to[int64_t(r) * dp + j] += x[j];
        }
    }
    void scatter(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++)
            copy_columns(lengths[i], c.d_model, from + int64_t(starts[i]) * dp, dp, at(to, i), c.d_model);
    }
};

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

// One loop on `rows` rows of h (and e): from h_{t-1} to h_t in `out`.
template <class P>
void one_loop(const Call& c, const Model<P>& m, Workspace<P>& ws, Rows seqs, int rows, const float* h, const float* e,
              float* out) {
    const Shape& s = m.shape;
    const int64_t n = int64_t(rows) * s.dp;
    if (c.injection)
        axpy(n, 1.0f, e, h, ws.layers[0].in);
    else
        std::memcpy(ws.layers[0].in, h, n * sizeof(float));
    for (int l = 0; l < c.n_layers; l++) {
        float* next = l + 1 < c.n_layers ? ws.layers[l + 1].in : c.loop_norm ? ws.u : out;
        layer_forward<P>(s, m.layers[l], c.rotary, seqs, rows, ws.layers[l], next, ws.room);
    }
    if (c.loop_norm) norm(s.norm_kind, rows, s.d, ws.u, m.loop_norm, s.eps, out);
}

// Whether rms(new - old) < threshold * rms(old).
bool settled(const float* before, const float* after, int64_t n, double threshold) {
    double change = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        const double step = double(after[i]) - before[i];
        change += step * step, size += double(before[i]) * before[i];
    }
    return std::sqrt(change) < threshold * std::sqrt(size);
}

template <class P>
void forward_tile(const Call& c, const Model<P>& m, const Tile& tile, Workspace<P>& ws, Team& team) {
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    tile.gather(c.e, 0, tile.count, ws.e);
    if (c.injection)
        std::memset(ws.h, 0, all * sizeof(float));
    else
        std::memcpy(ws.h, ws.e, all * sizeof(float));
    bool halted = false;
    for (int i = 0; i < tile.count; i++) c.used[tile.samples[i]] = tile.loops(i);
    for (int64_t t = 1; t <= c.most_loops; t++) {
        const int running = halted ? 0 : tile.running(t), rows = tile.starts[running];
        if (!running && !c.return_all) break;
        if (team.stopped()) return;
        if (running) {
            if (c.boundaries) tile.scatter(ws.h, 0, running, c.boundaries + (t - 1) * size);
            bind(c, m.shape, tile, t, 0, ws);
            float* after = c.halting ? ws.layers[0].z2 : ws.h;  // z2 is free once its loop is over
            one_loop(c, m, ws, {running, tile.lengths}, rows, ws.h, ws.e, after);
            if (c.halting) {  // then a tile is one sequence
                halted = settled(ws.h, after, int64_t(rows) * tile.dp, c.halt_threshold);
                if (halted) c.used[tile.samples[0]] = t;
                std::memcpy(ws.h, after, int64_t(rows) * tile.dp * sizeof(float));
            }
        }
        if (c.return_all) tile.scatter(ws.h, 0, tile.count, c.out + (t - 1) * size);
    }
    if (!c.return_all) tile.scatter(ws.h, 0, tile.count, c.out);
}

template <class P>
void backward_tile(const Call& c, const Model<P>& m, const Tile& tile, Workspace<P>& ws, LayerGrads* grads,
                   NormGrads loop_norm_grads, Team& team) {
    const Shape& s = m.shape;
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    std::memset(ws.dh, 0, all * sizeof(float));
    std::memset(ws.de, 0, all * sizeof(float));
    tile.gather(c.e, 0, tile.count, ws.e);
    // A finished sample repeats its last state, so every later output's gradient is that state's.
    if (!c.return_all) tile.gather_add(c.grad_out, 0, tile.count, ws.dh);
    for (int64_t t = c.return_all ? c.most_loops : tile.count ? tile.loops(0) : 0; t >= 1; t--) {
        if (team.stopped()) return;
        if (c.return_all) tile.gather_add(c.grad_out + (t - 1) * size, 0, tile.count, ws.dh);
        const int begin = tile.truncated(t), end = tile.running(t);
        if (begin >= end) continue;
        const int rows = tile.starts[end] - tile.starts[begin];
        const int64_t from = int64_t(tile.starts[begin]) * tile.dp, n = int64_t(rows) * tile.dp;
        const Rows seqs = {end - begin, tile.lengths + begin};
        if (c.kept) {
            bind(c, s, tile, t, tile.starts[begin], ws);
        } else {
            tile.gather(c.boundaries + (t - 1) * size, begin, end, ws.h);
            one_loop(c, m, ws, seqs, rows, ws.h + from, ws.e + from, ws.dx);
        }
        if (c.loop_norm)
            norm_backward(s.norm_kind, rows, s.d, ws.u, ws.dh + from, m.loop_norm, s.eps, loop_norm_grads, ws.dx,
                          false);
        else
            std::memcpy(ws.dx, ws.dh + from, n * sizeof(float));
        for (int l = c.n_layers - 1; l >= 0; l--)
            layer_backward<P>(s, m.layers[l], c.rotary, seqs, rows, ws.layers[l], grads[l], ws.t, ws.dx, ws.room);
        std::memcpy(ws.dh + from, ws.dx, n * sizeof(float));
        if (c.injection) axpy(n, 1.0f, ws.dx, ws.de + from, ws.de + from);
    }
    // Without injection e is h_0: reached where no loop was cut off.
    const int cut = tile.truncated(1);
    tile.scatter(c.injection ? ws.de : ws.dh, c.injection ? 0 : cut, tile.count, c.grad_e);
}

void add_padded(const float* from, int outs, int ins, int ld, float* to) {
    if (!to) return;
    for (int i = 0; i < outs; i++)
        for (int j = 0; j < ins; j++) to[int64_t(i) * ins + j] += from[int64_t(i) * ld + j];
}

void add_layer_grads(const Shape& s, const LayerGrads& g, float* const* to) {
    add_padded(g.qkv, s.qkv, s.d, s.dp, to[QKV_W]), add_padded(g.qkv_bias, 1, s.qkv, s.qp, to[QKV_B]);
    add_padded(g.out, s.d, s.a, s.ap, to[OUT_W]), add_padded(g.out_bias, 1, s.d, s.dp, to[OUT_B]);
    for (int i = 0; s.f && i < up_rows(s); i++) {
        add_padded(g.up + int64_t(up_row(s, i)) * s.dp, 1, s.d, s.dp, to[UP_W] + int64_t(i) * s.d);
        if (to[UP_B]) to[UP_B][i] += g.up_bias[up_row(s, i)];
    }
    for (int i = 0; i < s.d; i++)
        for (int j = 0; j < s.f; j++) to[DOWN_W][int64_t(i) * s.f + j] += g.down_t[int64_t(j) * s.dp + i];
    add_padded(g.down_bias, 1, s.d, s.dp, to[DOWN_B]);
    const NormGrads norms[] = {g.n1, g.n1_post, g.n2, g.n2_post};
    const int names[] = {N1_W, N1P_W, N2_W, N2P_W};
    for (int i = 0; i < 4; i++) {
        add_padded(norms[i].gain, 1, s.d, s.dp, to[names[i]]);
        add_padded(norms[i].shift, 1, s.d, s.dp, to[names[i] + 1]);
    }
}

struct SliceGrads {
    LayerGrads layers[MOST_LAYERS];
    NormGrads loop_norm;
    template <class Memory>
    SliceGrads(const Call& c, const Shape& s, Memory& m) {
        for (int l = 0; l < c.n_layers; l++) layers[l] = take_grads(m, s);
        loop_norm = {m.take(s.dp), m.take(s.dp)};
    }
};

template <class P>
int64_t workspace_floats(const Call& c, const Shape& s, int64_t rows, bool backward) {
    Counter count;
    Workspace<P>(c, s, rows, count, backward);
    return count.floats;
}

int team_size() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Both return 0, or 1 where memory ran out.
template <class P>
int forward(const Call& c, const Plan* plan, Team& team) {
    Counter count;
    Model<P>(c, count, false);
    Arena weights(count.floats);
    if (!weights.ok()) return 1;
    Model<P> model(c, weights, false);
    model.fill(c, false);
    const int64_t floats = workspace_floats<P>(c, model.shape, plan->most_rows, false);
    int failed = 0;
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1) reduction(| : failed)
    {
        Arena memory(floats), room(2 * plan->most_samples + 1);
        failed |= !memory.ok() || !room.ok();
        if (memory.ok() && room.ok()) {
            Workspace<P> ws(c, model.shape, plan->most_rows, memory, false);
            int* tile_room = reinterpret_cast<int*>(room.take(0));
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < plan->n_tiles; i++)
                forward_tile(c, model, Tile(c, *plan, i, tile_room), ws, team);
        }
        team.leave(team_size());
    }
    return failed;
}

template <class P>
int backward(const Call& c, const Plan* plan, Team& team) {
    Counter count;
    Model<P>(c, count, true);
    Arena weights(count.floats);
    if (!weights.ok()) return 1;
    Model<P> model(c, weights, true);
    model.fill(c, true);
    const Shape& s = model.shape;
    Counter per_slice;
    SliceGrads(c, s, per_slice);
    const int64_t slices = plan->n_slices, floats = workspace_floats<P>(c, s, plan->most_rows, true);
    Arena sums(per_slice.floats);
    if (!sums.ok()) return 1;
    float* total = sums.take(0);
    int failed = 0;
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1) reduction(| : failed)
    {
        Arena memory(floats), room(2 * plan->most_samples + 1), gradients(per_slice.floats, false);
        const bool ok = memory.ok() && room.ok() && gradients.ok();
        failed |= !ok;
        Workspace<P> ws(c, s, plan->most_rows, memory, true);
        Cursor cursor{gradients.take(0)};
        float* const slice_total = cursor.at;
        SliceGrads grads(c, s, cursor);
        int* tile_room = reinterpret_cast<int*>(room.take(0));
#pragma omp for schedule(monotonic : dynamic, 1) nowait
        for (int64_t slice = 0; slice < slices; slice++) {
            if (ok) std::memset(slice_total, 0, per_slice.floats * sizeof(float));
            for (int64_t i = slice; ok && i < plan->n_tiles; i += slices)
                backward_tile(c, model, Tile(c, *plan, i, tile_room), ws, grads.layers, grads.loop_norm, team);
            team.begin_turn(slice);
            for (int64_t i = 0; ok && i < per_slice.floats; i += VL)
                store(total + i, load(total + i) + load(slice_total + i));
            team.end_turn();
        }
        team.leave(team_size());
    }
    if (failed) return 1;
    Cursor cursor{total};
    const SliceGrads grads(c, s, cursor);
    for (int l = 0; l < c.n_layers; l++) add_layer_grads(s, grads.layers[l], c.grad_weights + l * WEIGHTS);
    float* const* last = c.grad_weights + c.n_layers * WEIGHTS;
    add_padded(grads.loop_norm.gain, 1, s.d, s.dp, last[0]);
    add_padded(grads.loop_norm.shift, 1, s.d, s.dp, last[1]);
    return 0;
}

}  // namespace

extern "C" {
int JOIN(shift_forward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? forward<BF16>(*call, plan, *team) : forward<F32>(*call, plan, *team);
}

int JOIN(shift_backward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? backward<BF16>(*call, plan, *team) : backward<F32>(*call, plan, *team);
}
}
