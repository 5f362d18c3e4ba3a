// A row of logits as a sampler sees it: all of them, or the largest with their ids, as Backend::top_logits
// gives them where a whole row would have to come from a GPU.
#pragma once

#include <cstdint>
#include <span>

#include "refrag/logprobs.h"

namespace refrag {

struct Logits {
    std::span<const float> values;  // of token 0, 1, ..., or of `ids`
    std::span<const int32_t> ids;   // empty: all tokens; else the largest first, equal ones by id
    int32_t drawn = -1;             // the token, where it has been drawn already (there are no values then)
    const TokenLogprobs* told = nullptr;  // its log-probabilities, where who drew it has told them
};

}  // namespace refrag
