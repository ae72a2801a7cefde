// Epilogues of a layer's products: what is done with the sums while they are in registers.
#pragma once
#include "ops/activation.h"
#include "scratch.h"

namespace {

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

}  // namespace
