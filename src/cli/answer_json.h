// An answer as JSON: the fields that `run --json`, `--batch` and `--explain` share.
#pragma once

#include <span>
#include <string_view>

#include "io/json.h"
#include "refrag/answer.h"
#include "refrag/context.h"
#include "text/tokenizer.h"

namespace refrag {

// Members of an object that is open and stays open: "question" to "times_ms", and "logprobs" where asked for.
void write_answer(JsonWriter& json, const Tokenizer& tokenizer, std::string_view question,
                  SelectPolicy policy, const Answer& answer);

// The member "chunks": every chunk with its document and text.
void write_chunks(JsonWriter& json, std::span<const ContextPassage> passages, const Answer& answer);

}  // namespace refrag
