// An answer as JSON: the fields that `run --json`, `--batch` and `--explain` share.
#pragma once

#include <span>
#include <string>
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

// An object of milliseconds, a member a stage.
void write_times(JsonWriter& json, const StageTimes& times);

// A passage by what its user calls it.
struct DocumentName {
    std::string id;
    std::string title;  // may be empty
};

// Members of an object that is open and stays open: byte span, `text`, "tokens" to "n_positions".
void write_chunk(JsonWriter& json, const ChunkReport& chunk, std::string_view text);

// The member "chunks": every chunk with its document's id and text. `documents` names the request's passage
// segments in their order.
void write_chunks(JsonWriter& json, const Model& model, std::span<const DocumentName> documents,
                  std::span<const Segment> segments, const Answer& answer);

}  // namespace refrag
