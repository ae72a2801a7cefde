// What one call of the looped block hands over: sizes, options and addresses. cpu_backend.py mirrors it.
#pragma once
#include <cstdint>

struct Call {
    // sizes
    int64_t batch, seq_len, d_model, n_heads, n_kv_heads, head_dim, n_layers, d_ff;
    int64_t most_loops;  // the largest of n_loops
    int64_t n_slices;    // of the batch: fixes the order of every sum, whatever the number of threads
    int64_t n_threads;
    // options
    int64_t activation, norm, placement, causal, rope, injection, loop_norm;
    int64_t return_all, n_grad_loops, halting;
    int64_t bf16;  // operands of the products with weights; all else is float32
    double eps, residual_scale, halt_threshold;
    // tensors, float32 and contiguous
    const float* e;          // [batch, seq_len, d_model]
    const int64_t* loops;    // [batch]
    const int64_t* lengths;  // [batch]
    const float* rotary;     // [2, seq_len, head_dim / 2]
    const float* const* weights;  // 16 a layer in the order of `Weight`, null where absent, then the loop norm's 2
    float* out;              // [batch, seq_len, d_model], or [most_loops, ...] with return_all
    float* boundaries;       // [most_loops, batch, seq_len, d_model]: h_0 .. h_{T-1}; null if not wanted
    float* kept;             // kept_floats() numbers: what every loop computed, instead of the boundaries; or null
    int64_t* used;           // [batch]
    // backward only
    const float* grad_out;   // as out
    float* grad_e;           // as e, zeroed
    float* const* grad_weights;  // as weights, zeroed
};

// What plan.cpp worked out: samples in the order they run, and where tiles begin in it.
struct Plan {
    const int64_t* order;        // [batch] samples
    const int64_t* tiles;        // [n_tiles + 1] positions in order
    const int64_t* rows_before;  // [n_tiles] rows in earlier tiles
    int64_t n_tiles, most_rows, most_samples;
};

enum Weight { QKV_W, QKV_B, OUT_W, OUT_B, N1_W, N1_B, N1P_W, N1P_B, UP_W, UP_B, DOWN_W, DOWN_B, N2_W, N2_B, N2P_W, N2P_B };
constexpr int WEIGHTS = 16;
enum Norm { LAYERNORM, RMSNORM, NO_NORM };
enum Placement { PRE, POST, SANDWICH };
