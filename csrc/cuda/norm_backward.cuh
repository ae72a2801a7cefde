// Gradient of a norm's input, and of its weight and bias summed over the program's rows.
//
//     unit = (x - mean) / deviation     dw += sum dy unit     db += sum dy
//     dx = (g - unit mean(g unit) - mean(g)) / deviation,  g = dy w        (rmsnorm: mean 0, no last term)
#pragma once
#include "norm.cuh"

namespace shift_cuda {

// x: what the norm read. dy(row, column) gives pairs of columns, zero in pads; out(row, column, dx) may replace
// what dy reads. dv: [2][d_model] of this program in device memory, the same thread for the same column each time.
template <class A, class T, class Dy, class Out>
__device__ inline void norm_backward(const Program<A, T>& p, Tile x, const float* weight, float* dv, Dy dy, Out out) {
    const int d = p.d();
    if (p.c().norm == NO_NORM) {
        p.each_pair([&](int r, int j) { out(r, j, dy(r, j)); });
        return;
    }
    sync_warp();  // all lanes have read those of the norm before
    for (int r = warp(); r < p.rows(); r += p.warps()) {
        const Moments m = moments(x.row(r), p.c());
        if (lane() == 0) p.mean()[r] = m.mean, p.inverse()[r] = m.inverse;
    }
    p.sync();
    for (int j = 2 * threadIdx.x; j < d; j += 2 * p.threads()) {
        float2 dw = load<float2>(dv + j), db = load<float2>(dv + d + j);
        for (int r = 0; r < p.inside; r++) {
            const float2 v = load<float2>(x.row(r) + j), g = dy(r, j);
            dw.x += g.x * (v.x - p.mean()[r]) * p.inverse()[r], dw.y += g.y * (v.y - p.mean()[r]) * p.inverse()[r];
            db.x += g.x, db.y += g.y;
        }
        store(dv + j, dw);
        store(dv + d + j, db);
    }
    p.sync();
    for (int r = warp(); r < p.rows(); r += p.warps()) {
        const float mean = p.mean()[r], inverse = p.inverse()[r];
        const auto unit_of = [&](int j) {
            const float2 v = load<float2>(x.row(r) + j);
            return make_float2((v.x - mean) * inverse, (v.y - mean) * inverse);
        };
        const auto g_of = [&](int j) {
            const float2 g = dy(r, j), w = load<float2>(weight + j);
            return make_float2(g.x * w.x, g.y * w.y);
        };
        float along = 0.0f, constant = 0.0f;
        for (int j = 2 * lane(); j < d; j += 64) {
            const float2 u = unit_of(j), g = g_of(j);
            along += g.x * u.x + g.y * u.y;
            constant += g.x + g.y;
        }
        along = sum_over_lanes(along) / d;
        constant = p.c().norm == LAYERNORM ? sum_over_lanes(constant) / d : 0.0f;
        for (int j = 2 * lane(); j < d; j += 64) {
            const float2 u = unit_of(j), g = g_of(j);
            out(r, j, make_float2((g.x - u.x * along - constant) * inverse, (g.y - u.y * along - constant) * inverse));
        }
    }
}

}  // namespace shift_cuda
