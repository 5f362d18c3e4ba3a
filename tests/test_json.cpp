// io/json: what is refused, what an error says, that limits hold against hostile documents, and the writer.
#include <doctest/doctest.h>

#include <cmath>
#include <ctime>
#include <limits>

#include "io/json.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

Json parse(std::string_view text) {
    return Json::parse(text, "t.json");
}
std::string refusal(std::string_view text) {
    return error_of([&] { parse(text); });
}

std::string repeated(std::string_view part, size_t n) {
    std::string text(part);
    while (text.size() < part.size() * n) text += text;
    return text.substr(0, part.size() * n);
}

}  // namespace

TEST_CASE("json: values, in the file's order") {
    const Json json = parse(
        R"({"b": 1, "a": [true, null, -2.5, "x\u00e9\n"], "o": {"k": 1e3}, "big": 18446744073709551615})");
    REQUIRE(json.size() == 4);
    CHECK(json.key_at(0) == "b");
    CHECK(json.key_at(1) == "a");
    CHECK(json.get_int("b") == 1);
    const Json array = json.get_array("a");
    CHECK(array.at(0).as_bool());
    CHECK(array.at(1).is_null());
    CHECK(array.at(2).as_number() == -2.5);
    CHECK(array.at(3).as_string() == "x\xC3\xA9\n");
    CHECK(json.get_object("o").get_number("k") == 1000.0);
    CHECK_FALSE(json.get("big").is_int());
    CHECK(json.get_number("big") == doctest::Approx(1.8446744073709552e19));
    CHECK(parse("\xEF\xBB\xBF 3 ").as_int() == 3);
    CHECK(parse(std::to_string(INT64_MIN)).as_int() == INT64_MIN);
}

TEST_CASE("json: values outlive the handle they came from") {
    const auto inner = [] { return parse(R"({"a": {"b": "kept"}})").get("a").get("b"); }();
    CHECK(inner.as_string() == "kept");
    CHECK(inner.where() == "t.json: key \"a.b\"");
}

TEST_CASE("json: absent, null and present keys") {
    const Json json = parse(R"({"n": null, "i": 3, "s": "x", "b": true, "f": 0.5})");
    CHECK(json.has("n"));
    CHECK_FALSE(json.find("n").has_value());
    CHECK_FALSE(json.has("none"));
    CHECK(json.get_int_or("i", 7) == 3);
    CHECK(json.get_int_or("n", 7) == 7);
    CHECK(json.get_int_or("none", 7) == 7);
    CHECK(json.get_number_or("f", 1) == 0.5);
    CHECK(json.get_string_or("s", "y") == "x");
    CHECK(json.get_string_or("none", "y") == "y");
    CHECK(json.get_bool_or("b", false));
    CHECK_FALSE(json.get_bool_or("n", false));
    CHECK(
        contains(error_of([&] { json.get_int_or("s", 1); }), "key \"s\": expected an integer, found \"x\""));
}

TEST_CASE("json: errors name file, key path, what was expected and what was found") {
    const Json json = parse(R"({"rope_scaling": {"factor": "x", "list": [1, [2, "y"]]}, "n": -1, "f": 2.5})");
    const Json scaling = json.get("rope_scaling");
    CHECK(error_of([&] { scaling.get_number("factor", 1, 64); }) ==
          "t.json: key \"rope_scaling.factor\": expected a number in [1, 64], found \"x\"");
    CHECK(error_of([&] { scaling.get("list").at(1).at(1).as_int(); }) ==
          "t.json: key \"rope_scaling.list[1][1]\": expected an integer, found \"y\"");
    CHECK(error_of([&] { json.get_int("n", 0, 10); }) ==
          "t.json: key \"n\": expected an integer in [0, 10], found -1");
    CHECK(error_of([&] { json.get_int("n", 0); }) == "t.json: key \"n\": expected an integer >= 0, found -1");
    CHECK(error_of([&] { json.get_int("f"); }) == "t.json: key \"f\": expected an integer, found 2.5");
    CHECK(error_of([&] { json.get_int("gone"); }) == "t.json: expected the key \"gone\", found none");
    CHECK(error_of([&] { scaling.get_int("gone"); }) ==
          "t.json: key \"rope_scaling\": expected the key \"gone\", found none");
    CHECK(contains(error_of([&] { json.get_bool("rope_scaling"); }),
                   "expected true or false, found an object"));
    CHECK(contains(error_of([&] { json.get_array("n"); }), "expected an array, found -1"));
    CHECK(contains(error_of([&] { json.get_string("f"); }), "expected a string, found 2.5"));
    CHECK(contains(error_of([&] { parse("[1]").at(1); }), "has 1 elements, none at 1"));
    CHECK(contains(error_of([&] { parse("[1]").get("a"); }), "expected an object, found an array of 1"));
    CHECK(contains(error_of([&] { parse("3").size(); }), "expected an array or an object"));
}

TEST_CASE("json: unknown keys are refused by name") {
    const Json json = parse(R"({"a": 1, "typo": {"x": 1}})");
    json.check_keys({"a", "typo"});
    CHECK(error_of([&] {
              json.check_keys({"a", "b"});
          }) == "t.json: unknown key \"typo\", expected one of: a, b");
    CHECK(error_of([&] { json.get("typo").check_keys({"y"}); }) ==
          "t.json: key \"typo\": unknown key \"x\", expected one of: y");
}

TEST_CASE("json: malformed documents are refused with a place") {
    for (const char* text : {"",        " ",           "{",
                             "[1,]",    "{\"a\":}",    "{\"a\" 1}",
                             "{a: 1}",  "'x'",         "nul",
                             "01",      "1.",          "+1",
                             "0x10",    "NaN",         "Infinity",
                             "[1] 2",   "{} {}",       "\"\n\"",
                             "\"\\x\"", "\"\\ud800\"", "\"\\udc00x\"",
                             "// c\n1", "[1 /* c */]", "\"unterminated"}) {
        CAPTURE(text);
        CHECK(contains(refusal(text), "t.json: not valid JSON at byte "));
    }
    CHECK(contains(refusal("1e999"), "t.json: "));
    CHECK(contains(refusal(std::string_view("1\0", 2)), "not valid JSON"));
}

TEST_CASE("json: invalid UTF-8 is refused, in values and in keys") {
    for (const char* bytes : {"\xFF", "\xC3", "\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82"}) {
        CHECK(contains(refusal(str("\"", bytes, "\"")), "not valid JSON"));
        CHECK(contains(refusal(str("{\"", bytes, "\": 1}")), "not valid JSON"));
    }
}

TEST_CASE("json: an error message is one short printable line whatever the document holds") {
    for (const std::string& text :
         {"\"" + std::string(1 << 20, 'x'), "\"\x1b[31m\n" + std::string(5000, '\xFF'),
          "{\"" + std::string(100000, 'k') + "\": 1, \"" + std::string(100000, 'k') + "\": 2}",
          std::string(100000, '\n') + "?"}) {
        const std::string message = refusal(text);
        CHECK(message.size() < 500);
        for (const char c : message) CHECK(static_cast<unsigned char>(c) >= 0x20);
    }
    CHECK(error_of([] { Json::parse("?", "bad\nname"); }).find('\n') == std::string::npos);
}

TEST_CASE("json: duplicate keys are refused at every level") {
    CHECK(contains(refusal(R"({"a": 1, "b": 2, "a": 3})"), "key \"a\" occurs twice"));
    CHECK(contains(refusal(R"([{"x": {"k": 1, "\u006b": 2}}])"), "key \"k\" occurs twice"));
    CHECK(refusal(R"([{"k": 1}, {"k": 2}])") == "(no error)");
}

TEST_CASE("json: nesting bombs are refused without recursion") {
    CHECK(refusal(repeated("[", 64) + repeated("]", 64)) == "(no error)");
    CHECK(contains(refusal(repeated("[", 65) + repeated("]", 65)), "at most 64 levels"));
    CHECK(contains(refusal(repeated("[", 1'000'000)), "at most 64 levels"));
    CHECK(contains(refusal(repeated("{\"a\":", 1'000'000)), "at most 64 levels"));
    CHECK(contains(refusal(repeated("[{\"a\":", 1'000'000)), "at most 64 levels"));
}

TEST_CASE("json: more values than any real document are refused before they fill the memory") {
    CHECK(contains(refusal("[" + repeated("0,", 9'000'000) + "0]"),
                   "expected at most 8388608 JSON values, found more"));
}

TEST_CASE("json: the path in a message is cut") {
    std::string text = repeated("{\"" + std::string(90, 'k') + "\":", 60) + "1" + repeated("}", 60);
    Json json = parse(text);
    while (json.is_object()) json = json.at(0);
    const std::string message = error_of([&] { json.as_string(); });
    CHECK(message.size() < 500);
    CHECK(contains(message, "k\": expected a string, found 1"));
}

TEST_CASE("json: a wide document stays fast") {
    std::string text = "{";
    for (int i = 0; i < 150'000; ++i) text += str(i == 0 ? "" : ",", "\"key", i, "\":[\"", i, "\",", i, "]");
    text += "}";
    const std::clock_t start = std::clock();
    const Json json = parse(text);
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    CHECK(json.size() == 150'000);
    CHECK(json.at(149'999).at(1).as_int() == 149'999);
    // 0.1 s in practice, some seconds under sanitizers; comparing all pairs would take minutes.
    CHECK(seconds < 30);
}

TEST_CASE("json: files are read with a limit") {
    const TempDir dir;
    const std::string path = dir.write("a.json", "{\"x\": 1}");
    CHECK(Json::parse_file(path).get_int("x") == 1);
    CHECK(contains(error_of([&] { Json::parse_file(path, 4); }), "expected at most 4 bytes"));
    CHECK(contains(error_of([&] { Json::parse_file(path).get_int("y"); }), path));
}

TEST_CASE("json: the writer's text reads back") {
    JsonWriter writer;
    writer.begin_object()
        .key("a")
        .begin_array()
        .integer(-1)
        .number(0.1)
        .number(0.1f)
        .boolean(true)
        .null()
        .end_array();
    writer.key("empty").begin_array().end_array().key("o").begin_object().end_object();
    writer.key("q\"\\\n\x01").string("tab\t \xC3\xA9 \xFF end").end_object();
    CHECK(writer.text() ==
          "{\"a\": [-1, 0.1, 0.1, true, null], \"empty\": [], \"o\": {}, "
          "\"q\\\"\\\\\\n\\u0001\": \"tab\\t \xC3\xA9 \xEF\xBF\xBD end\"}");
    CHECK(parse(writer.text()).get("a").size() == 5);

    JsonWriter pretty(2);
    pretty.begin_object()
        .key("a")
        .begin_array()
        .integer(1)
        .integer(2)
        .end_array()
        .key("b")
        .begin_array()
        .end_array();
    pretty.end_object();
    CHECK(pretty.text() == "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}");
}

TEST_CASE("json: numbers are written with the fewest digits that read back; NaN and inf are null") {
    for (const double value : {0.0, 1.0, -2.5, 1e21, 1e-7, 0.1, 1.0 / 3, 5e-324, 1.7976931348623157e308}) {
        CAPTURE(value);
        CHECK(parse(JsonWriter().number(value).text()).as_number() == value);
    }
    CHECK(JsonWriter().number(std::nan("")).text() == "null");
    CHECK(JsonWriter().number(std::numeric_limits<double>::infinity()).text() == "null");
    CHECK(JsonWriter().number(-std::numeric_limits<float>::infinity()).text() == "null");
    CHECK(json_quote("a\"b") == "\"a\\\"b\"");
}
