// One question after another over passages: compress, sense, expand, decode (paper, section 2). A Session
// holds the KV cache and the scratch memory; one thread drives it at a time, and several sessions can share a
// Model.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/assemble.h"
#include "refrag/context.h"
#include "refrag/model.h"
#include "refrag/sampler.h"
#include "refrag/select.h"

namespace refrag {

struct AnswerOptions {
    int32_t chunk_len = 0;                  // k; 0: the model's
    std::optional<double> expand_fraction;  // p; none: the model's
    SelectPolicy policy = SelectPolicy::model;
    SamplerOptions sampler;  // its seed also draws SelectPolicy::random
    int32_t max_new_tokens = 256;
    bool want_logits = false;  // run the policy network even where its choice is already known (p = 0 or 1)
};

// Milliseconds on the host's clock. TTFT is the sum of all but `decode`, and the little between them.
struct StageTimes {
    double tokenize = 0.0;  // passages not yet cut, question, template
    double encode = 0.0;    // chunks not yet encoded
    double sense = 0.0;     // question pieces encoded, policy, choice
    double project = 0.0;   // projector
    double prefill = 0.0;   // assembly and the decoder's pass over the prompt
    double sample = 0.0;    // the first token
    double decode = 0.0;    // all further tokens
};

struct ChunkReport {
    size_t passage = 0;  // index of its passage
    size_t begin = 0;    // byte span in the passage's text (title included)
    size_t end = 0;
    size_t n_tokens = 0;
    std::optional<float> logit;  // of the policy network, or the score of a perplexity policy
    bool expanded = false;
    bool cached = false;   // had its embedding before this question
    int32_t position = 0;  // first position in the decoder
    int32_t slots = 0;     // positions it takes: 1 compressed, n_tokens expanded
};

enum class FinishReason { end_token, max_tokens, context_full };
const char* finish_reason_name(FinishReason reason);

struct Answer {
    std::string text;  // without the one leading space that answers are trained with
    std::vector<int32_t> ids;
    FinishReason finish = FinishReason::end_token;
    int32_t chunk_len = 0;
    double expand_fraction = 0.0;
    size_t n_expanded = 0;
    size_t n_cached = 0;
    size_t positions = 0;     // decoder positions of the prompt
    size_t plain_tokens = 0;  // what the same prompt takes as tokens
    double ttft_ms = 0.0;
    double tokens_per_s = 0.0;  // of the tokens after the first; 0 if there is none
    StageTimes times;
    std::vector<ChunkReport> chunks;
};

// Text as it is generated; called on the session's thread.
using TextSink = std::function<void(std::string_view)>;

class Session {
  public:
    // max_context: decoder positions, prompt and answer together; 0 for the decoder's own window.
    // Status::usage when it is beyond that window.
    Session(const Model& model, int64_t max_context = 0);

    // Answers a question over passages. Passages are tokenised and encoded as far as needed and keep the
    // result. Status::runtime when the prompt does not fit, with both numbers.
    Answer answer(std::span<ContextPassage> passages, std::string_view question, const AnswerOptions& options,
                  const TextSink& sink = {});

    int64_t max_context() const { return max_context_; }
    size_t kv_bytes() const { return kv_.device_bytes(); }

  private:
    std::vector<bool> sense(std::span<ContextPassage> passages, std::string_view question,
                            const AnswerOptions& options, Answer& answer);
    std::vector<float> policy_logits(std::span<ContextPassage> passages, std::string_view question,
                                     Answer& answer);
    DecoderInput assemble(std::span<const ContextPassage> passages, const std::vector<int32_t>& question,
                          const std::vector<bool>& expanded) const;
    // Refuses a prompt that is empty, or that leaves no position for an answer.
    void check_fits(const DecoderInput& input, const char* at_least) const;
    Tensor project(std::span<const ContextPassage> passages, const std::vector<int32_t>& slot_chunk);
    void generate(Tensor hidden, int32_t max_new_tokens, Sampler& sampler, const TextSink& sink,
                  double started_ms, Answer& answer);

    const Model& model_;
    int64_t max_context_;
    KvCache kv_;
    Arena arena_;
};

}  // namespace refrag
