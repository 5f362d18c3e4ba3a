// See sampler.h.
#include "refrag/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace refrag {

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
    REFRAG_CHECK(std::isfinite(options.temperature) && options.temperature >= 0.0f, Status::usage,
                 "temperature: expected a finite number of at least 0, found ", options.temperature);
    REFRAG_CHECK(options.top_p > 0.0f && options.top_p <= 1.0f, Status::usage,
                 "top-p: expected a number above 0, at most 1, found ", options.top_p);
}

int32_t Sampler::sample(std::span<const float> logits) {
    size_t best = logits.size();
    for (size_t i = 0; i < logits.size(); ++i) {
        if (std::isnan(logits[i])) {
            fail(Status::runtime, "the decoder's logit of token ", i, " is not a number: broken weights");
        }
        if (std::isfinite(logits[i]) && (best == logits.size() || logits[i] > logits[best])) best = i;
    }
    REFRAG_CHECK(best < logits.size(), Status::runtime, "none of the decoder's ", logits.size(),
                 " logits is finite: broken weights");
    if (options_.temperature == 0.0f) return static_cast<int32_t>(best);

    candidates_.clear();
    const float largest = logits[best];
    double total = 0.0;
    for (size_t i = 0; i < logits.size(); ++i) {
        const float p =
            std::isfinite(logits[i]) ? std::exp((logits[i] - largest) / options_.temperature) : 0.0f;
        if (p > 0.0f) candidates_.emplace_back(p, static_cast<int32_t>(i));
        total += p;
    }
    if (options_.top_p < 1.0f) {
        std::sort(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) {
            return a.first != b.first ? a.first > b.first : a.second < b.second;
        });
        const double wanted = static_cast<double>(options_.top_p) * total;
        double sum = 0.0;
        size_t kept = 0;
        while (kept < candidates_.size() && sum < wanted) sum += candidates_[kept++].first;
        candidates_.resize(std::max<size_t>(kept, 1));
        total = sum;
    }
    double left = random_.uniform() * total;
    for (const auto& [p, id] : candidates_) {
        left -= p;
        if (left < 0.0) return id;
    }
    return candidates_.back().second;
}

}  // namespace refrag
