// A block's weights as the products read them, packed once a call, and their gradients.
#pragma once
#include "call.h"
#include "ops/attention.h"
#include "ops/norm.h"

namespace {

struct Shape {
    int d, dp, qkv, qp, a, ap, f, fp, up;  // widths and their padded forms; up: columns of the first MLP map
    int activation, norm_kind, placement, seq_len;
    bool rope;
    float eps, scale;
    Heads heads;

    explicit Shape(const Call& c) {
        d = c.d_model, dp = padded(d);
        qkv = qkv_columns(c), qp = padded(qkv);
        a = query_columns(c), ap = padded(a);
        f = c.d_ff, fp = padded(f), up = hidden_parts(c) * fp;
        activation = c.activation, norm_kind = c.norm, placement = c.placement;
        seq_len = c.seq_len, rope = c.position == ROPE, eps = c.eps, scale = c.residual_scale;
        heads = {int(c.n_heads), int(c.n_kv_heads), int(c.head_dim), c.causal != 0, qp, ap};
    }
};

// Rows of the caller's up-projection in ours: gate and values are padded apart.
inline int up_row(const Shape& s, int i) { return i < s.f ? i : s.fp + i - s.f; }
inline int up_rows(const Shape& s) { return s.activation == SWIGLU ? 2 * s.f : s.f; }

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

}  // namespace
