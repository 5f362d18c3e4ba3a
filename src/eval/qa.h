// `eval qa`: how well questions are answered with no passage, with all passages as tokens, and with passages
// compressed, among passages that do not answer them. Decoding is greedy. Every row asks
// the same questions in the same order, and rows with the same number of distractors read the same passages.
// A turn of a conversation is a question of its own: its prompt holds the passages, then every earlier turn
// with its first gold answer, whatever was answered, so that all rows read the same history.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "eval/qa_data.h"
#include "eval/qa_metrics.h"
#include "refrag/model.h"
#include "refrag/select.h"

namespace refrag {

enum class QaMode {
    none,    // the question alone: what the model knows by heart
    full,    // all passages as tokens
    refrag,  // passages as chunks of k, n_expand(p) of them expanded
    replug,  // one passage a sequence, as tokens, next-token probabilities averaged (replug.h)
};

// "none", "full", "refrag", "replug"; Status::usage otherwise.
QaMode parse_qa_mode(const std::string& name);
const char* qa_mode_name(QaMode mode);

struct QaOptions {
    std::vector<QaMode> modes;
    std::vector<int64_t> distractors{0};                      // passages beside the gold one
    std::vector<int32_t> chunk_lens;                          // k; empty: the model's
    std::vector<double> expand_fractions{0.0};                // p; policies none and all overrule it
    std::vector<SelectPolicy> policies{SelectPolicy::model};  // rows by plan_selections
    std::vector<Unexpanded> unexpanded{Unexpanded::compress};
    uint64_t seed = 0;  // draws questions, distractors, the gold passage's place, and SelectPolicy::random
    int64_t limit = 0;  // questions at most, a line with turns being one; 0: all
    int64_t max_turns = 6;        // of a line; further ones are not asked
    int64_t max_new_tokens = 32;  // of an answer
    // What counts as no answer (score_answer); an earlier turn without a gold answer reads as answered so.
    std::optional<std::string> no_answer;
};

// Status::usage naming the first option that makes no sense.
void check_qa_options(const QaOptions& options);

struct QaRow {
    QaMode mode = QaMode::none;
    std::optional<int64_t> distractors;     // all but none
    std::optional<int32_t> chunk_len;       // refrag
    std::optional<double> expand_fraction;  // refrag
    std::optional<SelectPolicy> policy;     // refrag
    std::optional<Unexpanded> unexpanded;   // refrag
    std::optional<int64_t> turn;            // the turns of this number; none: all
    // Means over the questions; none where a question does not fit the decoder's window (below).
    std::optional<double> exact_match;
    std::optional<double> f1;
    std::optional<double> rouge_l;
    std::optional<double> standard_error;  // of exact_match: sample deviation / sqrt(n); none with n < 2
    int64_t n = 0;                         // questions that fit; all of them where there are figures
    // To the row of the first policy of the list that is the same otherwise, question by question: mean of
    // this row's figure less that one's, and half the width of its 95% interval, turns of one line counting
    // as so many questions. None for that policy and where either row has no figures; no interval with n < 2.
    std::optional<double> em_difference;
    std::optional<double> em_ci95;
    std::optional<double> f1_difference;
    std::optional<double> f1_ci95;
};

// done, total: called after every answer.
using QaProgress = std::function<void(int64_t done, int64_t total)>;
// Called for every answer, question by question, for each one row by row; `row` is the row of all turns.
using QaSink = std::function<void(const QaRow& row, const QaQuestion& question, const std::string& prediction,
                                  const QaScore& score)>;

// Where a line has turns, every row comes once for each number of a turn and then once for all of them.
// A question fits when its prompt, with the longest chunks expanded, and max_new_tokens do. A row in which
// one does not is not asked at all, since its means would be over other, shorter questions than its
// neighbours'; turns of one number stand and fall together. The whole answer is judged, as the decoder's text
// without the one leading space. Passages stay encoded between rows and questions, within bounds.
// Status::usage for impossible options.
std::vector<QaRow> evaluate_qa(const Model& model, const QaData& data, const QaOptions& options,
                               const QaProgress& progress = {}, const QaSink& sink = {});

}  // namespace refrag
