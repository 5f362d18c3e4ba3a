// One question after another over passages that stay encoded between them: an Engine with one slot. One
// thread drives it at a time, and several sessions can share a Model.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "refrag/answer.h"
#include "refrag/context.h"
#include "refrag/engine.h"
#include "refrag/model.h"

namespace refrag {

class Session {
  public:
    // max_context: decoder positions, prompt and answer together; 0 for the decoder's own window.
    // Status::usage when it is beyond that window.
    explicit Session(const Model& model, int64_t max_context = 0);

    // Answers a question over passages, `history` being earlier ones, oldest first. Passages are tokenised
    // and encoded as far as needed and keep the result. Status::usage for options that make no sense;
    // Status::runtime when the prompt does not fit, with both numbers. After an error the session is as
    // before.
    Answer answer(std::span<ContextPassage> passages, std::string_view question, const AnswerOptions& options,
                  const TextSink& sink = {}, std::span<const Turn> history = {});

    int64_t max_context() const { return engine_.max_context(); }
    size_t kv_bytes() const { return engine_.kv_bytes(); }

  private:
    Engine engine_;
};

}  // namespace refrag
