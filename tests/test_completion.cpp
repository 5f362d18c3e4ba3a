// What `make install` puts beside the binary: completion scripts and the manual page know every command and
// option that --help knows, and bash completes with them.
#include <doctest/doctest.h>

#include <set>
#include <sstream>

#include "cli_test.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::Ran;
using refrag_test::refrag_run;
using refrag_test::shell_run;
using refrag_test::TempDir;

namespace {

constexpr const char* kCommands[] = {"run",     "eval perplexity", "eval qa",    "bench",
                                     "inspect", "tokenize",        "completion", "man"};

// The long options of a --help text, by its lines: "  -m,--model DIR ..." or "  --json ...".
std::set<std::string> long_options(const std::string& help) {
    std::set<std::string> found;
    std::istringstream text(help);
    for (std::string line; std::getline(text, line);) {
        const size_t at = line.find("--");
        if (!line.starts_with("  -") || at == std::string::npos || at > 8) continue;
        found.insert(line.substr(at, line.find_first_of(" ,", at) - at));
    }
    return found;
}

std::string without(std::string text, char unwanted) {
    std::erase(text, unwanted);
    return text;
}

}  // namespace

TEST_CASE("completion scripts and the manual page have every option of every command") {
    const TempDir dir;
    const std::string bash = refrag_run(dir, "completion bash").out;
    const std::string zsh = refrag_run(dir, "completion zsh").out;
    const std::string fish = refrag_run(dir, "completion fish").out;
    const std::string manual = without(refrag_run(dir, "man").out, '\\');
    size_t n = 0;
    for (const std::string command : kCommands) {
        CAPTURE(command);
        const Ran help = refrag_run(dir, command + " --help");
        REQUIRE(help.code == 0);
        const std::string word = command.substr(command.rfind(' ') + 1);
        CHECK(contains(bash, "'refrag " + command + "') words="));
        CHECK(contains(zsh, "'" + word + ":"));
        CHECK(contains(fish, "-a '" + word + "'"));
        CHECK(contains(manual, ".SS refrag " + command + "\n"));
        for (const std::string& option : long_options(help.out)) {
            CAPTURE(option);
            ++n;
            CHECK(contains(bash, option));
            CHECK(contains(zsh, option));
            CHECK(contains(fish, "-l " + option.substr(2)));
            if (option != "--help") CHECK(contains(manual, "fB" + option + "fR"));
        }
    }
    CHECK(n > 40);  // the help texts were understood

    const Ran wrong = refrag_run(dir, "completion tcsh");
    CHECK(wrong.code == 2);
    CHECK(wrong.err == "refrag: completion: expected bash, zsh or fish, found \"tcsh\"\n");
}

TEST_CASE("bash completes commands, options, choices and paths") {
    const TempDir dir;
    REQUIRE(refrag_run(dir, "completion bash").code == 0);
    const std::string script = dir.write("refrag.bash", refrag_run(dir, "completion bash").out);
    const std::string passages = dir.write("passages.txt", "x");
    // Calls the function as bash does when the key is pressed after these words.
    const auto complete = [&](const std::string& words) {
        const Ran ran =
            shell_run(dir, "bash -c 'source \"" + script + "\"; compopt() { :; }; COMP_WORDS=(" + words +
                               "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _refrag; echo "
                               "\"${COMPREPLY[*]}\"'");
        CHECK(ran.err == "");
        return ran.out;
    };
    if (shell_run(dir, "bash --version").code != 0 && refrag_test::skip("no bash")) return;
    CHECK(complete("refrag ins") == "inspect\n");
    CHECK(complete("refrag eval perp") == "perplexity\n");
    CHECK(complete("refrag run --pas") == "--passages\n");
    CHECK(complete("refrag run --device c") == "cpu cuda\n");
    CHECK(complete("refrag run --device = cu") == "cuda\n");
    CHECK(complete("refrag run --temp 0") == "\n");
    CHECK(complete("refrag run --passages " + dir.path() + "/pass") == passages + "\n");
    CHECK(complete("refrag completion f") == "fish\n");
}
