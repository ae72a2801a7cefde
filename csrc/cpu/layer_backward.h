// One transformer layer on the packed rows of a tile, backward.
//
// Weight gradients are summed chunk by chunk, whoever takes which, so that sums come in one order.
#pragma once
#include "layer.h"

namespace {

// From d_out to the gradient dz of the branch's output; dx becomes what flows past the branch.
inline void open_branch_backward(const Shape& s, int rows, const float* scale, float* dx, const float* z,
                                 NormWeights w, NormWeights w_post, NormGrads g, NormGrads g_post, float* dz) {
    const int64_t ld = s.model_cols;
    if (s.norms_sum()) {
        const bool post = s.placement == POST;
        norm_backward(s.norm_kind, rows, s.d_model, z, dx, post ? w : w_post, s.eps, post ? g : g_post, dz, false);
        std::memcpy(dx, dz, rows * ld * sizeof(float));
    }
    for (int i = 0; i < rows; i++)
        for (int64_t j = i * ld; j < (i + 1) * ld; j += VL) store(dz + j, scale[i] * load(dx + j));
    if (s.placement == SANDWICH) norm_backward(s.norm_kind, rows, s.d_model, z, dz, w_post, s.eps, g_post, dz, false);
}

// dx += what flows back through the branch's input, whose gradient is dy.
inline void close_branch_backward(const Shape& s, int rows, const float* x, const float* dy, NormWeights w,
                                  NormGrads g, float* dx) {
    if (s.norm_kind == NO_NORM || s.placement == POST) {
        axpy(int64_t(rows) * s.model_cols, 1.0f, dy, dx, dx);
        clear_padding(rows, s.d_model, s.model_cols, s.model_cols, dx);
    } else {
        norm_backward(s.norm_kind, rows, s.d_model, x, dy, w, s.eps, g, dx, true);
    }
}

// From the gradients of normed queries and keys to those of what they were.
template <class P>
inline void norm_heads_backward(const LayerOf<P>& layer, int rows, const Saved<P>& k, NormGrads of_q, NormGrads of_k,
                                float* d_qkv) {
    const Shape& s = layer.s;
    const int hd = s.heads.head_dim, size = rows * padded(hd);
    float *x = layer.scratch.qk, *dy = x + size, *all_heads = dy + size;
    for (int64_t i = 0; i < int64_t(rows) * s.qk_cols; i += VL) store(all_heads + i, load(k.qk + i));
    for (int h = 0; h < s.heads.n_heads + s.heads.n_kv_heads; h++) {
        const bool is_query = h < s.heads.n_heads;
        pack_head(rows, hd, all_heads + h * hd, s.qk_cols, x);
        pack_head(rows, hd, d_qkv + h * hd, s.qkv_cols, dy);
        norm_backward(s.norm_kind, rows, hd, x, dy, is_query ? layer.w.qn : layer.w.kn, s.eps, is_query ? of_q : of_k,
                      dy, false);
        unpack_head(rows, hd, dy, d_qkv + h * hd, s.qkv_cols);
    }
}

// The sums of VL columns of x.
template <class Number>
inline vf column_sums(int rows, const Number* x, int64_t ld) {
    vf even = all(0), odd = all(0);  // two additions under way at a time
    int i = 0;
    for (; i + 2 <= rows; i += 2) even += load(x + i * ld), odd += load(x + (i + 1) * ld);
    return i < rows ? even + odd + load(x + i * ld) : even + odd;
}

// weight[wide, narrow] += (= unless begun) x^T y of a chunk x[rows, wide], y[rows, narrow], in some columns of x.
//
// y in panels stays in a near cache while x's columns pass by once. x_sums, unless null, += the sums of x's columns: a
// bias's gradient.
template <class P, class X, class Y>
inline void weight_grads(int rows, Range columns, int wide, const X* x, float* x_sums, int narrow, const Y* y,
                         float* weight, bool begun, const OperandScratch<P>& scratch) {
    const int k = cells_of<P>(rows);
    stack<P>(rows, narrow, y, narrow, scratch.panels);
    for (int i = columns.begin; i < columns.end; i += COLUMNS) {
        const MatA<P> a = column_operand<P>(rows, x + i, wide, scratch.columns);
        const MatB<P> b = panels<P>(scratch.panels, k);
        float* const to = weight + int64_t(i) * narrow;
        begun ? gemm<P>(COLUMNS, narrow, k, a, b, Add{to, narrow}) : gemm<P>(COLUMNS, narrow, k, a, b, Store{to, narrow});
        for (int j = i; x_sums && j < i + COLUMNS; j += VL)
            store(x_sums + j, load(x_sums + j) + column_sums(rows, x + j, wide));
    }
}

// Gradients of a chunk's rows from the layer's result to the heads' outputs; dx becomes what flows past both branches.
template <class P>
inline void outputs_backward(const LayerOf<P>& layer, int begin, int rows, const float* scale, const Saved<P>& k,
                             float* dx) {
    const Shape& s = layer.s;
    const LayerWeights<P>& w = layer.w;
    const Temporaries& t = layer.t;
    const OperandScratch<P>& scratch = layer.scratch;
    NormGrads n1 = norm_grads_of_chunk(s, t, begin, 0), n1_post = norm_grads_of_chunk(s, t, begin, 1);
    NormGrads n2 = norm_grads_of_chunk(s, t, begin, 2), n2_post = norm_grads_of_chunk(s, t, begin, 3);
    std::memset(n1.gain, 0, s.norms * 2 * s.norm_cols * sizeof(float));
    float *dz = t.dz + int64_t(begin) * s.model_cols, *d_o = t.d_o + int64_t(begin) * s.query_cols;
    if (s.d_ff) {
        float *dz_mlp = t.dz_mlp + int64_t(begin) * s.model_cols, *du = t.du + int64_t(begin) * s.hidden_cols;
        branch_input(s, rows, k.mid, w.n2, k.y2);
        open_branch_backward(s, rows, scale, dx, k.z2, w.n2, w.n2_post, n2, n2_post, dz_mlp);
        activated_product<ActivateBackward, P>(s, rows, operand<P>(rows, s.model_cols, dz_mlp, scratch.rows), w.down_t,
                                               scratch.weight, k.u, k.act, du, s.hidden_cols, s.ff_cols, k.saved_qkv);
        for (int half = 0; half < s.hidden_cols; half += s.ff_cols)
            clear_padding(rows, s.d_ff, s.ff_cols, s.hidden_cols, du + half);
        product<P>(rows, operand<P>(rows, s.hidden_cols, du, scratch.rows), w.up_t, scratch.weight,
                   Store{scratch.dy, s.model_cols});
        close_branch_backward(s, rows, k.mid, scratch.dy, w.n2, n2, dx);
    }
    open_branch_backward(s, rows, scale, dx, k.z1, w.n1, w.n1_post, n1, n1_post, dz);
    product<P>(rows, operand<P>(rows, s.model_cols, dz, scratch.rows), w.out_t, scratch.weight, Store{d_o, s.query_cols});
    widen(int64_t(rows) * s.qkv_cols, k.saved_qkv, k.qkv);
    flag(rows, has_nonfinite(rows, s.heads.width(), s.qkv_cols, k.qkv) || has_nonfinite(rows, s.query, s.query_cols, d_o),
         t.nonfinite + begin);
}

// Weight gradients of the MLP and of the attention's last map, over rows begin .. end.
template <class P>
inline void output_grads(const LayerOf<P>& layer, const Share& share, int begin, int end, const Saved<P>& whole,
                         const LayerGrads& g) {
    const Shape& s = layer.s;
    const Temporaries& t = layer.t;
    const Range of_hidden = share.part(s.hidden_cols, COLUMNS), of_model = share.part(s.model_cols, COLUMNS);
    for (int i = begin; i < end; i += ROWS_PER_CHUNK) {
        const int rows = std::min(ROWS_PER_CHUNK, end - i);
        const bool begun = *g.begun || i > 0;
        const Saved<P> k = from_row(whole, s, i);
        const float *dz = t.dz + int64_t(i) * s.model_cols, *dz_mlp = t.dz_mlp + int64_t(i) * s.model_cols;
        if (s.d_ff) {
            weight_grads<P>(rows, of_model, s.model_cols, dz_mlp, g.down_bias, s.ff_cols, k.act, g.down, begun,
                            layer.scratch);
            weight_grads<P>(rows, of_hidden, s.hidden_cols, t.du + int64_t(i) * s.hidden_cols, g.up_bias, s.model_cols,
                            input_of_branch(s, k.mid, k.y2), g.up, begun, layer.scratch);
        }
        weight_grads<P>(rows, of_model, s.model_cols, dz, g.out_bias, s.query_cols, k.o, g.out, begun, layer.scratch);
    }
}

// From the gradients of a chunk's q, k and v to that of the layer's input.
template <class P>
inline void inputs_backward(const LayerOf<P>& layer, const Rows& tile, int begin, int end, const Saved<P>& k, float* dx) {
    const Shape& s = layer.s;
    const int rows = end - begin;
    float* d_qkv = layer.t.d_qkv + int64_t(begin) * s.qkv_cols;
    if (s.rope)
        tile.each_sequence(begin, end, [&](const Part& p) {
            rotate(s.heads, p.from, p.to, s.rotary_rows, layer.rotary, -1.0f,
                   d_qkv + int64_t(p.at + p.from - begin) * s.qkv_cols);
        });
    if (s.qk_cols)
        norm_heads_backward(layer, rows, k, norm_grads_of_chunk(s, layer.t, begin, 4),
                            norm_grads_of_chunk(s, layer.t, begin, 5), d_qkv);
    branch_input(s, rows, k.in, layer.w.n1, k.y1);
    product<P>(rows, operand<P>(rows, s.qkv_cols, d_qkv, layer.scratch.rows), layer.w.qkv_t, layer.scratch.weight,
               Store{layer.scratch.dy, s.model_cols});
    close_branch_backward(s, rows, k.in, layer.scratch.dy, layer.w.n1, norm_grads_of_chunk(s, layer.t, begin, 0), dx);
}

template <class P>
inline void input_grads(const LayerOf<P>& layer, const Share& share, int begin, int end, const Saved<P>& whole,
                        const LayerGrads& g) {
    const Shape& s = layer.s;
    for (int i = begin; i < end; i += ROWS_PER_CHUNK) {
        const Saved<P> k = from_row(whole, s, i);
        weight_grads<P>(std::min(ROWS_PER_CHUNK, end - i), share.part(s.qkv_cols, COLUMNS), s.qkv_cols,
                        layer.t.d_qkv + int64_t(i) * s.qkv_cols, g.qkv_bias, s.model_cols,
                        input_of_branch(s, k.in, k.y1), g.qkv, *g.begun || i > 0, layer.scratch);
    }
}

inline void add_norm_grads(int rows, const Shape& s, const Temporaries& t, const LayerGrads& g) {
    const NormGrads norms[] = {g.n1, g.n1_post, g.n2, g.n2_post, g.qn, g.kn};
    for (int i = 0; i < rows; i += ROWS_PER_CHUNK)
        for (int which = 0; which < s.norms; which++) {
            const NormGrads from = norm_grads_of_chunk(s, t, i, which), to = norms[which];
            axpy(s.norm_cols, 1.0f, from.gain, to.gain, to.gain), axpy(s.norm_cols, 1.0f, from.shift, to.shift, to.shift);
        }
}

inline void add_loop_norm_grads(int rows, const Shape& s, const Temporaries& t, NormGrads to) {
    for (int i = 0; i < rows; i += ROWS_PER_CHUNK) {
        const NormGrads from = norm_grads_of_chunk(s, t, i, 0);
        axpy(s.model_cols, 1.0f, from.gain, to.gain, to.gain), axpy(s.model_cols, 1.0f, from.shift, to.shift, to.shift);
    }
}

template <class P>
inline void attention_backward(const LayerOf<P>& layer, const Rows& tile, const Saved<P>& k) {
    const Shape& s = layer.s;
    const Heads& heads = s.heads;
    tile.each_sequence(0, tile.count, [&](const Part& p) {
        const bool every_pair = visits_every_pair(s.scoring, p.n, layer.t.nonfinite + p.at);
        const float* qkv = k.qkv + int64_t(p.at) * s.qkv_cols;
        float* d_qkv = layer.t.d_qkv + int64_t(p.at) * s.qkv_cols;
        for (int g = tile.share.index; g < heads.n_kv_heads; g += tile.share.count) {
            const int h = g * heads.group();
            const int64_t of_o = int64_t(p.at) * s.query_cols + h * heads.head_dim;
            const GroupRows rows{heads.group(), p.n, 0,
                                 qkv + heads.q(h), k.o + of_o,
                                 k.scores + int64_t(p.at) * s.score_cols + h * KEPT_OF_SCORES, layer.t.d_o + of_o,
                                 d_qkv + heads.q(h),
                                 s.qkv_cols, heads.head_dim, s.query_cols, heads.head_dim, s.score_cols, KEPT_OF_SCORES,
                                 qkv + heads.k(g), qkv + heads.v(g), d_qkv + heads.k(g), d_qkv + heads.v(g), s.qkv_cols,
                                 p.n};
            attend_backward(s.scoring, heads.head_dim, rows, 0, every_pair, layer.scratch.attention);
        }
    });
}

// Alone a thread takes a chunk's weight gradients while the chunk is in its cache; a team takes columns of the weights
// each, over all rows.
template <class P>
inline void layer_backward(const LayerOf<P>& layer, const Rows& tile, const Saved<P>& whole, const LayerGrads& g,
                           float* dx) {
    const Shape& s = layer.s;
    const Share& share = tile.share;
    share.each_chunk(tile.count, [&](int begin, int end) {
        outputs_backward(layer, begin, end - begin, tile.seqs.row_scale + begin, from_row(whole, s, begin),
                         dx + int64_t(begin) * s.model_cols);
        if (share.alone()) output_grads(layer, share, begin, end, whole, g);
    });
    share.meet();
    if (!share.alone()) output_grads(layer, share, 0, tile.count, whole, g);
    attention_backward(layer, tile, whole);
    share.meet();
    share.each_chunk(tile.count, [&](int begin, int end) {
        inputs_backward(layer, tile, begin, end, from_row(whole, s, begin), dx + int64_t(begin) * s.model_cols);
        if (share.alone()) input_grads(layer, share, begin, end, whole, g);
    });
    share.meet();
    if (!share.alone()) input_grads(layer, share, 0, tile.count, whole, g);
    if (share.index == 0) add_norm_grads(tile.count, s, layer.t, g);
    share.meet();
}

}  // namespace
