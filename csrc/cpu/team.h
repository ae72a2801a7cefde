// The threads of one call: what they wait for, and how Ctrl-C ends it.
//
// Python shows a signal to its main thread alone, which as a rule is the thread that called. So that one asks, once a
// loop and while it waits for others, but at most every 50 ms; all leave at the end of their loop.
#pragma once
#include <atomic>
#include <cstdint>

class Team {
  public:
    // signalled: asks Python; true where the call is to end. Called by the thread that this is made in.
    Team(bool (*signalled)());
    // Whether to leave all work undone. Asked by every thread, once a loop.
    bool stopped();
    // Waits until begin_turn(0) .. begin_turn(turn - 1) have been followed by end_turn().
    void begin_turn(int64_t turn);
    void end_turn();
    // A thread has no more to do; the one that called waits for the n - 1 others.
    void leave(int n);
    // Whether a call of stopped() said so.
    bool is_stopped() const { return stop_.load(std::memory_order_relaxed); }

  private:
    template <class Ready>
    void wait_until(Ready ready);
    bool (*const signalled_)();
    const uint64_t caller_;
    int64_t next_poll_;
    std::atomic<bool> stop_{false};
    std::atomic<int64_t> turn_{0};
    std::atomic<int> left_{0};
};

// How many threads of n there is room for; libgomp ends the process where it cannot make one.
int threads_that_fit(int n);
