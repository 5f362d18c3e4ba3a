// The thread pool: how a job is posted, joined and left. See threads.h for what it promises.
//
// Sleeping follows one pattern on both sides: the sleeper announces itself, then looks at state_ once more
// under the mutex; the waker changes state_, then looks for announced sleepers. All four are sequentially
// consistent, so at least one of the two sees the other.
#include "base/threads.h"

#include <algorithm>
#include <chrono>
#include <new>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"

namespace refrag {
namespace {

constexpr uint64_t kJoinedMask = 0xffff;
constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr uint64_t kStop = uint64_t{1} << 17;
constexpr uint64_t kEpochOne = uint64_t{1} << 18;
constexpr int kMaxThreads = 4096;

// Longer than the serial gaps between the ops of a decode step, shorter than anyone would notice as load.
constexpr auto kSpinTime = std::chrono::microseconds(50);

uint64_t epoch_of(uint64_t state) {
    return state / kEpochOne;
}

void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Spins until ready() or the spin time is over; the clock is read once in a while only.
template <typename Ready>
bool spin_until(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause_cpu();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

}  // namespace

int default_threads() {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int n_threads) : spins_(n_threads <= default_threads()) {
    REFRAG_CHECK(n_threads >= 1 && n_threads <= kMaxThreads, Status::usage, "a thread pool needs 1 to ",
                 kMaxThreads, " threads, not ", n_threads);
    workers_.reserve(static_cast<size_t>(n_threads - 1));
    try {
        for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::exception& e) {
        // The destructor does not run for an object that was never made: end the started ones here.
        state_.fetch_or(kStop);
        { const std::lock_guard<std::mutex> lock(sleep_mutex_); }
        job_posted_.notify_all();
        for (std::thread& worker : workers_) worker.join();
        const bool memory = dynamic_cast<const std::bad_alloc*>(&e) != nullptr;
        fail(memory ? Status::out_of_memory : Status::runtime, "cannot start ", n_threads,
             " threads: ", memory ? "out of memory" : e.what());
    }
}

ThreadPool::~ThreadPool() {
    state_.fetch_or(kStop);
    { const std::lock_guard<std::mutex> lock(sleep_mutex_); }
    job_posted_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t n_tasks, FunctionRef<void(int64_t)> task) {
    run_on(n_tasks, [&task](int64_t i, int) { task(i); });
}

void ThreadPool::run_on(int64_t n_tasks, FunctionRef<void(int64_t, int)> task) {
    if (n_tasks <= 0) return;
    const std::lock_guard<std::mutex> lock(run_mutex_);
    if (n_tasks == 1 || workers_.empty()) {
        for (int64_t i = 0; i < n_tasks; ++i) task(i, 0);
        return;
    }

    task_ = &task;
    n_tasks_ = n_tasks;
    next_.store(0, std::memory_order_relaxed);
    state_.store((epoch_of(state_.load(std::memory_order_relaxed)) + 1) * kEpochOne | kOpen);
    if (sleepers_.load() > 0) {
        { const std::lock_guard<std::mutex> sleep_lock(sleep_mutex_); }
        const int64_t wanted = std::min<int64_t>(n_tasks - 1, static_cast<int64_t>(workers_.size()));
        if (wanted == static_cast<int64_t>(workers_.size())) {
            job_posted_.notify_all();
        } else {
            for (int64_t i = 0; i < wanted; ++i) job_posted_.notify_one();
        }
    }

    take_tasks(0);
    // A worker that has not woken by now is not waited for.
    state_.fetch_and(~kOpen);
    wait_until_left();

    std::exception_ptr error;
    {
        const std::lock_guard<std::mutex> error_lock(error_mutex_);
        std::swap(error, error_);
    }
    if (error) std::rethrow_exception(error);
}

void ThreadPool::take_tasks(int thread) {
    for (;;) {
        const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= n_tasks_) return;
        try {
            (*task_)(i, thread);
        } catch (...) {
            next_.store(n_tasks_, std::memory_order_relaxed);
            const std::lock_guard<std::mutex> lock(error_mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }
}

void ThreadPool::work(int thread) {
    uint64_t seen_epoch = 0;
    while (wait_for_job(seen_epoch)) {
        uint64_t state = state_.load();
        if ((state & kOpen) == 0 || epoch_of(state) == seen_epoch) continue;
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        seen_epoch = epoch_of(state);
        take_tasks(thread);
        leave();
    }
}

// Returns true when there is a job that this worker has not been in, false when the pool ends.
bool ThreadPool::wait_for_job(uint64_t seen_epoch) {
    const auto ready = [this, seen_epoch] {
        const uint64_t state = state_.load();
        return (state & kStop) != 0 || ((state & kOpen) != 0 && epoch_of(state) != seen_epoch);
    };
    if (!(spins_ ? spin_until(ready) : ready())) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        job_posted_.wait(lock, ready);
        sleepers_.fetch_sub(1);
    }
    return (state_.load() & kStop) == 0;
}

void ThreadPool::leave() {
    const uint64_t left = state_.fetch_sub(1) - 1;
    if ((left & (kJoinedMask | kOpen)) == 0 && caller_sleeps_.load()) {
        { const std::lock_guard<std::mutex> lock(sleep_mutex_); }
        job_left_.notify_one();
    }
}

void ThreadPool::wait_until_left() {
    const auto empty = [this] { return (state_.load() & kJoinedMask) == 0; };
    if (spins_ ? spin_until(empty) : empty()) return;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    caller_sleeps_.store(true);
    job_left_.wait(lock, empty);
    caller_sleeps_.store(false);
}

}  // namespace refrag
