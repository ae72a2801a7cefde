// Attention by itself: queries over keys of a batch, and its gradients.
#pragma once
#include <cstdint>

struct AttentionCall {
    int64_t batch, n_heads, n_kv_heads, q_len, k_len, head_dim, n_threads;
    int64_t causal, window;           // window 0: none
    double scale, softcap;            // softcap 0: none
    const int64_t *q_lens, *k_lens;   // [batch]; a sample's last query is at the position of its last key
    // float32 and contiguous: [batch, n_heads, q_len, head_dim], [batch, n_kv_heads, k_len, head_dim]
    const float *q, *k, *v;
    float *o, *kept;                  // o zeroed; kept [batch, n_heads, q_len, 2]: of scores, for the backward
    // backward only
    const float* d_o;
    float *dq, *dk, *dv;              // zeroed
};
