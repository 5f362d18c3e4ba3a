// What Prometheus scrapes: counters of requests, histograms of latencies, and what the scheduler holds.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "refrag/passage_cache.h"
#include "server/scheduler.h"

namespace refrag {

// Counts of values up to each bound. Any number of threads.
class Histogram {
  public:
    void observe(double seconds, int64_t times = 1);
    // As Prometheus' text format has it.
    void write(std::string& out, std::string_view name, std::string_view help) const;

  private:
    static constexpr std::array<double, 16> bounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,  0.25,
                                                      0.5,   1.0,    2.5,   5.0,  10.0,  30.0, 60.0, 300.0};
    std::array<std::atomic<int64_t>, bounds.size() + 1> counts_{};
    std::atomic<int64_t> sum_ns_{0};
};

struct Metrics {
    Histogram ttft;                            // from a request's arrival in the queue to its first token
    Histogram ttit;                            // between tokens
    Histogram total;                           // from a request's arrival to its response's end
    std::atomic<int64_t> prompt_tokens{0};     // as plain tokens
    std::atomic<int64_t> prompt_positions{0};  // what the decoder read in their place
    std::atomic<int64_t> generated_tokens{0};
    std::atomic<int64_t> chunks{0};
    std::atomic<int64_t> chunks_expanded{0};
    std::atomic<int64_t> chunks_cached{0};
    std::atomic<int64_t> clients_left{0};

    // A response's status for a route.
    void count_response(std::string_view route, int status);
    // An answer that has ended.
    void count_answer(const Answer& answer);
    // All of it, in Prometheus' text format.
    // cache: of passages and their embeddings, whoever brought them.
    std::string text(const SchedulerStats& scheduler, size_t n_connections, size_t n_passages,
                     const PassageCache& cache) const;

  private:
    mutable std::mutex mutex_;
    std::map<std::pair<std::string, int>, int64_t> responses_;
};

}  // namespace refrag
