// refrag/qa_metrics and text/lowercase: hand-computed cases, and goldens of a plain Python implementation
// (weights_tools/make_golden_qa.py).
#include <doctest/doctest.h>

#include <algorithm>
#include <map>

#include "eval/qa_metrics.h"
#include "io/json.h"
#include "support.h"
#include "text/lowercase.h"
#include "text/unicode.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Tokens = std::vector<std::string>;

QaScore score(std::string_view prediction, const Tokens& gold) {
    return score_answer(prediction, gold);
}

std::string utf8(char32_t code) {
    std::string text;
    append_utf8(text, code);
    return text;
}

// Every code point below 0x110000 that a golden's list of [first, last] names.
std::vector<bool> members(const Json& ranges) {
    std::vector<bool> in(0x110000, false);
    for (size_t i = 0; i < ranges.as_array().size(); ++i) {
        const Json range = ranges.at(i);
        for (int64_t c = range.at(0).as_int(); c <= range.at(1).as_int(); ++c)
            in[static_cast<size_t>(c)] = true;
    }
    return in;
}

}  // namespace

TEST_CASE("qa metrics: normalisation by hand") {
    CHECK(answer_tokens("The Eiffel Tower.") == Tokens{"eiffel", "tower"});
    CHECK(answer_tokens("a an the A AN THE") == Tokens{});
    CHECK(answer_tokens("  ") == Tokens{});
    CHECK(answer_tokens("") == Tokens{});
    CHECK(answer_tokens("!?") == Tokens{});
    CHECK(answer_tokens("U.S. $1,000.50") == Tokens{"us", "100050"});
    // Punctuation goes before articles are looked for, and leaves no gap.
    CHECK(answer_tokens("the-end") == Tokens{"theend"});
    CHECK(answer_tokens("'the' end") == Tokens{"end"});
    CHECK(answer_tokens("x-a y") == Tokens{"xa", "y"});
    CHECK(answer_tokens("_a_ _") == Tokens{});
    CHECK(answer_tokens("another theatre an") == Tokens{"another", "theatre"});
    // Other punctuation than ASCII's stays, and ends a word: what is left of it is a token of its own.
    CHECK(answer_tokens("\u2013a\u2013the\u2013b") == Tokens{"\u2013", "\u2013", "\u2013b"});
    CHECK(answer_tokens("\u201cthe\u201d") == Tokens{"\u201c", "\u201d"});
    // A combining mark is no letter: the article before it is one.
    CHECK(answer_tokens("a\u0301") == Tokens{"\u0301"});
    CHECK(answer_tokens("a\u00B2 \u00E1") == Tokens{"a\u00B2", "\u00E1"});
    CHECK(answer_tokens("one\u00A0two\u2003three\x1Cthe\x1F four\u200B five") ==
          Tokens{"one", "two", "three", "four\u200B", "five"});
    CHECK(answer_tokens("a\xFFz") == Tokens{"\uFFFDz"});
}

TEST_CASE("qa metrics: scores by hand") {
    CHECK(score("The Tower", {"tower"}).exact_match == 1.0);
    CHECK(score("The Tower", {"tower"}).f1 == 1.0);
    // 1 of 2 and 1 of 3 tokens: 2 * 1 / (2 + 3).
    CHECK(score("red mill", {"mill by water"}).f1 == doctest::Approx(0.4));
    CHECK(score("red mill", {"mill by water"}).exact_match == 0.0);
    // A token counts as often as both have it: 2 of (3 + 2).
    CHECK(score("so so so", {"so so"}).f1 == doctest::Approx(0.8));
    CHECK(score("mill red", {"red mill"}).exact_match == 0.0);
    CHECK(score("mill red", {"red mill"}).f1 == 1.0);
    CHECK(score("water", {"red mill"}).f1 == 0.0);
    // The best over the gold answers, each measure by itself.
    CHECK(score("red mill", {"red", "red mill", "blue"}).exact_match == 1.0);
    CHECK(score("red mill house", {"red", "red mill"}).f1 == doctest::Approx(0.8));
}

TEST_CASE("qa metrics: unanswerable questions") {
    for (const Tokens& gold : {Tokens{}, Tokens{""}, Tokens{" ", "\t"}}) {
        for (const char* nothing : {"", "the", " ?!"}) {
            CHECK(score(nothing, gold).exact_match == 1.0);
            CHECK(score(nothing, gold).f1 == 1.0);
        }
        CHECK(score("no", gold).exact_match == 0.0);
        CHECK(score("no", gold).f1 == 0.0);
    }
    // An answer of which nothing remains is compared as it stands.
    CHECK(score("", {"the", "mill"}).exact_match == 0.0);
    CHECK(score("", {"mill"}).f1 == 0.0);
}

TEST_CASE("qa metrics: a gold answer of which normalisation leaves nothing is an answer") {
    const auto refusing = [](std::string_view prediction, const Tokens& gold) {
        return score_answer(prediction, gold, "not in the passages");
    };
    CHECK(refusing("not in the passages", {"A"}).exact_match == 0.0);
    CHECK(refusing("not in the passages", {"A"}).f1 == 0.0);
    CHECK(refusing("not in the passages", {"A"}).rouge_l == 0.0);
    for (const char* right : {"A", " a\n"}) {
        CHECK(refusing(right, {"A"}).exact_match == 1.0);
        CHECK(refusing(right, {"A"}).f1 == 1.0);
        CHECK(refusing(right, {"A"}).rouge_l == 1.0);
    }
    for (const char* wrong : {"", "the", "B", "A."}) CHECK(score(wrong, {"A"}).exact_match == 0.0);
    CHECK(score("?", {"?"}).rouge_l == 1.0);
    CHECK(score("the", {"the", "mill"}).exact_match == 1.0);
    CHECK(score("mill", {"the", "mill"}).exact_match == 1.0);
}

TEST_CASE("qa metrics: what the model says where there is no answer counts as the empty answer") {
    const auto with = [](std::string_view prediction, const Tokens& gold) {
        return score_answer(prediction, gold, "Not in the passages.");
    };
    // Normalised as answers are: "not in passages".
    for (const char* nothing : {"not in the passages", "Not in passages!", "", "the"}) {
        CAPTURE(nothing);
        CHECK(with(nothing, {}).exact_match == 1.0);
        CHECK(with(nothing, {}).f1 == 1.0);
        CHECK(with(nothing, {}).rouge_l == 1.0);
        CHECK(with(nothing, {"the passages"}).exact_match == 0.0);
    }
    // Nothing is said, so nothing is shared, whatever words stand in both.
    CHECK(with("not in the passages", {"passages"}).f1 == 0.0);
    CHECK(with("not in the passages", {"passages"}).rouge_l == 0.0);
    CHECK(with("in the passages", {"passages"}).f1 == doctest::Approx(2.0 / 3.0));
    CHECK(with("not in the passages today", {}).exact_match == 0.0);
    // The same for gold answers, alone or beside others.
    CHECK(with("", {"not in the passages"}).exact_match == 1.0);
    CHECK(with("Not in the passages", {"not in the passages"}).exact_match == 1.0);
    CHECK(with("not in the passages", {"not in the passages", "mill"}).exact_match == 0.0);
    CHECK(with("mill", {"not in the passages", "mill"}).exact_match == 1.0);
    // Without such a phrase it is an answer like any other.
    CHECK(score("not in the passages", {}).exact_match == 0.0);
}

TEST_CASE("qa metrics: ROUGE-L by hand") {
    CHECK(rouge_tokens("The U.S. mill's 3.5%") == Tokens{"the", "u", "s", "mill", "s", "3", "5"});
    CHECK(rouge_tokens("") == Tokens{});
    CHECK(rouge_tokens("_-\u2013!") == Tokens{});
    // Letters outside ASCII separate, but lower case comes first: a Kelvin sign is a k, U+0130 an i and a
    // mark.
    CHECK(rouge_tokens("caf\u00E9s \u212Aelvin \u0130zmir \u00C9A") ==
          Tokens{"caf", "s", "kelvin", "i", "zmir", "a"});
    const auto l = [](std::string_view prediction, std::string_view reference) {
        return rouge_l(rouge_tokens(prediction), rouge_tokens(reference));
    };
    // Lin's example: "police killed the gunman" against "police kill the gunman" and "the gunman kill police"
    // share 3 and 2 of 4 words in order.
    CHECK(l("police kill the gunman", "police killed the gunman") == doctest::Approx(0.75));
    CHECK(l("the gunman kill police", "police killed the gunman") == doctest::Approx(0.5));
    // 2 of 3 and 2 of 5: 2 * 2 / (3 + 5), either way round.
    CHECK(l("a b c", "a x c y z") == doctest::Approx(0.5));
    CHECK(l("a x c y z", "a b c") == doctest::Approx(0.5));
    CHECK(l("a a a", "a a") == doctest::Approx(0.8));
    // Sentences are no borders.
    CHECK(l("the mill. a river", "The mill a river!") == 1.0);
    CHECK(l("x", "y") == 0.0);
    CHECK(l("", "y") == 0.0);
    CHECK(l("", "") == 0.0);
    // The best of the references; an article counts here.
    CHECK(score("red mill", {"blue", "the red mill"}).rouge_l == doctest::Approx(0.8));
    CHECK(score("the", {"the mill"}).rouge_l == doctest::Approx(2.0 / 3.0));
    // Unanswerable questions have SQuAD's rule.
    CHECK(score("the", {}).rouge_l == 1.0);
    CHECK(score("mill", {}).rouge_l == 0.0);
    // A thousand words a side, against a subsequence known beforehand: every second word.
    std::string all;
    std::string half;
    for (int i = 0; i < 2000; ++i) {
        all += str("w", i, " ");
        half += i % 2 == 0 ? str("w", i, ". ") : str("v", i, " ");
    }
    CHECK(l(half, all) == doctest::Approx(0.5));
}

TEST_CASE("qa metrics: generated cases equal the Python implementation") {
    const Json cases = Json::parse_file(repo_path("tests/golden/qa/metrics.json"));
    REQUIRE(cases.as_array().size() >= 200);
    size_t n_compared = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
        CAPTURE(i);
        const Json expected = cases.at(i);
        const std::string prediction = expected.get_string("prediction");
        CAPTURE(prediction);
        Tokens gold;
        Tokens tokens;
        const Json answers = expected.get_array("answers");
        for (size_t a = 0; a < answers.size(); ++a) gold.emplace_back(answers.at(a).as_string());
        const Json list = expected.get_array("tokens");
        for (size_t t = 0; t < list.size(); ++t) tokens.emplace_back(list.at(t).as_string());
        CHECK(answer_tokens(prediction) == tokens);
        Tokens words;
        const Json word_list = expected.get_array("rouge_tokens");
        for (size_t t = 0; t < word_list.size(); ++t) words.emplace_back(word_list.at(t).as_string());
        CHECK(rouge_tokens(prediction) == words);
        // Golds like "a %" are compared as they stand here, and count as no answer in SQuAD's script.
        const auto is_bare = [](const std::string& text) {
            return answer_tokens(text).empty() && text.find_first_not_of(" \t\r\n") != std::string::npos;
        };
        if (std::any_of(gold.begin(), gold.end(), is_bare)) continue;
        ++n_compared;
        const QaScore got = score(prediction, gold);
        CHECK(got.exact_match == expected.get_number("exact_match"));
        // 2PR / (P + R) there and 2c / (a + b) here: a few roundings of numbers up to 1.
        CHECK(std::abs(got.f1 - expected.get_number("f1")) < 1e-15 * 8);
        CHECK(std::abs(got.rouge_l - expected.get_number("rouge_l")) < 1e-15 * 8);
    }
    CHECK(n_compared >= 400);
}

TEST_CASE("lower case by hand") {
    CHECK(lowercase("ABC xyz 123") == "abc xyz 123");
    CHECK(lowercase("\u00C9COLE \u0130\u1E9E \u01C5") == "\u00E9cole i\u0307\u00DF \u01C6");
    // Sigma: final after a cased letter with none after it, whatever marks and quotes stand between.
    CHECK(lowercase("\u039F\u0394\u039F\u03A3") == "\u03BF\u03B4\u03BF\u03C2");
    CHECK(lowercase("\u03A3\u0391\u03A3. \u03A3") == "\u03C3\u03B1\u03C2. \u03C3");
    CHECK(lowercase("\u0391\u03A3\u2019\u0391") == "\u03B1\u03C3\u2019\u03B1");
    CHECK(lowercase("\u0391\u0301\u03A3\u0301") == "\u03B1\u0301\u03C2\u0301");
    CHECK(lowercase("\u03A3\u03A3\u03A3") == "\u03C3\u03C3\u03C2");
    CHECK(lowercase("A\xC3") == "a\uFFFD");
    CHECK(lowercase("") == "");
}

TEST_CASE("lower case, words and white space equal Python's on every assigned code point") {
    const Json golden = Json::parse_file(repo_path("tests/golden/qa/unicode.json"));
    const std::vector<bool> assigned = members(golden.get("assigned"));
    const std::vector<bool> word = members(golden.get("word"));
    const std::vector<bool> space = members(golden.get("space"));
    const std::vector<bool> after = members(golden.get("final_sigma_after"));
    const std::vector<bool> after_a = members(golden.get("final_sigma_after_a_and"));
    const std::vector<bool> before = members(golden.get("final_sigma_before"));
    std::map<char32_t, std::string> lower;
    const Json runs = golden.get_array("lower");
    for (size_t i = 0; i < runs.size(); ++i) {
        const Json run = runs.at(i);
        const int64_t step = std::max<int64_t>(1, run.at(2).as_int());
        for (int64_t c = run.at(0).as_int(); c <= run.at(1).as_int(); c += step)
            lower[static_cast<char32_t>(c)] = utf8(static_cast<char32_t>(c + run.at(3).as_int()));
    }
    const Json special = golden.get_array("lower_long");
    for (size_t i = 0; i < special.size(); ++i)
        lower[static_cast<char32_t>(special.at(i).at(0).as_int())] = special.at(i).at(1).as_string();
    REQUIRE(lower.size() > 1300);

    size_t wrong = 0;
    char32_t first_wrong = 0;
    const std::string sigma = "\u03A3";
    for (char32_t c = 0; c < 0x110000; ++c) {
        if (!assigned[c]) continue;
        const std::string text = utf8(c);
        const auto found = lower.find(c);
        const std::string small = found == lower.end() ? text : found->second;
        // "the" is an article exactly where no word character touches it; U+0130 ends in a mark once it is
        // small.
        const Tokens tokens = answer_tokens("x " + text + "the");
        const bool is_word = tokens.size() == 2 && tokens[1].ends_with("the");
        const bool ascii_punctuation = c < 128 && !word[c] && !space[c] && c > 0x20 && c != 0x7F;
        const Tokens apart = answer_tokens("x" + text + "y");
        const bool right = lowercase(text) == small && is_word == (word[c] && c != 0x130) &&
                           (apart.size() == 2) == space[c] && (apart == Tokens{"xy"}) == ascii_punctuation &&
                           lowercase(text + sigma).ends_with("\u03C2") == after[c] &&
                           lowercase("A" + text + sigma).ends_with("\u03C2") == after_a[c] &&
                           lowercase("A" + sigma + text).starts_with("a\u03C2") == before[c];
        if (!right && wrong++ == 0) first_wrong = c;
    }
    CAPTURE(static_cast<uint32_t>(first_wrong));
    CHECK(wrong == 0);
}
