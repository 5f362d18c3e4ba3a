// What is asked of an answer and what comes back: options, text, and the story of every chunk.
// Plain data, shared by everything that answers (session.h, engine.h).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/logprobs.h"
#include "refrag/sampler.h"
#include "refrag/select.h"

namespace refrag {

struct AnswerOptions {
    int32_t chunk_len = 0;                  // k; 0: the model's
    std::optional<double> expand_fraction;  // p; none: the model's
    std::optional<SelectPolicy> policy;     // none: the model's
    std::optional<Unexpanded> unexpanded;   // none: the model's
    SamplerOptions sampler;                 // its seed also draws SelectPolicy::random
    // -1: until an end token comes or the context is full; 0: the prompt is read (and scored), no more.
    int32_t max_new_tokens = 256;
    std::vector<std::string> stop;  // looked for in the text without its leading space (stop.h)
    bool ignore_eos = false;        // end tokens are never sampled
    // The answer goes on from a text: its first space stays, which is no part of an answer otherwise.
    bool continues_text = false;
    std::optional<int32_t> logprobs;  // report each token's log-probability and this many alternatives
    // Report the prompt's positions too (Answer::scores): each token's log-probability and this many
    // alternatives.
    std::optional<int32_t> prompt_logprobs;
    bool want_logits = false;  // run the policy network even where its choice is already known (p = 0 or 1)
};

// Status::usage naming the first option that makes no sense.
void check_answer_options(const AnswerOptions& options);

// Milliseconds on the host's clock. TTFT is the sum of all but `queue` and `decode`, and the little between
// them. In a batch, work done together with other requests counts in full for each.
struct StageTimes {
    double queue = 0.0;     // waiting for a slot of a batch
    double tokenize = 0.0;  // passages not yet cut, texts, question
    double encode = 0.0;    // passages not yet encoded
    double sense = 0.0;     // question pieces encoded, policy, choice
    double project = 0.0;   // projector
    double prefill = 0.0;   // assembly and the decoder's pass over the prompt
    double sample = 0.0;    // the first token
    double decode = 0.0;    // all further tokens
};

struct ChunkReport {
    size_t segment = 0;  // index of its passage among the request's segments
    size_t begin = 0;    // byte span in the passage's text (title included)
    size_t end = 0;
    size_t n_tokens = 0;
    std::optional<float> logit;  // of the policy network, or another policy's score
    bool expanded = false;
    bool cached = false;      // had its embedding before this question
    int32_t position = 0;     // first position in the decoder
    int32_t n_positions = 0;  // that it takes: 1 compressed, n_tokens expanded
};

enum class FinishReason {
    end_token,
    stop_string,
    max_tokens,
    context_full,
    cancelled,  // its sink wanted no more
    deadline    // its time was over (Request::deadline)
};
// "end", "stop", "length", "context", "cancelled", "deadline"
const char* finish_reason_name(FinishReason reason);

struct Answer {
    std::string text;          // without the one leading space that answers are trained with, unless it
                               // continues a text
    std::vector<int32_t> ids;  // all that were generated but the end token; a stop string's among them
    std::vector<TokenLogprobs> logprobs;  // one for each id, where asked for
    // Of the prompt, by position: all positions where AnswerOptions::prompt_logprobs asks for them, else the
    // ids of scored segments (TokenSegment::score), without alternatives.
    std::vector<PromptScore> scores;
    FinishReason finish = FinishReason::end_token;
    std::optional<std::string> stop;            // the stop string found
    SelectPolicy policy = SelectPolicy::model;  // this and the next three: the model's where none was given
    Unexpanded unexpanded = Unexpanded::compress;
    int32_t chunk_len = 0;
    double expand_fraction = 0.0;
    size_t n_expanded = 0;
    size_t n_cached = 0;
    size_t positions = 0;       // decoder positions of the prompt
    size_t n_reused = 0;        // of those, taken over from an earlier prompt that began alike
    size_t plain_tokens = 0;    // what the same prompt takes as tokens
    double ttft_ms = 0.0;       // from the start of this request's own work
    double tokens_per_s = 0.0;  // of the tokens after the first; 0 if there is none
    StageTimes times;
    std::vector<ChunkReport> chunks;
};

// Text as it is generated; called on the thread that drives the generation. Returns whether to go on: after
// false the answer ends with FinishReason::cancelled.
using TextSink = std::function<bool(std::string_view)>;
// The same with the answer as far as it has come: its text, the piece included, its ids and
// log-probabilities.
using AnswerSink = std::function<bool(std::string_view piece, const Answer& so_far)>;

}  // namespace refrag
