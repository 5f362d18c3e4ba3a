// The rows of `eval qa`'s table: which there are, and what the scores of their questions say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "eval/qa.h"

namespace refrag {

// The rows of all turns, without figures. chunk_len: k where the options name none.
std::vector<QaRow> plan_qa_rows(const QaOptions& options, int32_t chunk_len);

// What was measured of one row of all turns and one number of a turn.
struct QaMeasured {
    int64_t n_fit = 0;  // questions that fit
    bool asked = false;
    std::vector<QaScore> scores;  // question by question, the same ones in every row; empty unless asked
};

// The table: each of `rows` for every number of a turn, then for all turns; with one number, for all alone.
// measured[r][t] is of rows[r] and turn t + 1.
std::vector<QaRow> sum_up(std::span<const QaRow> rows, std::span<const std::vector<QaMeasured>> measured,
                          SelectPolicy first_policy, bool has_turns);

}  // namespace refrag
