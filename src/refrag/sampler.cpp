// See sampler.h, which states the order of the steps and their formulas.
#include "refrag/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace refrag {
namespace {

// More likely first, equal ones by id.
bool more_likely(const std::pair<double, int32_t>& a, const std::pair<double, int32_t>& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
}

[[noreturn]] void refuse(float logit, size_t id) {
    fail(Status::runtime, "the decoder's logit of token ", id, " is ",
         std::isnan(logit) ? "not a number" : "infinite", ": broken weights");
}

}  // namespace

void check_sampler_options(const SamplerOptions& o) {
    // Each comparison is false for NaN.
    const auto within = [](float value, float low, float high) { return value >= low && value <= high; };
    REFRAG_CHECK(std::isfinite(o.temperature) && o.temperature >= 0.0f, Status::usage,
                 "temperature: expected a finite number of at least 0, found ", o.temperature);
    REFRAG_CHECK(o.top_k >= -1, Status::usage,
                 "top-k: expected a number of tokens, or 0 or -1 for all, found ", o.top_k);
    REFRAG_CHECK(o.top_p > 0.0f && o.top_p <= 1.0f, Status::usage,
                 "top-p: expected a number above 0, at most 1, found ", o.top_p);
    REFRAG_CHECK(within(o.min_p, 0.0f, 1.0f), Status::usage, "min-p: expected a number from 0 to 1, found ",
                 o.min_p);
    REFRAG_CHECK(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0.0f, Status::usage,
                 "repetition penalty: expected a finite number above 0 (1: none), found ",
                 o.repetition_penalty);
    REFRAG_CHECK(within(o.presence_penalty, -2.0f, 2.0f), Status::usage,
                 "presence penalty: expected a number from -2 to 2, found ", o.presence_penalty);
    REFRAG_CHECK(within(o.frequency_penalty, -2.0f, 2.0f), Status::usage,
                 "frequency penalty: expected a number from -2 to 2, found ", o.frequency_penalty);
    REFRAG_CHECK(o.repeat_last_n >= -1, Status::usage,
                 "repeat-last-n: expected a number of tokens, 0 for none or -1 for all, found ",
                 o.repeat_last_n);
}

Sampler::Sampler(const SamplerOptions& options, std::span<const int32_t> banned)
    : options_(options),
      banned_(banned.begin(), banned.end()),
      penalises_((options.repetition_penalty != 1.0f || options.presence_penalty != 0.0f ||
                  options.frequency_penalty != 0.0f) &&
                 options.repeat_last_n != 0),
      random_(options.seed) {
    check_sampler_options(options);
}

void Sampler::read_prompt(std::span<const int32_t> ids) {
    for (const int32_t id : ids) remember(id, false);
}

void Sampler::remember(int32_t id, bool generated) {
    if (!penalises_) return;
    Uses& uses = uses_[id];
    ++uses.seen;
    uses.generated += generated ? 1 : 0;
    if (options_.repeat_last_n < 0) return;
    window_.emplace_back(id, generated);
    if (std::ssize(window_) <= options_.repeat_last_n) return;
    const auto [old_id, old_generated] = window_.front();
    window_.pop_front();
    Uses& old_uses = uses_[old_id];
    old_uses.generated -= old_generated ? 1 : 0;
    if (--old_uses.seen == 0) uses_.erase(old_id);
}

void Sampler::adjust(std::span<const float> logits) {
    adjusted_.assign(logits.begin(), logits.end());
    const auto known = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < adjusted_.size(); };
    for (const auto& [id, uses] : uses_) {
        if (!known(id)) continue;
        double& logit = adjusted_[static_cast<size_t>(id)];
        const auto r = static_cast<double>(options_.repetition_penalty);
        logit = logit > 0.0 ? logit / r : logit * r;
        if (uses.generated > 0) {
            logit -= static_cast<double>(uses.generated) * static_cast<double>(options_.frequency_penalty) +
                     static_cast<double>(options_.presence_penalty);
        }
    }
    for (const int32_t id : banned_) {
        if (known(id)) adjusted_[static_cast<size_t>(id)] = -std::numeric_limits<double>::infinity();
    }
}

int32_t Sampler::sample(std::span<const float> logits) {
    for (size_t i = 0; i < logits.size(); ++i) {
        // NaN fails the comparison too.
        if (logits[i] <= std::numeric_limits<float>::max()) continue;
        refuse(logits[i], i);
    }
    adjust(logits);
    size_t best = 0;
    for (size_t i = 1; i < adjusted_.size(); ++i) {
        if (adjusted_[i] > adjusted_[best]) best = i;
    }
    REFRAG_CHECK(!logits.empty() && std::isfinite(adjusted_[best]), Status::runtime, "none of the decoder's ",
                 logits.size(), " logits is finite: broken weights");
    candidates_.clear();
    const int32_t id = options_.temperature == 0.0f ? static_cast<int32_t>(best) : draw(adjusted_[best]);
    remember(id, true);
    return id;
}

int32_t Sampler::draw(double largest) {
    const auto temperature = static_cast<double>(options_.temperature);
    for (size_t i = 0; i < adjusted_.size(); ++i) {
        const double p = std::exp((adjusted_[i] - largest) / temperature);
        if (p > 0.0) candidates_.emplace_back(p, static_cast<int32_t>(i));
    }
    if (options_.top_k > 0 && options_.top_k < std::ssize(candidates_)) {
        // By logit and not by probability: different logits may have rounded to one probability.
        const auto by_logit = [&](const auto& a, const auto& b) {
            return more_likely({adjusted_[static_cast<size_t>(a.second)], a.second},
                               {adjusted_[static_cast<size_t>(b.second)], b.second});
        };
        std::partial_sort(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(),
                          by_logit);
        candidates_.resize(static_cast<size_t>(options_.top_k));
    }
    return choose();
}

int32_t Sampler::needed() const {
    if (penalises_) return 0;
    const auto banned = static_cast<int32_t>(banned_.size());
    if (options_.temperature == 0.0f) return 1 + banned;
    // One more than top-k says whether there is a token that top-k drops.
    return options_.top_k > 0 ? options_.top_k + 1 + banned : 0;
}

std::optional<TokenDraw> Sampler::draw_elsewhere() {
    const SamplerOptions& o = options_;
    if (penalises_ || !banned_.empty()) return std::nullopt;
    if (o.temperature == 0.0f) return TokenDraw{0.0, 0.0f, 1.0f, 0.0f, 0};
    if (o.top_k >= Backend::kMaxTopLogits) return std::nullopt;
    if (!uniform_) uniform_ = random_.uniform();
    return TokenDraw{*uniform_, o.temperature, o.top_p, o.min_p, std::max(o.top_k, 0)};
}

int32_t Sampler::sample(const Logits& logits) {
    if (logits.drawn >= 0) {
        candidates_.clear();
        uniform_.reset();
        remember(logits.drawn, true);
        return logits.drawn;
    }
    if (logits.ids.empty()) return sample(logits.values);
    candidates_.clear();
    double largest = 0.0;
    for (size_t i = 0; i < logits.ids.size(); ++i) {
        const float logit = logits.values[i];
        if (!(logit <= std::numeric_limits<float>::max())) refuse(logit, static_cast<size_t>(logits.ids[i]));
        if (std::find(banned_.begin(), banned_.end(), logits.ids[i]) != banned_.end()) continue;
        if (candidates_.empty()) largest = static_cast<double>(logit);
        const double p = options_.temperature == 0.0f ? 1.0
                                                      : std::exp((static_cast<double>(logit) - largest) /
                                                                 static_cast<double>(options_.temperature));
        if (p > 0.0) candidates_.emplace_back(p, logits.ids[i]);
        if (options_.temperature == 0.0f) break;
    }
    REFRAG_CHECK(!candidates_.empty() && std::isfinite(largest), Status::runtime,
                 "none of the decoder's logits is finite: broken weights");
    int32_t id = candidates_[0].second;
    if (options_.temperature == 0.0f) {
        candidates_.clear();
    } else {
        // In the order in which the choice among all logits finds them.
        if (std::ssize(candidates_) > options_.top_k) {
            candidates_.resize(static_cast<size_t>(options_.top_k));
        } else {
            std::sort(candidates_.begin(), candidates_.end(),
                      [](const auto& a, const auto& b) { return a.second < b.second; });
        }
        id = choose();
    }
    remember(id, true);
    return id;
}

int32_t Sampler::choose() {
    const auto sum_of = [&] {
        double sum = 0.0;
        for (const auto& [p, id] : candidates_) sum += p;
        return sum;
    };
    if (options_.top_p < 1.0f) {
        const auto top_p = static_cast<double>(options_.top_p);
        const double total = sum_of();
        // Tokens below this hold less than 1 - top_p together, so the wanted set is among the others: they
        // need not be sorted.
        const double negligible = (1.0 - top_p) * total / static_cast<double>(candidates_.size());
        std::erase_if(candidates_, [&](const auto& c) { return c.first < negligible; });
        std::sort(candidates_.begin(), candidates_.end(), more_likely);
        double sum = 0.0;
        size_t kept = 0;
        while (kept < candidates_.size() && sum < top_p * total) sum += candidates_[kept++].first;
        candidates_.resize(kept);
    }
    // The most likely token has p = 1 and is among the candidates.
    std::erase_if(candidates_, [&](const auto& c) { return c.first < static_cast<double>(options_.min_p); });
    double left = (uniform_ ? *uniform_ : random_.uniform()) * sum_of();
    uniform_.reset();
    for (const auto& [p, id] : candidates_) {
        left -= p;
        if (left < 0.0) return id;
    }
    return candidates_.back().second;
}

}  // namespace refrag
