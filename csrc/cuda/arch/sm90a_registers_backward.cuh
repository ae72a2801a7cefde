// Backward with the residual stream, then the gradients of branches' inputs in registers (sm90a_registers.cuh).
//
// Of 232 registers a thread: dx d / 2, xn and dy d / 4 each, da and a product's result 32 each. A norm's input and its
// gradient, d / 2 each, are there while no branch is. dh is in device memory, which L2 holds, as ever.
#pragma once
#include "../resident_backward.cuh"
#include "sm90a_registers.cuh"

namespace shift_cuda {

// Rows of d_model columns, as this thread has put them; the last that exists stands for those that do not, whose results
// go nowhere. So there is no branch, in which ptxas would have to make ready for wgmma (C7520).
template <class T, class S>
__device__ __forceinline__ Fragments<T, InRegisters<T, S>::TILES> loaded(const InRegisters<T, S>& x, Rows<T> rows) {
    Fragments<T, InRegisters<T, S>::TILES> a;
    x.each([&](At at) {
        const int row = smaller(at.row, x.p.inside - 1);
        a.word(at.index) = load<uint32_t>(rows.at + int64_t(row) * rows.ld + at.column);
    });
    return a;
}

template <class T, class S, class Dy, class Out>
__device__ __forceinline__ void norm_backward(const InRegisters<T, S>& dx, ScratchState x, const float* weight, float* dv,
                                              Dy dy, Out out) {
    constexpr int D = InRegisters<T, S>::D;
    const Program<Sm90a, T>& p = dx.p;
    if (p.c().norm == NO_NORM) {
        dx.each([&](At at) { out(at, dy(at)); });
        return;
    }
    Numbers<S> units, gradients;
    InRegisters<T, S> unit{p, units}, g{p, gradients};
    unit.each([&](At at) {
        unit.put(at, x.get(at.row, at.column));
        g.put(at, dy(at));
    });
    Moments m[2] = {};
    moments(unit, m);
    unit.each([&](At at) {
        const Moments of = m[at.index % 2];
        const float2 v = unit.get(at);
        unit.put(at, make_float2((v.x - of.mean) * of.inverse, (v.y - of.mean) * of.inverse));
    });
    // Sums over the warp's rows, then over all warps'.
    float* const sums = p.template shared<float>(p.job.at.work);  // [warps][dw, db][D]
    p.sync();                                                     // all are done with what was in work
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        float2 dw = make_float2(0.0f, 0.0f), db = dw;
#pragma unroll
        for (int second = 0; second < 2; second++) {
            if (p.band_begin() + lane() / 4 + 8 * second >= p.inside) continue;
            const At at = {0, 0, 2 * j + second};
            const float2 u = unit.get(at), v = g.get(at);
            dw.x += v.x * u.x, dw.y += v.y * u.y;
            db.x += v.x, db.y += v.y;
        }
        dw = make_float2(sum_over_lanes<32, 4>(dw.x), sum_over_lanes<32, 4>(dw.y));
        db = make_float2(sum_over_lanes<32, 4>(db.x), sum_over_lanes<32, 4>(db.y));
        float* const to = sums + 2 * warp() * D + 8 * j + lane() * 2;
        if (lane() < 4) store(to, dw), store(to + D, db);
    }
    p.sync();
    add_sums(p, sums, D, 0, D, dv);
    p.sync();
    float along[2] = {}, constant[2] = {};
    g.each([&](At at) {
        const float2 u = unit.get(at), v = g.get(at), w = load<float2>(weight + at.column);
        const float2 gw = make_float2(v.x * w.x, v.y * w.y);
        along[at.index % 2] += gw.x * u.x + gw.y * u.y;
        constant[at.index % 2] += gw.x + gw.y;
        g.put(at, gw);
    });
#pragma unroll
    for (int h = 0; h < 2; h++) {
        along[h] = sum_over_lanes<4>(along[h]) / D;
        constant[h] = p.c().norm == LAYERNORM ? sum_over_lanes<4>(constant[h]) / D : 0.0f;
    }
    g.each([&](At at) {
        const int h = at.index % 2;
        out(at, through_norm(g.get(at), unit.get(at), along[h], constant[h], m[h].inverse));
    });
}

// Chunks of 64 hidden columns (plan.h).
template <class T, class S>
__device__ __forceinline__ void mlp_backward(InRegisters<T, S>& dx, Rows<T> xn_rows, Rows<T> dy_rows,
                                             const Weights<T>& w, Rows<T> act, Rows<T> dpre) {
    constexpr int SIDE = int(SUBTILE_SIDE), PARTS = InRegisters<T, S>::PARTS;
    const Program<Sm90a, T>& p = dx.p;
    const int ff = int(p.p().ff_pad);
    const int64_t f = p.c().activation;
    const auto xn = loaded(dx, xn_rows), dy = loaded(dx, dy_rows);
    float acc[32];
#pragma unroll 1
    for (int first = 0; first < ff; first += SIDE) {
        const int n = PARTS * (ff % SIDE ? smaller(SIDE, ff - first) : SIDE);
        project_64<MN_MAJOR>(p, acc, dy);
        Fragments<T, 1> da;  // for their room, and as in other kernels
#pragma unroll
        for (int i = 0; i < 16; i++) da.put(At{0, 0, i}, make_float2(acc[2 * i], acc[2 * i + 1]));
        Fragments<T, PARTS> d_pre;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (SIDE * part < n) project_64<K_MAJOR>(p, acc, xn);
            // As in mlp.
            const float* bias = w.up_bias() + PARTS * first + SIDE * part + lane() % 4 * 2;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int columns = i / 2 * 16, pair = i / 2 * 4 + i % 2, row = p.band_begin() + lane() / 4 + i % 2 * 8;
                if (SIDE * part + columns >= n) continue;
                const auto keep = [&](Rows<T> to, int column, uint32_t x) {
                    if (row < p.inside) store(to.at + int64_t(row) * to.ld + column + lane() % 4 * 2, x);
                };
                const float2 bu = load<float2>(bias + columns), bv = load<float2>(bias + columns + 8);
                const float2 u = make_float2(acc[2 * pair] + bu.x, acc[2 * pair + 1] + bu.y);
                const float2 v = make_float2(acc[2 * pair + 4] + bv.x, acc[2 * pair + 5] + bv.y);
                if (PARTS == 2) {
                    const int column = SIDE / 2 * part + columns / 2;
                    const Gated g = gated_backward(f, u, v, unpack<T>(da.word(column / 4 + i % 2)));
                    const uint32_t gate = pack<T>(g.gate.x, g.gate.y), value = pack<T>(g.value.x, g.value.y);
                    d_pre.word(16 * part + pair) = gate;
                    d_pre.word(16 * part + pair + 2) = value;
                    keep(act, first + column, pack<T>(g.act.x, g.act.y));
                    keep(dpre, first + column, gate);
                    keep(dpre, ff + first + column, value);
                } else {
#pragma unroll
                    for (int side = 0; side < 2; side++) {
                        float2 d = unpack<T>(da.word(pair + 2 * side));
                        const float2 a = activate_backward(f, side ? v : u, d);
                        const uint32_t x = pack<T>(d.x, d.y);
                        d_pre.word(pair + 2 * side) = x;
                        keep(act, first + columns + 8 * side, pack<T>(a.x, a.y));
                        keep(dpre, first + columns + 8 * side, x);
                    }
                }
            }
        }
        int stages[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (SIDE * i < n) stages[i] = next_stage(p);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (SIDE * i < n) start_sum<MN_MAJOR, T>(dx.numbers.of, d_pre.of[i], stage_at(p, stages[i]));
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (SIDE * i < n) give_back(p, stages[i]);
    }
}

}  // namespace shift_cuda
