// How an answer looks on the wire: as one JSON object, or as a stream of server-sent events. What is common
// to the three forms (OpenAI's chat and completions, Cohere's chat) is here; each form is a class.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "refrag/answer.h"
#include "refrag/citation_json.h"
#include "refrag/model.h"
#include "refrag/segment.h"
#include "server/api_error.h"

namespace refrag {

// Where an answer's tokens begin in its text, worked out as the answer grows.
class TokenPlaces {
  public:
    // In bytes. continues_text: the text's first space is part of it.
    const std::vector<size_t>& bytes(const Tokenizer& tokenizer, const Answer& answer, bool continues_text) {
        extend(tokenizer, answer, continues_text);
        return bytes_;
    }
    // In characters.
    const std::vector<size_t>& characters(const Tokenizer& tokenizer, const Answer& answer,
                                          bool continues_text) {
        extend(tokenizer, answer, continues_text);
        return characters_;
    }

  private:
    void extend(const Tokenizer& tokenizer, const Answer& answer, bool continues_text);

    std::vector<size_t> bytes_;
    std::vector<size_t> characters_;
    size_t end_byte_ = 0;  // of the tokens so far
    size_t end_character_ = 0;
    size_t dropped_ = 0;  // the space before an answer
};

// One of a call's answers, on its way.
struct ServedChoice {
    size_t index = 0;
    // The same for all choices of one prompt; what citations are of.
    std::shared_ptr<const std::vector<Segment>> segments;
    std::shared_ptr<const std::vector<CitedDocument>> documents;
    std::string prompt;               // completions: what `echo` gives back
    std::vector<int32_t> prompt_ids;  // completions: as they were given, without our BOS
    bool begun = false;               // its first event is out
    size_t n_bytes = 0;               // of the text that is out
    size_t n_tokens = 0;              // of the log-probabilities that are out
    std::optional<Answer> answer;     // when it has ended
    mutable TokenPlaces places;       // of the answer's tokens, as far as they were asked for
};

// What all answers to one call have in common.
struct CallInfo {
    std::string id;
    std::string model;
    int64_t created = 0;  // seconds since 1970
    bool include_usage = false;
    bool usage_so_far = false;
    std::optional<int32_t> logprobs;  // alternatives
    bool echo = false;
    bool cites = true;
    double retrieve_ms = 0.0;
    size_t n_prompts = 1;
};

class AnswerFormat {
  public:
    AnswerFormat(const Model& model, CallInfo call) : model_(model), call_(std::move(call)) {}
    virtual ~AnswerFormat() = default;

    // Events. A piece of a choice's text; a choice's end; the stream's end.
    virtual std::string piece(ServedChoice& choice, std::string_view text, const Answer& so_far) = 0;
    virtual std::string last(ServedChoice& choice) = 0;
    virtual std::string close(std::span<const ServedChoice> choices) = 0;
    // The whole.
    virtual std::string whole(std::span<const ServedChoice> choices) = 0;
    // A failure in the middle of a stream, and its end.
    virtual std::string broken(const ApiError& error) const;

  protected:
    // Empty where none are wanted.
    std::vector<Citation> citations_of(const ServedChoice& choice) const;

    const Model& model_;
    const CallInfo call_;
};

// Of chat/completions, completions, v2/chat.
std::unique_ptr<AnswerFormat> openai_chat_format(const Model& model, CallInfo call);
std::unique_ptr<AnswerFormat> openai_text_format(const Model& model, CallInfo call);
std::unique_ptr<AnswerFormat> cohere_chat_format(const Model& model, CallInfo call);

// ---- what the forms share ----------------------------------------------------------------------------

// "data: ...\n\n"
std::string sse_event(std::string_view json, std::string_view event = {});
inline constexpr std::string_view sse_done = "data: [DONE]\n\n";

size_t count_characters(std::string_view text);
// How many tokens belong to the text as far as `n_bytes`; at the end those of a stop string do not.
size_t tokens_within(const std::vector<size_t>& begins, size_t n_bytes);

// Sums over choices; a prompt that several choices share counts once.
struct Usage {
    size_t prompt = 0;  // as plain tokens
    size_t completion = 0;
    size_t cached = 0;  // of the prompt, taken over from the KV cache
};
Usage usage_of(std::span<const ServedChoice> choices, size_t n_prompts);
void write_usage(JsonWriter& json, const Usage& usage);

// "stop" or "length"
const char* openai_finish(FinishReason reason);

// The object "refrag": what was compressed, expanded, cached; positions against plain tokens; for each
// document; times.
void write_refrag(JsonWriter& json, const ServedChoice& choice, const Answer& answer, double retrieve_ms);

}  // namespace refrag
