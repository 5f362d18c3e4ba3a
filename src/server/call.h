// What a client asks for, read from a request's JSON: fields of generation that all endpoints share, and a
// conversation.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "refrag/answer.h"
#include "refrag/segment.h"
#include "server/body_reader.h"

namespace refrag {

// How the fields are called, where APIs differ.
struct FieldNames {
    const char* top_p = "top_p";
    const char* top_k = "top_k";
    const char* stop = "stop";
};

struct CallOptions {
    AnswerOptions answer;
    bool stream = false;
    bool include_usage = false;     // in a stream
    bool usage_so_far = false;      // in each of its chunks too
    int32_t n = 1;                  // choices
    std::optional<double> seconds;  // until the request's time is over
};

constexpr int32_t max_choices = 128;

// Sampling, stops, expansion, stream, deadline. `defaults`: what a request does not say. Without a seed one
// is drawn where it matters.
CallOptions read_call_options(BodyReader& body, const AnswerOptions& defaults, const FieldNames& names = {});

// max_completion_tokens, or max_tokens: at least `least`.
void read_max_tokens(BodyReader& body, CallOptions& call, int32_t least);

struct Conversation {
    std::optional<std::string> system;  // none: the model's own
    std::vector<Turn> turns;
    std::string question;
};

// "messages": system (or developer) first, then user and assistant in turn, the last one user's. Contents are
// strings or lists of text parts. Messages of one role that follow one another become one, a blank line
// between them.
Conversation read_messages(BodyReader& body);

// A list of token ids below vocab_size.
std::vector<int32_t> ids_of(const Json& list, int64_t vocab_size);

// Fields that change nothing in an answer here, whatever they say.
std::span<const std::string_view> harmless_fields();

}  // namespace refrag
