// The sampler: each step against values worked out by hand, the whole against a plain reference written here,
// the penalties' window, what it refuses; and log-probabilities.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>

#include "refrag/logprobs.h"
#include "refrag/sampler.h"
#include "support.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplerOptions at_temperature(float temperature) {
    SamplerOptions options;
    options.temperature = temperature;
    return options;
}

// Logits whose softmax at temperature 1 are these probabilities.
std::vector<float> logits_of(const std::vector<double>& probabilities) {
    std::vector<float> logits;
    for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
    return logits;
}

// The ids that a sampler chooses among.
std::set<int32_t> support(const SamplerOptions& options, const std::vector<float>& logits) {
    Sampler sampler(options);
    const int32_t id = sampler.sample(logits);
    std::set<int32_t> ids;
    for (const auto& [p, candidate] : sampler.candidates()) ids.insert(candidate);
    CHECK(ids.contains(id));
    return ids;
}

// The distribution by the definitions, step after step, nothing reused: id -> probability.
std::map<int32_t, double> reference(const SamplerOptions& o, std::vector<double> l,
                                    const std::vector<int32_t>& prompt, const std::vector<int32_t>& said,
                                    const std::vector<int32_t>& banned) {
    struct Past {
        int32_t id;
        bool generated;
    };
    std::vector<Past> past;
    for (const int32_t id : prompt) past.push_back({id, false});
    for (const int32_t id : said) past.push_back({id, true});
    if (o.repeat_last_n >= 0 && std::ssize(past) > o.repeat_last_n)
        past.erase(past.begin(), past.end() - o.repeat_last_n);
    for (size_t i = 0; i < l.size(); ++i) {
        int seen = 0;
        int generated = 0;
        for (const Past& p : past) {
            if (p.id != static_cast<int32_t>(i)) continue;
            ++seen;
            if (p.generated) ++generated;
        }
        if (seen > 0)
            l[i] = l[i] > 0 ? l[i] / double{o.repetition_penalty} : l[i] * double{o.repetition_penalty};
        if (generated > 0) l[i] -= generated * double{o.frequency_penalty} + double{o.presence_penalty};
    }
    for (const int32_t id : banned) l[static_cast<size_t>(id)] = -std::numeric_limits<double>::infinity();

    std::vector<std::pair<double, int32_t>> ranked;  // (-probability, id): sorts as it must
    double largest = -std::numeric_limits<double>::infinity();
    for (const double x : l) largest = std::max(largest, x);
    for (size_t i = 0; i < l.size(); ++i)
        ranked.emplace_back(-std::exp((l[i] - largest) / double{o.temperature}), static_cast<int32_t>(i));
    std::sort(ranked.begin(), ranked.end());
    const auto normalise = [&] {
        double sum = 0;
        for (const auto& r : ranked) sum += r.first;
        for (auto& r : ranked) r.first /= -sum;
    };
    normalise();
    if (o.top_k > 0 && std::ssize(ranked) > o.top_k) ranked.resize(static_cast<size_t>(o.top_k));
    normalise();
    double before = 0;
    size_t kept = 0;
    while (kept < ranked.size() && (kept == 0 || before < double{o.top_p})) before -= ranked[kept++].first;
    ranked.resize(kept);
    normalise();
    std::map<int32_t, double> result;
    double sum = 0;
    for (const auto& [p, id] : ranked) {
        if (-p < double{o.min_p} * -ranked[0].first || p == 0) continue;
        result[id] = -p;
        sum -= p;
    }
    for (auto& [id, p] : result) p /= sum;
    return result;
}

}  // namespace

TEST_CASE("greedy sampling takes the largest logit, the lowest id among equals") {
    Sampler sampler({});
    CHECK(sampler.sample(std::vector<float>{0.0f, 2.0f, 1.0f, 2.0f}) == 1);
    CHECK(sampler.sample(std::vector<float>{-kInf, -3.0f, -kInf}) == 1);
    CHECK(sampler.candidates().empty());
    CHECK(contains(error_of([&] {
                       sampler.sample(std::vector<float>{0.0f, kNan});
                   }),
                   "token 1 is not a number"));
    CHECK(contains(error_of([&] { sampler.sample(std::vector<float>{kInf, 0.0f}); }), "token 0 is infinite"));
    CHECK(contains(error_of([&] {
                       sampler.sample(std::vector<float>{-kInf, -kInf});
                   }),
                   "none of the decoder's 2"));
    CHECK(contains(error_of([&] { sampler.sample(std::vector<float>{}); }), "none of the decoder's 0"));
    // Filters change nothing for a greedy choice.
    SamplerOptions filters;
    filters.top_k = 1;
    filters.top_p = 0.1f;
    filters.min_p = 1.0f;
    CHECK(Sampler(filters).sample(std::vector<float>{0.0f, 2.0f, 1.0f, 2.0f}) == 1);
}

TEST_CASE("temperature and top-p sample from the right distribution, by the seed") {
    const std::vector<float> logits = logits_of({0.5, 0.3, 0.2});
    SamplerOptions options = at_temperature(1.0f);
    options.seed = 7;
    std::vector<int> counts(3, 0);
    Sampler sampler(options);
    std::vector<int32_t> first;
    for (int i = 0; i < 10000; ++i) {
        const int32_t id = sampler.sample(logits);
        ++counts[static_cast<size_t>(id)];
        if (i < 50) first.push_back(id);
    }
    // Standard deviations of the counts are 50, 46 and 40; five of the largest.
    CHECK(std::abs(counts[0] - 5000) < 250);
    CHECK(std::abs(counts[1] - 3000) < 250);
    CHECK(std::abs(counts[2] - 2000) < 250);
    Sampler again(options);
    for (const int32_t id : first) CHECK(again.sample(logits) == id);
    options.seed = 8;
    Sampler other(options);
    std::vector<int32_t> others;
    for (size_t i = 0; i < first.size(); ++i) others.push_back(other.sample(logits));
    CHECK(others != first);

    options.top_p = 0.6f;  // 0.5 alone does not reach it, so the first two stay
    CHECK(support(options, logits) == std::set<int32_t>{0, 1});
    options.top_p = 0.4f;
    CHECK(support(options, logits) == std::set<int32_t>{0});
}

// The n largest of `logits`, as Backend::top_logits gives them.
struct Top {
    std::vector<float> values;
    std::vector<int32_t> ids;
    Top(const std::vector<float>& logits, int32_t n) {
        for (int32_t i = 0; i < static_cast<int32_t>(logits.size()); ++i) ids.push_back(i);
        std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
            return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
        });
        ids.resize(std::min(ids.size(), static_cast<size_t>(n)));
        for (const int32_t id : ids) values.push_back(logits[static_cast<size_t>(id)]);
    }
    Logits view() const { return {values, ids}; }
};

TEST_CASE("the largest logits alone give the tokens that all of them give") {
    std::mt19937 random(5);
    const std::vector<int32_t> banned = {3, 4};
    for (int round = 0; round < 300; ++round) {
        SamplerOptions options = at_temperature(round % 5 == 0 ? 0.0f : 0.3f);
        options.top_k = 1 + round % 7;
        options.top_p = round % 3 == 0 ? 0.8f : 1.0f;
        options.min_p = round % 4 == 0 ? 0.2f : 0.0f;
        options.seed = static_cast<uint64_t>(round);
        const std::span<const int32_t> bans = round % 2 == 0 ? std::span<const int32_t>{} : banned;
        Sampler all(options, bans), largest(options, bans);
        REQUIRE(largest.needed() == (options.temperature == 0.0f ? 1 : options.top_k + 1) + std::ssize(bans));
        for (int i = 0; i < 4; ++i) {
            // Few values, so that many are equal; some so far below that their probability is 0.
            std::vector<float> logits(12);
            for (float& l : logits)
                l = static_cast<float>(random() % 5) * (random() % 3 == 0 ? -200.0f : 0.25f);
            const Top top(logits, largest.needed() + i % 2);
            CHECK(largest.sample(top.view()) == all.sample(logits));
        }
    }
    SamplerOptions penalised;
    penalised.repetition_penalty = 1.1f;
    CHECK(Sampler(penalised).needed() == 0);
    CHECK(Sampler(at_temperature(1.0f)).needed() == 0);
    Sampler greedy({});
    const auto sample = [&](std::vector<float> logits) {
        const Top top(logits, 1);
        return greedy.sample(top.view());
    };
    CHECK(contains(error_of([&] { sample({1.0f, kInf}); }), "token 1 is infinite"));
    CHECK(contains(error_of([&] { sample({-kInf, -kInf}); }), "none of the decoder's logits is finite"));
}

TEST_CASE("top-k, top-p and min-p by hand, alone and together; equals rank by id") {
    const std::vector<float> logits = logits_of({0.1, 0.4, 0.05, 0.25, 0.2});
    SamplerOptions options = at_temperature(1.0f);
    for (const int32_t all : {0, -1, 5, 1000}) {
        options.top_k = all;
        CHECK(support(options, logits).size() == 5);
    }
    options.top_k = 3;
    CHECK(support(options, logits) == std::set<int32_t>{1, 3, 4});
    options.top_k = 1;
    CHECK(support(options, logits) == std::set<int32_t>{1});

    options = at_temperature(1.0f);
    options.min_p = 0.3f;  // of 0.4: at least 0.12
    CHECK(support(options, logits) == std::set<int32_t>{1, 3, 4});
    options.min_p = 1.0f;
    CHECK(support(options, logits) == std::set<int32_t>{1});

    // top-p counts within what top-k left: .4, .25, .2 become .47, .29, .24.
    options = at_temperature(1.0f);
    options.top_p = 0.7f;
    CHECK(support(options, logits) == std::set<int32_t>{1, 3, 4});
    options.top_k = 3;
    CHECK(support(options, logits) == std::set<int32_t>{1, 3});

    // Temperature comes first: at 1/2 the probabilities are squared, .16 : .0625 : .04 : .01 : .0025.
    options = at_temperature(0.5f);
    options.min_p = 0.3f;
    CHECK(support(options, logits) == std::set<int32_t>{1, 3});

    const std::vector<float> equal(6, 1.0f);
    options = at_temperature(0.7f);
    options.top_k = 2;
    CHECK(support(options, equal) == std::set<int32_t>{0, 1});
    options.top_k = 0;
    options.top_p = 0.5f;
    CHECK(support(options, equal) == std::set<int32_t>{0, 1, 2});
    // Logits apart by less than a probability can show still rank by logit.
    options = at_temperature(1e30f);
    options.top_k = 1;
    CHECK(support(options, {0.0f, 1.0f, 0.5f}) == std::set<int32_t>{1});
    // A temperature next to nothing is as good as greedy.
    CHECK(support(at_temperature(std::numeric_limits<float>::denorm_min()), {0.0f, 1.0f, 0.5f}) ==
          std::set<int32_t>{1});
    // A token that cannot be is never a candidate.
    CHECK(support(at_temperature(1.0f), {0.0f, -kInf, 0.5f}) == std::set<int32_t>{0, 2});
}

TEST_CASE("penalties by hand: repetition reads prompt and answer, the others the answer alone") {
    SamplerOptions options;
    options.repetition_penalty = 2.0f;
    {
        Sampler sampler(options);
        sampler.read_prompt(std::vector<int32_t>{0, 0});
        // 3 / 2 is less than 2; being twice in the prompt counts once.
        CHECK(sampler.sample(std::vector<float>{3.0f, 2.0f, 1.4f}) == 1);
        CHECK(sampler.sample(std::vector<float>{3.0f, 2.0f, 1.4f}) == 0);  // 1.5, 1, 1.4
    }
    {
        Sampler sampler(options);  // a negative logit is multiplied: -1 becomes -2
        sampler.read_prompt(std::vector<int32_t>{0});
        CHECK(sampler.sample(std::vector<float>{-1.0f, -1.5f}) == 1);
    }
    options = {};
    options.presence_penalty = 1.0f;
    {
        Sampler sampler(options);
        sampler.read_prompt(std::vector<int32_t>{0, 1});  // does not count
        const std::vector<float> logits = {3.0f, 2.5f, 1.9f};
        CHECK(sampler.sample(logits) == 0);
        CHECK(sampler.sample(logits) == 1);  // 2, 2.5, 1.9
        CHECK(sampler.sample(logits) == 0);  // 2, 1.5, 1.9
        CHECK(sampler.sample(logits) == 0);  // once or twice is the same
    }
    options = {};
    options.frequency_penalty = 1.0f;
    {
        Sampler sampler(options);
        const std::vector<float> logits = {3.0f, 1.5f};
        CHECK(sampler.sample(logits) == 0);
        CHECK(sampler.sample(logits) == 0);  // 2
        CHECK(sampler.sample(logits) == 1);  // 1
    }
    // Repetition before the others: 4 / 2 - 1 = 1, not (4 - 1) / 2 = 1.5.
    options = {};
    options.repetition_penalty = 2.0f;
    options.presence_penalty = 1.0f;
    {
        Sampler sampler(options);
        CHECK(sampler.sample(std::vector<float>{4.0f, 0.0f}) == 0);
        CHECK(sampler.sample(std::vector<float>{4.0f, 1.25f}) == 1);
    }
    // Below 1 and below 0 they encourage.
    options = {};
    options.repetition_penalty = 0.5f;
    {
        Sampler sampler(options);
        sampler.read_prompt(std::vector<int32_t>{1});
        CHECK(sampler.sample(std::vector<float>{1.9f, 1.0f}) == 1);
    }
    // Ids beyond the logits do nothing.
    Sampler sampler(options);
    sampler.read_prompt(std::vector<int32_t>{-1, 2});
    CHECK(sampler.sample(std::vector<float>{1.9f, 1.0f}) == 0);
}

TEST_CASE("repeat-last-n is a window over prompt and answer") {
    SamplerOptions options;
    options.repetition_penalty = 10.0f;
    options.repeat_last_n = 2;
    const std::vector<float> logits = {3.0f, 2.0f, 1.0f, 0.5f};
    Sampler sampler(options);
    sampler.read_prompt(std::vector<int32_t>{0, 1, 0});  // the window: 1 0
    CHECK(sampler.sample(logits) == 2);                  // 0 2
    CHECK(sampler.sample(logits) == 1);                  // 2 1: 0 has left
    CHECK(sampler.sample(logits) == 0);
    options.repeat_last_n = 0;
    Sampler none(options);
    none.read_prompt(std::vector<int32_t>{0});
    CHECK(none.sample(logits) == 0);
    CHECK(none.sample(logits) == 0);
}

TEST_CASE("banned ids are never sampled") {
    const std::vector<int32_t> banned = {1, 3, 900};
    Sampler greedy({}, banned);
    CHECK(greedy.sample(std::vector<float>{0.0f, 5.0f, 1.0f, 9.0f}) == 2);
    Sampler sampler(at_temperature(1.0f), banned);
    for (int i = 0; i < 200; ++i) {
        const int32_t id = sampler.sample(std::vector<float>{0.0f, 5.0f, 1.0f, 9.0f});
        CHECK((id == 0 || id == 2));
    }
    CHECK(contains(error_of([&] {
                       Sampler({}, banned).sample(std::vector<float>{-kInf, 5.0f, -kInf, 9.0f});
                   }),
                   "none of the decoder's 4"));
}

TEST_CASE("every combination of options gives the reference's distribution") {
    std::mt19937 random(11);
    const auto pick = [&](auto... values) {
        const std::vector<float> list = {static_cast<float>(values)...};
        return list[random() % list.size()];
    };
    constexpr size_t kVocab = 40;
    for (int round = 0; round < 400; ++round) {
        CAPTURE(round);
        SamplerOptions o;
        o.temperature = pick(0.3, 0.8, 1.0, 2.5);
        o.top_k = static_cast<int32_t>(pick(0, -1, 1, 2, 7, 39, 40, 50));
        o.top_p = pick(1.0, 0.95, 0.5, 0.05);
        o.min_p = pick(0.0, 0.02, 0.4, 1.0);
        o.repetition_penalty = pick(1.0, 1.3, 0.7);
        o.presence_penalty = pick(0.0, 1.5, -0.5);
        o.frequency_penalty = pick(0.0, 0.4, -0.2);
        o.repeat_last_n = static_cast<int32_t>(pick(-1, 0, 1, 5, 30));
        o.seed = static_cast<uint64_t>(round);
        std::vector<int32_t> banned;
        if (round % 3 == 0) banned = {4, 17};
        std::vector<int32_t> prompt(random() % 12);
        for (int32_t& id : prompt) id = static_cast<int32_t>(random() % kVocab);
        Sampler sampler(o, banned);
        sampler.read_prompt(prompt);
        std::vector<int32_t> said;
        for (int step = 0; step < 12; ++step) {
            // Few different values, so that many are equal.
            std::vector<float> logits(kVocab);
            for (float& l : logits) l = static_cast<float>(random() % 33) / 4.0f - 4.0f;
            const std::map<int32_t, double> expected =
                reference(o, {logits.begin(), logits.end()}, prompt, said, banned);
            said.push_back(sampler.sample(logits));
            double sum = 0;
            for (const auto& [p, id] : sampler.candidates()) sum += p;
            REQUIRE(sampler.candidates().size() == expected.size());
            for (const auto& [p, id] : sampler.candidates()) {
                REQUIRE(expected.contains(id));
                // Both are ratios of sums of at most 40 doubles: a few roundings of 1e-16 each.
                CHECK(p / sum == doctest::Approx(expected.at(id)).epsilon(1e-13));
            }
            CHECK(expected.contains(said.back()));
        }
    }
}

TEST_CASE("an option out of its range is refused by name, with the range and what was found") {
    const auto message = [](auto&& change) {
        SamplerOptions options;
        change(options);
        return error_of([&] { const Sampler sampler(options); });
    };
    using O = SamplerOptions;
    CHECK(message([](O&) {}) == "(no error)");
    for (const float bad : {-1.0f, kNan, kInf}) {
        CAPTURE(bad);
        CHECK(message([&](O& o) { o.temperature = bad; }).starts_with("temperature: expected"));
        CHECK(message([&](O& o) { o.top_p = bad; }).starts_with("top-p: expected"));
        CHECK(message([&](O& o) { o.min_p = bad; }).starts_with("min-p: expected"));
        CHECK(message([&](O& o) { o.repetition_penalty = bad; }).starts_with("repetition penalty: expected"));
    }
    for (const float bad : {-2.1f, 2.1f, kNan, -kInf}) {
        CAPTURE(bad);
        CHECK(message([&](O& o) { o.presence_penalty = bad; }).starts_with("presence penalty: expected"));
        CHECK(message([&](O& o) { o.frequency_penalty = bad; }).starts_with("frequency penalty: expected"));
    }
    CHECK(contains(message([](O& o) { o.top_p = 0.0f; }), "found 0"));
    CHECK(contains(message([](O& o) { o.top_p = 1.5f; }), "found 1.5"));
    CHECK(contains(message([](O& o) { o.min_p = 1.5f; }), "from 0 to 1, found 1.5"));
    CHECK(message([](O& o) { o.repetition_penalty = 0.0f; }).starts_with("repetition penalty"));
    CHECK(message([](O& o) { o.top_k = -2; }).starts_with("top-k"));
    CHECK(message([](O& o) { o.repeat_last_n = -2; }).starts_with("repeat-last-n"));
    // The ends of the ranges are inside.
    CHECK(message([](O& o) {
              o.top_p = 1.0f;
              o.min_p = 1.0f;
              o.presence_penalty = -2.0f;
              o.frequency_penalty = 2.0f;
              o.top_k = -1;
              o.repeat_last_n = -1;
          }) == "(no error)");
}

TEST_CASE("log-probabilities: log-softmax, the chosen one and the most likely, equal ones by id") {
    const std::vector<float> logits = logits_of({0.1, 0.4, 0.1, 0.25, 0.15});
    const TokenLogprobs two = token_logprobs(logits, 2, 3);
    CHECK(two.chosen.id == 2);
    // The logits are floats of order 1: 1e-7 each.
    CHECK(two.chosen.logprob == doctest::Approx(std::log(0.1)).epsilon(1e-6));
    REQUIRE(two.top.size() == 3);
    CHECK(two.top[0].id == 1);
    CHECK(two.top[0].logprob == doctest::Approx(std::log(0.4)).epsilon(1e-6));
    CHECK(two.top[1].id == 3);
    CHECK(two.top[2].id == 4);
    const TokenLogprobs all = token_logprobs(logits, 0, 20);
    REQUIRE(all.top.size() == 5);
    CHECK(all.top[3].id == 0);
    CHECK(all.top[4].id == 2);
    double sum = 0;
    for (const TokenLogprob& token : all.top) sum += std::exp(token.logprob);
    CHECK(sum == doctest::Approx(1.0).epsilon(1e-14));
    CHECK(token_logprobs(logits, 0, 0).top.empty());
    // Equal ones by id, however many.
    const TokenLogprobs equal = token_logprobs(std::vector<float>(300, 0.5f), 7, 6);
    for (int32_t i = 0; i < 6; ++i) CHECK(equal.top[static_cast<size_t>(i)].id == i);
    // Far from 0 nothing overflows, and what cannot be is -inf.
    const TokenLogprobs far = token_logprobs(std::vector<float>{3e38f, -kInf, 3e38f}, 1, 2);
    CHECK(far.chosen.logprob == -std::numeric_limits<double>::infinity());
    CHECK(far.top[0].logprob == doctest::Approx(-std::log(2.0)).epsilon(1e-14));
}
