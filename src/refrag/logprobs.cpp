// See logprobs.h.
#include "refrag/logprobs.h"

#include <algorithm>
#include <cmath>

namespace refrag {

TokenLogprobs token_logprobs(std::span<const float> logits, int32_t chosen, int32_t n_top) {
    const auto largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
    const double log_sum = std::log(sum);  // of the logits less the largest, which may be far from 0
    const auto logprob_of = [&](int32_t id) {
        return TokenLogprob{id, static_cast<double>(logits[static_cast<size_t>(id)]) - largest - log_sum};
    };

    TokenLogprobs result;
    result.chosen = logprob_of(chosen);
    if (n_top == 0) return result;
    std::vector<int32_t> ids(logits.size());
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    const auto n = std::min<std::ptrdiff_t>(n_top, std::ssize(ids));
    std::partial_sort(ids.begin(), ids.begin() + n, ids.end(), [&](int32_t a, int32_t b) {
        const float la = logits[static_cast<size_t>(a)];
        const float lb = logits[static_cast<size_t>(b)];
        return la != lb ? la > lb : a < b;
    });
    for (std::ptrdiff_t i = 0; i < n; ++i) result.top.push_back(logprob_of(ids[static_cast<size_t>(i)]));
    return result;
}

}  // namespace refrag
