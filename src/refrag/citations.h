// Which passages an answer's words stand in. Words of the answer that follow one another, and that stand so
// in a passage where the decoder read it as tokens, are cited; nothing else is: a compressed chunk's words
// were never read as such, and no source is ever invented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "refrag/answer.h"
#include "refrag/segment.h"

namespace refrag {

struct Citation {
    size_t begin = 0;  // byte span in the answer's text
    size_t end = 0;
    std::vector<size_t> passages;  // indices among the request's passage segments, rising
};

// Words are compared in lower case, whatever stands between them. A run of words counts where one of them has
// a digit or at least four letters; a single word only where no more than half of the passages that were read
// have it. From left to right, the longest run from each word on; they do not overlap.
std::vector<Citation> find_citations(const Model& model, std::span<const Segment> segments,
                                     const Answer& answer);

// The same span in characters (Unicode code points), as APIs count.
std::pair<size_t, size_t> in_characters(std::string_view text, size_t begin, size_t end);

}  // namespace refrag
