// `refrag tokenize` in this process: where text comes from, what is printed, what is refused.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <sstream>

#include "cli/tokenize.h"
#include "io/json.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// Runs `refrag tokenize` with these arguments; gives what it wrote to standard output.
std::string tokenize(std::vector<std::string> arguments) {
    CLI::App app("refrag");
    app.require_subcommand(1);
    add_tokenize(app);
    arguments.insert(arguments.begin(), "tokenize");
    std::reverse(arguments.begin(), arguments.end());
    std::ostringstream out;
    std::streambuf* const before = std::cout.rdbuf(out.rdbuf());
    try {
        app.parse(arguments);
    } catch (...) {
        std::cout.rdbuf(before);
        throw;
    }
    std::cout.rdbuf(before);
    return out.str();
}

const std::string vocabulary = "weights_tools/refrag-nano/decoder/tokenizer.json";

std::vector<int64_t> ints(const Json& array) {
    std::vector<int64_t> values;
    for (size_t i = 0; i < array.size(); ++i) values.push_back(array.at(i).as_int());
    return values;
}

}  // namespace

TEST_CASE("tokenize: JSON with ids, pieces and byte offsets") {
    const std::string text = "Caf\xC3\xA9 the</s>";
    const Json json = Json::parse(tokenize({"--tokenizer", vocabulary, "--json", text}), "out");
    json.check_keys({"ids", "pieces", "offsets"});
    const Json offsets = json.get("offsets");
    REQUIRE(offsets.size() == json.get("ids").size());
    REQUIRE(offsets.size() == json.get("pieces").size());
    int64_t at = 0;
    for (size_t i = 0; i < offsets.size(); ++i) {
        CHECK(offsets.at(i).at(0).as_int() == at);
        at = offsets.at(i).at(1).as_int();
    }
    CHECK(at == static_cast<int64_t>(text.size()));
    for (const int64_t id : ints(json.get("ids"))) CHECK(id > 3);
}

TEST_CASE("tokenize: --special parses special tokens and adds the template's") {
    const Json json =
        Json::parse(tokenize({"--tokenizer", vocabulary, "--special", "--json", "the</s>"}), "out");
    const auto ids = ints(json.get("ids"));
    CHECK(std::count(ids.begin(), ids.end(), 2) == 1);
}

TEST_CASE("tokenize: --special with RoBERTa's template and <mask>") {
    if (test_data_dir().empty() && skip("REFRAG_TEST_DATA is unset or missing")) return;
    const std::string roberta = test_data_dir() + "/tokenizers/roberta-base/tokenizer.json";
    CHECK(
        tokenize({"--tokenizer", roberta, "--special", "--json", "Hello <mask>!"}) ==
        "{\"ids\": [0, 31414, 50264, 328, 2], \"pieces\": [\"<s>\", \"Hello\", \"<mask>\", \"!\", \"</s>\"], "
        "\"offsets\": [[0, 0], [0, 5], [5, 12], [12, 13], [13, 13]]}\n");
}

TEST_CASE("tokenize: text from an argument, a file and standard input is the same") {
    const TempDir dir;
    const std::string text = "one two\nthree\n";
    const std::string path = dir.write("text", text);
    const std::string expected = tokenize({"--tokenizer", vocabulary, "--json", text});
    CHECK(tokenize({"--tokenizer", vocabulary, "--json", "--file", path}) == expected);

    const int saved = ::dup(STDIN_FILENO);
    const int source = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    REQUIRE(::dup2(source, STDIN_FILENO) == STDIN_FILENO);
    const std::string from_stdin = tokenize({"--tokenizer", vocabulary, "--json"});
    ::dup2(saved, STDIN_FILENO);
    ::close(saved);
    ::close(source);
    CHECK(from_stdin == expected);
    CHECK(tokenize({"--tokenizer", vocabulary, "--json", ""}) ==
          "{\"ids\": [], \"pieces\": [], \"offsets\": []}\n");
}

TEST_CASE("tokenize: a model directory or a directory with tokenizer.json will do") {
    const std::string expected = tokenize({"--tokenizer", vocabulary, "--json", "the end"});
    CHECK(tokenize({"--tokenizer", path_parent(vocabulary), "--json", "the end"}) == expected);
    CHECK(tokenize({"-m", path_parent(path_parent(vocabulary)), "--json", "the end"}) == expected);
}

TEST_CASE("tokenize: --decode gives the text back, special tokens on request") {
    const std::string text = "It's 2024, caf\xC3\xA9 \xE4\xB8\xAD!";
    std::string ids;
    for (const int64_t id :
         ints(Json::parse(tokenize({"--tokenizer", vocabulary, "--json", text}), "out").get("ids")))
        ids += std::to_string(id) + ",";
    CHECK(tokenize({"--tokenizer", vocabulary, "--decode", ids}) == text + "\n");
    CHECK(tokenize({"--tokenizer", vocabulary, "--decode", "[0, " + ids + " 2]"}) == text + "\n");
    CHECK(tokenize({"--tokenizer", vocabulary, "--special", "--decode", "0 " + ids + "2"}) ==
          "<s>" + text + "</s>\n");
    CHECK(tokenize({"--tokenizer", vocabulary, "--json", "--decode", ids}) ==
          "{\"text\": " + json_quote(text) + "}\n");
    CHECK(tokenize({"--tokenizer", vocabulary, "--decode", ""}) == "\n");
}

TEST_CASE("tokenize: --batch gives a line of ids for a line of text, --batch-decode the way back") {
    const TempDir dir;
    const std::vector<std::string> texts = {"the end", "", "caf\xC3\xA9\n</s> \\ \"\x01",
                                            "a\xF0\x9F\x98\x82"};
    std::string lines;
    for (size_t i = 0; i < texts.size(); ++i)
        lines += i % 2 == 0 ? json_quote(texts[i]) + "\n" : "{\"text\": " + json_quote(texts[i]) + "}\n";
    lines.pop_back();  // the last line need not end
    const std::string path = dir.write("lines", lines);
    for (const bool special : {false, true}) {
        std::vector<std::string> more;
        if (special) more.push_back("--special");
        const auto with = [&](std::vector<std::string> arguments) {
            arguments.insert(arguments.end(), more.begin(), more.end());
            return tokenize(arguments);
        };
        std::istringstream out(with({"--tokenizer", vocabulary, "--batch", "--file", path}));
        std::string line;
        std::string id_lines;
        for (const std::string& text : texts) {
            REQUIRE(std::getline(out, line));
            const Json json = Json::parse(line, "line");
            json.check_keys({"ids"});
            const Json alone = Json::parse(with({"--tokenizer", vocabulary, "--json", text}), "alone");
            CHECK(ints(json.get("ids")) == ints(alone.get("ids")));
            id_lines += line.substr(7, line.size() - 8) + "\n";
        }
        CHECK_FALSE(std::getline(out, line));
        if (special) continue;  // decoding passes over what --special added
        const std::string ids_path = dir.write("ids", id_lines);
        std::string expected;
        for (const std::string& text : texts) expected += "{\"text\":" + json_quote(text) + "}\n";
        CHECK(tokenize({"--tokenizer", vocabulary, "--batch-decode", "--file", ids_path}) == expected);
    }
    const std::string json = tokenize({"--tokenizer", vocabulary, "--batch", "--json", "--file", path});
    CHECK(json.starts_with(tokenize({"--tokenizer", vocabulary, "--json", texts[0]})));
}

TEST_CASE("tokenize: a bad line of --batch is refused with its number") {
    const TempDir dir;
    const auto refuse = [&](const std::string& flag, const std::string& lines) {
        const std::string path = dir.write("lines", lines);
        return error_of([&] { tokenize({"--tokenizer", vocabulary, flag, "--file", path}); });
    };
    CHECK(contains(refuse("--batch", "\"a\"\n5\n"),
                   "lines: line 2: expected a string or an object with \"text\""));
    CHECK(contains(refuse("--batch", "\"a\"\n\n5"), "lines: line 3: "));
    CHECK(contains(refuse("--batch", "{\"txt\":\"a\"}"), "lines: line 1: expected the key \"text\""));
    CHECK(contains(refuse("--batch-decode", "[1]\n[1,8192000]"),
                   "lines: line 2: key \"[1]\": expected an integer in [0, "));
    CHECK(contains(refuse("--batch-decode", "\"a\""), "expected an array"));
    CHECK(contains(error_of([&] {
                       tokenize({"--tokenizer", vocabulary, "--batch", "x"});
                   }),
                   "expected no TEXT"));
    CHECK(contains(error_of([&] {
                       tokenize({"--tokenizer", vocabulary, "--batch", "--batch-decode"});
                   }),
                   "found both"));
}

TEST_CASE("tokenize: one token a line without --json") {
    const std::string out = tokenize({"--tokenizer", vocabulary, "the"});
    CHECK(contains(out, "\t0-"));
    CHECK(out.back() == '\n');
}

TEST_CASE("tokenize: wrong usage and bad files") {
    const auto refuse = [](const std::vector<std::string>& arguments) {
        return error_of([&] { tokenize(arguments); });
    };
    CHECK(contains(refuse({"x"}), "expected either --tokenizer or --model, found neither"));
    CHECK(contains(refuse({"--tokenizer", vocabulary, "-m", "dir", "x"}), "found both"));
    CHECK(contains(refuse({"--tokenizer", vocabulary, "--file", "f", "x"}),
                   "expected one of TEXT, --file and --decode"));
    CHECK(contains(refuse({"--tokenizer", "none.json", "x"}), "none.json: cannot be opened"));
    CHECK(contains(refuse({"--tokenizer", vocabulary, "--file", "none.txt"}), "none.txt: cannot be opened"));
    for (const char* ids : {"8192000", "-1", "x", "1,2,99999999999999999999", "1.5", "4 five"}) {
        CAPTURE(ids);
        CHECK(contains(refuse({"--tokenizer", vocabulary, "--decode", ids}), "expected ids in [0, "));
    }
}
