// Which chunks are expanded: the rounding rule, ties, the seeded baseline.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "refrag/select.h"
#include "support.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

TEST_CASE("n_expand rounds half up, gives at least one, and the two ends exactly") {
    CHECK(n_expand(0.0, 100) == 0);
    CHECK(n_expand(1.0, 7) == 7);
    CHECK(n_expand(0.1, 100) == 10);
    CHECK(n_expand(0.1, 4) == 1);    // 0.4 rounds to 0, but p > 0 expands one
    CHECK(n_expand(0.5, 5) == 3);    // 2.5 rounds up
    CHECK(n_expand(0.25, 10) == 3);  // 2.5 rounds up
    CHECK(n_expand(1e-9, 1) == 1);
    CHECK(n_expand(0.999, 2) == 2);  // never more than there are
    CHECK(n_expand(0.5, 0) == 0);
    CHECK(contains(error_of([] { n_expand(1.5, 3); }), "expected a number from 0 to 1, found 1.5"));
    CHECK(contains(error_of([] { n_expand(-0.1, 3); }), "found -0.1"));
    CHECK(contains(error_of([] { n_expand(std::nan(""), 3); }), "found nan"));
}

TEST_CASE("select_largest takes the largest scores, equal ones by index, NaN last") {
    const std::vector<float> scores = {1.0f, 3.0f, 2.0f, 3.0f, -1.0f};
    CHECK(select_largest(scores, 1) == std::vector<bool>{false, true, false, false, false});
    CHECK(select_largest(scores, 3) == std::vector<bool>{false, true, true, true, false});
    CHECK(select_largest(scores, 0) == std::vector<bool>(5, false));
    CHECK(select_largest(scores, 5) == std::vector<bool>(5, true));
    const float nan = std::numeric_limits<float>::quiet_NaN();
    CHECK(select_largest(std::vector<float>{nan, -5.0f, nan}, 1) == std::vector<bool>{false, true, false});
    CHECK(select_largest(std::vector<float>(4, 0.5f), 2) == std::vector<bool>{true, true, false, false});
}

TEST_CASE("select_random takes n distinct chunks, the same for the same seed, uniformly") {
    std::vector<int> counts(10, 0);
    for (uint64_t seed = 0; seed < 2000; ++seed) {
        const std::vector<bool> chosen = select_random(10, 3, seed);
        REQUIRE(std::count(chosen.begin(), chosen.end(), true) == 3);
        CHECK(chosen == select_random(10, 3, seed));
        for (size_t i = 0; i < 10; ++i) counts[i] += chosen[i] ? 1 : 0;
    }
    // Binomial(2000, 0.3): mean 600, standard deviation 20.5; five of them.
    for (const int count : counts) CHECK(std::abs(count - 600) < 103);
    CHECK(select_random(4, 4, 1) == std::vector<bool>(4, true));
    CHECK(select_random(4, 0, 1) == std::vector<bool>(4, false));
}

TEST_CASE("every policy has a name, and an unknown name lists them") {
    for (const char* name : {"model", "none", "all", "random", "perplexity-asc", "perplexity-desc"}) {
        CHECK(std::string(select_policy_name(parse_select_policy(name))) == name);
    }
    const std::string message = error_of([] { parse_select_policy("best"); });
    CHECK(contains(message, "perplexity-desc"));
    CHECK(contains(message, "\"best\""));
}

TEST_CASE("select_chunks: each policy reads its scores its own way") {
    const std::vector<float> scores = {1.0f, 3.0f, 2.0f, 0.5f};
    const auto choose = [&](SelectPolicy policy, int64_t n) {
        return select_chunks(policy, scores, 4, n, 9);
    };
    CHECK(choose(SelectPolicy::model, 2) == std::vector<bool>{false, true, true, false});
    CHECK(choose(SelectPolicy::perplexity_desc, 2) == std::vector<bool>{false, true, true, false});
    CHECK(choose(SelectPolicy::perplexity_asc, 2) == std::vector<bool>{true, false, false, true});
    CHECK(choose(SelectPolicy::random, 2) == select_random(4, 2, 9));
    CHECK(select_chunks(SelectPolicy::none, {}, 3, 0, 0) == std::vector<bool>(3, false));
    CHECK(select_chunks(SelectPolicy::all, {}, 3, 3, 0) == std::vector<bool>(3, true));
}

TEST_CASE("lists of policies: unknown and repeated words are named") {
    CHECK(parse_select_policies({"random", "model"}) ==
          std::vector<SelectPolicy>{SelectPolicy::random, SelectPolicy::model});
    CHECK(contains(error_of([] { parse_select_policies({"model", "best", "none"}); }), "found \"best\""));
    CHECK(contains(error_of([] { parse_select_policies({"model", ""}); }), "found \"\""));
    CHECK(error_of([] {
              parse_select_policies({"model", "random", "model"});
          }) == "policy: expected each once, found \"model\" twice");
}

TEST_CASE("plan_selections: every policy at every p, none and all once, p = 0 once") {
    using Pairs = std::vector<std::pair<double, SelectPolicy>>;
    constexpr SelectPolicy model = SelectPolicy::model;
    constexpr SelectPolicy random = SelectPolicy::random;
    constexpr SelectPolicy none = SelectPolicy::none;
    constexpr SelectPolicy all = SelectPolicy::all;
    const auto plan = [](const std::vector<double>& fractions, const std::vector<SelectPolicy>& policies) {
        Pairs pairs;
        for (const Selection& s : plan_selections(fractions, policies, std::vector{Unexpanded::compress}))
            pairs.emplace_back(s.expand_fraction, s.policy);
        return pairs;
    };
    CHECK(plan({0.0, 0.5}, {model}) == Pairs{{0.0, model}, {0.5, model}});
    CHECK(plan({0.1, 0.2}, {none}) == Pairs{{0.0, none}});
    CHECK(plan({0.1, 0.2}, {all}) == Pairs{{1.0, all}});
    CHECK(plan({0.0, 0.1, 1.0}, {model, random}) ==
          Pairs{{0.0, model}, {0.1, model}, {0.1, random}, {1.0, model}, {1.0, random}});
    CHECK(plan({0.1, 0.0, 0.2}, {random, none, model, all}) ==
          Pairs{{0.1, random}, {0.0, none}, {0.1, model}, {1.0, all}, {0.2, random}, {0.2, model}});
    CHECK(contains(error_of([&] { plan({}, {model}); }), "at least one"));
    CHECK(contains(error_of([&] { plan({0.1}, {}); }), "at least one"));
    CHECK(contains(error_of([&] { plan({1.5}, {model}); }), "from 0 to 1"));
    CHECK(contains(error_of([&] { plan({0.1}, {all, all}); }), "found \"all\" twice"));
}

TEST_CASE(
    "plan_selections: all rows for compress and drop, but that all chunks expanded leave none to drop") {
    const std::vector<double> fractions{0.0, 0.5};
    const std::vector<SelectPolicy> policies{SelectPolicy::bm25, SelectPolicy::all};
    const std::vector<Unexpanded> both{Unexpanded::compress, Unexpanded::drop};
    std::string rows;
    for (const Selection& s : plan_selections(fractions, policies, both))
        rows += str(s.expand_fraction, " ", select_policy_name(s.policy), " ", unexpanded_name(s.unexpanded),
                    "; ");
    CHECK(rows == "0 bm25 compress; 1 all compress; 0.5 bm25 compress; 0 bm25 drop; 0.5 bm25 drop; ");
    CHECK(contains(error_of([&] { plan_selections(fractions, policies, {}); }),
                   "unexpanded: expected at least"));
    CHECK(contains(error_of([&] { plan_selections(fractions, policies, std::vector(2, Unexpanded::drop)); }),
                   "found \"drop\" twice"));
}

TEST_CASE("policy recent expands the last chunks, without scores") {
    CHECK(select_chunks(SelectPolicy::recent, {}, 5, 2, 9) ==
          std::vector<bool>{false, false, false, true, true});
    CHECK(select_chunks(SelectPolicy::recent, {}, 3, 0, 9) == std::vector<bool>(3, false));
    CHECK(select_chunks(SelectPolicy::recent, {}, 3, 3, 9) == std::vector<bool>(3, true));
}

TEST_CASE("the words of --policy and --unexpanded") {
    CHECK(select_policy_names("|") == "model|none|all|random|bm25|recent|perplexity-asc|perplexity-desc");
    for (const char* name : {"bm25", "recent"})
        CHECK(std::string(select_policy_name(parse_select_policy(name))) == name);
    CHECK(contains(error_of([] { parse_select_policy("bm26"); }), "bm25, recent"));
    CHECK(parse_unexpanded("compress") == Unexpanded::compress);
    CHECK(parse_unexpanded("drop") == Unexpanded::drop);
    CHECK(error_of([] { parse_unexpanded("keep"); }) ==
          "unexpanded: expected compress or drop; found \"keep\"");
}
