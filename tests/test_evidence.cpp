// bench/evidence.py, which measures the default model and fills the tables of its card, and the figures that
// bench/plot.py draws of it.
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "cli_test.h"
#include "io/file.h"
#include "io/json.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::Ran;
using refrag_test::repo_path;
using refrag_test::shell_run;
using refrag_test::skip;
using refrag_test::TempDir;

namespace {

std::string python() {
    const char* path = std::getenv("REFRAG_PYTHON");
    return path != nullptr ? path : "python3";
}

bool without_python(const TempDir& dir) {
    return shell_run(dir, python() + " --version").code != 0 && skip("no python3");
}

Ran evidence(const TempDir& dir, const std::string& arguments) {
    return shell_run(dir, python() + " bench/evidence.py " + arguments + " --results " + dir.file("results") +
                              " --card " + dir.file("card.md"));
}

constexpr const char* kFacts =
    R"({"id": "1", "title": "Corrash", "text": "Corrash is a city in Brelk.", "question": "In which country is Corrash?", "answers": ["Brelk"]}
{"id": "2", "title": "Urvik", "text": "The Urvik is a river in Selwin.", "question": "In which country is the Urvik?", "answers": ["Selwin"]}
)";

}  // namespace

TEST_CASE("evidence.py measures a table by refrag, keeps its rows, and puts it into the card") {
    const TempDir dir;
    if (without_python(dir)) return;
    dir.write("cloze.jsonl", kFacts);
    dir.write("card.md",
              "before\n<!-- table cloze -->\nold\n<!-- end -->\nbetween\n<!-- table boolq -->\n<!-- end "
              "-->\nafter\n");
    const char* binary = std::getenv("REFRAG_BINARY");
    // Only two passages: the four distractors that the table asks for are not there.
    Ran ran =
        evidence(dir, str("run cloze --data ", dir.file(""), " --binary ", binary ? binary : "build/refrag"));
    CHECK(ran.code != 0);
    CHECK(contains(ran.err, "cloze: refrag ended with 2"));
    std::string passages;
    for (int i = 0; i < 6; ++i)
        passages +=
            str(R"({"id": ")", i, R"(", "title": "T)", i, R"(", "text": "Number )", i,
                R"( is a word.", "question": "What is number )", i, R"(?", "answers": ["a word"]})", "\n");
    dir.write("cloze.jsonl", passages);
    ran =
        evidence(dir, str("run cloze --data ", dir.file(""), " --binary ", binary ? binary : "build/refrag"));
    CAPTURE(ran.err);
    REQUIRE(ran.code == 0);
    const Json table = Json::parse_file(dir.file("results/cloze.json"));
    CHECK(table.get_string("table") == "cloze");
    CHECK(contains(table.get_string("command"), "refrag eval qa"));
    CHECK(table.get_array("rows").size() == 13);  // none; full and five of refrag for 0 and for 4 distractors
    const std::string card = read_file(dir.file("card.md"), 1 << 20);
    CHECK(contains(card, "before\n<!-- table cloze -->\n| distractors | k | p |"));
    CHECK(contains(card,
                   "|\n<!-- end -->\nbetween\n<!-- table boolq -->\n(not measured)\n<!-- end -->\nafter\n"));
    CHECK_FALSE(contains(card, "old"));
    std::string conversations;
    for (int i = 0; i < 6; ++i)
        conversations +=
            str(R"({"id": ")", i, R"(", "title": "", "text": "Number )", i, R"( is a word.", "turns": )",
                R"([{"question": "What is it?", "answers": ["a word"]}]})", "\n");
    dir.write("facts-turns.jsonl", conversations);
    ran = evidence(
        dir, str("run facts-turns --data ", dir.file(""), " --binary ", binary ? binary : "build/refrag"));
    CAPTURE(ran.err);
    CHECK(ran.code == 0);
}

TEST_CASE("evidence.py measures trainings that are not shipped and sums them up in a table") {
    const TempDir dir;
    if (without_python(dir)) return;
    for (const char* folder : {"test", "validation", "trainings"})
        std::filesystem::create_directory(dir.file(folder));
    for (const char* name : {"dropout", "plain"})
        std::filesystem::create_directory_symlink(
            std::filesystem::absolute(repo_path("weights_tools/refrag-nano")), dir.file("trainings/") + name);
    std::string text;
    for (int i = 0; i < 200; ++i) text += str("The river number ", i, " ends in the sea. ");
    dir.write("validation/novels.txt", text);
    dir.write("card.md", "<!-- table regularisation -->\n<!-- end -->\n");
    const char* binary = std::getenv("REFRAG_BINARY");
    const Ran ran = evidence(dir, str("run regularisation --data ", dir.file("test"), " --regularisation ",
                                      dir.file("trainings"), " --binary ", binary ? binary : "build/refrag"));
    CAPTURE(ran.err);
    REQUIRE(ran.code == 0);
    const std::string card = read_file(dir.file("card.md"), 1 << 20);
    CHECK(contains(
        card, "| continued | no context | 256 tokens of context | s.e. |\n|---|---|---|---|\n| dropout | "));
    CHECK(contains(card, "|\n| plain | "));
}

TEST_CASE("evidence.py refuses a card and names that it does not know") {
    const TempDir dir;
    if (without_python(dir)) return;
    dir.write("card.md", "<!-- table nothing -->\n<!-- end -->\n");
    Ran ran = evidence(dir, "tables");
    CHECK(ran.code == 1);
    CHECK(contains(ran.err, "table nothing: expected one of variants, regularisation, perplexity-textbooks"));
    dir.write("card.md", "<!-- table facts -->\n");
    ran = evidence(dir, "tables");
    CHECK(ran.code == 1);
    CHECK(contains(ran.err, "table facts: expected <!-- end -->"));
    ran = evidence(dir, str("run nothing --data ", dir.file("")));
    CHECK(ran.code == 2);
    CHECK(contains(ran.err, "found nothing"));
    ran = evidence(dir, str("run --data ", dir.file("none")));
    CHECK(ran.code == 2);
    CHECK(contains(ran.err, "prepare.py"));
}

TEST_CASE("plot.py draws the tables of evidence.py that have a figure, each beside its file") {
    const TempDir dir;
    if (shell_run(dir, python() + " -c 'import matplotlib'").code != 0 && skip("no matplotlib")) return;
    const auto table = [&](const std::string& name, const std::string& rows) {
        return dir.write(name + ".json",
                         str(R"({"table": ")", name, R"(", "model": "m", "rows": [)", rows, "]}"));
    };
    const std::string figures =
        table("selection-a", R"({"mode": "refrag", "p": 0.1, "policy": "model", "log_perplexity": 3.0})") +
        " " + table("perplexity-a", R"({"mode": "full", "context": 256, "k": null, "log_perplexity": 3.0})") +
        " " +
        table("facts-passages",
              R"({"mode": "refrag", "distractors": 1, "p": 0.1, "policy": "model", "exact_match": null})") +
        " " + table("squad", "");
    const Ran ran = shell_run(dir, python() + " bench/plot.py " + figures);
    CAPTURE(ran.err);
    CHECK(ran.code == 0);
    for (const char* name : {"selection-a", "perplexity-a", "facts-passages"}) {
        CHECK(contains(ran.out, dir.file(str(name, ".png"))));
        CHECK(contains(read_file(dir.file(str(name, ".svg")), 1 << 24), "<svg"));
    }
    CHECK_FALSE(contains(ran.out, "squad"));
    const Ran refused =
        shell_run(dir, python() + " bench/plot.py " + table("selection-b", R"({"mode": "refrag"})"));
    CHECK(refused.code == 3);
    CHECK(contains(refused.err, "expected the key 'policy'"));
}
