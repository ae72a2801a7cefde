// The looped block, all T loops in one call, for the instruction set that this file is compiled for.
//
// A tile is a few sequences whose rows together fill the cache, longest-looping first, so that the rows still
// running are always the first ones. A thread takes a tile through all its loops before it takes the next (where
// tiles are few and long, all threads share each: share.h):
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

#include <optional>

#include "attention_batch.h"
#include "injection.h"
#include "team.h"

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)

namespace {

// One loop on the tile's rows of h (and e): from h_{t-1} to h_t in `out`.
template <class P>
void one_loop(const Call& c, const Model<P>& m, const Workspace<P>& ws, const OperandScratch<P>& scratch,
              const Rows& rows, int64_t t, const float* h, const float* e, float* out) {
    const Shape& s = m.shape;
    const Range own = rows.share.part(rows.count, ROWS_PER_CHUNK);
    const int64_t from = int64_t(own.begin) * s.model_cols, n = int64_t(own.end - own.begin) * s.model_cols;
    if (reads_state(c)) std::memcpy(ws.state + from, h + from, n * sizeof(float));
    rows.share.each_chunk(rows.count, [&](int begin, int end) {
        const int64_t at = int64_t(begin) * s.model_cols;
        inject<P>(s, m.injection, end - begin, h + at, e + at, ws.layers[0].in + at, scratch);
    });
    for (int l = 0; l < c.n_layers; l++) {
        float* next = l + 1 < c.n_layers ? ws.layers[l + 1].in : c.loop_norm ? ws.u : out;
        layer_forward<P>({s, m.layers[l], c.rotary, ws.t, scratch, {c, t, l}}, rows, ws.layers[l], next);
    }
    if (c.loop_norm) norm(s.norm_kind, own.end - own.begin, s.d_model, ws.u + from, m.loop_norm, s.eps, out + from);
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

// Work of the first thread, which is not worth sharing.
template <class Work>
void first_alone(const Share& share, Work work) {
    share.meet();
    if (share.index == 0) work();
    share.meet();
}

constexpr Share ALONE{0, 1};

// Before a tile's loops: what they add of the input, and every row's scale.
template <class P>
void begin_tile(const Call& c, const Model<P>& m, const Sequences& tile, const Workspace<P>& ws,
                const OperandScratch<P>& scratch) {
    const bool concat = c.injection == CONCAT_INPUT;
    tile.gather(c.e, 0, tile.count, concat ? ws.own_u : ws.e);
    if (concat)
        ALONE.each_chunk(tile.rows, [&](int begin, int end) {
            const int64_t at = int64_t(begin) * tile.dp;
            prepare_input<P>(m.shape, m.injection, end - begin, ws.own_u + at, ws.e + at, scratch);
        });
    for (int i = 0; i < tile.count; i++)
        std::fill(ws.row_scale + tile.starts[i], ws.row_scale + tile.starts[i + 1],
                  c.scales ? c.scales[tile.samples[i]] : float(c.residual_scale));
}

template <class P>
void forward_tile(const Call& c, const Model<P>& m, const Sequences& tile, Workspace<P>& ws,
                  const OperandScratch<P>& scratch, const Share& share, Team& team) {
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    first_alone(share, [&] {
        begin_tile(c, m, tile, ws, scratch);
        if (c.h0 || !c.injection)
            tile.gather(c.h0 ? c.h0 : c.e, 0, tile.count, ws.h);
        else
            std::memset(ws.h, 0, all * sizeof(float));
        for (int i = 0; i < tile.count; i++) c.used[tile.samples[i]] = tile.loops(i);
    });
    bool halted = false;
    for (int64_t t = 1; t <= c.most_loops; t++) {
        const int running = halted ? 0 : tile.running(t), rows = tile.starts[running];
        if (!running && !c.return_all) break;
        if (share.stopped(team)) return;
        if (running) {
            if (c.boundaries) first_alone(share, [&] { tile.scatter(ws.h, 0, running, c.boundaries + (t - 1) * size); });
            bind(c, m.shape, tile, t, 0, ws);
            float* after = c.halting ? ws.next : ws.h;
            one_loop(c, m, ws, scratch, {{running, tile.lengths, ws.row_scale, tile.samples}, rows, share}, t, ws.h, ws.e, after);
            if (c.halting) {  // then a tile is one sequence, of one thread
                halted = settled(ws.h, after, int64_t(rows) * tile.dp, c.halt_threshold);
                if (halted) c.used[tile.samples[0]] = t;
                std::memcpy(ws.h, after, int64_t(rows) * tile.dp * sizeof(float));
            }
        }
        if (c.return_all) first_alone(share, [&] { tile.scatter(ws.h, 0, tile.count, c.out + (t - 1) * size); });
    }
    if (!c.return_all) first_alone(share, [&] { tile.scatter(ws.h, 0, tile.count, c.out); });
}

template <class P>
void backward_tile(const Call& c, const Model<P>& m, const Sequences& tile, Workspace<P>& ws,
                   const OperandScratch<P>& scratch, SliceGrads& grads, const Share& share, Team& team) {
    const Shape& s = m.shape;
    const int64_t size = c.batch * c.seq_len * c.d_model, all = int64_t(tile.rows) * tile.dp;
    first_alone(share, [&] {
        std::memset(ws.dh, 0, all * sizeof(float));
        std::memset(ws.de, 0, all * sizeof(float));
        begin_tile(c, m, tile, ws, scratch);
        // A finished sample repeats its last state, so every later output's gradient is that state's.
        if (!c.return_all) tile.gather_add(c.grad_out, 0, tile.count, ws.dh);
    });
    for (int64_t t = c.return_all ? c.most_loops : tile.count ? tile.loops(0) : 0; t >= 1; t--) {
        if (share.stopped(team)) return;
        if (c.return_all) first_alone(share, [&] { tile.gather_add(c.grad_out + (t - 1) * size, 0, tile.count, ws.dh); });
        const int begin = tile.truncated(t), end = tile.running(t);
        if (begin >= end) continue;
        const int64_t from = int64_t(tile.starts[begin]) * tile.dp;
        const Rows rows{{end - begin, tile.lengths + begin, ws.row_scale + tile.starts[begin], tile.samples + begin},
                        tile.starts[end] - tile.starts[begin], share};
        if (c.kept) {
            bind(c, s, tile, t, tile.starts[begin], ws);
        } else {
            first_alone(share, [&] { tile.gather(c.boundaries + (t - 1) * size, begin, end, ws.h); });
            one_loop(c, m, ws, scratch, rows, t, ws.h + from, ws.e + from, ws.next);
        }
        share.each_chunk(rows.count, [&](int first, int last) {
            const int64_t at = int64_t(first) * tile.dp;
            const NormGrads own = norm_grads_of_chunk(s, ws.t, first, 0);
            std::memset(own.gain, 0, 2 * s.norm_cols * sizeof(float));
            if (c.loop_norm)
                norm_backward(s.norm_kind, last - first, s.d_model, ws.u + at, ws.dh + from + at, m.loop_norm, s.eps, own,
                              ws.next + at, false);
            else
                std::memcpy(ws.next + at, ws.dh + from + at, int64_t(last - first) * tile.dp * sizeof(float));
        });
        if (c.loop_norm) first_alone(share, [&] { add_loop_norm_grads(rows.count, s, ws.t, grads.loop_norm); });
        for (int l = c.n_layers - 1; l >= 0; l--)
            layer_backward<P>({s, m.layers[l], c.rotary, ws.t, scratch, {c, t, l}}, rows, ws.layers[l], grads.layers[l], ws.next);
        if (rows.count) *grads.layers[0].begun = true;
        const auto through_injection = [&](int first, int last) {
            const int64_t at = int64_t(first) * tile.dp;
            inject_backward<P>(s, m.injection, last - first, ws.state + at, ws.e + from + at, ws.next + at, grads.injection,
                               ws.dh + from + at, ws.de + from + at, scratch);
        };
        if (reads_state(c))  // and sums gradients of its weights
            first_alone(share, [&] { ALONE.each_chunk(rows.count, through_injection); });
        else
            share.each_chunk(rows.count, through_injection);
    }
    first_alone(share, [&] {
        if (c.injection == CONCAT_INPUT) {
            tile.gather(c.e, 0, tile.count, ws.e);
            ALONE.each_chunk(tile.rows, [&](int begin, int end) {
                const int64_t at = int64_t(begin) * tile.dp;
                prepare_input_backward<P>(s, m.injection, end - begin, ws.e + at, ws.de + at, grads.injection, ws.next + at,
                                          scratch);
            });
            tile.scatter(ws.next, 0, tile.count, c.grad_e);
        } else if (c.injection) {
            tile.scatter(ws.de, 0, tile.count, c.grad_e);
        }
        // The gradient of h_0: reached where no loop was cut off.
        if (c.h0 || !c.injection) tile.scatter(ws.dh, tile.truncated(1), tile.count, c.h0 ? c.grad_h0 : c.grad_e);
    });
}

Share whole_team() {
#if defined(_OPENMP)
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
}

// The memory of the threads' tiles: each its own, or one that all share.
struct TileMemory {
    TileMemory(const Plan& plan, float* shared, int64_t floats)
        : own_(plan.together ? 0 : floats), at_{plan.together ? shared : own_.place(0)} {}
    bool ok() const { return own_.ok(); }
    Cursor& cursor() { return at_; }

  private:
    Arena own_;
    Cursor at_;
};

// A call's weights as the products read them; not ok() where memory ran out.
template <class P>
class PackedModel {
  public:
    PackedModel(const Call& c, const Use& use) : memory_(floats(c, use)) {
        if (!memory_.ok()) return;
        model_.emplace(c, use, memory_);
        model_->fill(c, use);
    }
    bool ok() const { return memory_.ok(); }
    const Model<P>& operator*() const { return *model_; }

  private:
    static int64_t floats(const Call& c, const Use& use) {
        Counter count;
        Model<P>(c, use, count);
        return count.floats;
    }
    Arena memory_;
    std::optional<Model<P>> model_;
};

// What a thread works with. sums: as many floats as each_unit() was asked for, beside the tile's.
template <class P>
struct Desk {
    float* sums;
    Workspace<P> ws;
    OperandScratch<P> scratch;
    int* starts;
};

// run(desk, i, share) for i below n, by the threads of the call: each takes one at a time, in order, or all share
// each. Returns 0, or 1 where memory ran out.
template <class P, class Run>
int each_unit(const Call& c, const Plan& plan, const Shape& s, bool backward, int64_t sums, int64_t n, Team& team, Run run) {
    const int64_t of_tile = floats_of<Workspace<P>>(c, s, plan, backward) + sums;
    const int64_t of_thread = floats_of<OperandScratch<P>>(c, s, plan, backward);
    Arena shared(plan.together ? of_tile : 0);
    if (!shared.ok()) return 1;
    float* const of_all = shared.place(0);
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(int(c.n_threads)) if (c.n_threads > 1)
    {
        const Share everyone = whole_team();
        TileMemory tile(plan, of_all, of_tile);
        Arena memory(of_thread), integers(2 * plan.most_samples + 1);
        if (!tile.ok() || !memory.ok() || !integers.ok()) failed = 1;
        everyone.meet();
        if (!failed) {
            float* const begin = tile.cursor().at;
            tile.cursor().at += sums;
            Desk<P> desk{begin, Workspace<P>(c, s, plan, tile.cursor(), backward),
                         OperandScratch<P>(c, s, plan, memory, backward), reinterpret_cast<int*>(integers.place(0))};
            if (plan.together) {
                for (int64_t i = 0; i < n; i++) run(desk, i, everyone);
            } else {
#pragma omp for schedule(monotonic : dynamic, 1) nowait
                for (int64_t i = 0; i < n; i++) run(desk, i, ALONE);
            }
        }
        team.leave(everyone.count);
    }
    return failed;
}

// Both return 0, or 1 where memory ran out.
template <class P>
int forward(const Call& c, const Plan& plan, Team& team) {
    const PackedModel<P> model(c, Use(c, plan, false));
    if (!model.ok()) return 1;
    return each_unit<P>(c, plan, (*model).shape, false, 0, plan.n_tiles, team,
                        [&](Desk<P>& desk, int64_t i, const Share& share) {
        forward_tile(c, *model, Sequences(c, plan, i, desk.starts), desk.ws, desk.scratch, share, team);
    });
}

template <class P>
int backward(const Call& c, const Plan& plan, Team& team) {
    const PackedModel<P> model(c, Use(c, plan, true));
    if (!model.ok()) return 1;
    const Shape& s = (*model).shape;
    Counter per_slice;
    bool begun;
    SliceGrads(c, s, plan, per_slice, &begun);
    const int64_t floats = per_slice.floats;
    Arena sums(floats);
    if (!sums.ok()) return 1;
    float* const total = sums.place(0);
    std::atomic<bool> any{!sums_in_place(c, plan)};
    const bool one = plan.n_slices == 1;
    const int failed = each_unit<P>(c, plan, s, true, one ? 0 : floats, plan.n_slices, team,
                                    [&](Desk<P>& desk, int64_t slice, const Share& share) {
        const Range own = share.part(floats, VL);
        if (!one) std::memset(desk.sums + own.begin, 0, (own.end - own.begin) * sizeof(float));
        Cursor cursor{one ? total : desk.sums};
        bool begun;
        SliceGrads grads(c, s, plan, cursor, &begun);
        for (int64_t i = slice; i < plan.n_tiles; i += plan.n_slices)
            backward_tile(c, *model, Sequences(c, plan, i, desk.starts), desk.ws, desk.scratch, grads, share, team);
        if (begun) any = true;
        if (one) return;
        if (share.alone()) team.begin_turn(slice);
        for (int64_t i = own.begin; i < own.end; i += VL) store(total + i, load(total + i) + load(desk.sums + i));
        if (share.alone()) team.end_turn();
    });
    if (failed) return 1;
    if (!any) clear_matrices(c, s);
    Cursor cursor{total};
    add_grads(c, s, SliceGrads(c, s, plan, cursor, &begun), c.grad_weights);
    return 0;
}

}  // namespace

extern "C" {
int JOIN(shift_attention, SHIFT_ISA)(const AttentionCall* call, bool backward) {
    return backward ? attention_backward(*call) : attention_forward(*call);
}

int JOIN(shift_forward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? forward<BF16>(*call, *plan, *team) : forward<F32>(*call, *plan, *team);
}

int JOIN(shift_backward, SHIFT_ISA)(const Call* call, const Plan* plan, Team* team) {
    return call->bf16 ? backward<BF16>(*call, *plan, *team) : backward<F32>(*call, *plan, *team);
}
}
