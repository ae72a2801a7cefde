// The MLP of the rows, `ff_chunk` hidden columns at a time:
//
//     act = f(xn W1_c^T + b)       to work; with swiglu a gate and its value meet in one thread's registers
//     tile += scale (act W2_c^T + b)
#pragma once
#include "matmul.cuh"

namespace shift_cuda {

// y = f(x), with swiglu f(x) times the value; slope is f'(x).
__device__ inline float activate(int64_t activation, float x, float& slope) {
    if (activation == RELU) {
        slope = x > 0.0f ? 1.0f : 0.0f;
        return x > 0.0f ? x : 0.0f;
    }
    if (activation == GELU) {
        const float share = 0.5f * (1.0f + erff(x * 0.7071067811865476f));
        slope = share + x * 0.3989422804014327f * exp2_approx(-0.5f * LOG2_E * x * x);
        return x * share;
    }
    // x sigmoid(z): tanh(z) = 2 sigmoid(2 z) - 1, so that gelu_tanh is x sigmoid(2 z).
    const bool swiglu = activation == SWIGLU;
    const float z = swiglu ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const float dz = swiglu ? 1.0f : 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    const float share = 1.0f / (1.0f + exp2_approx(-LOG2_E * z));
    slope = share + x * share * (1.0f - share) * dz;
    return x * share;
}

// W1_c for the hidden columns from `first` on, for the product before it.
template <class T>
__device__ inline Ahead<T> up_ahead(const Program<T>& p, const Weights<T>& w, int first) {
    const int parts = int(hidden_parts(p.c())), n = smaller(int(p.p().ff_chunk), int(p.p().ff_pad) - first);
    return {w.up() + int64_t(parts) * first * p.d(), p.d(), parts * n, p.d()};
}

// xn W1_c^T + b for the hidden columns first .. first + n: out as in multiply, columns counted from the chunk's
// first in W1's packed rows (with swiglu x gates, y their values).
template <class T, class Out>
__device__ __forceinline__ void project_up(const Program<T>& p, Rows<T> xn, const Weights<T>& w, int first, int n,
                                           Out out, Ahead<T> ahead = {}) {
    const int parts = int(hidden_parts(p.c()));
    const float* bias = w.up_bias() + parts * first;
    multiply<false>(p, xn, w.up() + int64_t(parts) * first * p.d(), p.d(), parts * n, p.d(),
                    [&](int r, int j, float2 x, float2 y) {
                        const float2 bx = load<float2>(bias + j), by = load<float2>(bias + j + 8);
                        out(r, j, make_float2(x.x + bx.x, x.y + bx.y), make_float2(y.x + by.x, y.y + by.y));
                    },
                    ahead);
}

// tile += scale mlp(xn). after: the weights of the product that follows.
template <class T>
__device__ __forceinline__ void mlp(const Program<T>& p, Rows<T> xn, const Weights<T>& w, float scale, Ahead<T> after) {
    const int ff = int(p.p().ff_pad), chunk = int(p.p().ff_chunk), ld = chunk + int(PAD);
    const int64_t f = p.c().activation;
    for (int first = 0; first < ff; first += chunk) {
        const int n = smaller(chunk, ff - first);
        const Ahead<T> down = {w.down() + first, ff, p.d(), n};
        const auto to_work = [&](int r, int j, float2 x, float2 y) {
            float slope;
            float2 a = make_float2(activate(f, x.x, slope), activate(f, x.y, slope));
            if (f == SWIGLU) {
                store(p.work() + r * ld + j / 16 * 8 + j % 8, pack<T>(a.x * y.x, a.y * y.y));
            } else {
                store(p.work() + r * ld + j, pack<T>(a.x, a.y));
                store(p.work() + r * ld + j + 8, pack<T>(activate(f, y.x, slope), activate(f, y.y, slope)));
            }
        };
        project_up(p, xn, w, first, n, to_work, xn.streamed ? Ahead<T>{} : down);
        const float* bias = first ? nullptr : w.down_bias();
        multiply<false>(
            p, Rows<T>{p.work(), ld, false}, down.b, down.ld, down.n, down.k,
            [&](int r, int j, float2 x, float2 y) { add_to_tile(p.tile(), r, j, x, y, scale, bias); },
            xn.streamed ? Ahead<T>{} : first + n < ff ? up_ahead(p, w, first + n) : after);
    }
}

}  // namespace shift_cuda
