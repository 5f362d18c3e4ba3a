// Which questions `eval qa` asks and over which passages: drawn by a seed, the same on every machine, and
// independent of everything that differs between a table's rows but the number of distractors. For all turns
// of a line the first one's draw holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "eval/qa_data.h"

namespace refrag {

// At most `limit` of the first turns (0: all), evenly drawn, in the file's order: the questions, where no
// line has turns.
std::vector<size_t> draw_questions(const QaData& data, size_t limit, uint64_t seed);

// n passages of other articles than the question's, no passage twice, in random order. With a larger n the
// first ones stay the same. Status::usage where there are fewer than n, with both numbers.
std::vector<size_t> draw_distractors(const QaData& data, size_t question, size_t n, uint64_t seed);

// The question's gold passage among the first n of its distractors, at a random place.
std::vector<size_t> place_gold(const QaData& data, size_t question, const std::vector<size_t>& distractors,
                               size_t n, uint64_t seed);

}  // namespace refrag
