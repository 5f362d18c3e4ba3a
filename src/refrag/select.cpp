// See select.h.
#include "refrag/select.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "refrag/random.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, SelectPolicy>, 8> kPolicies = {{
    {"model", SelectPolicy::model},
    {"none", SelectPolicy::none},
    {"all", SelectPolicy::all},
    {"random", SelectPolicy::random},
    {"bm25", SelectPolicy::bm25},
    {"recent", SelectPolicy::recent},
    {"perplexity-asc", SelectPolicy::perplexity_asc},
    {"perplexity-desc", SelectPolicy::perplexity_desc},
}};

void check_distinct(std::span<const SelectPolicy> policies) {
    for (auto at = policies.begin(); at != policies.end(); ++at) {
        REFRAG_CHECK(std::find(policies.begin(), at, *at) == at, Status::usage,
                     "policy: expected each once, found \"", select_policy_name(*at), "\" twice");
    }
}

}  // namespace

SelectPolicy parse_select_policy(const std::string& name) {
    for (const auto& [word, policy] : kPolicies) {
        if (name == word) return policy;
    }
    fail(Status::usage, "policy: expected one of ", select_policy_names(", "), "; found \"", name, "\"");
}

const char* select_policy_name(SelectPolicy policy) {
    for (const auto& [word, value] : kPolicies) {
        if (value == policy) return word;
    }
    return "?";
}

std::string select_policy_names(const char* separator) {
    std::string names;
    for (const auto& [word, policy] : kPolicies) names += str(names.empty() ? "" : separator, word);
    return names;
}

Unexpanded parse_unexpanded(const std::string& name) {
    for (const Unexpanded unexpanded : {Unexpanded::compress, Unexpanded::drop}) {
        if (name == unexpanded_name(unexpanded)) return unexpanded;
    }
    fail(Status::usage, "unexpanded: expected compress or drop; found \"", name, "\"");
}

const char* unexpanded_name(Unexpanded unexpanded) {
    return unexpanded == Unexpanded::compress ? "compress" : "drop";
}

std::vector<SelectPolicy> parse_select_policies(const std::vector<std::string>& names) {
    std::vector<SelectPolicy> policies;
    policies.reserve(names.size());
    for (const std::string& name : names) policies.push_back(parse_select_policy(name));
    check_distinct(policies);
    return policies;
}

std::vector<Selection> plan_selections(std::span<const double> expand_fractions,
                                       std::span<const SelectPolicy> policies,
                                       std::span<const Unexpanded> unexpanded) {
    REFRAG_CHECK(!expand_fractions.empty(), Status::usage, "expand fraction: expected at least one");
    REFRAG_CHECK(!policies.empty(), Status::usage, "policy: expected at least one");
    REFRAG_CHECK(!unexpanded.empty(), Status::usage, "unexpanded: expected at least one");
    check_distinct(policies);
    std::vector<Selection> selections;
    for (auto rest = unexpanded.begin(); rest != unexpanded.end(); ++rest) {
        REFRAG_CHECK(std::find(unexpanded.begin(), rest, *rest) == rest, Status::usage,
                     "unexpanded: expected each once, found \"", unexpanded_name(*rest), "\" twice");
        bool nothing_expanded = false;  // there is a row at p = 0
        for (size_t i = 0; i < expand_fractions.size(); ++i) {
            n_expand(expand_fractions[i], 1);  // refuses a p outside 0..1
            for (const SelectPolicy policy : policies) {
                const bool overrules = policy == SelectPolicy::none || policy == SelectPolicy::all;
                if (overrules && i > 0) continue;
                const double p = !overrules ? expand_fractions[i] : policy == SelectPolicy::all ? 1.0 : 0.0;
                if (p == 1.0 && rest != unexpanded.begin()) continue;
                if (p == 0.0 && nothing_expanded) continue;
                nothing_expanded = nothing_expanded || p == 0.0;
                selections.push_back({p, policy, *rest});
            }
        }
    }
    return selections;
}

int64_t n_expand(double expand_fraction, int64_t n_chunks) {
    // Written so that NaN is refused too.
    REFRAG_CHECK(expand_fraction >= 0.0 && expand_fraction <= 1.0, Status::usage,
                 "expand fraction: expected a number from 0 to 1, found ", expand_fraction);
    if (expand_fraction == 0.0 || n_chunks == 0) return 0;
    if (expand_fraction == 1.0) return n_chunks;
    const auto rounded =
        static_cast<int64_t>(std::floor(expand_fraction * static_cast<double>(n_chunks) + 0.5));
    return std::min(n_chunks, std::max<int64_t>(1, rounded));
}

std::vector<bool> select_largest(std::span<const float> scores, int64_t n) {
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), size_t{0});
    const auto key = [&](size_t i) {
        return std::isnan(scores[i]) ? -std::numeric_limits<float>::infinity() : scores[i];
    };
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) > key(b); });
    std::vector<bool> chosen(scores.size(), false);
    for (size_t i = 0; i < order.size() && static_cast<int64_t>(i) < n; ++i) chosen[order[i]] = true;
    return chosen;
}

std::vector<bool> select_chunks(SelectPolicy policy, std::span<const float> scores, int64_t n_chunks,
                                int64_t n, uint64_t seed) {
    if (n == 0 || n == n_chunks) return std::vector<bool>(static_cast<size_t>(n_chunks), n != 0);
    if (policy == SelectPolicy::random) return select_random(n_chunks, n, seed);
    if (policy == SelectPolicy::recent) {
        std::vector<bool> chosen(static_cast<size_t>(n_chunks), false);
        std::fill(chosen.end() - n, chosen.end(), true);
        return chosen;
    }
    REFRAG_DCHECK(static_cast<int64_t>(scores.size()) == n_chunks);
    if (policy != SelectPolicy::perplexity_asc) return select_largest(scores, n);
    std::vector<float> negated(scores.begin(), scores.end());
    for (float& score : negated) score = -score;
    return select_largest(negated, n);
}

std::vector<bool> select_random(int64_t n_chunks, int64_t n, uint64_t seed) {
    Random random(seed);
    std::vector<bool> chosen(static_cast<size_t>(n_chunks), false);
    // Floyd's sampling: each new j is drawn from 0..j; a repeat takes j itself.
    for (int64_t j = n_chunks - n; j < n_chunks; ++j) {
        const auto pick = static_cast<size_t>(random.below(static_cast<uint64_t>(j) + 1));
        chosen[chosen[pick] ? static_cast<size_t>(j) : pick] = true;
    }
    return chosen;
}

}  // namespace refrag
