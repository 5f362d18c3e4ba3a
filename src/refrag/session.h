// One question after another over passages that stay encoded between them: an Engine with one slot. One
// thread drives it at a time, and several sessions can share a Model, and a cache of passages.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "refrag/answer.h"
#include "refrag/engine.h"
#include "refrag/model.h"
#include "refrag/segment.h"

namespace refrag {

// What can end an answer early.
struct AnswerLimits {
    // Asked before every step; false ends the answer, and nothing is left of it. May be empty.
    std::function<bool()> keep_going = {};
    // Past it the answer ends with what it has said so far, FinishReason::deadline.
    std::optional<std::chrono::steady_clock::time_point> deadline = {};
};

class Session {
  public:
    // max_context: decoder positions, prompt and answer together; 0 for the decoder's own window.
    // Status::usage when it is beyond that window. cache: of passages; null: one of its own.
    explicit Session(const Model& model, int64_t max_context = 0,
                     std::shared_ptr<PassageCache> cache = nullptr);
    // The same with all of an engine's options; n_slots is 1.
    Session(const Model& model, EngineOptions options, std::shared_ptr<PassageCache> cache = nullptr);

    // Answers a request. Status::usage for options or segments that make no sense; Status::runtime when the
    // prompt does not fit, with both numbers. After an error the session is as before.
    Answer answer(std::vector<Segment> segments, const AnswerOptions& options, const TextSink& sink = {});
    // The same within limits: nothing where keep_going ended it. What keep_going throws comes out here.
    std::optional<Answer> answer(std::vector<Segment> segments, const AnswerOptions& options,
                                 const TextSink& sink, const AnswerLimits& limits);
    // As the first for a question over passages, `history` being earlier ones, oldest first, in the model's
    // template (make_segments).
    Answer answer(std::span<const Passage> passages, std::string_view question, const AnswerOptions& options,
                  const TextSink& sink = {}, std::span<const Turn> history = {});

    const Model& model() const { return model_; }
    PassageCache& cache() { return *cache_; }
    int64_t max_context() const { return engine_.max_context(); }
    size_t kv_bytes() const { return engine_.kv_bytes(); }

  private:
    const Model& model_;
    std::shared_ptr<PassageCache> cache_;
    Engine engine_;
};

}  // namespace refrag
