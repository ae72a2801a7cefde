// Compiled for any machine, unlike its users.
#include "team.h"

#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

namespace {

constexpr int64_t MICROSECOND = 1000, POLL = 50 * 1000 * MICROSECOND;

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * (1000 * 1000 * MICROSECOND) + time.tv_nsec;
}

uint64_t this_thread() { return uint64_t(pthread_self()); }

}  // namespace

Team::Team(bool (*signalled)()) : signalled_(signalled), caller_(this_thread()), next_poll_(now() + POLL) {}

bool Team::stopped() {
    if (stop_.load(std::memory_order_relaxed)) return true;
    if (this_thread() != caller_ || now() < next_poll_) return false;
    const bool stop = signalled_();
    stop_.store(stop, std::memory_order_relaxed);
    next_poll_ = now() + POLL;
    return stop;
}

template <class Ready>
void Team::wait_until(Ready ready) {
    const int64_t patience = now() + 100 * MICROSECOND;  // others are as fast as a rule: being woken takes as long
    while (!ready()) {
        stopped();
        if (now() < patience) continue;
        const timespec nap = {0, 50 * MICROSECOND};
        nanosleep(&nap, nullptr);
    }
}

void Team::begin_turn(int64_t turn) {
    wait_until([&] { return turn_.load(std::memory_order_acquire) == turn; });
}

void Team::end_turn() { turn_.fetch_add(1, std::memory_order_release); }

void Team::leave(int n) {
    if (this_thread() != caller_)
        left_.fetch_add(1, std::memory_order_release);
    else
        wait_until([&] { return left_.load(std::memory_order_acquire) == n - 1; });
}

namespace {

bool has_room(size_t bytes) {
    void* room = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return false;
    munmap(room, bytes);
    return true;
}

}  // namespace

int threads_that_fit(int n) {
    static std::atomic<int> most_made{1};  // libgomp keeps them
    if (n <= most_made.load()) return n;
    size_t stack = 0;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_getstacksize(&attributes, &stack);
    pthread_attr_destroy(&attributes);
    const size_t heap = size_t(128) << 20;  // addresses that a thread's first malloc reserves, which others then lack
    while (n > 1 && !has_room((n - 1) * (stack + heap))) n /= 2;
    most_made.store(n);
    return n;
}
