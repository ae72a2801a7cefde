// What a chunk of a loop's layers reads, u, of the state h and the input e, all [rows, model_cols]; and its backward.
//
//   none      u = h                          concat    u = W [h, e] + b = W_h h + (W_e e + b)
//   add       u = h + e                      diagonal  u = a h + b e       norm_add  u = norm(h) + alpha e
//
// With concat the input's share is the same in every loop: it is computed once, and stands in the place of e. Its
// gradient is summed over the loops there too, and goes back through W_e once.
#pragma once
#include "layer_backward.h"

namespace {

// x + sum
struct Plus {
    float* out;
    int64_t ld;
    const float* x;
    void prefetch_next(int, int) const {}
    void prefetch_now(int i, int j) const {
        prefetch(x + i * ld + j);
        prefetch_to_write(out + i * ld + j);
    }
    void finish(int i, int j, vf sum) const { store(out + i * ld + j, load(x + i * ld + j) + sum); }
};

// out = what loops add of the input e, which is elsewhere.
template <class P>
inline void prepare_input(const Shape& s, const InjectionWeights<P>& w, int rows, const float* e, float* out,
                          OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model);
    gemm<P>(rows, s.model_cols, d, operand<P>(rows, s.model_cols, e, scratch.rows), panels<P>(w.of_input, d),
            Bias{out, s.model_cols, w.bias});
    clear_padding(rows, s.d_model, s.model_cols, s.model_cols, out);
}

template <class P>
inline void inject(const Shape& s, const InjectionWeights<P>& w, int rows, const float* h, const float* e, float* u,
                   OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model), ld = s.model_cols;
    const int64_t n = int64_t(rows) * ld;
    switch (s.injection) {
        case ADD_INPUT:
            return axpy(n, 1.0f, e, h, u);
        case CONCAT_INPUT:
            gemm<P>(rows, ld, d, operand<P>(rows, ld, h, scratch.rows), panels<P>(w.of_state, d), Plus{u, ld, e});
            return clear_padding(rows, s.d_model, ld, ld, u);
        case DIAGONAL:
            for (int64_t i = 0; i < n; i += ld)
                for (int j = 0; j < ld; j += VL)
                    store(u + i + j, load(w.state_factor + j) * load(h + i + j) + load(w.input_factor + j) * load(e + i + j));
            return;
        case NORM_ADD:
            std::memcpy(u, h, n * sizeof(float));
            if (s.norm_kind != NO_NORM) norm(s.norm_kind, rows, s.d_model, h, w.norm, s.eps, u);
            for (int64_t i = 0; i < n; i += ld)
                for (int j = 0; j < ld; j += VL)
                    store(u + i + j, load(u + i + j) + load(w.input_factor + j) * load(e + i + j));
            return;
        default:
            std::memcpy(u, h, n * sizeof(float));
    }
}

// sums += x * y, summed over rows
inline void add_products(int rows, int ld, const float* x, const float* y, float* sums) {
    for (int j = 0; j < ld; j += VL) {
        vf sum = load(sums + j);
        for (int64_t i = 0; i < rows; i++) sum += load(x + i * ld + j) * load(y + i * ld + j);
        store(sums + j, sum);
    }
}

// From du to dh; de collects the input's.
template <class P>
inline void inject_backward(const Shape& s, const InjectionWeights<P>& w, int rows, const float* h, const float* e,
                            const float* du, InjectionGrads g, float* dh, float* de, OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model), ld = s.model_cols;
    const int64_t n = int64_t(rows) * ld;
    if (s.injection == ADD_INPUT || s.injection == CONCAT_INPUT) axpy(n, 1.0f, du, de, de);
    if (s.injection == CONCAT_INPUT) {
        weight_grads<P>(rows, {0, ld}, ld, du, g.bias, ld, h, g.of_state, true, scratch);
        gemm<P>(rows, ld, d, operand<P>(rows, ld, du, scratch.rows), panels<P>(w.of_state_t, d), Store{dh, ld});
        return clear_padding(rows, s.d_model, ld, ld, dh);
    }
    if (s.injection == DIAGONAL || s.injection == NORM_ADD) {
        add_products(rows, ld, du, e, g.input_factor);
        for (int64_t i = 0; i < n; i += ld)
            for (int j = 0; j < ld; j += VL)
                store(de + i + j, load(de + i + j) + load(w.input_factor + j) * load(du + i + j));
    }
    if (s.injection == DIAGONAL) {
        add_products(rows, ld, du, h, g.state_factor);
        for (int64_t i = 0; i < n; i += ld)
            for (int j = 0; j < ld; j += VL) store(dh + i + j, load(w.state_factor + j) * load(du + i + j));
    } else if (s.injection == NORM_ADD && s.norm_kind != NO_NORM) {
        norm_backward(s.norm_kind, rows, s.d_model, h, du, w.norm, s.eps, g.norm, dh, false);
    } else {
        std::memcpy(dh, du, n * sizeof(float));
    }
}

// Of the input's share: from de, the gradient of what prepare_input made of e, to that of e, in `out`.
template <class P>
inline void prepare_input_backward(const Shape& s, const InjectionWeights<P>& w, int rows, const float* e,
                                   const float* de, InjectionGrads g, float* out, OperandScratch<P> scratch) {
    const int d = cells_of<P>(s.d_model), ld = s.model_cols;
    weight_grads<P>(rows, {0, ld}, ld, de, nullptr, ld, e, g.of_input, true, scratch);
    gemm<P>(rows, ld, d, operand<P>(rows, ld, de, scratch.rows), panels<P>(w.of_input_t, d), Store{out, ld});
}

}  // namespace
