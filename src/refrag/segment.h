// A request's input: segments in any order, of which the decoder's rows are made one after another
// (prompt_work.h). Each is tokenised alone. make_segments() is the model's template.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "refrag/passage.h"
#include "refrag/passage_cache.h"
#include "refrag/passages.h"

namespace refrag {

// Ids as they are.
struct TokenSegment {
    std::vector<int32_t> ids;
    // The log-probability of each, given all rows before it, is reported (Answer::scores).
    bool score = false;
    // A template's piece around a passage: how many segments further that passage is (-1: the one before).
    // Where all of its chunks are left out (Unexpanded::drop), so is the piece. 0: of no passage.
    int32_t around = 0;
};

// A text, read as tokens. parse_special: spellings of special tokens are those tokens, as in a template;
// else they are ordinary text.
struct TextSegment {
    std::string text;
    bool parse_special = false;
};

// Tokens too, and what a policy that sees the question, or its words, sees. `ids`: how it stands in the
// input, with what a chat template puts around it; without them the text is tokenised alone.
struct QuestionSegment {
    std::string text;
    std::optional<std::vector<int32_t>> ids = {};
};

// Chunks, each of which is expanded or not. `expanded`, one for each chunk: a choice made earlier, which is
// kept; without it the request's policy chooses.
struct PassageSegment {
    std::shared_ptr<SharedPassage> passage;
    std::optional<std::vector<bool>> expanded = std::nullopt;
};

// Chunk embeddings [n, d_enc] from elsewhere, a row each. Nobody knows their tokens: they stay compressed,
// and no policy sees them.
struct ChunkEmbSegment {
    std::vector<float> values;
};

// Rows of the decoder's input [n, d_dec] as they are.
struct VectorSegment {
    std::vector<float> values;
};

using Segment =
    std::variant<TokenSegment, TextSegment, QuestionSegment, PassageSegment, ChunkEmbSegment, VectorSegment>;

// An earlier question about the same passages, and what was answered.
struct Turn {
    std::string question;
    std::string answer;  // without the leading space and the end token that the prompt gives it
    // Question and answer are read as chunks like a passage, the template's pieces and the end token around
    // them as tokens. `expanded`: the choice for the question's chunks and then the answer's, kept from an
    // earlier request; without it they are sensed with all others.
    bool compress = false;
    std::optional<std::vector<bool>> expanded = std::nullopt;
};

// The passages of a request, kept in `cache`; chunk_len 0: the model's.
std::vector<std::shared_ptr<SharedPassage>> share_passages(const Model& model,
                                                           std::span<const Passage> passages,
                                                           PassageCache& cache, int32_t chunk_len = 0);

// A prompt as the model was trained on it. With a chat format it is chat_segments()'; else: BOS; the system
// message and a blank line, where there is one; `before`; then, in the order that the model's configuration
// says, the passages, each between its pieces of the template, and the conversation. Status::usage where a
// turn's choice does not fit its chunks.
std::vector<Segment> make_segments(const Model& model, std::span<const Turn> history,
                                   std::span<const std::shared_ptr<SharedPassage>> passages,
                                   std::string_view question, int32_t chunk_len = 0);

// The conversation's part of it: for every earlier turn the question in its template, the segment
// " " + answer, and the end token; then the present question in its template.
std::vector<Segment> conversation_segments(const Model& model, std::span<const Turn> history,
                                           std::string_view question, int32_t chunk_len = 0);

}  // namespace refrag
