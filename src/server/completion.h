// A call for answers on its way: its choices run as jobs of the scheduler, and what they say goes to the
// client, piece by piece or as one.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "server/answer_format.h"
#include "server/exchange.h"
#include "server/metrics.h"
#include "server/scheduler.h"

namespace refrag {

class Completion : public std::enable_shared_from_this<Completion> {
  public:
    // A choice and what the engine is asked for it.
    struct Part {
        ServedChoice choice;
        std::vector<Segment> segments;
        AnswerOptions options;
    };

    Completion(Scheduler& scheduler, Metrics& metrics, std::shared_ptr<Exchange> exchange,
               std::unique_ptr<AnswerFormat> format, bool stream, size_t n_prompts = 1)
        : scheduler_(scheduler),
          metrics_(metrics),
          exchange_(std::move(exchange)),
          format_(std::move(format)),
          stream_(stream),
          n_prompts_(n_prompts) {}

    // Hands the parts to the scheduler: all of them, or none with ApiRefusal (429) where the queue is full.
    void start(std::vector<Part> parts, std::optional<std::chrono::steady_clock::time_point> deadline);

  private:
    // On the scheduler's thread, as all that follows.
    bool take_piece(size_t index, std::string_view text, const Answer& so_far);
    void take_result(size_t index, Result&& result);
    void take_result_or_throw(size_t index, Result&& result);
    void fail_call(const ApiError& error);
    bool begin_stream();
    void observe_tokens(size_t index, size_t n_tokens);

    Scheduler& scheduler_;
    Metrics& metrics_;
    const std::shared_ptr<Exchange> exchange_;
    const std::unique_ptr<AnswerFormat> format_;
    const bool stream_;
    const size_t n_prompts_;
    std::vector<ServedChoice> choices_;
    struct Seen {
        double ms = 0.0;
        size_t n_tokens = 0;
    };
    std::vector<Seen> seen_;  // of each choice, when tokens last came
    size_t n_ended_ = 0;
    bool failed_ = false;

    std::mutex mutex_;
    std::vector<uint64_t> tickets_;
};

}  // namespace refrag
