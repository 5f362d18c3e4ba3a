// Okapi BM25 over a request's chunks: words, values worked out by hand, chunk borders inside words.
#include <doctest/doctest.h>

#include <cmath>

#include "refrag/bm25.h"
#include "refrag/select.h"
#include "support.h"

using namespace refrag;

namespace {

std::vector<std::string> words(std::string_view text) {
    std::vector<std::string> list;
    for (const TextWord& word : words_of(text)) list.push_back(word.word);
    return list;
}

// idf * tf / (tf + k1 * (1 - b + b * words / mean_words)), with the numbers of the formula spelt out.
double part(double n_all, double n_with, double tf, double n_words, double mean_words) {
    return std::log(1.0 + (n_all - n_with + 0.5) / (n_with + 0.5)) * tf /
           (tf + 1.2 * (0.25 + 0.75 * n_words / mean_words));
}

}  // namespace

TEST_CASE("bm25: words are runs of letters and numbers in lower case, with their first byte") {
    CHECK(words("The RED lantern, 42nd; x_y") ==
          std::vector<std::string>{"the", "red", "lantern", "42nd", "x", "y"});
    CHECK(words("ÉCOLE naïve 東京 ΣΟΦΟΣ") == std::vector<std::string>{"école", "naïve", "東京", "σοφος"});
    CHECK(words("").empty());
    CHECK(words(" .,;\n").empty());
    CHECK(words("ab\xFFzz\xC3") == std::vector<std::string>{"ab", "zz"});  // what is not UTF-8 ends a word
    const std::vector<TextWord> placed = words_of("é  ab");
    REQUIRE(placed.size() == 2);
    CHECK(placed[0].begin == 0);
    CHECK(placed[1].begin == 4);
}

TEST_CASE("bm25: scores worked out by hand, over the chunks of two texts") {
    // Words of the chunks: 5, 2 and 6, so 13 / 3 in the mean. "the" is in all three, "red" in two, "door" in
    // one; the question has "red" twice, and two words that no chunk has.
    const std::string first = "The red lantern hangs over the door";
    const std::string second = "Owners light the red, red lamp.";
    const std::vector<ChunkedText> texts = {{first, {27, first.size()}}, {second, {second.size()}}};
    const std::vector<float> scores = bm25_scores(texts, "Where is the RED red door?");
    REQUIRE(scores.size() == 3);
    const double mean = 13.0 / 3.0;
    const double expected[] = {
        part(3, 3, 1, 5, mean) + 2 * part(3, 2, 1, 5, mean),
        part(3, 3, 1, 2, mean) + part(3, 1, 1, 2, mean),
        part(3, 3, 1, 6, mean) + 2 * part(3, 2, 2, 6, mean),
    };
    for (size_t i = 0; i < 3; ++i) {
        CAPTURE(i);
        CHECK(scores[i] == doctest::Approx(expected[i]).epsilon(1e-6));
    }
    // The same three numbers from another program, so that part() itself is checked.
    CHECK(scores[0] == doctest::Approx(0.4590790284377606).epsilon(1e-6));
    CHECK(scores[1] == doctest::Approx(0.6496272822094723).epsilon(1e-6));
    CHECK(scores[2] == doctest::Approx(0.5826002911427519).epsilon(1e-6));
    CHECK(select_chunks(SelectPolicy::bm25, scores, 3, 1, 0) == std::vector<bool>{false, true, false});
    CHECK(select_chunks(SelectPolicy::bm25, scores, 3, 2, 0) == std::vector<bool>{false, true, true});
}

TEST_CASE("bm25: a chunk's border cuts no word, and a word counts where it begins") {
    // "lan|tern": the border lies inside the word.
    const std::string text = "red lantern";
    const std::vector<ChunkedText> cut = {{text, {7, text.size()}}};
    const std::vector<float> scores = bm25_scores(cut, "lantern");
    REQUIRE(scores.size() == 2);
    CHECK(scores[0] == doctest::Approx(part(2, 1, 1, 2, 1)).epsilon(1e-6));
    CHECK(scores[1] == 0.0f);  // it has no word at all
    CHECK(bm25_scores(cut, "tern") == std::vector<float>{0.0f, 0.0f});
    // Inside a character: é is two bytes, and its word begins in the first chunk.
    const std::string accent = "é b";
    const std::vector<ChunkedText> inside = {{accent, {1, 2, accent.size()}}};
    const std::vector<float> halves = bm25_scores(inside, "É");
    CHECK(halves[0] > 0.0f);
    CHECK(halves[1] == 0.0f);
    CHECK(halves[2] == 0.0f);
    // A chunk without a byte of its own, as byte fallback's leading token makes, takes no word.
    const std::vector<ChunkedText> empty = {{text, {0, 3, 3, text.size()}}};
    const std::vector<float> of_empty = bm25_scores(empty, "red lantern");
    CHECK(of_empty[0] == 0.0f);
    CHECK(of_empty[1] > 0.0f);
    CHECK(of_empty[2] == 0.0f);
    CHECK(of_empty[3] > 0.0f);
}

TEST_CASE("bm25: nothing in common, no words, no chunks") {
    const std::string text = "red lantern";
    const std::vector<ChunkedText> texts = {{text, {4, text.size()}}};
    CHECK(bm25_scores(texts, "blue") == std::vector<float>{0.0f, 0.0f});
    CHECK(bm25_scores(texts, "") == std::vector<float>{0.0f, 0.0f});
    CHECK(bm25_scores({}, "red").empty());
    const std::vector<ChunkedText> blanks = {{"  ", {1, 2}}};
    CHECK(bm25_scores(blanks, "red") == std::vector<float>{0.0f, 0.0f});
    // Equal scores: the lower index.
    CHECK(select_chunks(SelectPolicy::bm25, std::vector<float>(4, 0.0f), 4, 2, 0) ==
          std::vector<bool>{true, true, false, false});
}
