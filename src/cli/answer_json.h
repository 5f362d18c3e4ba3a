// An answer as JSON: the fields that `run --json`, `--batch` and `--explain` share.
#pragma once

#include <span>
#include <string_view>

#include "io/json.h"
#include "refrag/answer.h"
#include "refrag/model.h"
#include "refrag/segment.h"
#include "text/tokenizer.h"

namespace refrag {

// Members of an object that is open and stays open: "question" to "times_ms", and "logprobs" where asked for.
void write_answer(JsonWriter& json, const Tokenizer& tokenizer, std::string_view question,
                  const Answer& answer);

// The member "chunks": every chunk with its document and text. The request's passage segments are those of
// `passages`, in their order.
void write_chunks(JsonWriter& json, const Model& model, std::span<const Passage> passages,
                  std::span<const Segment> segments, const Answer& answer);

}  // namespace refrag
