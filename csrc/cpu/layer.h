// One transformer layer on the packed rows of a tile: forward, keeping what the backward needs, and backward.
//
// All buffers have leading dimensions padded to 16 with zeros in the padding. Rows are the valid tokens of the
// tile's sequences, one sequence behind the other: pads and finished samples are never computed.
#pragma once
#include "attention.h"
#include "norm.h"

namespace {

struct Shape {
    int d, dp, qkv, qp, a, ap, f, fp, up;  // widths and their padded forms; up: columns of the first MLP map
    int activation, norm_kind, placement, seq_len;
    bool rope;
    float eps, scale;
    Heads heads;

    explicit Shape(const Call& c) {
        d = c.d_model, dp = padded(d);
        qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, qp = padded(qkv);
        a = c.n_heads * c.head_dim, ap = padded(a);
        f = c.d_ff, fp = padded(f), up = c.activation == SWIGLU ? 2 * fp : fp;
        activation = c.activation, norm_kind = c.norm, placement = c.placement;
        seq_len = c.seq_len, rope = c.rope, eps = c.eps, scale = c.residual_scale;
        heads = {int(c.n_heads), int(c.n_kv_heads), int(c.head_dim), c.causal != 0, qp, ap};
    }
};

// Rows of the caller's up-projection in ours: gate and values are padded apart.
inline int up_row(const Shape& s, int i) { return i < s.f ? i : s.fp + i - s.f; }
inline int up_rows(const Shape& s) { return s.activation == SWIGLU ? 2 * s.f : s.f; }

struct LayerWeights {
    const float *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;  // packed for x W^T
    const float *qkv_t, *out_t, *up_t, *down_t;  // packed for dy W; backward only
    NormWeights n1, n1_post, n2, n2_post;
};

struct LayerGrads {  // row-major, padded
    float *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;
    NormGrads n1, n1_post, n2, n2_post;
};

// Of one layer, [rows, width]: y1, y2 normed inputs, z1, z2 branch outputs (with post-norm: the sums). The
// backward computes y1, y2 and act again, for they are cheap.
struct Kept {
    float *in, *y1, *qkv, *o, *z1, *mid, *y2, *u, *act, *z2;
};

struct Rows {  // the sequences of a tile
    int count;
    const int* lengths;
};

inline void add_bias(int rows, int width, const float* bias, float* x) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < width; j += VL) store(x + i * width + j, load(x + i * width + j) + load(bias + j));
}

inline void add_columns(int rows, int width, const float* x, float* total) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < width; j += VL) store(total + j, load(total + j) + load(x + i * width + j));
}

inline void axpy(int64_t n, float factor, const float* x, const float* y, float* out) {
    for (int64_t i = 0; i < n; i += VL) store(out + i, load(y + i) + factor * load(x + i));
}

template <Activation A>
inline void activation_rows(const Shape& s, int rows, const float* u, float* act) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < s.fp; j += VL) {
            const vf x = load(u + i * s.up + j);
            store(act + i * s.fp + j,
                  A == SWIGLU ? x * sigmoid(x) * load(u + i * s.up + s.fp + j) : activation<A>(x).value);
        }
}

// act again, and in du what its gradient is to be multiplied with (swiglu: for gate and values apart).
template <Activation A>
inline void activation_slopes(const Shape& s, int rows, const float* u, float* act, float* du) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < s.fp; j += VL) {
            const vf x = load(u + i * s.up + j);
            if (A == SWIGLU) {
                const vf gate = sigmoid(x), value = load(u + i * s.up + s.fp + j);
                store(act + i * s.fp + j, x * gate * value);
                store(du + i * s.up + j, value * gate * (1.0f + x * (1.0f - gate)));
                store(du + i * s.up + s.fp + j, x * gate);
            } else {
                const ValueSlope f = activation<A>(x);
                store(act + i * s.fp + j, f.value);
                store(du + i * s.up + j, f.slope);
            }
        }
}

inline void times_gradient(const Shape& s, int rows, const float* d_act, float* du) {
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < s.up; half += s.fp)
            for (int j = 0; j < s.fp; j += VL) {
                float* slope = du + i * s.up + half + j;
                store(slope, load(slope) * load(d_act + i * s.fp + j));
            }
}

#define WITH_ACTIVATION(function, s, ...)                              \
    switch (s.activation) {                                            \
        case RELU: function<RELU>(s, __VA_ARGS__); break;              \
        case GELU: function<GELU>(s, __VA_ARGS__); break;              \
        case GELU_TANH: function<GELU_TANH>(s, __VA_ARGS__); break;    \
        default: function<SWIGLU>(s, __VA_ARGS__); break;              \
    }

// y = the branch's input: norm(x) in the buffer y, or x itself where no norm comes first
inline const float* branch_input(const Shape& s, int rows, const float* x, NormWeights w, float* y) {
    if (s.norm_kind == NO_NORM || s.placement == POST) return x;
    norm(s.norm_kind, rows, s.d, x, w, s.eps, y);
    return y;
}

// out = x and the branch's output z, added and normed as the placement says; tmp [rows, dp]
inline void close_branch(const Shape& s, int rows, const float* x, float* z, NormWeights w, NormWeights w_post,
                         float* out) {
    const int64_t n = int64_t(rows) * s.dp;
    if (s.placement == POST) {
        axpy(n, s.scale, z, x, z);  // z keeps the sum, which is what the backward needs
        norm(s.norm_kind, rows, s.d, z, w, s.eps, out);
    } else if (s.placement == SANDWICH) {
        norm(s.norm_kind, rows, s.d, z, w_post, s.eps, out);
        axpy(n, s.scale, out, x, out);
    } else {
        axpy(n, s.scale, z, x, out);
    }
}

// From d_out to the gradient dz of the branch's output; dx becomes what flows past the branch.
inline void open_branch_backward(const Shape& s, int rows, float* dx, const float* z, NormWeights w,
                                 NormWeights w_post, NormGrads g, NormGrads g_post, float* dz) {
    const int64_t n = int64_t(rows) * s.dp;
    if (s.placement == POST) {
        norm_backward(s.norm_kind, rows, s.d, z, dx, w, s.eps, g, dz, false);
        std::memcpy(dx, dz, n * sizeof(float));
    }
    for (int64_t i = 0; i < n; i += VL) store(dz + i, s.scale * load(dx + i));
    if (s.placement == SANDWICH) norm_backward(s.norm_kind, rows, s.d, z, dz, w_post, s.eps, g_post, dz, false);
}

// dx += what flows back through the branch's input, whose gradient is dy.
inline void close_branch_backward(const Shape& s, int rows, const float* x, const float* dy, NormWeights w,
                                  NormGrads g, float* dx) {
    if (s.norm_kind == NO_NORM || s.placement == POST)
        axpy(int64_t(rows) * s.dp, 1.0f, dy, dx, dx);
    else
        norm_backward(s.norm_kind, rows, s.d, x, dy, w, s.eps, g, dx, true);
}

inline void layer_forward(const Shape& s, const LayerWeights& w, const float* rotary, Rows seqs, int rows, Kept k,
                          float* out, float* scratch) {
    const float* y = branch_input(s, rows, k.in, w.n1, k.y1);
    gemm(rows, s.qp, s.d, {y, s.dp, 1}, panels(w.qkv, s.d), k.qkv, s.qp);
    add_bias(rows, s.qp, w.qkv_bias, k.qkv);
    int at = 0;
    for (int b = 0; b < seqs.count; at += seqs.lengths[b++]) {
        float* qkv = k.qkv + int64_t(at) * s.qp;
        if (s.rope) rotate(s.heads, seqs.lengths[b], s.seq_len, rotary, 1.0f, qkv);
        attend(s.heads, seqs.lengths[b], qkv, k.o + int64_t(at) * s.ap, scratch);
    }
    float* mid = s.f ? k.mid : out;
    gemm(rows, s.dp, s.a, {k.o, s.ap, 1}, panels(w.out, s.a), k.z1, s.dp);
    add_bias(rows, s.dp, w.out_bias, k.z1);
    close_branch(s, rows, k.in, k.z1, w.n1, w.n1_post, mid);
    if (!s.f) return;

    y = branch_input(s, rows, mid, w.n2, k.y2);
    gemm(rows, s.up, s.d, {y, s.dp, 1}, panels(w.up, s.d), k.u, s.up);
    add_bias(rows, s.up, w.up_bias, k.u);
    WITH_ACTIVATION(activation_rows, s, rows, k.u, k.act)
    gemm(rows, s.dp, s.f, {k.act, s.fp, 1}, panels(w.down, s.f), k.z2, s.dp);
    add_bias(rows, s.dp, w.down_bias, k.z2);
    close_branch(s, rows, mid, k.z2, w.n2, w.n2_post, out);
}

struct Temporaries {  // [rows, width] each; packed: the widest of them
    float *dz, *dy, *d_o, *d_qkv, *d_act, *du, *packed;
};

// weight += dy^T x, bias += column sums of dy
inline void weight_grads(int rows, int outs, int ldy, const float* dy, int ldx, const float* x, float* weight,
                         float* bias, float* packed) {
    pack_rows(x, ldx, rows, ldx, ldx, rows, packed);
    gemm_outer(outs, ldx, rows, dy, ldy, panels(packed, rows), weight, ldx);
    add_columns(rows, ldy, dy, bias);
}

inline void layer_backward(const Shape& s, const LayerWeights& w, const float* rotary, Rows seqs, int rows,
                           Kept k, LayerGrads g, Temporaries t, float* dx, float* scratch) {
    const float* y1 = branch_input(s, rows, k.in, w.n1, k.y1);
    if (s.f) {
        const float* y2 = branch_input(s, rows, k.mid, w.n2, k.y2);
        WITH_ACTIVATION(activation_slopes, s, rows, k.u, k.act, t.du)
        open_branch_backward(s, rows, dx, k.z2, w.n2, w.n2_post, g.n2, g.n2_post, t.dz);
        weight_grads(rows, s.d, s.dp, t.dz, s.fp, k.act, g.down, g.down_bias, t.packed);
        gemm(rows, s.fp, s.d, {t.dz, s.dp, 1}, panels(w.down_t, s.d), t.d_act, s.fp);
        times_gradient(s, rows, t.d_act, t.du);
        weight_grads(rows, s.up, s.up, t.du, s.dp, y2, g.up, g.up_bias, t.packed);
        gemm(rows, s.dp, s.up, {t.du, s.up, 1}, panels(w.up_t, s.up), t.dy, s.dp);
        close_branch_backward(s, rows, k.mid, t.dy, w.n2, g.n2, dx);
    }
    open_branch_backward(s, rows, dx, k.z1, w.n1, w.n1_post, g.n1, g.n1_post, t.dz);
    weight_grads(rows, s.d, s.dp, t.dz, s.ap, k.o, g.out, g.out_bias, t.packed);
    gemm(rows, s.ap, s.d, {t.dz, s.dp, 1}, panels(w.out_t, s.d), t.d_o, s.ap);
    int at = 0;
    for (int b = 0; b < seqs.count; at += seqs.lengths[b++]) {
        float* d_qkv = t.d_qkv + int64_t(at) * s.qp;
        attend_backward(s.heads, seqs.lengths[b], k.qkv + int64_t(at) * s.qp, t.d_o + int64_t(at) * s.ap, d_qkv,
                        scratch);
        if (s.rope) rotate(s.heads, seqs.lengths[b], s.seq_len, rotary, -1.0f, d_qkv);
    }
    weight_grads(rows, s.qkv, s.qp, t.d_qkv, s.dp, y1, g.qkv, g.qkv_bias, t.packed);
    gemm(rows, s.dp, s.qkv, {t.d_qkv, s.qp, 1}, panels(w.qkv_t, s.qkv), t.dy, s.dp);
    close_branch_backward(s, rows, k.in, t.dy, w.n1, g.n1, dx);
}

}  // namespace
