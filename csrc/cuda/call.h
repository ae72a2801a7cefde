// What one call of the looped block hands over, beside the block: sizes, options and device addresses.
#pragma once
#include "../block.h"

struct Call : Block {
    // sizes
    int64_t batch, seq_len;
    int64_t most_loops;  // forward: loops of every sample, or no fewer than any of `loops`. backward: of `boundaries`
    int64_t low, high;   // backward: the loops low + 1 .. high of this launch (0 <= low < high <= most_loops)
    // options
    int64_t return_all, n_grad_loops, halting;  // n_grad_loops 0: all
    int64_t own_loops, ragged, save;            // `loops`, `lengths`, `boundaries` are given; for the planner too
    int64_t dtype, compute_dtype, weight_dtype; // enum Dtype: of e; of matmul operands; of all weights as given
    double halt_threshold;
    // device
    int64_t shared_bytes;  // most shared memory a block may ask for (cudaDevAttrMaxSharedMemoryPerBlockOptin)
    int64_t n_sms;
    int64_t sm90a;           // whether device and library both are for sm_90a
    int64_t own_kernel;      // whether the kernel is compiled for this shape alone (shape.h): then registers may hold x
    // tensors
    const void* e;           // [batch, seq_len, d_model] dtype
    const int64_t* loops;    // [batch], or null: most_loops each
    const int64_t* lengths;  // [batch], or null: seq_len each
    const float* rotary;     // [2, seq_len, head_dim / 2] cos, sin; null without rope
    const void* const* weights;  // host array of device addresses: weight_count(), see block.h
    void* out;               // [batch, seq_len, d_model] dtype, or [most_loops, ...] with return_all; pads become 0
    void* boundaries;        // [most_loops, batch, seq_len, d_model] dtype: h_0 .. h_{T-1}; null if not saved
    int64_t* used;           // [batch], written with halting alone
    void* packed;            // Plan::packed_bytes, 256-byte aligned: the weights as shift_cuda_pack has left them
    void* workspace;         // Plan::workspace_bytes, 256-byte aligned; null where that is 0
    // backward only. It may be called several times, for the last loops first; dh, de, dv go from launch to launch.
    const void* grad_out;    // as out (NaN in pads is ignored)
    float* dh;   // [batch, seq_len, d_model]: in: gradient of h_high (first launch: grad_out without pads, or 0 with
                 // return_all, whose gradients the kernel adds itself); out: of h_low
    float* de;   // [batch, seq_len, d_model]: with injection gradient of e so far, zeroed before the first launch
    float* dv;   // [blocks, n_layers + 1, 8, d_model]: gradients of norm weights so far in the order N1_W .. N1P_B,
                 // N2_W .. N2P_B (loop norm: the first two of "layer" n_layers), zeroed; sum over blocks at the end
    // Operands of the weight gradients, in compute_dtype, each [n_layers, high - low, batch * seq_len, columns].
    // For every (layer, loop, token) that the launch reaches all columns are written; at pads the left operand is 0
    // and the right one finite. With own_loops some loops are not reached: zero the operands before.
    // in_proj = dqkv^T xn, out_proj = dy^T o, linear1 = dpre^T xn2, linear2 = dy2^T act; a bias is the sum of its
    // matrix's left operand. linear1's columns: d_ff padded to ff_pad, with gates ff_pad of them, then ff_pad values.
    void* xn;    // d_model
    void* dqkv;  // (n_heads + 2 n_kv_heads) head_dim, in the order of in_proj
    void* o;     // n_heads head_dim
    void* dy;    // d_model
    void* xn2;   // d_model
    void* dpre;  // ff_pad, with gates 2 ff_pad
    void* act;   // ff_pad
    void* dy2;   // d_model
};

enum Residual { IN_WORKSPACE, IN_SHARED, IN_REGISTERS };  // the workspace: L2 holds it
constexpr const char* RESIDUALS[] = {"workspace", "shared", "registers"};

// What plan.h decided. All of it follows from the sizes, options and device limits of a Call.
struct Plan {
    int64_t refusal;          // enum Refusal; the rest is 0 unless FITS
    int64_t rows;             // tokens a program owns; a multiple of 16 if `tiles` is 0
    int64_t sequences;        // whole sequences among them, or 1
    int64_t split;            // programs, neighbours in a cluster, over which that one's rows are split; or 1
    int64_t programs;         // shares of the batch, as above
    int64_t blocks;           // of the grid; each goes through every blocks-th program
    int64_t threads;
    int64_t kv_heads;         // key/value heads (with all their query heads) at a time
    int64_t remote_rows;      // of another program of the sequence at a time, a multiple of 16; 0 if split is 1
    int64_t ff_pad;           // d_ff to the next multiple of 16
    int64_t ff_chunk;         // hidden columns at a time
    int64_t stages;           // weight tiles in flight
    int64_t tiles;            // weight tiles that a loop reads, if an sm_90a kernel runs; or 0
    int64_t tile_columns;     // of such a tile: 128, or 64; see tiles_lie_along_k
    int64_t cluster;          // blocks that share each weight tile's way from L2 (sm_90a), or a sequence
    int64_t residual;         // enum Residual: where the fp32 residual stream is
    int64_t shared_bytes;     // dynamic shared memory of a block
    int64_t packed_bytes;     // of the weights as the kernels read them
    int64_t workspace_bytes;
};

enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };
constexpr const char* DTYPES[] = {"float32", "float16", "bfloat16"};
enum Refusal { FITS, BAD_DTYPE, BAD_D_MODEL, BAD_HEAD_DIM, SEQUENCE_TOO_LONG, NO_SHARED_MEMORY, REFUSALS };
