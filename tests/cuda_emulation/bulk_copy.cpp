// sm_90: mbarriers, the copies that report to them, and the blocks of a cluster.
#include "machine.h"

namespace emulation {

namespace {

constexpr uint64_t MARK = 0xfffff1a9b0fffff1;  // what an mbarrier's 8 bytes hold here: a NaN

Mbarrier& at(uint64_t* b, const char* what) {
    for (Block& block : machine.blocks)
        if (auto found = block.mbarriers.find(b); found != block.mbarriers.end()) {
            if (*b != MARK) trap("%s: something wrote over this mbarrier", what);
            if (current->block != &block && !block.running) trap("%s: its block has returned", what);
            saw_read(b, 8, as_current());
            return found->second;
        }
    trap("%s: no mbarrier was initialised here", what);
}

void complete_if_due(Mbarrier& m) {
    if (m.pending < 0) trap("mbarrier: more arrivals than the %d it was initialised with", m.arrivals);
    if (m.pending || m.bytes) return;
    m.completed = std::move(m.joined);
    m.joined.clear();
    m.phase++;
    m.pending = m.arrivals;
    for (Thread* t : m.waiting) wake(*t);
    m.waiting.clear();
}

}  // namespace

void mbarrier_init(uint64_t* b, int arrivals) {
    check_shared(b, 8, 8, "mbarrier_init");
    if (shared_offset(b) % 8 || arrivals < 1) trap("mbarrier_init with %d arrivals", arrivals);
    if (!current->block->mbarriers.emplace(b, Mbarrier{arrivals, arrivals, 0, 0, {}, {}, {}}).second)
        trap("mbarrier_init of an mbarrier in use");
    saw_write(b, 8, as_current());
    *b = MARK;
}

void mbarrier_arrive(uint64_t* b, int expected_bytes) {
    Mbarrier& m = at(b, "mbarrier_arrive");
    if (expected_bytes < 0 || expected_bytes >= 1 << 20) trap("mbarrier: %d bytes expected", expected_bytes);
    release_into(m.joined);
    m.bytes += expected_bytes;
    m.pending--;
    complete_if_due(m);
}

void mbarrier_arrive_relaxed(uint64_t* b) {
    Mbarrier& m = at(b, "cluster_arrive");
    if (watched) join(m.joined, current->released);
    m.pending--;
    complete_if_due(m);
}

void cluster_fence() {
    if (!watched) return;
    current->released = current->clock;
    current->clock[current->id]++;
}

void mbarrier_wait(uint64_t* b, int parity) {
    Mbarrier& m = at(b, "mbarrier_wait");
    if (parity != 0 && parity != 1) trap("mbarrier_wait for parity %d", parity);
    const uint32_t phase = m.phase;
    if (int(phase % 2) == parity) {
        m.waiting.push_back(current);
        suspend("mbarrier_wait");
        if (m.phase != phase + 1)
            trap("mbarrier_wait: two phases passed while one was awaited; a GPU might wait for ever");
    }
    acquire_from(m.completed);
}

void fence_async_proxy() {
    if (watched) current->fenced = ++current->clock[current->id];
}

// Section 9.7.9.25.4

void bulk_copy(void* shared, const void* device, int bytes, uint64_t* arrives_at, uint16_t ranks) {
    check_shared(shared, bytes, 16, "bulk_copy");
    check_access(device, bytes, 16, "bulk_copy");
    if (bytes <= 0 || bytes % 16) trap("bulk_copy of %d bytes; a multiple of 16 is possible", bytes);
    if (ranks >> machine.cluster_size) trap("bulk_copy to ranks %#x of a cluster of %u", ranks, machine.cluster_size);
    if (!ranks) ranks = 1u << current->block->rank;
    BulkCopy copy{current, {}, static_cast<const unsigned char*>(device), bytes, {}, {}};
    const Actor engine{current->id, current->clock, true};
    saw_read(device, bytes, as_current());
    for (unsigned rank = 0; rank < machine.cluster_size; rank++) {
        if (!(ranks >> rank & 1)) continue;
        auto* to = static_cast<unsigned char*>(map_shared(shared, rank));
        auto* mbarrier = static_cast<uint64_t*>(map_shared(arrives_at, rank));
        saw_write(to, bytes, engine);
        mark_writing(to, bytes, 1);
        copy.to.push_back(to);
        copy.arrives_at.push_back(&at(mbarrier, "bulk_copy"));
        saw_read(mbarrier, 8, engine);
    }
    release_into(copy.clock);
    machine.bulk_copies.push_back(std::move(copy));
    if (draw(256) < machine.eagerness) land_a_copy();
}

bool land_a_copy() {
    if (machine.bulk_copies.empty()) return false;
    const unsigned i = draw(machine.bulk_copies.size());
    const BulkCopy copy = std::move(machine.bulk_copies[i]);
    machine.bulk_copies.erase(machine.bulk_copies.begin() + i);
    for (size_t j = 0; j < copy.to.size(); j++) {
        mark_writing(copy.to[j], copy.bytes, -1);
        saw_write(copy.to[j], copy.bytes, {copy.issuer->id, copy.clock, true});
        std::memcpy(copy.to[j], copy.from, copy.bytes);
        Mbarrier& m = *copy.arrives_at[j];
        if (watched) join(m.joined, copy.clock);
        m.bytes -= copy.bytes;
        complete_if_due(m);
    }
    return true;
}

std::string left_undone() {
    if (!machine.bulk_copies.empty()) return "a block returned while a bulk copy to its shared memory was under way";
    for (Warp& w : machine.warps) {
        if (!w.wgmma.accumulators.empty()) return "a warp returned while wgmmas were under way";
        const Warp& first = (&w)[-int(w.threads[0].index.x / WARP % 4)];  // of its warpgroup
        if (w.wgmma.history != first.wgmma.history) return "the four warps of a warpgroup issued different wgmmas";
    }
    return {};
}

// Clusters

int cluster_rank() { return current->block->rank; }
int cluster_size() { return machine.cluster_size; }

void sync_cluster() { meet(machine.cluster_barrier, machine.threads.size(), true, "sync_cluster"); }

uint32_t shared_offset(const void* shared) {
    const auto* p = static_cast<const unsigned char*>(shared);
    const Region& r = *region_of(current->block->shared);
    if (p < r.begin || p > r.end) trap("an address outside the block's own shared memory");
    return p - r.begin;
}

void* map_shared(void* mine, int rank) {
    if (rank < 0 || rank >= int(machine.cluster_size)) trap("map_shared to rank %d of %u", rank, machine.cluster_size);
    return machine.blocks[rank].shared + shared_offset(mine);
}

}  // namespace emulation
