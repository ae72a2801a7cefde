// The sequences of a tile: which rows of its buffers are whose, and their way from the caller's tensors and back.
#pragma once
#include <cstring>

#include "call.h"
#include "simd/vec.h"

namespace {

struct Lengths {  // the sequences of a tile
    int count;
    const int* lengths;
    const float* row_scale;  // of every row's branches
    const int64_t* samples;
};

void copy_columns(int n, int columns, const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    for (int i = 0; i < n; i++) std::memcpy(to + i * ld_to, from + i * ld_from, columns * sizeof(float));
}

// The sequences of one tile, in the order they finish in, last first.
struct Sequences {
    const Call& c;
    int dp, count, rows;
    const int64_t* samples;
    int* lengths;
    int* starts;  // [count + 1] first row of each
    int64_t rows_before;  // in the tiles before this one

    Sequences(const Call& call, const Plan& plan, int64_t index, int* integers) : c(call), dp(padded(call.d_model)) {
        samples = plan.order + plan.tiles[index];
        count = plan.tiles[index + 1] - plan.tiles[index];
        rows_before = plan.rows_before[index];
        lengths = integers, starts = integers + count;
        rows = 0;
        for (int i = 0; i < count; i++) {
            starts[i] = rows;
            lengths[i] = c.lengths[samples[i]];
            rows += lengths[i];
        }
        starts[count] = rows;
    }
    int64_t loops(int i) const { return c.loops[samples[i]]; }
    int running(int64_t t) const {  // how many samples run loop t: the first ones
        int n = 0;
        while (n < count && loops(n) >= t) n++;
        return n;
    }
    int truncated(int64_t t) const {  // how many of them do so without gradient: again the first ones
        int n = 0;
        if (c.n_grad_loops)
            while (n < count && loops(n) - c.n_grad_loops >= t) n++;
        return n;
    }
    const float* at(const float* x, int i) const { return x + samples[i] * c.seq_len * c.d_model; }
    float* at(float* x, int i) const { return x + samples[i] * c.seq_len * c.d_model; }

    void gather(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++)
            copy_columns(lengths[i], c.d_model, at(from, i), c.d_model, to + int64_t(starts[i]) * dp, dp);
    }
    void gather_add(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++) {
            const float* x = at(from, i);
            for (int r = starts[i]; r < starts[i + 1]; r++, x += c.d_model)
                for (int j = 0; j < c.d_model; j++) to[int64_t(r) * dp + j] += x[j];
        }
    }
    void scatter(const float* from, int begin, int end, float* to) const {
        for (int i = begin; i < end; i++)
            copy_columns(lengths[i], c.d_model, from + int64_t(starts[i]) * dp, dp, at(to, i), c.d_model);
    }
};

}  // namespace
