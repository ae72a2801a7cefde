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
    int activation, norm_kind, placement, norm_factor, injection, rotary_rows;
    bool rope;
    float eps;
    int score_cols, kv_cols;  // what is kept of the heads' scores; keys and values with each head padded
    int qk_cols;              // of queries and keys as they were before their norm; 0 without one
    int norms, norm_cols;     // of a layer, and columns of the widest
    Heads heads;
    Scoring scoring;

    bool norms_sum() const { return placement == POST || placement == SANDWICH_POST; }

    explicit Shape(const Call& c)
        : d_model(c.d_model), qkv(qkv_columns(c)), query(query_columns(c)), d_ff(c.d_ff), model_cols(padded(d_model)),
          qkv_cols(padded(qkv)), query_cols(padded(query)), ff_cols(padded(d_ff)),
          hidden_cols(hidden_parts(c) * ff_cols), activation(c.activation), norm_kind(c.norm), placement(c.placement),
          norm_factor(c.norm_factor), injection(c.injection), rotary_rows(c.rotary_rows), rope(c.position == ROPE), eps(c.eps),
          score_cols(padded(KEPT_OF_SCORES * c.n_heads)), kv_cols(2 * c.n_kv_heads * padded(c.head_dim)),
          qk_cols(c.qk_norm ? padded((c.n_heads + c.n_kv_heads) * c.head_dim) : 0), norms(c.qk_norm ? 6 : 4),
          norm_cols(c.qk_norm ? std::max(model_cols, padded(c.head_dim)) : model_cols),
          heads{int(c.n_heads), int(c.n_kv_heads), int(c.head_dim), int(c.rotary_pairs), qkv_cols, query_cols},
          scoring{c.attn_scale ? float(c.attn_scale) : 1.0f / std::sqrt(float(c.head_dim)), float(c.softcap),
                  int(c.window), c.causal != 0} {}
};

// Rows of the caller's up-projection in ours: gate and values are padded apart.
inline int up_row(const Shape& s, int i) { return i < s.d_ff ? i : s.ff_cols + i - s.d_ff; }
inline bool whole_widths(const Call& c) {  // no padding anywhere
    return c.d_model % 16 == 0 && c.d_ff % 16 == 0 && query_columns(c) % 16 == 0 && qkv_columns(c) % 16 == 0;
}
inline int up_rows(const Shape& s) { return is_gated(s.activation) ? 2 * s.d_ff : s.d_ff; }

// Which products a call has, and how they read the weights.
struct Use {
    bool forward, backward;  // x W^T, dy W
    bool packed;             // once a call, or as they are used (gemm.h)
    Use(const Call& c, const Plan& plan, bool back)
        : forward(!back || !c.kept), backward(back), packed(!plan.few_uses || !whole_widths(c)) {}
};

template <class P>
struct LayerWeights {
    WeightOperand<P> qkv, out, up, down;          // x W^T
    WeightOperand<P> qkv_t, out_t, up_t, down_t;  // dy W
    const float *qkv_bias, *out_bias, *up_bias, *down_bias;
    NormWeights n1, n1_post, n2, n2_post, qn, kn;
};

struct LayerGrads {  // row-major, padded
    bool* begun;  // whether the matrices hold sums already
    float *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;
    NormGrads n1, n1_post, n2, n2_post, qn, kn;
};

template <class Memory>
NormWeights place_norm(Memory& m, const Shape& s) {
    const float* gain = m.place(s.norm_cols);
    return {gain, m.place(s.norm_cols)};
}

template <class P, class Memory>
LayerWeights<P> place_weights(Memory& m, const Shape& s, const Use& use) {
    const auto place = [&](int k, int n) -> WeightOperand<P> {
        const int64_t cells = use.packed ? int64_t(cells_of<P>(k)) * n : 0;
        return {cells ? reinterpret_cast<const typename P::cell*>(m.place(cells)) : nullptr, k, n, {}, 0, false};
    };
    LayerWeights<P> w{};
    if (use.forward) {
        w.qkv = place(s.d_model, s.qkv_cols), w.out = place(s.query, s.model_cols);
        w.up = place(s.d_model, s.hidden_cols), w.down = place(s.d_ff, s.model_cols);
    }
    if (use.backward) {
        w.qkv_t = place(s.qkv, s.model_cols), w.out_t = place(s.d_model, s.query_cols);
        w.up_t = place(s.hidden_cols, s.model_cols), w.down_t = place(s.d_model, s.ff_cols);
    }
    w.qkv_bias = m.place(s.qkv_cols), w.out_bias = m.place(s.model_cols);
    w.up_bias = m.place(s.hidden_cols), w.down_bias = m.place(s.model_cols);
    w.n1 = place_norm(m, s), w.n1_post = place_norm(m, s), w.n2 = place_norm(m, s), w.n2_post = place_norm(m, s);
    if (s.qk_cols) w.qn = place_norm(m, s), w.kn = place_norm(m, s);
    return w;
}

// in_place: the caller's, where the matrices are summed at once; or null.
template <class Memory>
LayerGrads place_grads(Memory& m, const Shape& s, float* const* in_place, bool* begun) {
    const auto matrix = [&](int weight, int64_t outs, int64_t ins) {
        return in_place ? in_place[weight] : m.place(outs * ins);
    };
    LayerGrads g;
    g.begun = begun;
    g.qkv = matrix(QKV_W, s.qkv_cols, s.model_cols), g.qkv_bias = m.place(s.qkv_cols);
    g.out = matrix(OUT_W, s.model_cols, s.query_cols), g.out_bias = m.place(s.model_cols);
    g.up = matrix(UP_W, s.hidden_cols, s.model_cols), g.up_bias = m.place(s.hidden_cols);
    g.down = matrix(DOWN_W, s.model_cols, s.ff_cols), g.down_bias = m.place(s.model_cols);
    NormGrads* norms[] = {&g.n1, &g.n1_post, &g.n2, &g.n2_post, &g.qn, &g.kn};
    for (int i = 0; i < s.norms; i++) norms[i]->gain = m.place(s.norm_cols), norms[i]->shift = m.place(s.norm_cols);
    return g;
}

template <class T>
T* writable(const T* p) {  // our own buffers, being filled
    return const_cast<T*>(p);
}

void copy_vector(const float* from, int n, const float* to) {
    if (from) std::memcpy(writable(to), from, n * sizeof(float));
}

void fill_norm(const Shape& s, const float* gain, const float* shift, int d, NormWeights w) {
    copy_vector(gain, d, w.gain), copy_vector(shift, d, w.shift);
    for (int i = 0; s.norm_factor != WEIGHT_ITSELF && i < d; i++) writable(w.gain)[i] += 1.0f;
}

// x W^T and dy W of `outs` rows of W[.., ins], which are B's columns or rows from `at` on.
template <class P, class Number>
void pack(const Number* w, int outs, int ins, const WeightOperand<P>& forward, const WeightOperand<P>& backward, int at) {
    const int outs_padded = padded(outs);
    if (forward.packed)
        pack_transposed<P>(w, ins, outs, ins, outs_padded, writable(forward.packed) + int64_t(at) * cells_of<P>(ins));
    if (backward.packed)
        pack_rows<P>(w, ins, outs, ins, padded(ins), backward.k, writable(backward.packed) + int64_t(cells_of<P>(at)) * VL);
}

template <class P>
void fill_weights(const Shape& s, const float* const* from, bool bf16, const Use& use, LayerWeights<P>& w) {
    struct Map {
        int weight, outs, ins;
        WeightOperand<P> &forward, &backward;
    };
    const Map maps[] = {{QKV_W, s.qkv, s.d_model, w.qkv, w.qkv_t}, {OUT_W, s.d_model, s.query, w.out, w.out_t},
                        {UP_W, s.d_ff, s.d_model, w.up, w.up_t}, {DOWN_W, s.d_model, s.d_ff, w.down, w.down_t}};
    for (const Map& m : maps) {
        const int halves = m.weight == UP_W && s.d_ff ? s.hidden_cols / s.ff_cols : 1;  // swiglu: gate, then values
        const Matrix matrix{from[m.weight], bf16};
        matrix.visit([&](const auto* rows) {
            for (int half = 0; use.packed && half < halves; half++)
                pack<P>(rows + int64_t(half) * m.outs * m.ins, m.outs, m.ins, m.forward, m.backward, half * padded(m.outs));
        });
        m.forward.w = m.backward.w = matrix, m.forward.ld = m.backward.ld = m.ins, m.forward.transposed = true;
    }
    copy_vector(from[QKV_B], s.qkv, w.qkv_bias), copy_vector(from[OUT_B], s.d_model, w.out_bias);
    for (int half = 0; s.d_ff && half < s.hidden_cols / s.ff_cols; half++)
        if (from[UP_B]) copy_vector(from[UP_B] + half * s.d_ff, s.d_ff, w.up_bias + half * s.ff_cols);
    copy_vector(from[DOWN_B], s.d_model, w.down_bias);
    fill_norm(s, from[N1_W], from[N1_B], s.d_model, w.n1);
    fill_norm(s, from[N1P_W], from[N1P_B], s.d_model, w.n1_post);
    if (s.d_ff) {
        fill_norm(s, from[N2_W], from[N2_B], s.d_model, w.n2);
        fill_norm(s, from[N2P_W], from[N2P_B], s.d_model, w.n2_post);
    }
    if (s.qk_cols) {
        fill_norm(s, from[QN_W], from[QN_B], s.heads.head_dim, w.qn);
        fill_norm(s, from[KN_W], from[KN_B], s.heads.head_dim, w.kn);
    }
}

template <class P>
struct InjectionWeights {
    typedef const typename P::cell* Panels;
    Panels of_state, of_input, of_state_t, of_input_t;  // the two halves of concat's map
    const float *bias, *state_factor, *input_factor;    // u = state_factor * h + input_factor * e
    NormWeights norm;
};

struct InjectionGrads {
    float *of_state, *of_input;  // [outputs, inputs]
    float *bias, *state_factor, *input_factor;
    NormGrads norm;
};

template <class P, class Memory>
InjectionWeights<P> place_injection(Memory& m, const Shape& s, bool backward) {
    const auto panels = [&] {
        return reinterpret_cast<const typename P::cell*>(m.place(int64_t(cells_of<P>(s.d_model)) * s.model_cols));
    };
    InjectionWeights<P> w{};
    if (s.injection == CONCAT_INPUT) {
        w.of_state = panels(), w.of_input = panels(), w.bias = m.place(s.model_cols);
        if (backward) w.of_state_t = panels(), w.of_input_t = panels();
    }
    if (s.injection == DIAGONAL || s.injection == NORM_ADD)
        w.state_factor = m.place(s.model_cols), w.input_factor = m.place(s.model_cols), w.norm = place_norm(m, s);
    return w;
}

template <class Memory>
InjectionGrads place_injection_grads(Memory& m, const Shape& s) {
    const int64_t n = s.model_cols;
    InjectionGrads g{};
    if (s.injection == CONCAT_INPUT) g.of_state = m.place(n * n), g.of_input = m.place(n * n), g.bias = m.place(n);
    if (s.injection == DIAGONAL || s.injection == NORM_ADD)
        g.state_factor = m.place(n), g.input_factor = m.place(n), g.norm = {m.place(n), m.place(n)};
    return g;
}

template <class P>
void fill_injection(const Shape& s, const float* const* from, bool backward, InjectionWeights<P> w) {
    const int d = s.d_model;
    if (s.injection == CONCAT_INPUT) {
        const float *state = from[INJECT_W], *input = state + d;
        pack_transposed<P>(state, 2 * d, d, d, s.model_cols, writable(w.of_state));
        pack_transposed<P>(input, 2 * d, d, d, s.model_cols, writable(w.of_input));
        copy_vector(from[INJECT_B], d, w.bias);
        if (backward) {
            pack_rows<P>(state, 2 * d, d, d, s.model_cols, d, writable(w.of_state_t));
            pack_rows<P>(input, 2 * d, d, d, s.model_cols, d, writable(w.of_input_t));
        }
    }
    if (s.injection == DIAGONAL) {
        for (int i = 0; i < d; i++) writable(w.state_factor)[i] = 1.0f / (1.0f + std::exp(from[INJECT_DECAY][i]));
        copy_vector(from[INJECT_GAIN], d, w.input_factor);
    }
    if (s.injection == NORM_ADD) {
        copy_vector(from[INJECT_ALPHA], d, w.input_factor);
        fill_norm(s, from[INJECT_NORM_W], from[INJECT_NORM_B], d, w.norm);
    }
}

template <class P>
struct Model {
    Shape shape;
    LayerWeights<P> layers[MOST_LAYERS];
    NormWeights loop_norm;
    InjectionWeights<P> injection;

    template <class Memory>
    Model(const Call& c, const Use& use, Memory& m) : shape(c) {
        for (int l = 0; l < c.n_layers; l++) layers[l] = place_weights<P>(m, shape, use);
        loop_norm = place_norm(m, shape);
        injection = place_injection<P>(m, shape, use.backward);
    }
    void fill(const Call& c, const Use& use) {
        for (int l = 0; l < c.n_layers; l++) fill_weights<P>(shape, c.weights + l * WEIGHTS, c.bf16_weights, use, layers[l]);
        const float* const* of_loop = c.weights + c.n_layers * WEIGHTS;
        if (c.loop_norm) fill_norm(shape, of_loop[LOOP_NORM_W], of_loop[LOOP_NORM_B], shape.d_model, loop_norm);
        fill_injection<P>(shape, of_loop, use.backward, injection);
    }
};

void add_vector(const float* from, int n, float* to) {
    for (int j = 0; to && j < n; j++) to[j] += from[j];
}

void copy_matrix(const float* from, int outs, int ins, int ld, float* to) {
    if (from == to) return;  // summed there
    for (int64_t i = 0; i < outs; i++) std::memcpy(to + i * ins, from + i * ld, ins * sizeof(float));
}

void add_layer_grads(const Shape& s, const LayerGrads& g, float* const* to) {
    copy_matrix(g.qkv, s.qkv, s.d_model, s.model_cols, to[QKV_W]);
    add_vector(g.qkv_bias, s.qkv, to[QKV_B]);
    copy_matrix(g.out, s.d_model, s.query, s.query_cols, to[OUT_W]);
    add_vector(g.out_bias, s.d_model, to[OUT_B]);
    for (int i = 0; s.d_ff && i < up_rows(s); i++) {
        copy_matrix(g.up + int64_t(up_row(s, i)) * s.model_cols, 1, s.d_model, 0, to[UP_W] + int64_t(i) * s.d_model);
        if (to[UP_B]) to[UP_B][i] += g.up_bias[up_row(s, i)];
    }
    if (s.d_ff) copy_matrix(g.down, s.d_model, s.d_ff, s.ff_cols, to[DOWN_W]);
    add_vector(g.down_bias, s.d_model, to[DOWN_B]);
    const NormGrads norms[] = {g.n1, g.n1_post, g.n2, g.n2_post, g.qn, g.kn};
    const int names[] = {N1_W, N1P_W, N2_W, N2P_W, QN_W, KN_W};
    for (int i = 0; i < s.norms; i++) {
        const int width = i < 4 ? s.d_model : s.heads.head_dim;
        add_vector(norms[i].gain, width, to[names[i]]);
        add_vector(norms[i].shift, width, to[names[i] + 1]);
    }
}

void add_injection_grads(const Call& c, const Shape& s, const InjectionGrads& g, float* const* to) {
    const int d = s.d_model;
    if (s.injection == CONCAT_INPUT) {
        for (int i = 0; i < d; i++) {
            copy_matrix(g.of_state + int64_t(i) * s.model_cols, 1, d, 0, to[INJECT_W] + int64_t(2 * i) * d);
            copy_matrix(g.of_input + int64_t(i) * s.model_cols, 1, d, 0, to[INJECT_W] + int64_t(2 * i + 1) * d);
        }
        add_vector(g.bias, d, to[INJECT_B]);
    }
    if (s.injection == DIAGONAL) {
        const float* decay = c.weights[c.n_layers * WEIGHTS + INJECT_DECAY];
        for (int i = 0; i < d; i++) {
            const float a = 1.0f / (1.0f + std::exp(decay[i]));
            to[INJECT_DECAY][i] -= g.state_factor[i] * a * (1.0f - a);
        }
        add_vector(g.input_factor, d, to[INJECT_GAIN]);
    }
    if (s.injection == NORM_ADD) {
        add_vector(g.input_factor, d, to[INJECT_ALPHA]);
        add_vector(g.norm.gain, d, to[INJECT_NORM_W]);
        add_vector(g.norm.shift, d, to[INJECT_NORM_B]);
    }
}

inline bool sums_in_place(const Call& c, const Plan& plan) { return plan.n_slices == 1 && whole_widths(c); }

struct SliceGrads {
    LayerGrads layers[MOST_LAYERS];
    NormGrads loop_norm;
    InjectionGrads injection;
    // With one slice of whole widths the matrices are the call's own, and *begun says whether they hold sums yet.
    template <class Memory>
    SliceGrads(const Call& c, const Shape& s, const Plan& plan, Memory& m, bool* begun) {
        *begun = !sums_in_place(c, plan);
        for (int l = 0; l < c.n_layers; l++)
            layers[l] = place_grads(m, s, *begun ? nullptr : c.grad_weights + l * WEIGHTS, begun);
        loop_norm = {m.place(s.model_cols), m.place(s.model_cols)};
        injection = place_injection_grads(m, s);
    }
};

// Zeros, where no row ran.
void clear_matrices(const Call& c, const Shape& s) {
    for (int l = 0; l < c.n_layers; l++) {
        float* const* to = c.grad_weights + l * WEIGHTS;
        const auto clear = [](float* x, int64_t outs, int64_t ins) { std::memset(x, 0, outs * ins * sizeof(float)); };
        clear(to[QKV_W], s.qkv, s.d_model), clear(to[OUT_W], s.d_model, s.query);
        if (s.d_ff) clear(to[UP_W], up_rows(s), s.d_model), clear(to[DOWN_W], s.d_model, s.d_ff);
    }
}

// To the gradients of the call's weights, `to`.
void add_grads(const Call& c, const Shape& s, const SliceGrads& g, float* const* to) {
    for (int l = 0; l < c.n_layers; l++) add_layer_grads(s, g.layers[l], to + l * WEIGHTS);
    float* const* of_loop = to + c.n_layers * WEIGHTS;
    add_vector(g.loop_norm.gain, s.d_model, of_loop[LOOP_NORM_W]);
    add_vector(g.loop_norm.shift, s.d_model, of_loop[LOOP_NORM_B]);
    add_injection_grads(c, s, g.injection, of_loop);
}

}  // namespace
