// One request of an engine, from the making of its prompt to its answer's end: what is still to be made, the
// sampler, the text, the sums. Knows its generator's sequence only by what the sequence calls.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>

#include "refrag/engine.h"
#include "refrag/prompt_work.h"
#include "refrag/sampler.h"
#include "refrag/stop.h"

namespace refrag {

// A request's end is a border: whatever was thrown becomes its error. Needs no memory to say that there is
// none.
Error error_from(const std::exception_ptr& thrown);

class EngineJob {
  public:
    // Of a request that was submitted at submitted_ms (now_ms). `model` must outlive it, and n_generated,
    // which counts the tokens of all jobs. Throws where its options make no sense for the model.
    EngineJob(const Model& model, uint64_t id, Request&& from, double submitted_ms, int64_t max_context,
              int64_t& n_generated);
    EngineJob(const EngineJob&) = delete;
    EngineJob& operator=(const EngineJob&) = delete;

    // The prompt is made: `start` becomes what a generator takes; the callbacks are this job's.
    void make_start(bool name_rows);
    // Ends the text: what was held back, the reason, the sums. Throws what the sink throws.
    void end(std::optional<FinishReason> reason);

    const uint64_t id;
    Request request;
    Answer answer;
    std::unique_ptr<PromptWork> work;  // until the prompt is made
    Generator::Start start;            // then, until there is room
    bool cancelled = false;            // gives no result, and no further text

  private:
    // The next token, taken into the answer; nothing when it was the last.
    std::optional<int32_t> next(const Logits& logits, double logits_ms);
    void take_score(const ScoredRow& row, TokenLogprobs&& logprobs);
    // Takes piece_ for the answer's next text; what of it is decided goes out.
    void say();
    void emit(const std::string& piece);
    // The entries of Answer::scores, as far as they are known before the prompt is read.
    void list_positions(const Prompt& prompt);

    const Model& model_;
    Sampler sampler_;
    StreamDecoder stream_;
    StopFilter stops_;
    std::string piece_;    // of the last token; here and in the next, so that no token asks for memory
    std::string decided_;  // what no stop string can take back
    int64_t& n_generated_;
    bool at_start_;
    bool stopped_ = false;  // its sink wants no more
    double started_ms_;
    double prompted_ms_ = 0.0;     // when its prompt was made; 0: not yet
    double first_token_ms_ = 0.0;  // 0: none yet
};

}  // namespace refrag
