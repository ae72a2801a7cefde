// One transformer layer on the packed rows of a tile: forward, keeping what the backward (layer_backward.h) needs.
//
// Rows go through it in chunks, which attention and the weight gradients look beyond: before these the threads that
// share a tile meet.
//
// All buffers have leading dimensions padded to 16 with zeros in the padding. Rows are the valid tokens of the
// tile's sequences, one sequence behind the other: pads and finished samples are never computed.
#pragma once
#include "epilogues.h"

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

}  // namespace
