// One transformer layer on the packed rows of a tile: forward, keeping what the backward needs, and backward.
//
// Rows go through it in chunks, which attention and the weight gradients look beyond: before these the threads that
// share a tile meet. Weight gradients are summed chunk by chunk, whoever takes which, so that sums come in one order.
//
// All buffers have leading dimensions padded to 16 with zeros in the padding. Rows are the valid tokens of the
// tile's sequences, one sequence behind the other: pads and finished samples are never computed.
#pragma once
#include "ops/activation.h"
#include "scratch.h"

namespace {

inline void axpy(int64_t n, float factor, const float* x, const float* y, float* out) {
    for (int64_t i = 0; i < n; i += VL) store(out + i, load(y + i) + factor * load(x + i));
}

// Zeros in the columns from `width` to `padded_width`: what products leave there, but for rows with an infinity or
// NaN, whose product with the zeros of a padded weight is NaN.
template <class Number>
inline void clear_padding(int rows, int width, int padded_width, int64_t ld, Number* x) {
    if (width < padded_width)
        for (int i = 0; i < rows; i++) std::memset(x + i * ld + width, 0, (padded_width - width) * sizeof(Number));
}

// Epilogues of the layer's products.

// x + scale * (sum + bias), with a scale for each row
struct Residual {
    float* out;
    int64_t ld;
    const float *bias, *x, *scale;
    void prefetch_next(int, int) const {}
    void prefetch_now(int i, int j) const {
        prefetch(x + i * ld + j);
        prefetch_to_write(out + i * ld + j);
    }
    void finish(int i, int j, vf sum) const {
        store(out + i * ld + j, load(x + i * ld + j) + scale[i] * (sum + load(bias + j)));
    }
};

// u = sum + bias, act = the activation of it (where values are gated, when they come in: the gate is there by then)
template <Activation A, class Number>
struct Activate {
    Number *u, *act;
    const float* bias;
    int64_t up, fp;
    void prefetch_next(int, int) const {}
    void prefetch_now(int i, int j) const { prefetch_to_write(u + i * up + j); }
    void finish(int i, int j, vf sum) const {
        const vf x = sum + load(bias + j);
        store(u + i * up + j, x);
        if (!is_gated(A)) {
            store(act + i * fp + j, activation<A>(x).value);
        } else if (j >= fp) {
            const vf gate = load(u + i * up + j - fp);
            store(act + i * fp + j - fp, activation<A>(gate).value * x);
        }
    }
};

// From the activation's gradient, the sum, that of u; act again, for it is cheap.
template <Activation A, class Number>
struct ActivateBackward {
    const Number* u;
    Number* act;
    float* du;
    int64_t up, fp;
    const Number* next;  // [rows, fp]: what is read after this
    void prefetch_next(int i, int j) const { prefetch(next + i * fp + j); }
    void prefetch_now(int i, int j) const {
        prefetch(u + i * up + j);
        if (is_gated(A)) prefetch(u + i * up + fp + j);
    }
    void finish(int i, int j, vf sum) const {
        const vf x = load(u + i * up + j);
        const ValueSlope f = activation<A>(x);
        if (!is_gated(A)) {
            store(act + i * fp + j, f.value);
            store(du + i * up + j, through<A>(x, f.slope, sum));
        } else {
            const vf value = load(u + i * up + fp + j);
            store(act + i * fp + j, f.value * value);
            store(du + i * up + j, value * f.slope * sum);
            store(du + i * up + fp + j, f.value * sum);
        }
    }
};

template <template <Activation, class> class Epilogue, class P, class... Fields>
inline void activated_product(const Shape& s, int m, MatA<P> a, const WeightOperand<P>& b, typename P::cell* scratch,
                              Fields... fields) {
    typedef typename P::number Number;
    switch (s.activation) {
        case RELU: return product<P>(m, a, b, scratch, Epilogue<RELU, Number>{fields...});
        case RELU2: return product<P>(m, a, b, scratch, Epilogue<RELU2, Number>{fields...});
        case GELU: return product<P>(m, a, b, scratch, Epilogue<GELU, Number>{fields...});
        case GELU_TANH: return product<P>(m, a, b, scratch, Epilogue<GELU_TANH, Number>{fields...});
        case SWIGLU: return product<P>(m, a, b, scratch, Epilogue<SWIGLU, Number>{fields...});
        default: return product<P>(m, a, b, scratch, Epilogue<GEGLU_TANH, Number>{fields...});
    }
}

// The branch's input: norm(x) in the buffer y, or x itself where no norm comes first.
inline const float* input_of_branch(const Shape& s, const float* x, const float* y) {
    return s.norm_kind == NO_NORM || s.placement == POST ? x : y;
}
inline const float* branch_input(const Shape& s, int rows, const float* x, NormWeights w, float* y) {
    if (input_of_branch(s, x, y) == y) norm(s.norm_kind, rows, s.d_model, x, w, s.eps, y);
    return input_of_branch(s, x, y);
}

// The branch's last product y W^T + bias, and x, added and normed as the placement says. z keeps what the
// backward needs of it: where the sum is normed the sum, with sandwich the product, else nothing.
template <class P>
inline void close_branch(const Shape& s, int rows, MatA<P> y, const WeightOperand<P>& w, typename P::cell* scratch,
                         const float* bias, const float* scale, const float* x, float* z, NormWeights n,
                         NormWeights n_post, float* out) {
    const int64_t ld = s.model_cols;
    if (s.placement == SANDWICH) {
        product<P>(rows, y, w, scratch, Bias{z, ld, bias});
        norm(s.norm_kind, rows, s.d_model, z, n_post, s.eps, out);
        for (int i = 0; i < rows; i++) axpy(ld, scale[i], out + i * ld, x + i * ld, out + i * ld);
        clear_padding(rows, s.d_model, s.model_cols, ld, out);
        return;
    }
    float* sum = s.norms_sum() ? z : out;
    product<P>(rows, y, w, scratch, Residual{sum, ld, bias, x, scale});
    clear_padding(rows, s.d_model, s.model_cols, ld, sum);
    if (s.norms_sum()) norm(s.norm_kind, rows, s.d_model, z, s.placement == POST ? n : n_post, s.eps, out);
}

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

// A of x W^T.
template <class P>
inline MatA<P> operand(int rows, int width, const float* x, typename P::number* scratch) {
    return row_operand<P>(rounded(int64_t(rows) * width, x, scratch), width);
}

struct Part {  // rows from .. to of the n of a tile's sequence, which begins at the tile's row `at`
    int sequence, at, n, from, to;
};

// The rows of a tile that run a loop, whose they are, and the threads that share them.
struct Rows {
    Lengths seqs;
    int count;
    Share share;

    // f(what rows begin .. end have of a sequence)
    template <class F>
    void each_sequence(int begin, int end, F f) const {
        for (int i = 0, at = 0; i < seqs.count && at < end; at += seqs.lengths[i++]) {
            const int from = std::max(begin, at) - at, to = std::min(end - at, seqs.lengths[i]);
            if (from < to) f(Part{i, at, seqs.lengths[i], from, to});
        }
    }
};

// What a layer of a call reads beside its rows.
template <class P>
struct LayerOf {
    const Shape& s;
    const LayerWeights<P>& w;
    const float* rotary;
    Temporaries t;
    OperandScratch<P> scratch;
    Cached cached;

    // Where a sequence's keys and values are, and how many came before the call's.
    HeadStore store(const Rows& tile, const Part& part) const {
        const int width = padded(s.heads.head_dim);
        float* const k = t.kv + int64_t(part.at) * s.kv_cols;
        const int64_t size = int64_t(part.n) * width;
        return cached.k ? cached.of_sample(s.heads, tile.seqs.samples[part.sequence])
                        : HeadStore{k, k + size, width, 2 * size, width};
    }
    int before(const Rows& tile, const Part& part) const {
        return cached.k ? int(cached.before[tile.seqs.samples[part.sequence]]) : 0;
    }
};

inline void flag(int rows, bool on, float* flags) { std::fill(flags, flags + rows, on ? 1.0f : 0.0f); }

// Whether a sequence has to visit every pair: where it holds an infinity or NaN, and some pairs are masked.
inline bool visits_every_pair(const Scoring& s, int n, const float* nonfinite) {
    return (s.causal || s.window) && std::find(nonfinite, nonfinite + n, 1.0f) != nonfinite + n;
}

// Norms every query and key of a chunk; keeps what they were.
template <class P>
inline void norm_heads(const LayerOf<P>& layer, int rows, const Saved<P>& k) {
    const Shape& s = layer.s;
    const int hd = s.heads.head_dim;
    round_numbers<P>(int64_t(rows) * s.qkv_cols, k.qkv);
    for (int i = 0; k.qk && i < rows; i++)
        for (int j = 0; j < s.qk_cols; j += VL)
            store(k.qk + int64_t(i) * s.qk_cols + j, load(k.qkv + int64_t(i) * s.qkv_cols + j));
    for (int h = 0; h < s.heads.n_heads + s.heads.n_kv_heads; h++) {
        pack_head(rows, hd, k.qkv + h * hd, s.qkv_cols, layer.scratch.qk);
        norm(s.norm_kind, rows, hd, layer.scratch.qk, h < s.heads.n_heads ? layer.w.qn : layer.w.kn, s.eps,
             layer.scratch.qk);
        unpack_head(rows, hd, layer.scratch.qk, k.qkv + h * hd, s.qkv_cols);
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

// Queries, keys and values of a chunk; the last two also where attention reads them.
template <class P>
inline void project(const LayerOf<P>& layer, const Rows& tile, int begin, int end, const Saved<P>& k) {
    const Shape& s = layer.s;
    const int rows = end - begin;
    const float* y = branch_input(s, rows, k.in, layer.w.n1, k.y1);
    product<P>(rows, operand<P>(rows, s.model_cols, y, layer.scratch.rows), layer.w.qkv, layer.scratch.weight,
               Bias{k.qkv, s.qkv_cols, layer.w.qkv_bias});
    if (s.qk_cols) norm_heads(layer, rows, k);
    tile.each_sequence(begin, end, [&](const Part& p) {
        const int n = p.to - p.from;
        float* qkv = k.qkv + int64_t(p.at + p.from - begin) * s.qkv_cols;
        if (s.rope) {
            const int first = layer.cached.k ? int(layer.cached.positions[tile.seqs.samples[p.sequence]]) : 0;
            rotate(s.heads, first + p.from, first + p.to, s.rotary_rows, layer.rotary, 1.0f, qkv);
        }
        round_numbers<P>(int64_t(n) * s.qkv_cols, qkv);  // the backward has only these
        store_keys_values(s.heads, n, qkv, layer.store(tile, p), layer.before(tile, p) + p.from);
        flag(n, has_nonfinite(n, s.heads.width(), s.qkv_cols, qkv), layer.t.nonfinite + p.at + p.from);
    });
    if (k.saved_qkv) rounded(int64_t(rows) * s.qkv_cols, k.qkv, k.saved_qkv);
}

template <class P>
inline void attend_chunk(const LayerOf<P>& layer, const Rows& tile, int begin, int end, const Saved<P>& whole) {
    const Shape& s = layer.s;
    tile.each_sequence(begin, end, [&](const Part& p) {
        const int before = layer.before(tile, p);
        const HeadRows rows{whole.qkv + int64_t(p.at) * s.qkv_cols, s.qkv_cols, whole.o + int64_t(p.at) * s.query_cols,
                            s.query_cols, whole.scores + int64_t(p.at) * s.score_cols, s.score_cols, before};
        attend(s.heads, s.scoring, before, p.from, p.to, visits_every_pair(s.scoring, p.n, layer.t.nonfinite + p.at), rows,
               layer.store(tile, p), before + p.n, layer.scratch.attention);
    });
}

// From what a chunk's heads attended to, to the layer's result.
template <class P>
inline void finish_chunk(const LayerOf<P>& layer, int rows, const float* scale, const Saved<P>& k, float* out) {
    const Shape& s = layer.s;
    const LayerWeights<P>& w = layer.w;
    const OperandScratch<P>& scratch = layer.scratch;
    float* mid = s.d_ff ? k.mid : out;
    close_branch<P>(s, rows, operand<P>(rows, s.query_cols, k.o, scratch.rows), w.out, scratch.weight, w.out_bias, scale,
                    k.in, k.z1, w.n1, w.n1_post, mid);
    if (!s.d_ff) return;
    const float* y = branch_input(s, rows, mid, w.n2, k.y2);
    activated_product<Activate, P>(s, rows, operand<P>(rows, s.model_cols, y, scratch.rows), w.up, scratch.weight, k.u,
                                   k.act, w.up_bias, s.hidden_cols, s.ff_cols);
    clear_padding(rows, s.d_ff, s.ff_cols, s.ff_cols, k.act);
    close_branch<P>(s, rows, row_operand<P>(k.act, s.ff_cols), w.down, scratch.weight, w.down_bias, scale, mid, k.z2, w.n2,
                    w.n2_post, out);
}

template <class P>
inline void layer_forward(const LayerOf<P>& layer, const Rows& tile, const Saved<P>& whole, float* out) {
    const Share& share = tile.share;
    share.each_chunk(tile.count, [&](int begin, int end) {
        project(layer, tile, begin, end, from_row(whole, layer.s, begin));
    });
    share.meet();
    // Every so many chunks: with a causal mask the last ones take longest.
    for (int i = share.index * ROWS_PER_CHUNK; i < tile.count; i += share.count * ROWS_PER_CHUNK)
        attend_chunk(layer, tile, i, std::min(i + ROWS_PER_CHUNK, tile.count), whole);
    share.meet();
    share.each_chunk(tile.count, [&](int begin, int end) {
        finish_chunk(layer, end - begin, tile.seqs.row_scale + begin, from_row(whole, layer.s, begin),
                     out + int64_t(begin) * layer.s.model_cols);
    });
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
