// The weights of a call as the kernels read them (layout: program.cuh), PACKED_LAYERS layers a launch.
// Grid: some blocks that share a layer's numbers, for each layer.
#pragma once
#include "program.cuh"
#include "tile/launch.cuh"

namespace shift_cuda {

constexpr int PACKED_LAYERS = 8;  // their weights' addresses fit in a kernel's arguments

struct PackJob {
    Job job;
    int first_layer;
    const void* from[PACKED_LAYERS][WEIGHTS];
};

__device__ inline float number(const void* from, int64_t at, int64_t dtype) {
    if (!from) return 0.0f;
    if (dtype == FLOAT32) return static_cast<const float*>(from)[at];
    return dtype == BFLOAT16 ? to_float(static_cast<const bf16*>(from)[at])
                             : to_float(static_cast<const fp16*>(from)[at]);
}

template <class Row>
__device__ inline void pack_vector(const float* to, int64_t n, const void* from, int64_t dtype, Row row) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += step) {
        const int64_t r = row(int(i));
        store(const_cast<float*>(to) + i, r >= 0 ? number(from, r, dtype) : 0.0f);
    }
}

template <class A, class T>
__global__ void __launch_bounds__(256) pack_layer(const __grid_constant__ PackJob pack) {
    const Job& job = pack.job;
    const Call& c = job.call;
    const int64_t d = c.d_model, ff = job.plan.ff_pad, attn = c.n_heads * c.head_dim, type = c.weight_dtype;
    const int layer = pack.first_layer + int(blockIdx.y);
    const auto& from = pack.from[blockIdx.y];
    const Weights<T> w{job, layer};
    const auto same = [](int i) { return i; };
    const int chunk = int(head_chunk_columns(c, job.plan.kv_heads));
    const auto qkv = [&](int i) { return qkv_row(job, i / chunk, i % chunk); };
    const auto up = [&](int i) {
        const bool gated = is_gated(c.activation);
        const int hidden = gated ? from_halves(i, int(ff)) : i, column = hidden % int(ff);
        return column < c.d_ff ? hidden / int(ff) * int(c.d_ff) + column : -1;
    };
    if (layer < c.n_layers) {
        A::pack_weights(job, w, [&](Weight weight, int64_t row, int64_t column) {
            const int64_t r = weight == QKV_W ? qkv(int(row)) : weight == UP_W ? up(int(row)) : row;
            const int64_t have = weight == OUT_W ? attn : weight == DOWN_W ? c.d_ff : d;
            return r >= 0 && column < have ? number(from[weight], r * have + column, type) : 0.0f;
        });
        pack_vector(w.qkv_bias(), qkv_columns(c), from[QKV_B], type, qkv);
        pack_vector(w.out_bias(), d, from[OUT_B], type, same);
    }
    if (layer < c.n_layers && ff) {
        pack_vector(w.up_bias(), hidden_parts(c) * ff, from[UP_B], type, up);
        pack_vector(w.down_bias(), d, from[DOWN_B], type, same);
    }
    const int norms[NORM_SLOTS] = {N1_W, N1_B, N1P_W, N1P_B, N2_W, N2_B, N2P_W, N2P_B};
    for (int i = 0; i < NORM_SLOTS; i++) pack_vector(w.norm(i), d, from[norms[i]], type, same);
}

// Packs all layers; behind the last the loop norm, by the names of a layer's first. Null, or what went wrong.
template <class A, class T>
const char* pack(const Job& job, void* stream) {
    const Call& c = job.call;
    const int layers = int(c.n_layers + (c.loop_norm != 0));
    const char* error = nullptr;
    for (int first = 0; first < layers && !error; first += PACKED_LAYERS) {
        PackJob pack = {job, first, {}};
        const int count = smaller(PACKED_LAYERS, layers - first);
        for (int i = 0; i < count; i++) {
            const void* const* from = c.weights + (first + i) * WEIGHTS;
            if (first + i < c.n_layers)
                for (int weight = 0; weight < WEIGHTS; weight++) pack.from[i][weight] = from[weight];
            else
                pack.from[i][N1_W] = from[0], pack.from[i][N1_B] = from[1];
        }
        tile::Launch grid;
        grid.grid = dim3(unsigned(2 * c.n_sms), unsigned(count)), grid.threads = 256, grid.shared_bytes = 0;
        grid.stream = stream;
        error = tile::launch(grid, pack_layer<A, T>, pack);
    }
    return error;
}

}  // namespace shift_cuda
