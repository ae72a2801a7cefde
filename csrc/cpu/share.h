// A tile's rows shared out to threads: one thread has all rows of a short tile, and a team its part of a long one.
#pragma once
#include <algorithm>
#include <cstdint>

#include "team.h"

namespace {

constexpr int ROWS_PER_CHUNK = 64;  // what goes through a layer together: enough for the products, few for L2

struct Range {
    int begin, end;
};

struct Share {
    int index, count;
    bool alone() const { return count == 1; }
    // Waits for the others: what they wrote is there to be read.
    void meet() const {
#if defined(_OPENMP)
        if (count > 1) {
#pragma omp barrier
        }
#endif
    }
    // Its part of n, in whole pieces.
    Range part(int n, int piece) const {
        const int64_t pieces = (n + piece - 1) / piece;
        const auto bound = [&](int i) { return int(std::min<int64_t>(n, pieces * i / count * piece)); };
        return {bound(index), bound(index + 1)};
    }
    // Its rows of n, chunk by chunk: f(begin, end). Chunks are the same for any number of threads.
    template <class F>
    void each_chunk(int n, F f) const {
        const Range own = part(n, ROWS_PER_CHUNK);
        for (int i = own.begin; i < own.end; i += ROWS_PER_CHUNK) f(i, std::min(i + ROWS_PER_CHUNK, own.end));
    }
    // Whether all are to leave. Each of them has to ask.
    bool stopped(Team& team) const {
        if (alone()) return team.stopped();
        if (index == 0) team.stopped();
        meet();
        return team.is_stopped();  // asked again only after another meeting
    }
};

}  // namespace
