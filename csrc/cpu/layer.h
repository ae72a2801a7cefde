// One transformer layer on the packed rows of a tile: forward, keeping what the backward needs, and backward.
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
inline void gemm_activated(const Shape& s, int m, int n, int k, MatA<P> a, MatB<P> b, Fields... fields) {
    typedef typename P::number Number;
    switch (s.activation) {
        case RELU: return gemm<P>(m, n, k, a, b, Epilogue<RELU, Number>{fields...});
        case RELU2: return gemm<P>(m, n, k, a, b, Epilogue<RELU2, Number>{fields...});
        case GELU: return gemm<P>(m, n, k, a, b, Epilogue<GELU, Number>{fields...});
        case GELU_TANH: return gemm<P>(m, n, k, a, b, Epilogue<GELU_TANH, Number>{fields...});
        case SWIGLU: return gemm<P>(m, n, k, a, b, Epilogue<SWIGLU, Number>{fields...});
        default: return gemm<P>(m, n, k, a, b, Epilogue<GEGLU_TANH, Number>{fields...});
    }
}

// y = the branch's input: norm(x) in the buffer y, or x itself where no norm comes first
inline const float* branch_input(const Shape& s, int rows, const float* x, NormWeights w, float* y) {
    if (s.norm_kind == NO_NORM || s.placement == POST) return x;
    norm(s.norm_kind, rows, s.d_model, x, w, s.eps, y);
    return y;
}

// The branch's last product y W^T + bias, and x, added and normed as the placement says. z keeps what the
// backward needs of it: where the sum is normed the sum, with sandwich the product, else nothing.
template <class P>
inline void close_branch(const Shape& s, int rows, int k, MatA<P> y, MatB<P> w, const float* bias, const float* scale,
                         const float* x, float* z, NormWeights n, NormWeights n_post, float* out) {
    const int64_t ld = s.model_cols;
    if (s.placement == SANDWICH) {
        gemm<P>(rows, s.model_cols, k, y, w, Bias{z, ld, bias});
        norm(s.norm_kind, rows, s.d_model, z, n_post, s.eps, out);
        for (int i = 0; i < rows; i++) axpy(ld, scale[i], out + i * ld, x + i * ld, out + i * ld);
        clear_padding(rows, s.d_model, s.model_cols, ld, out);
        return;
    }
    float* sum = s.norms_sum() ? z : out;
    gemm<P>(rows, s.model_cols, k, y, w, Residual{sum, ld, bias, x, scale});
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

template <class P>
inline void layer_forward(const Shape& s, const LayerWeights<P>& w, const float* rotary, Lengths seqs, int rows,
                          Saved<P> k, float* out, OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model), a = cells_of<P>(s.query), f = cells_of<P>(s.d_ff);
    const float* y = branch_input(s, rows, k.in, w.n1, k.y1);
    gemm<P>(rows, s.qkv_cols, d, operand<P>(rows, s.model_cols, y, scratch.rows), panels<P>(w.qkv, d),
            Bias{k.qkv, s.qkv_cols, w.qkv_bias});
    int at = 0;
    for (int b = 0; b < seqs.count; at += seqs.lengths[b++]) {
        float* qkv = k.qkv + int64_t(at) * s.qkv_cols;
        if (s.rope) rotate(s.heads, seqs.lengths[b], s.seq_len, rotary, 1.0f, qkv);
        attend(s.heads, seqs.lengths[b], qkv, k.o + int64_t(at) * s.query_cols, scratch.attention);
    }
    if (k.saved_qkv) rounded(int64_t(rows) * s.qkv_cols, k.qkv, k.saved_qkv);
    float* mid = s.d_ff ? k.mid : out;
    close_branch<P>(s, rows, a, operand<P>(rows, s.query_cols, k.o, k.saved_o), panels<P>(w.out, a), w.out_bias,
                    seqs.row_scale, k.in, k.z1, w.n1, w.n1_post, mid);
    if (!s.d_ff) return;

    y = branch_input(s, rows, mid, w.n2, k.y2);
    gemm_activated<Activate, P>(s, rows, s.hidden_cols, d, operand<P>(rows, s.model_cols, y, scratch.rows),
                                panels<P>(w.up, d), k.u, k.act, w.up_bias, s.hidden_cols, s.ff_cols);
    clear_padding(rows, s.d_ff, s.ff_cols, s.ff_cols, k.act);
    close_branch<P>(s, rows, f, row_operand<P>(k.act, s.ff_cols), panels<P>(w.down, f), w.down_bias, seqs.row_scale, mid,
                    k.z2, w.n2, w.n2_post, out);
}

// The sums of VL columns of x.
template <class Number>
inline vf column_sums(int rows, const Number* x, int64_t ld) {
    vf even = all(0), odd = all(0);  // two additions under way at a time
    int i = 0;
    for (; i + 2 <= rows; i += 2) even += load(x + i * ld), odd += load(x + (i + 1) * ld);
    return i < rows ? even + odd + load(x + i * ld) : even + odd;
}

// weight[wide, narrow] += x^T y of x[rows, wide], y[rows, narrow]: y in panels stays in L1 while x's columns pass
// by once. x_sums (or y_sums) += the sums of columns, a bias's gradient: of the one that is a gradient.
template <class P, class X, class Y>
inline void weight_grads(int rows, int wide, const X* x, float* x_sums, int narrow, const Y* y, float* y_sums,
                         float* weight, OperandScratch<P> scratch) {
    const int k = cells_of<P>(rows);
    stack<P>(rows, narrow, y, narrow, scratch.panels);
    for (int i = 0; i < wide; i += VL) {
        gemm<P>(VL, narrow, k, column_operand<P>(rows, x + i, wide, scratch.columns), panels<P>(scratch.panels, k),
                Add{weight + int64_t(i) * narrow, narrow});
        if (x_sums) store(x_sums + i, load(x_sums + i) + column_sums(rows, x + i, wide));
    }
    for (int j = 0; y_sums && j < narrow; j += VL)
        store(y_sums + j, load(y_sums + j) + column_sums(rows, y + j, narrow));
}

template <class P>
inline void layer_backward(const Shape& s, const LayerWeights<P>& w, const float* rotary, Lengths seqs, int rows,
                           Saved<P> k, LayerGrads g, Temporaries t, float* dx, OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model), qkv = cells_of<P>(s.qkv), up = cells_of<P>(s.hidden_cols);
    const float* y1 = branch_input(s, rows, k.in, w.n1, k.y1);
    if (s.d_ff) {
        const float* y2 = branch_input(s, rows, k.mid, w.n2, k.y2);
        open_branch_backward(s, rows, seqs.row_scale, dx, k.z2, w.n2, w.n2_post, g.n2, g.n2_post, t.dz);
        gemm_activated<ActivateBackward, P>(s, rows, s.ff_cols, d, operand<P>(rows, s.model_cols, t.dz, scratch.rows),
                                            panels<P>(w.down_t, d), k.u, k.act, t.du, s.hidden_cols, s.ff_cols,
                                            k.saved_qkv);
        for (int half = 0; half < s.hidden_cols; half += s.ff_cols)
            clear_padding(rows, s.d_ff, s.ff_cols, s.hidden_cols, t.du + half);
        weight_grads<P>(rows, s.ff_cols, k.act, nullptr, s.model_cols, t.dz, g.down_bias, g.down_t, scratch);
        weight_grads<P>(rows, s.hidden_cols, t.du, g.up_bias, s.model_cols, y2, nullptr, g.up, scratch);
        gemm<P>(rows, s.model_cols, up, operand<P>(rows, s.hidden_cols, t.du, scratch.rows), panels<P>(w.up_t, up),
                Store{t.dy, s.model_cols});
        close_branch_backward(s, rows, k.mid, t.dy, w.n2, g.n2, dx);
    }
    open_branch_backward(s, rows, seqs.row_scale, dx, k.z1, w.n1, w.n1_post, g.n1, g.n1_post, t.dz);
    weight_grads<P>(rows, s.model_cols, t.dz, g.out_bias, s.query_cols, k.saved_o, nullptr, g.out, scratch);
    gemm<P>(rows, s.query_cols, d, operand<P>(rows, s.model_cols, t.dz, scratch.rows), panels<P>(w.out_t, d),
            Store{t.d_o, s.query_cols});
    widen(int64_t(rows) * s.qkv_cols, k.saved_qkv, k.qkv);
    int at = 0;
    for (int b = 0; b < seqs.count; at += seqs.lengths[b++]) {
        float* d_qkv = t.d_qkv + int64_t(at) * s.qkv_cols;
        attend_backward(s.heads, seqs.lengths[b], k.qkv + int64_t(at) * s.qkv_cols,
                        t.d_o + int64_t(at) * s.query_cols, d_qkv, scratch.attention);
        if (s.rope) rotate(s.heads, seqs.lengths[b], s.seq_len, rotary, -1.0f, d_qkv);
    }
    weight_grads<P>(rows, s.qkv_cols, t.d_qkv, g.qkv_bias, s.model_cols, y1, nullptr, g.qkv, scratch);
    gemm<P>(rows, s.model_cols, qkv, operand<P>(rows, s.qkv_cols, t.d_qkv, scratch.rows), panels<P>(w.qkv_t, qkv),
            Store{t.dy, s.model_cols});
    close_branch_backward(s, rows, k.in, t.dy, w.n1, g.n1, dx);
}

}  // namespace
