// What a page about answers shows (explain_page.h), measured and put into JSON. More than the answer itself
// tells: which row of the decoder's input is what, where the answer looked, and how long the same question
// takes as a full context.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/answer_json.h"
#include "refrag/answer.h"
#include "refrag/engine.h"
#include "refrag/model.h"
#include "refrag/segment.h"

namespace refrag {

struct ExplainedQuestion {
    std::string question;
    std::vector<DocumentName> documents;  // of the passage segments, in their order
    std::vector<Segment> segments;
    std::vector<bool> was_cut;  // [segments.size()]: passages that were cut before the question was asked
    std::optional<double> retrieve_ms;  // what finding the passages took, before the question was answered
    Answer answer;
};

// A JSON object in one line: "model", "device", "version" and "questions", each with the members of
// write_answer, "retrieve_ms" where passages were looked for, "documents", "chunks", "input", "full" and
// "attention". Makes an engine with `engine`'s options, so none should be holding the device's memory: every
// question is read once more with all chunks expanded, for its time, and once more as it was answered, for
// its attention. What cannot be had (a context too long, memory too small) gives "error" in its place.
std::string explain_data(const Model& model, const EngineOptions& engine, const AnswerOptions& options,
                         const std::vector<ExplainedQuestion>& questions);

// Chunks begin and end at tokens, which may be inside characters. As whole characters a chunk holds those
// whose first byte is its own, so that each is shown once: of `ends`, rising byte positions in `text`, each
// moves on to where a character begins.
std::vector<size_t> whole_characters(std::string_view text, const std::vector<size_t>& ends);

}  // namespace refrag
