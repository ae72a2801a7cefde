// What one call of the looped block hands over, beside the block: sizes, options and addresses.
#pragma once
#include "../block.h"

constexpr int MOST_LAYERS = 64;

struct Call : Block {
    // sizes
    int64_t batch, seq_len;
    int64_t most_loops;  // no fewer than any of `loops`; the first size of `boundaries` or `kept`
    int64_t n_threads;
    int64_t rotary_rows, cache_len, cache_loops;
    // options
    int64_t return_all, n_grad_loops, halting;  // n_grad_loops 0: all
    int64_t bf16;  // operands of the products with weights; all else is float32
    int64_t bf16_weights;  // the layers' matrices are bfloat16 in memory
    double halt_threshold;
    const float* scales;     // [batch]: factor on a sample's branches; null: residual_scale
    // tensors, float32 and contiguous
    const float* e;          // [batch, seq_len, d_model]
    const float* h0;         // likewise; null: e without an injection, otherwise 0
    const int64_t* loops;    // [batch]
    const int64_t* lengths;  // [batch]
    const float* rotary;     // [2, rotary_rows, rotary_pairs]
    const float* const* weights;  // weight_count(), see block.h; float but for bf16_weights
    float* out;              // [batch, seq_len, d_model], or [most_loops, ...] with return_all
    float* boundaries;       // [most_loops, batch, seq_len, d_model]: h_0 .. h_{T-1}; null if not wanted
    float* kept;             // [most_loops, batch * seq_len * kept_floats() + 16]: what every loop computed, instead of
                             // the boundaries; or null
    int64_t* used;           // [batch]
    // where the tokens go on from others: keys and values [cache_loops, n_layers, 2, batch, n_kv_heads, cache_len,
    // head_dim] and 16 floats that may be read; loop t has those of t mod cache_loops
    float* cache;
    const int64_t *before, *positions;  // [batch] tokens there; the row of `rotary` of the first new one
    // backward only
    const float* grad_out;   // as out
    float *grad_e, *grad_h0; // as e, zeroed; grad_h0 with h0 alone
    float* const* grad_weights;  // as weights; vectors zeroed, matrices overwritten
};

// Samples in the order in which they run, and where in it tiles begin: the sequences that a thread takes through all
// loops together. All that decides results follows from the call, and nothing from the number of threads.
struct Plan {
    const int64_t* order;        // [batch] samples
    const int64_t* tiles;        // [n_tiles + 1] positions in order
    const int64_t* rows_before;  // [n_tiles] rows in earlier tiles
    int64_t n_tiles, most_rows, most_samples;
    bool together;               // all threads share each tile: few are long
    bool few_uses;               // of a weight: not worth packing it for all of them
    int64_t n_slices;            // of the tiles, whose weight gradients are summed apart: fixes the order of every sum
};
