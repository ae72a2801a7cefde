// Gradient of the MLP's input, `ff_chunk` hidden columns at a time:
//
//     da = dy W2_c     pre = xn W1_c^T + b, again     dpre = da f'(pre)     dx += dpre W1_c
//
// act and dpre go to device memory too, for the weights' gradients.
#pragma once
#include "mlp.cuh"

namespace shift_cuda {

// dx += gradient of xn. act, dpre: rows of this program.
template <class A, class T>
__device__ __forceinline__ void mlp_backward(const InMemory<A, T>& dx, Rows<T> xn, Rows<T> dy, const Weights<T>& w,
                                             Rows<T> act, Rows<T> dpre) {
    const Program<A, T>& p = dx.p;
    const int ff = int(p.p().ff_pad), chunk = int(p.p().ff_chunk), ld = p.job.at.ld_work, d = p.d();
    const int64_t f = p.c().activation;
    const bool gated = is_gated(f);
    const int parts = int(hidden_parts(p.c()));
    // dpre takes the place of da where each has one number.
    const Rows<T> local = {p.work() + (gated ? chunk : 0), ld, false};
    for (int first = 0; first < ff; first += chunk) {
        const int n = smaller(chunk, ff - first);
        // da = dy W2_c
        multiply<true>(p, dy, w.down() + first, ff, n, d, [&](int r, int j, float2 x, float2 y) {
            store(p.work() + r * ld + j, pack<T>(x.x, x.y));
            store(p.work() + r * ld + j + 8, pack<T>(y.x, y.y));
        });
        const auto keep = [&](Rows<T> to, int r, int column, uint32_t pair) {
            if (r < p.inside) store(to.at + int64_t(r) * to.ld + column, pair);
        };
        // pre again; act and dpre
        project_up(p, xn, w, first, n, [&](int r, int j, float2 x, float2 y) {
            T* to = local.at + r * local.ld + j;
            if (gated) {
                const int column = j / 16 * 8 + j % 8;
                const float2 da = unpack<T>(load<uint32_t>(p.work() + r * ld + column));
                const Gated g = gated_backward(f, x, y, da);
                const uint32_t gate = pack<T>(g.gate.x, g.gate.y), value = pack<T>(g.value.x, g.value.y);
                store(to, gate);
                store(to + 8, value);
                keep(act, r, first + column, pack<T>(g.act.x, g.act.y));
                keep(dpre, r, first + column, gate);
                keep(dpre, r, ff + first + column, value);
            } else {
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    float2 da = unpack<T>(load<uint32_t>(to + 8 * side));
                    const float2 a = activate_backward(f, side ? y : x, da);
                    const uint32_t pre = pack<T>(da.x, da.y);
                    store(to + 8 * side, pre);
                    keep(act, r, first + j + 8 * side, pack<T>(a.x, a.y));
                    keep(dpre, r, first + j + 8 * side, pre);
                }
            }
        });
        // dx += dpre W1_c
        add_product<true>(dx, local, {w.up() + int64_t(parts) * first * d, d, d, parts * n}, 1.0f, nullptr, {});
    }
}

}  // namespace shift_cuda
