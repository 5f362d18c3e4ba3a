// A small thread pool for short parallel regions: the calling thread takes part, tasks are handed out by an
// atomic counter, idle workers spin briefly and then sleep. No global state; a pool belongs to its owner.
//
// run() may be called from several threads (the calls take turns), but not from inside a task of the same
// pool. Which thread runs which task is not fixed: results must not depend on it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/function_ref.h"

namespace refrag {

// CPUs this process may run on (its affinity mask), at least 1.
int default_threads();

class ThreadPool {
  public:
    // n_threads >= 1 counts the calling thread: n_threads - 1 workers are started.
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls task(i) once for each i in [0, n_tasks), and returns when all have ended. If a task throws, tasks
    // not yet begun are dropped and the first exception is rethrown here.
    void run(int64_t n_tasks, FunctionRef<void(int64_t)> task);
    // The same, with the number of the thread, in [0, size()): for scratch memory kept per thread. No two
    // tasks that run at once have the same number.
    void run_on(int64_t n_tasks, FunctionRef<void(int64_t task, int thread)> task);

  private:
    using Task = FunctionRef<void(int64_t, int)>;

    void work(int thread);
    void take_tasks(int thread);
    bool wait_for_job(uint64_t seen_epoch);
    void leave();
    void wait_until_left();

    std::vector<std::thread> workers_;
    bool spins_ = true;  // false where the pool has more threads than there are CPUs

    std::mutex run_mutex_;  // one run() at a time

    // The job. Written by run() only while the job is closed and nobody is in it.
    const Task* task_ = nullptr;
    int64_t n_tasks_ = 0;
    std::atomic<int64_t> next_{0};

    // Bits 0..15: workers now in the job. Bit 16: open, workers may enter. Bit 17: the pool ends.
    // Bits 18..63: the job's number. A worker enters by one compare-and-swap of the whole word, so it can
    // never slip into a job that has been closed, nor into the next one with an old task.
    std::atomic<uint64_t> state_{0};

    std::mutex sleep_mutex_;
    std::condition_variable job_posted_;
    std::condition_variable job_left_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};

    std::mutex error_mutex_;
    std::exception_ptr error_;
};

}  // namespace refrag
