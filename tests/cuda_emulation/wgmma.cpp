// sm_90a: wgmma, each warp's 16 rows for themselves, some time between issue and wait.
#include <limits>

#include "machine.h"

namespace emulation {

namespace {

// Section 9.7.15.5.1.2.2, for the 128-byte swizzle: where the eight numbers are that hold row (column) `line`, k ..
// (K-major), or k = `line`, rows (columns) from `along` on (MN-major).
struct Matrix {
    unsigned char* shared;
    uint32_t address, leading, stride;
    bool mn_major;

    Matrix(uint64_t descriptor, bool mn_major) : shared(current->block->shared), mn_major(mn_major) {
        address = (descriptor & 0x3fff) << 4;
        leading = (descriptor >> 16 & 0x3fff) << 4;
        stride = (descriptor >> 32 & 0x3fff) << 4;
        if (descriptor >> 62 != 1) trap("wgmma: a descriptor that does not say 128-byte swizzle");
        if (address % 1024 >= 128 || (mn_major && address % 1024))
            trap("wgmma: a descriptor that does not start at a brick of 1024 bytes (and, K-major, its first line)");
        if (stride % 1024 || (mn_major && leading % 1024)) trap("wgmma: a stride that is not a multiple of 1024");
    }

    const uint16_t* piece(int mn, int k) const {
        uint32_t a = address;
        a += mn_major ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                      : mn / 8 * stride + mn % 8 * 128 + k * 2;
        return reinterpret_cast<const uint16_t*>(shared + (a ^ (a >> 7 & 7) << 4));
    }

    template <class F>
    void each_piece(int first, int count, F f) const {  // of the rows (columns) from first on
        if (mn_major) {
            for (int k = 0; k < 16; k++)
                for (int mn = first; mn < first + count; mn += 8) f(piece(mn, k));
        } else {
            for (int mn = first; mn < first + count; mn++)
                for (int k = 0; k < 16; k += 8) f(piece(mn, k));
        }
    }

    float number(int mn, int k, Number type) const {
        const uint16_t bits = mn_major ? piece(mn & ~7, k)[mn % 8] : piece(mn, k & ~7)[k % 8];
        return type == Number::BF16 ? from_bf16(bits) : from_fp16(bits);
    }
};

int first_row(const Warp& w) { return w.threads[0].index.x / WARP % 4 * 16; }

template <class F>
void each_piece(const Warp& w, const Product& p, F f) {
    if (!p.a_registers[0]) Matrix(p.a_descriptor, p.a_mn_major).each_piece(first_row(w), 16, f);
    Matrix(p.b_descriptor, p.b_mn_major).each_piece(0, p.columns, f);
}

void run(const Warp& w, Product& p, Accumulators& acc) {
    if (p.done) return;
    p.done = true;
    static float a[16][16], b[16][256], d[16][256];
    const Matrix matrix_b(p.b_descriptor, p.b_mn_major);
    for (int n = 0; n < p.columns; n++)
        for (int k = 0; k < 16; k++) b[k][n] = matrix_b.number(n, k, p.type);
    if (p.a_registers[0]) {
        for (unsigned l = 0; l < WARP; l++)
            for (int i = 0; i < 8; i++) {
                const uint16_t bits = p.a[l][i / 2] >> i % 2 * 16;
                float& place = a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8];
                place = p.type == Number::BF16 ? from_bf16(bits) : from_fp16(bits);
            }
    } else {
        const Matrix matrix_a(p.a_descriptor, p.a_mn_major);
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 16; k++) a[m][k] = matrix_a.number(first_row(w) + m, k, p.type);
    }
    const auto each_accumulator = [&](auto f) {
        for (unsigned l = 0; l < WARP; l++)
            for (int i = 0; i < p.columns / 2; i++)
                f(acc.values[l * p.columns / 2 + i], d[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2]);
    };
    each_accumulator([&](float value, float& place) { place = p.accumulate ? value : 0.0f; });
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < p.columns; n++) d[m][n] += a[m][k] * b[k][n];
    each_accumulator([&](float& value, float place) { value = place; });
}

// wgmma's reads are lane 0's; at the wait, which all lanes of the warp do together, all know that they are over.
Actor reader(const Warp& w) { return {w.threads[0].id, w.threads[0].clock, true}; }

}  // namespace

void wgmma_fence() {
    warp_collective("wgmma_fence", nullptr, [](Warp& w) { w.wgmma.fenced = true; });
}

void wgmma(float* d, int columns, const uint32_t* a_registers, uint64_t a, bool a_mn_major, uint64_t b, bool b_mn_major,
           bool accumulate, Number type) {
    struct {
        float* d;
        const uint32_t* a;
    } mine{d, a_registers};
    using Mine = decltype(mine);
    warp_collective("wgmma", &mine, [&](Warp& w) {
        WgmmaState& state = w.wgmma;
        if (!state.fenced) trap("wgmma without wgmma_fence since the last wait");
        Product p{};
        p.a_descriptor = a, p.b_descriptor = b, p.a_mn_major = a_mn_major, p.b_mn_major = b_mn_major;
        p.accumulate = accumulate, p.columns = columns, p.type = type;
        for (unsigned l = 0; l < WARP; l++) {
            const Mine& lane = *static_cast<Mine*>(w.operands[l]);
            p.d[l] = lane.d, p.a_registers[l] = lane.a;
            if (lane.a) std::memcpy(p.a[l], lane.a, sizeof p.a[l]);
        }
        for (uint64_t part : {a, b, uint64_t(columns) << 3 | a_mn_major << 2 | b_mn_major << 1 | accumulate})
            state.history = (state.history ^ part) * 0x9e3779b97f4a7c15;
        each_piece(w, p, [&](const uint16_t* piece) {
            check_shared(piece, 16, 16, "wgmma");
            saw_read(piece, 16, reader(w));
            mark_reading(piece, 16, 1);
        });
        Accumulators& acc = state.accumulators[p.d[0]];
        if (!acc.products) {
            acc.columns = columns;
            acc.values.resize(WARP * columns / 2);
            for (unsigned l = 0; l < WARP; l++) {
                std::copy(p.d[l], p.d[l] + columns / 2, &acc.values[l * columns / 2]);
                std::fill(p.d[l], p.d[l] + columns / 2, std::numeric_limits<float>::quiet_NaN());
            }
        }
        if (acc.columns != columns) trap("wgmma: accumulators of one that is under way, with another shape");
        acc.products++;
        if (draw(256) < machine.eagerness) {  // in order: those before it first
            for (auto& group : state.groups)
                for (Product& before : group) run(w, before, state.accumulators[before.d[0]]);
            for (Product& before : state.uncommitted) run(w, before, state.accumulators[before.d[0]]);
            run(w, p, acc);
        }
        state.uncommitted.push_back(p);
    });
}

void wgmma_commit() {
    warp_collective("wgmma_commit", nullptr, [](Warp& w) {
        w.wgmma.groups.push_back(std::move(w.wgmma.uncommitted));
        w.wgmma.uncommitted.clear();
    });
}

void wgmma_wait(int groups_left) {
    warp_collective("wgmma_wait", nullptr, [=](Warp& w) {
        WgmmaState& state = w.wgmma;
        for (; int(state.groups.size()) > groups_left; state.groups.pop_front()) {
            for (Product& p : state.groups.front()) {
                Accumulators& acc = state.accumulators[p.d[0]];
                run(w, p, acc);
                each_piece(w, p, [&](const uint16_t* piece) {
                    mark_reading(piece, 16, -1);
                    saw_read(piece, 16, reader(w));
                });
                for (unsigned l = 0; l < WARP; l++)
                    if (p.a_registers[l] && std::memcmp(p.a[l], p.a_registers[l], sizeof p.a[l]))
                        trap("wgmma: registers of a were changed before the wait");
                if (--acc.products) continue;
                for (unsigned l = 0; l < WARP; l++)
                    std::copy_n(&acc.values[l * p.columns / 2], p.columns / 2, p.d[l]);
                state.accumulators.erase(p.d[0]);
            }
        }
        state.fenced = false;
        order_lanes(w);
    });
}

}  // namespace emulation
