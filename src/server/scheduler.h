// The one thread that computes: an engine's steps, and between them a slice of encoding for passages that are
// put or embedded. Others hand over work and are told of its end; what is handed over waits in a bounded
// queue, first come, first served.
//
// While answers are under way, prompts get as many rows of a step as the machine has been seen to take in
// step_ms, so that no answer waits longer for its next token, whatever is read beside it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/arena.h"
#include "refrag/engine.h"
#include "refrag/passage.h"

namespace refrag {

struct SchedulerOptions {
    EngineOptions engine;
    size_t max_queue = 64;  // requests beside those that have a slot
    double step_ms = 50.0;
};

struct SchedulerStats {
    EngineStats engine;
    size_t n_pending = 0;   // requests that are handed over and have not ended
    size_t n_encoding = 0;  // calls of encode that have not ended
    int64_t step_rows = 0;  // of prompts in a step, while answers are under way
    size_t kv_bytes = 0;
    int64_t max_context = 0;
};

class Scheduler {
  public:
    struct Job {
        Request request;
        // On the scheduler's thread, once, unless it is cancelled; must not throw.
        std::function<void(Result&&)> done;
    };

    // Throws as Engine's constructor does. `model` must outlive it.
    Scheduler(const Model& model, const SchedulerOptions& options);
    ~Scheduler();
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;

    // Ends the thread; whatever is under way is given up without a word.
    void stop();

    // All of these jobs, or none where the queue has no room for them: their tickets, in order.
    std::optional<std::vector<uint64_t>> submit(std::vector<Job>&& jobs);
    // Passages are encoded beside the requests; then done(nothing), or the error, with the scheduler's
    // backend. None where the queue is full.
    using Encoded = std::function<void(const std::optional<Error>&, Backend&)>;
    std::optional<uint64_t> encode(std::vector<std::shared_ptr<SharedPassage>> passages, Encoded done);
    // Of either kind; unknown ones are ignored. Its `done` may still be on its way.
    void cancel(std::span<const uint64_t> tickets);

    // What the queue holds at most, with those that have a slot.
    size_t capacity() const { return n_slots_ + options_.max_queue; }
    SchedulerStats stats() const;
    bool idle() const;
    // Waits until nothing is under way, or until then; whether nothing is.
    bool wait_idle(std::chrono::steady_clock::time_point until) const;

  private:
    struct Waiting {
        uint64_t ticket;
        Job job;
    };
    struct Encoding {
        uint64_t ticket;
        std::vector<std::shared_ptr<SharedPassage>> passages;
        Encoded done;
    };
    struct Running {
        uint64_t ticket;
        std::function<void(Result&&)> done;
    };
    // What other threads have left for the scheduler's.
    struct Mail {
        std::vector<Waiting> jobs;
        std::vector<Encoding> encodings;
        std::vector<uint64_t> cancelled;
        bool empty() const { return jobs.empty() && encodings.empty() && cancelled.empty(); }
    };

    void drive();
    void open(Mail&& mail);
    void start(Waiting&& waiting);
    void step();
    void encode_slice();
    void adapt(double ms, int64_t rows);
    void ended(size_t n_jobs, size_t n_encodings);
    void take_stats();

    const Model& model_;
    const SchedulerOptions options_;
    const size_t n_slots_;

    // The scheduler's thread alone.
    Engine engine_;
    std::unique_ptr<Backend> backend_;  // for encoding alone; outlives what takes memory through it
    Arena arena_;
    std::unordered_map<uint64_t, Running> running_;     // by the engine's id
    std::unordered_map<uint64_t, uint64_t> engine_id_;  // by ticket
    std::vector<Encoding> encodings_;                   // the first is worked on
    int64_t step_rows_;
    double rows_per_ms_ = 0.0;  // 0: not known yet

    mutable std::mutex mutex_;  // of all that follows
    mutable std::condition_variable changed_;
    Mail mail_;
    bool stopping_ = false;
    uint64_t next_ticket_ = 1;
    size_t n_pending_ = 0;
    size_t n_encoding_ = 0;
    SchedulerStats stats_;

    std::thread thread_;  // last: it uses all of the above
};

}  // namespace refrag
