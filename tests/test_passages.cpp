// refrag/passages: both forms of passage files, line ends, ids, and hostile lines.
#include <doctest/doctest.h>

#include "refrag/passages.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

std::vector<Passage> parse(std::string_view content) {
    return parse_passages(content, "p.jsonl");
}
std::string refusal(std::string_view content) {
    return error_of([&] { parse(content); });
}

}  // namespace

TEST_CASE("passages: JSON Lines") {
    const auto passages = parse(
        "{\"id\": \"a\", \"title\": \"T\", \"text\": \"one\"}\n\n"
        "  {\"id\": 17, \"text\": \"two\", \"url\": \"http://x\", \"score\": [1]}\r\n"
        "{\"text\": \"three\\nlines\", \"title\": null, \"id\": null}");
    REQUIRE(passages.size() == 3);
    CHECK(passages[0].id == "a");
    CHECK(passages[0].content() == "T\none");
    CHECK(passages[1].id == "17");
    CHECK(passages[1].content() == "two");
    CHECK(passages[2].id == "3");
    CHECK(passages[2].content() == "three\nlines");
}

TEST_CASE("passages: plain text, blank lines between") {
    const auto passages = parse("\n \nfirst line\n  second line \n\t\n\r\nthird\r\nfourth");
    REQUIRE(passages.size() == 2);
    CHECK(passages[0].id == "1");
    CHECK(passages[0].title.empty());
    CHECK(passages[0].content() == "first line\n  second line ");
    CHECK(passages[1].id == "2");
    CHECK(passages[1].content() == "third\nfourth");
}

TEST_CASE("passages: a byte order mark is skipped in both forms") {
    CHECK(parse("\xEF\xBB\xBF{\"text\": \"x\"}")[0].text == "x");
    CHECK(parse("\xEF\xBB\xBFplain")[0].text == "plain");
    CHECK(parse("\xEF\xBB\xBF\xEF\xBB\xBF{\"text\": \"x\"}")[0].text == "x");
    CHECK(parse("\xEF\xBB\xBF\xEF\xBB\xBFplain")[0].text == "plain");
}

TEST_CASE("passages: invalid UTF-8 is kept in plain text and refused in JSON") {
    CHECK(parse("a\xFF\xC3z")[0].text == "a\xFF\xC3z");
    CHECK(contains(refusal("{\"text\": \"ok\"}\n{\"text\": \"\xFF\"}"), "p.jsonl: line 2: not valid JSON"));
}

TEST_CASE("passages: an empty file is an error") {
    for (const char* content : {"", "\n\n", " \t\r\n", "\xEF\xBB\xBF", "\xEF\xBB\xBF\n"})
        CHECK(refusal(content) == "p.jsonl: expected at least one passage, found none");
}

TEST_CASE("passages: errors name file, line and key") {
    CHECK(contains(refusal("{\"text\": \"x\"}\n\n{\"text\": "), "p.jsonl: line 3: not valid JSON"));
    CHECK(refusal("{\"title\": \"x\"}") == "p.jsonl: line 1: expected the key \"text\", found none");
    CHECK(contains(refusal("{\"text\": 5}"), "p.jsonl: line 1: key \"text\": expected a string, found 5"));
    CHECK(contains(refusal("{\"text\": null}"), "key \"text\": expected a string, found null"));
    CHECK(contains(refusal("{\"text\": \"x\", \"title\": []}"), "key \"title\": expected a string"));
    CHECK(contains(refusal("{\"text\": \"x\", \"id\": 1.5}"),
                   "key \"id\": expected a string or an integer, found 1.5"));
    CHECK(contains(refusal("{\"text\": \"x\"}\n[1]"),
                   "line 2: expected an object with \"text\", found an array of 1"));
    CHECK(contains(refusal("{\"text\": \"x\"} {\"text\": \"y\"}"), "line 1: not valid JSON"));
    CHECK(contains(refusal("{\"text\": \"x\", \"text\": \"y\"}"), "occurs twice"));
    CHECK(contains(refusal("{\"text\": \"x\"}\n" + std::string(100000, '[')),
                   "line 2: expected at most 64 levels"));
    CHECK(refusal("{\n  \"text\": \"x\"\n}") ==
          "p.jsonl: expected JSON Lines, one value on each line, found one JSON document over several lines");
}

TEST_CASE("passages: a whole number is an id however it is written, and a refusal shows what stands there") {
    CHECK(parse("{\"id\": 1.0, \"text\": \"x\"}")[0].id == "1");
    CHECK(parse("{\"id\": 1e3, \"text\": \"x\"}")[0].id == "1000");
    CHECK(parse("{\"id\": -9223372036854775808, \"text\": \"x\"}")[0].id == "-9223372036854775808");
    CHECK(contains(refusal("{\"id\": 1.50, \"text\": \"x\"}"), "a string or an integer, found 1.50"));
    CHECK(contains(refusal("{\"id\": 18446744073709551615, \"text\": \"x\"}"), "found 18446744073709551615"));
}

TEST_CASE("passages: another form is named, and not read as one passage of plain text") {
    const std::string expected =
        "p.jsonl: expected JSON Lines of {\"id\", \"title\", \"text\"} or plain text with blank lines "
        "between passages, found what looks like ";
    const std::vector<std::pair<std::string, std::string>> forms = {
        {"[{\"text\": \"x\"}]", "a JSON array"},
        {"\n [\n{\"text\": \"x\"},\n{\"text\": \"y\"}\n]\n", "a JSON array"},
        {"[\"x\", \"y\"]", "a JSON array"},
        {"<!DOCTYPE html>\n<html>", "an HTML page"},
        {"<?xml version=\"1.0\"?><a/>", "an XML document"},
        {"id,text\n1,x\n", "a CSV table"},
        {"\"title\";\"text\"\na;b\n", "a CSV table"},
        {"id\ttext\ttitle\n1\tx\ty\n", "a table with tabs between its columns (TSV)"},
        {"0\tThe mill.\n1\tThe hill.\n", "numbered lines with tabs between columns (TSV)"},
        {"\x1F\x8B\x08", "gzip-compressed data"},
        {"{\\rtf1 x}", "an RTF document"},
        {"\t{\\rtf1 x}", "an RTF document"},
        {std::string("T\0h\0e\0", 6), "UTF-16 without a byte order mark"},
        {"\xFF\xFET\x01", "UTF-16"},
    };
    for (const auto& [content, form] : forms) {
        CAPTURE(content);
        CHECK(refusal(content) == expected + form);
    }
    // Plain text that begins alike is plain text.
    for (const char* text : {"[1] The mill.", "[Hello]", "[1, see the note] and [2]", "< 3 is small",
                             "Text, title and id are words.", "id", "7\tone such line alone"}) {
        CAPTURE(text);
        CHECK(parse(text)[0].text == text);
    }
}

TEST_CASE("passages: a bad line is handed over with its number, and the others are read") {
    std::vector<std::string> bad;
    const auto passages =
        parse_passages("{\"text\": \"a\"}\n\n{\"text\": 5}\n{\"text\": \"b\"}\n{\"text\"\n[1]\n", "p.jsonl",
                       [&](const Error& error) { bad.push_back(error.message()); });
    REQUIRE(passages.size() == 2);
    CHECK(passages[1].text == "b");
    REQUIRE(bad.size() == 3);
    CHECK(bad[0] == "p.jsonl: line 3: key \"text\": expected a string, found 5");
    CHECK(contains(bad[1], "p.jsonl: line 5: not valid JSON"));
    CHECK(contains(bad[2], "p.jsonl: line 6: expected an object"));
    CHECK(error_of([] { parse_passages("{\"text\": 5}", "p.jsonl", [](const Error&) {}); }) ==
          "p.jsonl: expected at least one passage, found none but bad lines");
}

TEST_CASE("passages: a line beyond the limit is refused") {
    const std::string line = "{\"text\": \"" + std::string(max_json_line_bytes, 'x') + "\"}";
    CHECK(contains(refusal(line), "line 1: expected at most 67108864 bytes on one line"));
}

TEST_CASE("passages: many passages are read in linear time") {
    std::string content;
    for (int i = 0; i < 50'000; ++i) content += str("{\"text\": \"passage ", i, "\"}\n");
    CHECK(parse(content).size() == 50'000);
    std::string plain;
    for (int i = 0; i < 200'000; ++i) plain += "line\n\n";
    CHECK(parse(plain).size() == 200'000);
}

TEST_CASE("passages: read from a file") {
    const TempDir dir;
    CHECK(read_passages(dir.write("p.txt", "one\n\ntwo\n")).size() == 2);
    CHECK(contains(error_of([&] { read_passages(dir.file("none")); }), dir.file("none")));
}
