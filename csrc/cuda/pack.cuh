// The weights of a call as the kernels read them (layout: program.cuh). Once a call, not once a loop.
// Grid: some blocks that share a layer's numbers.
#pragma once
#include "program.cuh"

namespace shift_cuda {

struct PackJob {
    Job job;
    int layer;                 // n_layers: the loop norm alone
    const void* from[WEIGHTS];
};

__device__ inline float number(const void* from, int64_t at, int64_t dtype) {
    if (!from) return 0.0f;
    if (dtype == FLOAT32) return static_cast<const float*>(from)[at];
    return dtype == BFLOAT16 ? to_float(static_cast<const bf16*>(from)[at])
                             : to_float(static_cast<const fp16*>(from)[at]);
}

// to [rows][columns] from rows of `have` columns, zeros beyond; row(i) is packed row i's, -1 for none.
template <class T, class Row>
__device__ inline void pack_matrix(const T* to, int64_t rows, int64_t columns, const void* from, int64_t dtype,
                                   int64_t have, Row row) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * columns / 2; i += step) {
        const int64_t r = row(int(2 * i / columns)), j = 2 * i % columns;
        const float x = r >= 0 && j < have ? number(from, r * have + j, dtype) : 0.0f;
        const float y = r >= 0 && j + 1 < have ? number(from, r * have + j + 1, dtype) : 0.0f;
        store(const_cast<T*>(to) + 2 * i, pack<T>(x, y));
    }
}

template <class Row>
__device__ inline void pack_vector(const float* to, int64_t n, const void* from, int64_t dtype, Row row) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += step) {
        const int64_t r = row(int(i));
        store(const_cast<float*>(to) + i, r >= 0 ? number(from, r, dtype) : 0.0f);
    }
}

template <class T>
__global__ void __launch_bounds__(256) pack_layer(const __grid_constant__ PackJob pack) {
    const Job& job = pack.job;
    const Call& c = job.call;
    const int64_t d = c.d_model, ff = job.plan.ff_pad, attn = c.n_heads * c.head_dim, type = c.weight_dtype;
    const Weights<T> w{job, pack.layer};
    const auto same = [](int i) { return i; };
    const auto qkv = [&](int i) { return qkv_row(job, i); };
    const auto up = [&](int i) {
        const bool swiglu = c.activation == SWIGLU;
        const int hidden = swiglu ? from_halves(i, int(ff)) : i, column = hidden % int(ff);
        return column < c.d_ff ? hidden / int(ff) * int(c.d_ff) + column : -1;
    };
    if (pack.layer < c.n_layers) {
        pack_matrix(w.qkv(), qkv_columns(c), d, pack.from[QKV_W], type, d, qkv);
        pack_matrix(w.out(), d, attn, pack.from[OUT_W], type, attn, same);
        pack_vector(w.qkv_bias(), qkv_columns(c), pack.from[QKV_B], type, qkv);
        pack_vector(w.out_bias(), d, pack.from[OUT_B], type, same);
    }
    if (pack.layer < c.n_layers && ff) {
        pack_matrix(w.up(), hidden_parts(c) * ff, d, pack.from[UP_W], type, d, up);
        pack_matrix(w.down(), d, ff, pack.from[DOWN_W], type, c.d_ff, same);
        pack_vector(w.up_bias(), hidden_parts(c) * ff, pack.from[UP_B], type, up);
        pack_vector(w.down_bias(), d, pack.from[DOWN_B], type, same);
    }
    const int norms[NORM_SLOTS] = {N1_W, N1_B, N1P_W, N1P_B, N2_W, N2_B, N2P_W, N2P_B};
    for (int i = 0; i < NORM_SLOTS; i++) pack_vector(w.norm(i), d, pack.from[norms[i]], type, same);
}

}  // namespace shift_cuda
