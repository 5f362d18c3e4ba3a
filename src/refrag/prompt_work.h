// From a request's segments to the decoder's rows: compress, sense, expand (paper, section 2). The work is
// done piece by piece, so that an engine can do it in steps beside others' prefill and decoding.
//
//   tokenise and cut -> does it fit? -> encode what is sensed -> sense -> encode the rest -> project
//
// Sensing covers the chunks whose choice is open: L counts those alone, and the policy sees them at positions
// 0 .. L-1 in the order of the input. A choice made earlier stays.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "refrag/answer.h"
#include "refrag/assemble.h"
#include "refrag/choice.h"
#include "refrag/logprobs.h"
#include "refrag/model.h"
#include "refrag/segment.h"

namespace refrag {

// What a chunk row is: equal keys, equal bytes. A token row is what its id says.
struct ChunkRowKey {
    Sha256Digest of;    // a passage's key; of given values, their digest
    int64_t index = 0;  // chunk of the passage, row of the values
    bool operator==(const ChunkRowKey&) const = default;
};

struct Prompt {
    DecoderInput input;
    // [input.row_chunk.size(), dim] F32 in the order of the input, taken from the backend that made them.
    Buffer chunk_rows;
    std::vector<ChunkRowKey> row_keys;  // of the chunk rows, for sharing prefixes
    // In the order of the input: of scored segments, or of all tokens but a first one where
    // AnswerOptions::prompt_logprobs asks for them.
    std::vector<ScoredRow> scores;
};

class PromptWork {
  public:
    // Fills in what `answer` says of the prompt: chunk_len to plain_tokens, chunks, and its stages' times.
    // max_context: positions, of which one is left for an answer unless max_new_tokens is 0; then the last
    // row, which only a next token would need, is left out unless it is the only one. Model, options and
    // answer must outlive it.
    PromptWork(const Model& model, std::vector<Segment> segments, const AnswerOptions& options,
               int64_t max_context, Answer& answer);

    // Goes on until about budget_rows rows have gone through encoder, policy, projector or (for the
    // perplexity policies) decoder, or the prompt is made: then it returns true. Every call gets further, if
    // only by one chunk; what the policy sees goes through it at once. used_rows: what this call used.
    // Every call with the same backend. Throws Status::runtime when the prompt does not fit, with both
    // numbers; what cannot fit is refused before anything is encoded. Status::usage when it is empty, or a
    // segment makes no sense. After an error it is of no further use.
    bool advance(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows);

    // Waits for what is under way when it was not finished: that reads the request's passages.
    ~PromptWork();
    PromptWork(const PromptWork&) = delete;
    PromptWork& operator=(const PromptWork&) = delete;

    // Once advance() has returned true.
    Prompt take() { return std::move(prompt_); }

  private:
    friend int64_t most_positions(const Model& model, std::vector<Segment> segments,
                                  const AnswerOptions& options);
    enum class Phase { tokenize, read_alone, encode_open, sense, encode_rest, project, done };

    // A segment's part of the input.
    struct Part {
        const Segment* segment = nullptr;
        std::vector<int32_t> ids;               // tokens
        bool score = false;                     // each of them
        std::shared_ptr<const CutPassage> cut;  // of a passage
        std::shared_ptr<const EncodedPassage> encoded;
        int64_t n_rows = 0;  // of given values
        Sha256Digest digest;
    };
    // A chunk of a passage, or a row of given values.
    struct RowRef {
        size_t part;
        int64_t index;
    };

    void tokenize();
    void add_part(const TokenSegment& segment);
    void add_part(const TextSegment& segment);
    void add_part(const QuestionSegment& segment);
    void add_part(const PassageSegment& segment);
    void add_part(const ChunkEmbSegment& segment);
    void add_part(const VectorSegment& segment);
    Part values_part(const std::vector<float>& values, int64_t dim, const char* what) const;
    // The parts that have rows when the open chunks are expanded as this says: all but passages whose chunks
    // are all left out, and the template's pieces around them.
    std::vector<bool> parts_kept(const std::vector<bool>& open_expanded) const;
    // The rows then. kept: parts_kept(), or all.
    DecoderInput assemble(const std::vector<bool>& open_expanded, const std::vector<bool>& kept) const;
    DecoderInput assemble(const std::vector<bool>& open_expanded) const {
        return assemble(open_expanded, parts_kept(open_expanded));
    }
    std::vector<bool> fewest() const { return std::vector<bool>(open_.size(), everything_); }
    void check_fits(const DecoderInput& input, const char* at_least) const;
    void read_words();
    bool read_alone(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows);
    // Encodes the passages that a chunk's row, open or compressed, is needed of; true when all are.
    bool encode(Backend& backend, Arena& arena, const std::vector<size_t>& parts, int64_t budget_rows,
                int64_t& used_rows);
    void sense(Backend& backend, Arena& arena, int64_t& used_rows);
    void choose();
    // What the prompt's rows are, once it is known which chunks are expanded.
    void name_rows(const std::vector<bool>& kept);
    bool project(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows);
    // Chunk embeddings [rows.size(), d_enc] into `out`.
    void gather(Backend& backend, Arena& arena, std::span<const RowRef> rows, Tensor out) const;

    const Model& model_;
    const std::vector<Segment> segments_;
    const AnswerOptions& options_;
    const Choice choice_;
    const int64_t max_context_;
    Answer& answer_;

    Phase phase_ = Phase::tokenize;
    Backend* backend_ = nullptr;  // while its work may be under way
    std::vector<Part> parts_;     // one for each segment
    std::vector<std::pair<std::string_view, std::vector<Token>>> questions_;  // text, tokens
    std::vector<RowRef> chunks_;                                              // all, as answer_.chunks
    std::vector<size_t> open_;   // of those, whose choice is open
    bool everything_ = false;    // p = 1
    std::vector<float> scores_;  // of the open chunks
    std::vector<RowRef> rows_;   // chunk rows
    int64_t n_projected_ = 0;
    Prompt prompt_;
};

// Makes a prompt at once.
Prompt make_prompt(Backend& backend, const Model& model, std::vector<Segment> segments,
                   const AnswerOptions& options, int64_t max_context, Arena& arena, Answer& answer);

// The most positions that a prompt of these segments can take; cuts their passages.
int64_t most_positions(const Model& model, std::vector<Segment> segments, const AnswerOptions& options);

// The ids of segments as tokens: "full context". Status::usage where one has none.
std::vector<int32_t> token_ids(const Model& model, std::span<const Segment> segments);

}  // namespace refrag
