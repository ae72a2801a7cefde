// What fits on chip: the only place that knows. Shared by the launcher and, through shift_cuda_plan, by Python.
//
// A program owns `rows` tokens: whole sequences, or its share of one that is split over `split` programs. Its shared
// memory, in bytes (leading dimensions are 8 numbers more than their columns, so that the rows that ldmatrix reads at
// once lie in different banks):
//
//   both      tile    rows (d_model + 8) 4      fp32: the residual stream; backward: a branch's input gradient.
//                                               Where that does not fit it lies in the workspace, which L2 holds.
//             spans   rows 8                    the keys that each row may see, as an interval
//             sums    128                       one reduction over the warps
//   forward   xn      rows (d_model + 8) 2      the branch's input as matmul operand
//             work    rows (most + 8) 2         q, k, v of `kv_heads` heads, or `ff_chunk` hidden columns
//             ring    stages 128 72 2           weight tiles under way
//   backward  work    rows (most + 8) 2         q, k, v, do, dq, dk, dv, or da and dpre; or a norm's sums
//             scores  query heads rows 8        each row's softmax normaliser and sum of o do
//             moments rows 8                    of the norm that is being differentiated
//             ring    stages (128 72 2 + rows 72 2)   weight tiles, and xn or dy, which come from device memory
//
// Of what fits it takes the widest work, for the fewest passes over the tile, that leaves room for three weight
// tiles; only where nothing does, two. Hidden columns fill what the heads take anyhow. Rows are a multiple of 16; as
// many whole sequences as fit 128 of them, with the tile in shared memory, or else in the workspace.
//
// The kernels for sm_90a (kernels.cuh; bf16 alone) have as many rows as tokens, and instead of the ring
//
//   both      ring    stages (128 64 2 + 16) + 32     weight tiles with two mbarriers each, and two more; where weights
//                                                     stay for all loops and rows are more than 64: tiles of 64 64 2
//   forward   remote  remote_rows (2 kv_heads head_dim + 8) 2   where a sequence is split: keys and values on their
//                                                     way from another block of the cluster, 16 rows or as many of
//                                                     the block's as the ring leaves room for
//   backward  remote  remote_rows (2 query columns + 8) 2       the same, or queries and gradients of their output
//
// Their kernels for one shape may have the residual stream in registers, with the MLP's hidden columns and up to 128
// columns of its normalised copy: no tile, xn of 128 rows without the 8 where there are more columns, work is what
// attention takes, and a stage is all of d_model, of 64 rows or columns of a weight.
//
// They take the first of these that fits:
//   0. one shape, up to 256 columns (a backward 128, with gates 64): as many whole sequences as fit 128 rows and more
//      than 64, x in registers;
//   1. whole sequences in up to 128 rows, or else in up to 64, with a stage for every tile of a loop, so that weights
//      are read once for all loops;
//   2. as many whole sequences as fit 128 rows, the tile in shared memory;
//   3. a sequence over 2 blocks, or else over 4, of more than 16 rows each;
//   4. as 2, but for the tile, which is in the workspace;
//   5. as 2 to 4, but with room for two weight tiles only.
#pragma once
#include <initializer_list>

#include "call.h"

namespace shift_cuda {

// sm_90a: threads that own rows, that stream weights; a warpgroup of them where it can give its registers to the others.
constexpr int64_t CONSUMERS = 256, PRODUCERS = 32, PRODUCERS_OF_REGISTERS = 128;
constexpr int64_t MOST_ROWS = 128;       // 16 warps, four for 32 rows
constexpr int64_t MOST_HEAD_DIM = 128;   // a warp holds a head's output for 16 rows in registers
constexpr int64_t TILE_N = 128, TILE_K = 64, PAD = 8;  // a weight tile; numbers between the ends of two rows
constexpr int64_t OPERAND = 2;           // bytes of a matmul operand
constexpr int64_t WIDTHS[] = {256, 128, 64, 32, 16};

constexpr int64_t ceil_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
template <class N>
constexpr N larger(N a, N b) {
    return a > b ? a : b;
}
template <class N>
constexpr N smaller(N a, N b) {
    return a < b ? a : b;
}

// Whether the kernels for sm_90a run the call. There are none for fp16: those for all architectures run that.
constexpr bool takes_sm90a(const Call& c) { return c.sm90a && c.compute_dtype == BFLOAT16; }

constexpr int64_t query_group(const Block& b) { return b.n_heads / b.n_kv_heads; }
constexpr int64_t halves(const Call& c) { return c.d_ff ? 2 : 1; }  // of a layer: attention, MLP

// Columns of q, k and v, and of q alone, for some key/value heads.
constexpr int64_t head_chunk_columns(const Block& b, int64_t kv_heads) {
    return kv_heads * (query_group(b) + 2) * b.head_dim;
}
constexpr int64_t query_columns(const Block& b, int64_t kv_heads) { return kv_heads * query_group(b) * b.head_dim; }

constexpr int64_t tile_bytes(const Call& c, int64_t rows) { return rows * (c.d_model + PAD) * 4; }

// Columns of work that the two halves of a layer take.
constexpr int64_t attention_columns(const Call& c, int64_t kv_heads, bool backward) {
    const int64_t qkv = head_chunk_columns(c, kv_heads);
    return backward ? 2 * qkv + query_columns(c, kv_heads) : qkv;
}
constexpr int64_t mlp_columns(const Call& c, int64_t ff_chunk, bool backward) {
    return ff_chunk * (backward && is_gated(c.activation) ? 3 : 1);
}
constexpr bool in_registers(const Plan& p) { return p.residual == IN_REGISTERS; }  // hidden columns too, then
// xn, then, is operand as it lies in registers, or, of more columns, as wgmma reads it from shared memory.
constexpr bool operand_in_shared(const Block& b, const Plan& p) { return in_registers(p) && b.d_model > 128; }
// A row of work has one place for all that either half puts there, so that nobody writes to another's rows.
constexpr int64_t work_columns(const Call& c, const Plan& p, bool backward) {
    const int64_t mlp = c.d_ff && !in_registers(p) ? mlp_columns(c, p.ff_chunk, backward) : 0;
    return larger(attention_columns(c, p.kv_heads, backward), mlp) + PAD;
}
// Gradients of a norm's weight and bias summed by each warp, for so many columns at a time.
constexpr int64_t NORM_COLUMNS = 64;
constexpr int64_t norm_sums_bytes(const Plan& p) {
    return (p.tiles ? CONSUMERS : p.threads) / 32 * NORM_COLUMNS * 2 * 4;
}

constexpr int64_t work_bytes(const Call& c, const Plan& p, bool backward) {
    const int64_t branches = p.rows * work_columns(c, p, backward) * OPERAND;
    return backward ? larger(branches, norm_sums_bytes(p)) : branches;
}

constexpr int64_t scores_bytes(const Call& c, const Plan& p) { return p.kv_heads * query_group(c) * p.rows * 8; }

constexpr int64_t SUBTILE_SIDE = 64, SUBTILE = SUBTILE_SIDE * SUBTILE_SIDE * OPERAND;  // sm_90a: two make a weight tile
constexpr int64_t MOST_STAGES = 64;

constexpr int64_t stage_bytes(const Plan& p, bool backward) {
    if (p.tiles) return p.tile_columns / SUBTILE_SIDE * SUBTILE;
    return (TILE_N + (backward ? p.rows : 0)) * (TILE_K + PAD) * OPERAND;
}

// Full and empty for each stage, the barrier of a split sequence, and whether another loop comes.
constexpr int64_t mbarrier_bytes(const Plan& p) { return p.tiles ? p.stages * 16 + 32 : 0; }

// What comes from another block of the cluster: keys and values; backward: queries and their gradients, too.
constexpr int64_t remote_bytes(const Call& c, const Plan& p, bool backward) {
    const int64_t columns = backward ? query_columns(c, p.kv_heads) : p.kv_heads * c.head_dim;
    return p.remote_rows * (2 * columns + PAD) * OPERAND;
}

constexpr int64_t xn_bytes(const Call& c, const Plan& p, bool backward) {
    if (operand_in_shared(c, p)) return MOST_ROWS * ceil_to(c.d_model, SUBTILE_SIDE) * OPERAND;
    return backward || in_registers(p) ? 0 : p.rows * (c.d_model + PAD) * OPERAND;
}

constexpr int64_t shared_bytes(const Call& c, const Plan& p, bool backward) {
    int64_t bytes = p.residual == IN_SHARED ? tile_bytes(c, p.rows) : 0;
    bytes += p.rows * 8 + 128 + work_bytes(c, p, backward) + remote_bytes(c, p, backward);
    bytes += p.stages * stage_bytes(p, backward) + mbarrier_bytes(p) + xn_bytes(c, p, backward);
    return bytes + (backward ? scores_bytes(c, p) + p.rows * 8 : 0);
}

// A part of a layer's weight that an sm_90a kernel multiplies by at once: n rows and k columns from this row (as
// packed) and this column on. Packed are subtiles of 64 x 64, those of 64 rows side by side; `subtile` of the layer's
// are before this part's.
struct Part {
    Weight weight;
    int64_t n, k, row, column, subtile;
};

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t subtiles_along(int64_t side) { return ceil_div(side, SUBTILE_SIDE); }

// Calls f(to, back) for each chunk of heads, or chunk of hidden columns, of half a layer: weights to the hidden
// columns, and back. Returns how many subtiles there are up to here.
template <class F>
constexpr int64_t each_pass(const Call& c, const Plan& p, bool is_mlp, F f) {
    const int64_t qkv = head_chunk_columns(c, p.kv_heads), queries = query_columns(c, p.kv_heads);
    const int64_t head_chunks = c.n_kv_heads / p.kv_heads, d = c.d_model, parts = hidden_parts(c);
    int64_t subtile = is_mlp ? head_chunks * subtiles_along(d) * (subtiles_along(qkv) + subtiles_along(queries)) : 0;
    const auto pass = [&](Part to, Part back) {
        to.subtile = subtile, back.subtile = subtile + subtiles_along(to.n) * subtiles_along(to.k);
        subtile = back.subtile + subtiles_along(back.n) * subtiles_along(back.k);
        f(to, back);
    };
    if (!is_mlp)
        for (int64_t chunk = 0; chunk < head_chunks; chunk++)
            pass({QKV_W, qkv, d, chunk * qkv, 0, 0}, {OUT_W, d, queries, 0, chunk * queries, 0});
    else
        for (int64_t first = 0; first < p.ff_pad; first += p.ff_chunk) {
            const int64_t some = smaller(p.ff_chunk, p.ff_pad - first);
            pass({UP_W, parts * some, d, parts * first, 0, 0}, {DOWN_W, d, some, 0, first, 0});
        }
    return subtile;
}

constexpr int64_t layer_subtiles(const Call& c, const Plan& p) {
    return each_pass(c, p, c.d_ff != 0, [](const Part&, const Part&) {});
}

// Whether all half layers are computed again in the backward. A pre-norm's last half needs no result.
constexpr bool needs_last_half(const Call& c) { return c.placement != PRE || c.loop_norm; }

// The matrix products of a loop in their order. f(layer, part, transposed): a part^T, or, transposed, a part.
template <class F>
constexpr void each_product(const Call& c, const Plan& p, bool backward, F f) {
    const int64_t last = c.n_layers * halves(c) - 1;
    for (int64_t i = 0; i <= last - (backward && !needs_last_half(c)); i++)
        each_pass(c, p, c.d_ff && i % 2, [&](const Part& to, const Part& back) {
            f(i / halves(c), to, false);
            f(i / halves(c), back, false);
        });
    for (int64_t i = last; backward && i >= 0; i--)
        each_pass(c, p, c.d_ff && i % 2, [&](const Part& to, const Part& back) {
            f(i / halves(c), back, true);
            f(i / halves(c), to, false);
            f(i / halves(c), to, true);
        });
}

// With x in registers a product's tile has all of d_model: along k where xn is the operand, else along n.
constexpr bool tiles_lie_along_k(const Plan& p, const Part& of, bool transposed) {
    const bool to_hidden = of.weight == QKV_W || of.weight == UP_W;
    return in_registers(p) && to_hidden != transposed;
}

// How many tiles of tile_columns and 64 k they read, or, along k, of 64 columns.
constexpr int64_t loop_tiles(const Call& c, const Plan& p, bool backward) {
    int64_t tiles = 0;
    each_product(c, p, backward, [&](int64_t, const Part& of, bool transposed) {
        const int64_t n = transposed ? of.k : of.n, k = transposed ? of.n : of.k;
        tiles += tiles_lie_along_k(p, of, transposed) ? subtiles_along(n) : ceil_div(n, p.tile_columns) * subtiles_along(k);
    });
    return tiles;
}

// Packed weights: matrices, then fp32 vectors.
constexpr int64_t layer_weights(const Call& c, int64_t ff_pad) {
    return (qkv_columns(c) + c.n_heads * c.head_dim + (hidden_parts(c) + 1) * ff_pad) * c.d_model;
}
constexpr int64_t layer_vectors(const Call& c, int64_t ff_pad) {
    return qkv_columns(c) + hidden_parts(c) * ff_pad + 10 * c.d_model;
}
constexpr int64_t weights_bytes(const Call& c, const Plan& p) {
    if (p.tiles) return c.n_layers * layer_subtiles(c, p) * SUBTILE;
    return ceil_to(c.n_layers * layer_weights(c, p.ff_pad) * OPERAND, 256);
}
constexpr int64_t vectors_bytes(const Call& c, int64_t ff_pad) {
    return ceil_to((c.n_layers + 1) * layer_vectors(c, ff_pad) * 4, 256);
}

// The workspace: each block's scratch states, [rows, d_model + 8]. Forward, fp32: the residual around a sandwiched
// branch, and h before a loop that may be the last. Backward, in the dtype of e as the loop boundaries are: what every
// norm has read.
constexpr int64_t norms_of_half_layer(const Call& c) { return c.placement == SANDWICH ? 2 : 1; }
constexpr int64_t scratch_states(const Call& c, bool backward) {
    if (!backward) return (c.placement == SANDWICH) + (c.halting != 0);
    return c.n_layers * halves(c) * norms_of_half_layer(c) + (c.loop_norm != 0);
}
constexpr int64_t scratch_state_bytes(const Call& c, const Plan& p, bool backward) {
    return tile_bytes(c, p.rows) / (backward && c.dtype != FLOAT32 ? 2 : 1);
}
// Of one block; the tile last, if it is there.
constexpr int64_t scratch_bytes(const Call& c, const Plan& p, bool backward) {
    const int64_t tile = p.residual == IN_WORKSPACE ? tile_bytes(c, p.rows) : 0;
    return scratch_states(c, backward) * scratch_state_bytes(c, p, backward) + tile;
}

// Blocks of the grid. A forward's programs are a block each, so that one that has few loops makes room for the next. A
// backward's blocks are as many as the device may run at once, for what they put aside shall stay in L2; by shared
// memory and threads (the launch knows by registers, too).
constexpr int64_t blocks(const Call& c, const Plan& p, bool backward) {
    constexpr int64_t RESERVED = 1024, THREADS = 2048;  // bytes a block; of a multiprocessor
    const int64_t on_one = smaller((c.shared_bytes + RESERVED) / (p.shared_bytes + RESERVED), THREADS / p.threads);
    const int64_t at_once = larger(c.n_sms * on_one / p.cluster, int64_t{1}) * p.cluster;
    return backward ? smaller(p.programs, at_once) : p.programs;
}

constexpr void fill_in_bytes(const Call& c, Plan& p, bool backward) {
    p.shared_bytes = shared_bytes(c, p, backward);
    p.packed_bytes = weights_bytes(c, p) + vectors_bytes(c, p.ff_pad);
    p.blocks = blocks(c, p, backward);
    p.workspace_bytes = p.blocks * scratch_bytes(c, p, backward);
}

constexpr Refusal refusal(const Call& c) {
    if (c.compute_dtype != FLOAT16 && c.compute_dtype != BFLOAT16) return BAD_DTYPE;
    if (c.d_model % 16 || c.d_model < 64 || c.d_model > 1024) return BAD_D_MODEL;
    if (c.head_dim % 16 || c.head_dim > MOST_HEAD_DIM) return BAD_HEAD_DIM;
    if (c.seq_len > MOST_ROWS) return SEQUENCE_TOO_LONG;
    return FITS;
}

// Hidden columns at a time: `width`, or as many as the heads leave room for, in chunks of one size; for sm_90a whole
// subtiles, if it is one at least.
constexpr int64_t ff_chunk(const Call& c, const Plan& p, int64_t width, bool backward) {
    if (!p.ff_pad) return 0;
    const int64_t room = attention_columns(c, p.kv_heads, backward);
    int64_t most = width;
    while (mlp_columns(c, most + 16, backward) <= room) most += 16;
    const int64_t step = takes_sm90a(c) && most >= SUBTILE_SIDE ? SUBTILE_SIDE : 16;
    most = most / step * step;
    const int64_t chunks = (p.ff_pad + most - 1) / most;
    return smaller(ceil_to((p.ff_pad + chunks - 1) / chunks, step), p.ff_pad);
}

// Fills in the chunks for one width of work.
constexpr void choose_width(const Call& c, Plan& p, int64_t width, bool backward) {
    p.kv_heads = 1;
    for (int64_t n = 2; n <= c.n_kv_heads; n++)
        if (c.n_kv_heads % n == 0 && query_columns(c, n) <= width) p.kv_heads = n;
    p.ff_chunk = in_registers(p) ? smaller(p.ff_pad, SUBTILE_SIDE) : ff_chunk(c, p, width, backward);
}

// Fills in the chunks and stages for rows and residual; says whether there are any that fit.
constexpr bool choose_chunks(const Call& c, Plan& p, bool backward) {
    for (int64_t least = 3; least >= 2; least--)
        for (int64_t width : WIDTHS) {
            choose_width(c, p, width, backward);
            for (p.stages = 4; p.stages >= least; p.stages--)
                if (shared_bytes(c, p, backward) <= c.shared_bytes) return true;
        }
    return false;
}

// Samples that leave at loops of their own do not share a program.
constexpr int64_t most_sequences(const Call& c) { return c.own_loops || c.halting ? 1 : MOST_ROWS / c.seq_len; }

// What every kernel's plan begins with: `sequences` whole ones a program, or one over `split` programs.
constexpr Plan begin_plan(const Call& c, int64_t sequences, int64_t split, Residual residual) {
    Plan p = {};
    p.ff_pad = ceil_to(c.d_ff, 16);
    p.residual = residual;
    p.sequences = sequences, p.split = p.cluster = split;
    p.rows = (sequences * c.seq_len + split - 1) / split;
    p.remote_rows = split > 1 ? 16 : 0;
    p.programs = (c.batch + sequences - 1) / sequences * split;
    return p;
}

// More rows share each weight that is read, but not at the price of idle multiprocessors: where half of them would still
// all run at once.
constexpr bool leaves_idle(const Call& c, const Plan& p, int64_t step) {
    return 2 * p.programs <= c.n_sms && p.rows > ceil_to(c.seq_len, step);
}

// Whether each of so many blocks has enough of a sequence's rows: of the 64 that wgmma computes more than a quarter.
constexpr bool may_split(const Call& c, int64_t split) { return split <= 4 && c.seq_len > 16 * split; }

// Fills in the chunks, tiles and stages for sm_90a: the widest work that leaves room for so many stages, or for all
// tiles, if there are fewer; all other room is stages, and then rows of other blocks. Says whether there is any.
constexpr bool choose_ring(const Call& c, Plan& p, int64_t least, bool backward) {
    for (int64_t width : WIDTHS) {
        choose_width(c, p, width, backward);
        p.tiles = loop_tiles(c, p, backward);
        const int64_t most = smaller(p.tiles, MOST_STAGES);
        p.stages = smaller(p.tiles, least);
        if (p.stages > most || shared_bytes(c, p, backward) > c.shared_bytes) continue;
        while (p.stages < most && shared_bytes(c, p, backward) + stage_bytes(p, backward) + 16 <= c.shared_bytes)
            p.stages++;
        for (Plan more = p; p.split > 1 && p.remote_rows < p.rows; p = more) {
            more.remote_rows += 16;
            if (shared_bytes(c, more, backward) > c.shared_bytes) break;
        }
        return true;
    }
    return false;
}

// A kernel for sm_90a; says whether it fits.
constexpr bool arrange_sm90a(const Call& c, Plan& p, int64_t sequences, int64_t split, Residual residual, int64_t least,
                             bool backward) {
    p = begin_plan(c, sequences, split, residual);
    p.threads = CONSUMERS + (in_registers(p) ? PRODUCERS_OF_REGISTERS : PRODUCERS);
    // Two warpgroups of 64 rows each take all columns of a tile. So where weights are to stay, tiles are of 64: none is
    // half empty, as 128 columns of 192 or 64 are.
    p.tile_columns = least > MOST_STAGES && p.rows > 64 ? SUBTILE_SIDE : TILE_N;
    if (in_registers(p)) p.tile_columns = ceil_to(c.d_model, SUBTILE_SIDE);
    if (leaves_idle(c, p, 64) || !choose_ring(c, p, least, backward)) return false;
    // Neighbours share the weights' way if none can leave before others, and if there is any after the first loop. Four
    // must be of one part of the device (a GPC), which leaves some multiprocessors over, a tenth at most: two where all
    // programs just run at once.
    const bool stay = p.stages == p.tiles, just = p.programs <= c.n_sms && 10 * p.programs > 9 * c.n_sms;
    if (!c.own_loops && !c.halting && !stay)
        p.cluster = larger(split, p.programs % 4 == 0 && !just ? int64_t{4} : p.programs % 2 == 0 ? int64_t{2} : int64_t{1});
    fill_in_bytes(c, p, backward);
    return true;
}

// Registers hold x where each warp has 16 rows of its own, and these few columns; fewer where a backward has xn there,
// too, and gates.
constexpr bool may_be_in_registers(const Call& c, bool backward) {
    return c.own_kernel && c.d_model <= (!backward ? 256 : is_gated(c.activation) ? 64 : 128);
}

constexpr Plan plan_sm90a(const Call& c, bool backward) {
    Plan p = {};
    const int64_t most = most_sequences(c);
    for (int64_t least : {MOST_STAGES + 1, int64_t{3}})
        for (int64_t n = most; may_be_in_registers(c, backward) && n * c.seq_len > MOST_ROWS / 2; n--)
            if (arrange_sm90a(c, p, n, 1, IN_REGISTERS, least, backward)) return p;
    for (int64_t rows = MOST_ROWS; rows >= larger<int64_t>(c.seq_len, 64); rows -= 64)
        if (arrange_sm90a(c, p, smaller(most, rows / c.seq_len), 1, IN_SHARED, MOST_STAGES + 1, backward)) return p;
    for (int64_t least = 3; least >= 2; least--) {
        for (int64_t n = most; n > 0; n--)
            if (arrange_sm90a(c, p, n, 1, IN_SHARED, least, backward)) return p;
        for (int64_t split = 2; may_split(c, split); split *= 2)
            if (arrange_sm90a(c, p, 1, split, IN_SHARED, least, backward)) return p;
        for (int64_t n = most; n > 0; n--)
            if (arrange_sm90a(c, p, n, 1, IN_WORKSPACE, least, backward)) return p;
    }
    Plan none = {};
    none.refusal = NO_SHARED_MEMORY;
    return none;
}

// The other kernels, likewise.
constexpr bool arrange(const Call& c, Plan& p, int64_t sequences, Residual residual, bool backward) {
    p = begin_plan(c, sequences, 1, residual);
    p.rows = ceil_to(p.rows, 16);
    p.threads = ceil_to(p.rows, 32) * 4;
    if (leaves_idle(c, p, 16) || !choose_chunks(c, p, backward)) return false;
    fill_in_bytes(c, p, backward);
    return true;
}

constexpr Plan plan(const Call& c, bool backward) {
    Plan p = {};
    p.refusal = refusal(c);
    if (p.refusal != FITS) return p;
    if (takes_sm90a(c)) return plan_sm90a(c, backward);
    for (Residual residual : {IN_SHARED, IN_WORKSPACE})
        for (int64_t n = most_sequences(c); n > 0; n--)
            if (arrange(c, p, n, residual, backward)) return p;
    Plan none = {};
    none.refusal = NO_SHARED_MEMORY;
    return none;
}

constexpr const char* reason(int64_t refusal) {
    constexpr const char* REASONS[REFUSALS] = {
        "it fits",
        "matrix products are in fp16 or bf16 only: tf32 would be less exact than fp32 PyTorch",
        "d_model is not a multiple of 16 from 64 to 1024",
        "head_dim is not a multiple of 16 up to 128",
        "seq_len > 128",
        "no chunk sizes leave room for the operands in shared memory",
    };
    return refusal >= 0 && refusal < REFUSALS ? REASONS[refusal] : "unknown";
}

}  // namespace shift_cuda
