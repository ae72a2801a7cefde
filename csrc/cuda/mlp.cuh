// The MLP of the rows, `ff_chunk` hidden columns at a time:
//
//     act = f(xn W1_c^T + b)       to work; a gate and its value meet in one thread's registers
//     x += scale (act W2_c^T + b)
#pragma once
#include "activation.cuh"
#include "residual.cuh"

namespace shift_cuda {

// W1_c for the hidden columns from `first` on, for the product before it.
template <class A, class T>
__device__ inline Prefetch<T> prefetch_up(const Program<A, T>& p, const Weights<T>& w, int first) {
    const int parts = int(hidden_parts(p.c())), n = smaller(int(p.p().ff_chunk), int(p.p().ff_pad) - first);
    return {w.up() + int64_t(parts) * first * p.d(), p.d(), parts * n, p.d()};
}

// xn W1_c^T + b for the hidden columns first .. first + n: out as in multiply, columns counted from the chunk's
// first in W1's packed rows (of a gated MLP x gates, y their values).
template <class A, class T, class Out>
__device__ __forceinline__ void project_up(const Program<A, T>& p, Rows<T> xn, const Weights<T>& w, int first, int n,
                                           Out out, Prefetch<T> prefetch = {}) {
    const int parts = int(hidden_parts(p.c()));
    const float* bias = w.up_bias() + parts * first;
    multiply<false>(p, xn, w.up() + int64_t(parts) * first * p.d(), p.d(), parts * n, p.d(),
                    [&](int r, int j, float2 x, float2 y) {
                        const float2 bx = load<float2>(bias + j), by = load<float2>(bias + j + 8);
                        out(r, j, make_float2(x.x + bx.x, x.y + bx.y), make_float2(y.x + by.x, y.y + by.y));
                    },
                    prefetch);
}

// x += scale mlp(xn). after: the weights of the product that follows.
template <class A, class T>
__device__ __forceinline__ void mlp(const InMemory<A, T>& x, Rows<T> xn, const Weights<T>& w, float scale,
                                    Prefetch<T> after) {
    const Program<A, T>& p = x.p;
    const int ff = int(p.p().ff_pad), chunk = int(p.p().ff_chunk), ld = p.job.at.ld_work;
    const int64_t f = p.c().activation;
    for (int first = 0; first < ff; first += chunk) {
        const int n = smaller(chunk, ff - first);
        const Prefetch<T> down = {w.down() + first, ff, p.d(), n};
        const auto to_work = [&](int r, int j, float2 u, float2 v) {
            const float2 a = make_float2(activate(f, u.x), activate(f, u.y));
            if (is_gated(f)) {
                store(p.work() + r * ld + j / 16 * 8 + j % 8, pack<T>(a.x * v.x, a.y * v.y));
            } else {
                store(p.work() + r * ld + j, pack<T>(a.x, a.y));
                store(p.work() + r * ld + j + 8, pack<T>(activate(f, v.x), activate(f, v.y)));
            }
        };
        project_up(p, xn, w, first, n, to_work, xn.streamed ? Prefetch<T>{} : down);
        add_product<false>(x, Rows<T>{p.work(), ld, false}, down, scale, first ? nullptr : w.down_bias(),
                           xn.streamed ? Prefetch<T>{} : first + n < ff ? prefetch_up(p, w, first + n) : after);
    }
}

}  // namespace shift_cuda
