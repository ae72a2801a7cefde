// A block's weights as the products read them, packed once a call, and their gradients.
#pragma once
#include "call.h"
#include "ops/attention.h"
#include "ops/norm.h"

namespace {

struct Shape {  // widths; `cols` are padded to whole vectors, and the leading dimensions of buffers
    int d_model, qkv, query, d_ff;
    int model_cols, qkv_cols, query_cols, ff_cols;
    int hidden_cols;  // of the first MLP map: with swiglu, gate and values are padded apart
    int activation, norm_kind, placement, seq_len;
    bool rope;
    float eps, scale;
    Heads heads;

    explicit Shape(const Call& c)
        : d_model(c.d_model), qkv(qkv_columns(c)), query(query_columns(c)), d_ff(c.d_ff), model_cols(padded(d_model)),
          qkv_cols(padded(qkv)), query_cols(padded(query)), ff_cols(padded(d_ff)),
          hidden_cols(hidden_parts(c) * ff_cols), activation(c.activation), norm_kind(c.norm), placement(c.placement),
          seq_len(c.seq_len), rope(c.position == ROPE), eps(c.eps), scale(c.residual_scale),
          heads{int(c.n_heads), int(c.n_kv_heads), int(c.head_dim), c.causal != 0, qkv_cols, query_cols} {}
};

// Rows of the caller's up-projection in ours: gate and values are padded apart.
inline int up_row(const Shape& s, int i) { return i < s.d_ff ? i : s.ff_cols + i - s.d_ff; }
inline int up_rows(const Shape& s) { return s.activation == SWIGLU ? 2 * s.d_ff : s.d_ff; }

template <class P>
struct LayerWeights {
    typedef const typename P::cell* Panels;
    Panels qkv, out, up, down;          // packed for x W^T
    Panels qkv_t, out_t, up_t, down_t;  // packed for dy W; backward only
    const float *qkv_bias, *out_bias, *up_bias, *down_bias;
    NormWeights n1, n1_post, n2, n2_post;
};

struct LayerGrads {  // row-major, padded
    float *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down_t, *down_bias;  // down_t: [inputs, outputs]
    NormGrads n1, n1_post, n2, n2_post;
};

template <class Memory>
NormWeights place_norm(Memory& m, const Shape& s) {
    const float* gain = m.place(s.model_cols);
    return {gain, m.place(s.model_cols)};
}

template <class P, class Memory>
LayerWeights<P> place_weights(Memory& m, const Shape& s, bool backward) {
    const auto place = [&](int k, int n) {
        return reinterpret_cast<const typename P::cell*>(m.place(int64_t(cells_of<P>(k)) * n));
    };
    LayerWeights<P> w{};
    w.qkv = place(s.d_model, s.qkv_cols), w.out = place(s.query, s.model_cols);
    w.up = place(s.d_model, s.hidden_cols), w.down = place(s.d_ff, s.model_cols);
    w.qkv_bias = m.place(s.qkv_cols), w.out_bias = m.place(s.model_cols);
    w.up_bias = m.place(s.hidden_cols), w.down_bias = m.place(s.model_cols);
    w.n1 = place_norm(m, s), w.n1_post = place_norm(m, s), w.n2 = place_norm(m, s), w.n2_post = place_norm(m, s);
    if (backward) {
        w.qkv_t = place(s.qkv, s.model_cols), w.out_t = place(s.d_model, s.query_cols);
        w.up_t = place(s.hidden_cols, s.model_cols), w.down_t = place(s.d_model, s.ff_cols);
    }
    return w;
}

template <class Memory>
LayerGrads place_grads(Memory& m, const Shape& s) {
    LayerGrads g;
    g.qkv = m.place(int64_t(s.qkv_cols) * s.model_cols), g.qkv_bias = m.place(s.qkv_cols);
    g.out = m.place(int64_t(s.model_cols) * s.query_cols), g.out_bias = m.place(s.model_cols);
    g.up = m.place(int64_t(s.hidden_cols) * s.model_cols), g.up_bias = m.place(s.hidden_cols);
    g.down_t = m.place(int64_t(s.ff_cols) * s.model_cols), g.down_bias = m.place(s.model_cols);
    for (NormGrads* n : {&g.n1, &g.n1_post, &g.n2, &g.n2_post})
        n->gain = m.place(s.model_cols), n->shift = m.place(s.model_cols);
    return g;
}

template <class T>
T* writable(const T* p) {  // our own buffers, being filled
    return const_cast<T*>(p);
}

void copy_vector(const float* from, int n, const float* to) {
    if (from) std::memcpy(writable(to), from, n * sizeof(float));
}

void fill_norm(const float* gain, const float* shift, int d, NormWeights w) {
    copy_vector(gain, d, w.gain), copy_vector(shift, d, w.shift);
}

template <class P>
void fill_weights(const Shape& s, const float* const* from, bool backward, LayerWeights<P> w) {
    pack_transposed<P>(from[QKV_W], s.d_model, s.qkv, s.d_model, s.qkv_cols, writable(w.qkv));
    pack_transposed<P>(from[OUT_W], s.query, s.d_model, s.query, s.model_cols, writable(w.out));
    copy_vector(from[QKV_B], s.qkv, w.qkv_bias), copy_vector(from[OUT_B], s.d_model, w.out_bias);
    fill_norm(from[N1_W], from[N1_B], s.d_model, w.n1), fill_norm(from[N1P_W], from[N1P_B], s.d_model, w.n1_post);
    if (backward) {
        pack_rows<P>(from[QKV_W], s.d_model, s.qkv, s.d_model, s.model_cols, s.qkv, writable(w.qkv_t));
        pack_rows<P>(from[OUT_W], s.query, s.d_model, s.query, s.query_cols, s.d_model, writable(w.out_t));
    }
    if (!s.d_ff) return;
    for (int half = 0; half < s.hidden_cols / s.ff_cols; half++) {  // swiglu: gate, then values
        const float* rows = from[UP_W] + int64_t(half) * s.d_ff * s.d_model;
        pack_transposed<P>(rows, s.d_model, s.d_ff, s.d_model, s.ff_cols,
                           writable(w.up) + int64_t(half) * s.ff_cols * cells_of<P>(s.d_model));
        if (from[UP_B]) copy_vector(from[UP_B] + half * s.d_ff, s.d_ff, w.up_bias + half * s.ff_cols);
        if (backward)
            pack_rows<P>(rows, s.d_model, s.d_ff, s.d_model, s.model_cols, s.hidden_cols,
                         writable(w.up_t) + int64_t(half) * cells_of<P>(s.ff_cols) * VL);
    }
    pack_transposed<P>(from[DOWN_W], s.d_ff, s.d_model, s.d_ff, s.model_cols, writable(w.down));
    copy_vector(from[DOWN_B], s.d_model, w.down_bias);
    fill_norm(from[N2_W], from[N2_B], s.d_model, w.n2), fill_norm(from[N2P_W], from[N2P_B], s.d_model, w.n2_post);
    if (backward) pack_rows<P>(from[DOWN_W], s.d_ff, s.d_model, s.d_ff, s.ff_cols, s.d_model, writable(w.down_t));
}

template <class P>
struct Model {
    Shape shape;
    LayerWeights<P> layers[MOST_LAYERS];
    NormWeights loop_norm;

    template <class Memory>
    Model(const Call& c, Memory& m, bool backward) : shape(c) {
        for (int l = 0; l < c.n_layers; l++) layers[l] = place_weights<P>(m, shape, backward);
        loop_norm = place_norm(m, shape);
    }
    void fill(const Call& c, bool backward) {
        for (int l = 0; l < c.n_layers; l++) fill_weights<P>(shape, c.weights + l * WEIGHTS, backward, layers[l]);
        const float* const* last = c.weights + c.n_layers * WEIGHTS;
        if (c.loop_norm) fill_norm(last[0], last[1], shape.d_model, loop_norm);
    }
};

void add_padded(const float* from, int outs, int ins, int ld, float* to) {
    if (!to) return;
    for (int i = 0; i < outs; i++)
        for (int j = 0; j < ins; j++) to[int64_t(i) * ins + j] += from[int64_t(i) * ld + j];
}

void add_layer_grads(const Shape& s, const LayerGrads& g, float* const* to) {
    add_padded(g.qkv, s.qkv, s.d_model, s.model_cols, to[QKV_W]);
    add_padded(g.qkv_bias, 1, s.qkv, s.qkv_cols, to[QKV_B]);
    add_padded(g.out, s.d_model, s.query, s.query_cols, to[OUT_W]);
    add_padded(g.out_bias, 1, s.d_model, s.model_cols, to[OUT_B]);
    for (int i = 0; s.d_ff && i < up_rows(s); i++) {
        add_padded(g.up + int64_t(up_row(s, i)) * s.model_cols, 1, s.d_model, s.model_cols,
                   to[UP_W] + int64_t(i) * s.d_model);
        if (to[UP_B]) to[UP_B][i] += g.up_bias[up_row(s, i)];
    }
    for (int i = 0; i < s.d_model; i++)
        for (int j = 0; j < s.d_ff; j++) to[DOWN_W][int64_t(i) * s.d_ff + j] += g.down_t[int64_t(j) * s.model_cols + i];
    add_padded(g.down_bias, 1, s.d_model, s.model_cols, to[DOWN_B]);
    const NormGrads norms[] = {g.n1, g.n1_post, g.n2, g.n2_post};
    const int names[] = {N1_W, N1P_W, N2_W, N2P_W};
    for (int i = 0; i < 4; i++) {
        add_padded(norms[i].gain, 1, s.d_model, s.model_cols, to[names[i]]);
        add_padded(norms[i].shift, 1, s.d_model, s.model_cols, to[names[i] + 1]);
    }
}

struct SliceGrads {
    LayerGrads layers[MOST_LAYERS];
    NormGrads loop_norm;
    template <class Memory>
    SliceGrads(const Call& c, const Shape& s, Memory& m) {
        for (int l = 0; l < c.n_layers; l++) layers[l] = place_grads(m, s);
        loop_norm = {m.place(s.model_cols), m.place(s.model_cols)};
    }
};

}  // namespace
