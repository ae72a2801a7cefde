// Gradient of a norm's input, and of its weight and bias summed over the program's rows.
//
//     unit = (x - mean) / deviation     dw += sum dy unit     db += sum dy
//     dx = (g - unit mean(g unit) - mean(g)) / deviation,  g = dy w        (rmsnorm: mean 0, no last term)
#pragma once
#include "norm.cuh"

namespace shift_cuda {

// Adds to dv, [2][d_model] of this block in device memory, what each warp's sums have for n columns from `first` on; the
// same thread has the same column each time.
template <class A, class T>
__device__ inline void add_sums(const Program<A, T>& p, const float* sums, int columns, int first, int n, float* dv) {
    for (int i = threadIdx.x; i < 2 * n; i += p.threads()) {
        const int bias = i >= n, j = i - bias * n;
        float total = dv[bias * p.d() + first + j];
        for (int of = 0; of < p.warps(); of++) total += sums[(2 * of + bias) * columns + j];
        dv[bias * p.d() + first + j] = total;
    }
}

// dx of a pair of columns.
__device__ inline float2 through_norm(float2 g, float2 unit, float along, float constant, float inverse) {
    return make_float2((g.x - unit.x * along - constant) * inverse, (g.y - unit.y * along - constant) * inverse);
}

// x: what the norm read. dy(at) gives pairs of columns, zero in pads; out(at, dx) may replace what dy reads. A warp adds
// up its own rows, then the block adds up the warps' sums; work, which is free here, holds these.
template <class A, class T, class Dy, class Out>
__device__ inline void norm_backward(const InMemory<A, T>& dx, ScratchState x, const float* weight, float* dv, Dy dy,
                                     Out out) {
    const Program<A, T>& p = dx.p;
    const int d = p.d();
    if (p.c().norm == NO_NORM) {
        dx.each([&](At at) { out(at, dy(at)); });
        return;
    }
    sync_warp();  // all lanes have read those of the norm before
    p.each_row([&](int r) {
        const Moments m = moments(x, r, p.c());
        if (lane() == 0) p.mean()[r] = m.mean, p.inverse()[r] = m.inverse;
    });
    sync_warp();
    const int columns = p.job.at.norm_columns;
    float* const sums = p.template shared<float>(p.job.at.work);  // [warps][dw, db][columns]
    for (int first = 0; first < d; first += columns) {
        const int n = smaller(columns, d - first);
        p.sync();  // all have read the sums before, or what else was in work
        for (int j = 2 * lane(); j < n; j += 64) {
            float2 dw = make_float2(0.0f, 0.0f), db = dw;
            p.each_row([&](int r) {
                if (r >= p.inside) return;
                const float2 v = x.get(r, first + j), g = dy(At{r, first + j, 0});
                const float mean = p.mean()[r], inverse = p.inverse()[r];
                dw.x += g.x * (v.x - mean) * inverse, dw.y += g.y * (v.y - mean) * inverse;
                db.x += g.x, db.y += g.y;
            });
            store(sums + 2 * warp() * columns + j, dw);
            store(sums + (2 * warp() + 1) * columns + j, db);
        }
        p.sync();
        add_sums(p, sums, columns, first, n, dv);
    }
    if (p.bands() > 1) p.sync();  // as the first; what follows has a barrier of the band alone
    p.each_row([&](int r) {
        const float mean = p.mean()[r], inverse = p.inverse()[r];
        const auto unit_of = [&](int j) {
            const float2 v = x.get(r, j);
            return make_float2((v.x - mean) * inverse, (v.y - mean) * inverse);
        };
        const auto g_of = [&](int j) {
            const float2 g = dy(At{r, j, 0}), w = load<float2>(weight + j);
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
            out(At{r, j, 0}, through_norm(g, u, along, constant, inverse));
        }
    });
}

}  // namespace shift_cuda
