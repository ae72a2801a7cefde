// The looped block, all T loops in one call, for the instruction set that this file is compiled for.
//
// A tile is a few sequences whose rows together fill the cache, longest-looping first, so that the rows still
// running are always the first ones. A thread takes a tile through all its loops before it takes the next:
// the residual stream and everything a loop computes stay in L2 (about 150 d_model bytes a row), the packed
// weights are read T times from there too. The backward walks the loops down from what the forward kept of
// each (about 40 d_model bytes a row and loop, in bfloat16 24), or from the boundaries alone, computing each
// again. Weight gradients are summed within a slice (a fixed share of the tiles) in order, and over the slices
// in order, each as soon as those before it are: the same bits for any number of threads. All code is there
// twice: matrix products with weights in float32, or with operands rounded to bfloat16 (P in operand.h); what is
// not such a product is float32 in both.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "injection.h"
#include "team.h"

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)

namespace {

// One loop on `rows` rows of h (and e): from h_{t-1} to h_t in `out`.
template <class P>
void one_loop(const Call& c, const Model<P>& m, Workspace<P>& ws, Lengths seqs, int rows, const float* h,
              const float* e,
              float* out) {
    const Shape& s = m.shape;
    const int64_t n = int64_t(rows) * s.model_cols;
    if (reads_state(c)) std::memcpy(ws.state, h, n * sizeof(float));
    inject<P>(s, m.injection, rows, h, e, ws.layers[0].in, ws.scratch);
    for (int l = 0; l < c.n_layers; l++) {
        float* next = l + 1 < c.n_layers ? ws.layers[l + 1].in : c.loop_norm ? ws.u : out;
        layer_forward<P>(s, m.layers[l], c.rotary, seqs, rows, ws.layers[l], next, ws.scratch);
    }
    if (c.loop_norm) norm(s.norm_kind, rows, s.d_model, ws.u, m.loop_norm, s.eps, out);
}

// Whether rms(new - old) < threshold * rms(old).
bool settled(const float* before, const float* after, int64_t n, double threshold) {
    double change = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        const double step = double(after[i]) - before[i];
        change += step * step, size += double(before[i]) * before[i];
    }
    return std::sqrt(change) < threshold * std::sqrt(size);
}

// Before a tile's loops: what they add of the input, and every row's scale.
template <class P>
void begin_tile(const Call& c, const Model<P>& m, const Sequences& tile, Workspace<P>& ws) {
    const bool concat = c.injection == CONCAT_INPUT;
    tile.gather(c.e, 0, tile.count, concat ? ws.own_u : ws.e);
    if (concat) prepare_input<P>(m.shape, m.injection, tile.rows, ws.own_u, ws.e, ws.scratch);
    for (int i = 0; i < tile.count; i++)
        std::fill(ws.row_scale + tile.starts[i], ws.row_scale + tile.starts[i + 1],
                  c.scales ? c.scales[tile.samples[i]] : float(c.residual_scale));
}

template <class P>
void forward_tile(const Call& c, const Model<P>& m, const Sequences& tile, Workspace<P>& ws, Team& team) {
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    begin_tile(c, m, tile, ws);
    if (c.h0 || !c.injection)
        tile.gather(c.h0 ? c.h0 : c.e, 0, tile.count, ws.h);
    else
        std::memset(ws.h, 0, all * sizeof(float));
    bool halted = false;
    for (int i = 0; i < tile.count; i++) c.used[tile.samples[i]] = tile.loops(i);
    for (int64_t t = 1; t <= c.most_loops; t++) {
        const int running = halted ? 0 : tile.running(t), rows = tile.starts[running];
        if (!running && !c.return_all) break;
        if (team.stopped()) return;
        if (running) {
            if (c.boundaries) tile.scatter(ws.h, 0, running, c.boundaries + (t - 1) * size);
            bind(c, m.shape, tile, t, 0, ws);
            float* after = c.halting ? ws.layers[0].z2 : ws.h;  // z2 is free once its loop is over
            one_loop(c, m, ws, {running, tile.lengths, ws.row_scale}, rows, ws.h, ws.e, after);
            if (c.halting) {  // then a tile is one sequence
                halted = settled(ws.h, after, int64_t(rows) * tile.dp, c.halt_threshold);
                if (halted) c.used[tile.samples[0]] = t;
                std::memcpy(ws.h, after, int64_t(rows) * tile.dp * sizeof(float));
            }
        }
        if (c.return_all) tile.scatter(ws.h, 0, tile.count, c.out + (t - 1) * size);
    }
    if (!c.return_all) tile.scatter(ws.h, 0, tile.count, c.out);
}

template <class P>
void backward_tile(const Call& c, const Model<P>& m, const Sequences& tile, Workspace<P>& ws, SliceGrads& grads,
                   Team& team) {
    const Shape& s = m.shape;
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    std::memset(ws.dh, 0, all * sizeof(float));
    std::memset(ws.de, 0, all * sizeof(float));
    begin_tile(c, m, tile, ws);
    // A finished sample repeats its last state, so every later output's gradient is that state's.
    if (!c.return_all) tile.gather_add(c.grad_out, 0, tile.count, ws.dh);
    for (int64_t t = c.return_all ? c.most_loops : tile.count ? tile.loops(0) : 0; t >= 1; t--) {
        if (team.stopped()) return;
        if (c.return_all) tile.gather_add(c.grad_out + (t - 1) * size, 0, tile.count, ws.dh);
        const int begin = tile.truncated(t), end = tile.running(t);
        if (begin >= end) continue;
        const int rows = tile.starts[end] - tile.starts[begin];
        const int64_t from = int64_t(tile.starts[begin]) * tile.dp, n = int64_t(rows) * tile.dp;
        const Lengths seqs = {end - begin, tile.lengths + begin, ws.row_scale + tile.starts[begin]};
        if (c.kept) {
            bind(c, s, tile, t, tile.starts[begin], ws);
        } else {
            tile.gather(c.boundaries + (t - 1) * size, begin, end, ws.h);
            one_loop(c, m, ws, seqs, rows, ws.h + from, ws.e + from, ws.dx);
        }
        if (c.loop_norm)
            norm_backward(s.norm_kind, rows, s.d_model, ws.u, ws.dh + from, m.loop_norm, s.eps, grads.loop_norm, ws.dx,
                          false);
        else
            std::memcpy(ws.dx, ws.dh + from, n * sizeof(float));
        for (int l = c.n_layers - 1; l >= 0; l--)
            layer_backward<P>(s, m.layers[l], c.rotary, seqs, rows, ws.layers[l], grads.layers[l], ws.t, ws.dx,
                              ws.scratch);
        inject_backward<P>(s, m.injection, rows, ws.state, ws.e + from, ws.dx, grads.injection, ws.dh + from,
                           ws.de + from, ws.scratch);
    }
    if (c.injection == CONCAT_INPUT) {
        tile.gather(c.e, 0, tile.count, ws.e);
        prepare_input_backward<P>(s, m.injection, tile.rows, ws.e, ws.de, grads.injection, ws.dx, ws.scratch);
        tile.scatter(ws.dx, 0, tile.count, c.grad_e);
    } else if (c.injection) {
        tile.scatter(ws.de, 0, tile.count, c.grad_e);
    }
    // The gradient of h_0: reached where no loop was cut off.
    if (c.h0 || !c.injection) tile.scatter(ws.dh, tile.truncated(1), tile.count, c.h0 ? c.grad_h0 : c.grad_e);
}

int team_size() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Both return 0, or 1 where memory ran out.
template <class P>
int forward(const Call& c, const Plan* plan, Team& team) {
    Counter count;
    Model<P>(c, count, false);
    Arena weights(count.floats);
    if (!weights.ok()) return 1;
    Model<P> model(c, weights, false);
    model.fill(c, false);
    const int64_t floats = workspace_floats<P>(c, model.shape, plan->most_rows, false);
    int failed = 0;
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1) reduction(| : failed)
    {
        Arena memory(floats), integers(2 * plan->most_samples + 1);
        failed |= !memory.ok() || !integers.ok();
        if (memory.ok() && integers.ok()) {
            Workspace<P> ws(c, model.shape, plan->most_rows, memory, false);
            int* starts = reinterpret_cast<int*>(integers.place(0));
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < plan->n_tiles; i++)
                forward_tile(c, model, Sequences(c, *plan, i, starts), ws, team);
        }
        team.leave(team_size());
    }
    return failed;
}

template <class P>
int backward(const Call& c, const Plan* plan, Team& team) {
    Counter count;
    Model<P>(c, count, true);
    Arena weights(count.floats);
    if (!weights.ok()) return 1;
    Model<P> model(c, weights, true);
    model.fill(c, true);
    const Shape& s = model.shape;
    Counter per_slice;
    SliceGrads(c, s, per_slice);
    const int64_t slices = plan->n_slices, floats = workspace_floats<P>(c, s, plan->most_rows, true);
    Arena sums(per_slice.floats);
    if (!sums.ok()) return 1;
    float* total = sums.place(0);
    int failed = 0;
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1) reduction(| : failed)
    {
        Arena memory(floats), integers(2 * plan->most_samples + 1), gradients(per_slice.floats, false);
        const bool ok = memory.ok() && integers.ok() && gradients.ok();
        failed |= !ok;
        Workspace<P> ws(c, s, plan->most_rows, memory, true);
        Cursor cursor{gradients.place(0)};
        float* const slice_total = cursor.at;
        SliceGrads grads(c, s, cursor);
        int* starts = reinterpret_cast<int*>(integers.place(0));
#pragma omp for schedule(monotonic : dynamic, 1) nowait
        for (int64_t slice = 0; slice < slices; slice++) {
            if (ok) std::memset(slice_total, 0, per_slice.floats * sizeof(float));
            for (int64_t i = slice; ok && i < plan->n_tiles; i += slices)
                backward_tile(c, model, Sequences(c, *plan, i, starts), ws, grads, team);
            team.begin_turn(slice);
            for (int64_t i = 0; ok && i < per_slice.floats; i += VL)
                store(total + i, load(total + i) + load(slice_total + i));
            team.end_turn();
        }
        team.leave(team_size());
    }
    if (failed) return 1;
    Cursor cursor{total};
    add_grads(c, s, SliceGrads(c, s, cursor), c.grad_weights);
    return 0;
}

}  // namespace

extern "C" {
int JOIN(shift_forward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? forward<BF16>(*call, plan, *team) : forward<F32>(*call, plan, *team);
}

int JOIN(shift_backward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? backward<BF16>(*call, plan, *team) : backward<F32>(*call, plan, *team);
}
}
