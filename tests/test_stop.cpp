// Stop strings against the definition: read the text byte by byte, the string that is complete first ends it.
// Pieces have any borders; what is emitted early must never have to be taken back.
#include <doctest/doctest.h>

#include <random>

#include "refrag/stop.h"
#include "support.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

struct Outcome {
    std::string text;
    std::optional<std::string> found;
    bool operator==(const Outcome&) const = default;
};

Outcome feed(const std::vector<std::string>& stops, const std::vector<std::string>& pieces) {
    StopFilter filter(stops);
    Outcome outcome;
    for (const std::string& piece : pieces) outcome.text += filter.push(piece);
    outcome.text += filter.flush();
    outcome.found = filter.found();
    return outcome;
}

// The definition, by trying every end and every stop string.
Outcome reference(const std::vector<std::string>& stops, const std::string& text) {
    for (size_t end = 1; end <= text.size(); ++end) {
        std::optional<std::string> found;
        for (const std::string& stop : stops) {
            if (std::string_view(text).substr(0, end).ends_with(stop) &&
                (!found || stop.size() > found->size()))
                found = stop;
        }
        if (found) return {text.substr(0, end - found->size()), found};
    }
    return {text, std::nullopt};
}

}  // namespace

TEST_CASE("a stop string is found inside a piece and across pieces, and nothing of it is emitted") {
    CHECK(feed({"END"}, {"one END two"}) == Outcome{"one ", "END"});
    CHECK(feed({"END"}, {"one E", "N", "D two", " three END"}) == Outcome{"one ", "END"});
    CHECK(feed({"END"}, {"END"}) == Outcome{"", "END"});
    CHECK(feed({"END"}, {"EN", "EN", "ED"}) == Outcome{"ENENED", std::nullopt});
    CHECK(feed({"END"}, {"one EN"}) == Outcome{"one EN", std::nullopt});
    CHECK(feed({}, {"one", " two"}) == Outcome{"one two", std::nullopt});
    // A stop string that overlaps itself.
    CHECK(feed({"abab!"}, {"ab", "ab", "ab", "!"}) == Outcome{"ab", "abab!"});
}

TEST_CASE("of several stop strings the first to be complete counts, the longer at the same place") {
    CHECK(feed({"two", "one"}, {"one two"}) == Outcome{"", "one"});
    CHECK(feed({"one", "two"}, {"zero two one"}) == Outcome{"zero ", "two"});
    CHECK(feed({"b", "abc"}, {"abc"}) == Outcome{"a", "b"});
    CHECK(feed({"c", "abc", "bc"}, {"xabc"}) == Outcome{"x", "abc"});
    // One is the other's beginning: the shorter is there first, whatever the borders of pieces.
    CHECK(feed({"\n\n", "\n"}, {"a\n\nb"}) == Outcome{"a", "\n"});
    CHECK(feed({"x", "x"}, {"ax"}) == Outcome{"a", "x"});
}

TEST_CASE("text is held back only while it may become a stop string") {
    StopFilter filter({"User:", "\xc3\xa9t\xc3\xa9"});
    CHECK(filter.push("Hello U") == "Hello ");
    CHECK(filter.push("s") == "");
    CHECK(filter.push("e it. \xc3\xa9") == "Use it. ");
    CHECK(filter.push("t") == "");
    CHECK(filter.push("\xc3\xa8.") == "\xc3\xa9t\xc3\xa8.");  // the same first byte is not the same letter
    CHECK(filter.push("User") == "");
    CHECK(!filter.found());
    CHECK(filter.push(": x") == "");
    CHECK(filter.found() == "User:");
    CHECK(filter.push("more") == "");
    CHECK(filter.flush() == "");
}

TEST_CASE("any stop strings, any text, any borders: as the definition says") {
    std::mt19937 random(5);
    const std::vector<std::string> letters = {"a", "b", "a", "b", "\xc3\xa9", "\xe2\x82\xac"};
    const auto text_of = [&](size_t n) {
        std::vector<std::string> characters;
        while (characters.size() < n) characters.push_back(letters[random() % letters.size()]);
        return characters;
    };
    const auto join = [](const std::vector<std::string>& parts) {
        std::string all;
        for (const std::string& part : parts) all += part;
        return all;
    };
    int stopped = 0;
    for (int round = 0; round < 3000; ++round) {
        std::vector<std::string> stops(1 + random() % 3);
        for (std::string& stop : stops) stop = join(text_of(1 + random() % 6));
        const std::vector<std::string> characters = text_of(random() % 30);
        const std::string text = join(characters);
        std::vector<std::string> pieces(1);
        for (const std::string& character : characters) {
            pieces.back() += character;
            if (random() % 3 == 0) pieces.emplace_back();
        }
        const Outcome expected = reference(stops, text);
        const Outcome got = feed(stops, pieces);
        stopped += expected.found ? 1 : 0;
        CHECK_MESSAGE(got == expected, "round ", round, ", text ", text);
    }
    // Both outcomes were tried, many times.
    CHECK(stopped > 500);
    CHECK(stopped < 2500);
}

TEST_CASE("stop strings that cannot be are refused") {
    const auto message = [](const std::vector<std::string>& stops) {
        return error_of([&] { const StopFilter filter(stops); });
    };
    CHECK(contains(message({"ok", ""}), "stop string: expected 1 to"));
    CHECK(contains(message({"\xff"}), "expected UTF-8, found \"\\xff\""));
    CHECK(contains(message({std::string(max_stop_bytes + 1, 'x')}), "found 4097"));
    CHECK(message({std::string(max_stop_bytes, 'x')}) == "(no error)");
    CHECK(contains(message(std::vector<std::string>(max_stop_strings + 1, "x")), "found 65"));
}
