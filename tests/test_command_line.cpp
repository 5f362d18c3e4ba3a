// The command line's own words: what is refused before anything is loaded, and in which terms. Every case is
// an input that a user of other runtimes has typed.
#include <doctest/doctest.h>

#include <string>

#include "cli_test.h"
#include "io/json.h"

using namespace refrag;
using refrag_test::binary;
using refrag_test::contains;
using refrag_test::line_count;
using refrag_test::Ran;
using refrag_test::refrag_run;
using refrag_test::shell_run;
using refrag_test::TempDir;

namespace {

constexpr const char* kPassages = "{\"text\": \"The old mill stands on a hill.\"}\n";

struct Tiny {
    TempDir dir;
    std::string passages = dir.write("passages.jsonl", kPassages);
    std::string base = "run -m tests/golden/tiny-refrag --passages '" + passages + "' ";
    Ran run(const std::string& arguments) const { return refrag_run(dir, base + arguments); }
    // One line, nothing on standard output.
    std::string refusal(const std::string& arguments, int code = 2) const {
        CAPTURE(arguments);
        const Ran ran = refrag_run(dir, arguments);
        CHECK(ran.code == code);
        CHECK(ran.out.empty());
        CHECK(line_count(ran.err) == 1);
        return ran.err;
    }
};

}  // namespace

TEST_CASE("command line: an unknown or missing command is told which there are, and the nearest") {
    const Tiny tiny;
    CHECK(
        contains(tiny.refusal("rnu"), "refrag: unknown command \"rnu\": did you mean run? (expected run, "));
    CHECK(contains(tiny.refusal("fly -m x"),
                   "unknown command \"fly\" (expected run, ask, chat, serve, index, encode, "));
    CHECK(contains(tiny.refusal("eval perplexty"),
                   "refrag: eval: unknown command \"perplexty\": did you mean "
                   "perplexity?"));
    CHECK(contains(tiny.refusal(""), "refrag: expected a command: run, ask"));
    CHECK(contains(tiny.refusal("eval"), "refrag: eval: expected a command: perplexity, qa"));
    CHECK(refrag_run(tiny.dir, "eval --help").code == 0);
}

TEST_CASE("command line: a long option with one dash is not a short one with a value") {
    const Tiny tiny;
    CHECK(contains(tiny.refusal("run -ngl 99"), "refrag: run: unknown option -ngl"));
    CHECK(contains(tiny.refusal("run -temp 0.5"), "unknown option -temp: did you mean --temp?"));
    CHECK(contains(tiny.refusal("run -seed=4"), "unknown option -seed: did you mean --seed?"));
    CHECK(contains(tiny.refusal("run -mdir"), "-m takes its value after a space: -m dir"));
    CHECK(tiny.run("-n2 -q x").out == tiny.run("-n 2 -q x").out);
}

TEST_CASE("command line: unexpected arguments stand in their order, with the nearest option") {
    const Tiny tiny;
    CHECK(contains(tiny.refusal("run -m x -q y one two three"), "unexpected arguments one two three"));
    CHECK(contains(tiny.refusal("run -m x -q y --tmep 1"), "--tmep 1: did you mean --temp?"));
}

TEST_CASE("command line: -np is an alias of an option's name, not of a value") {
    const Tiny tiny;
    const Ran ran = tiny.run("-n 2 --json -q -np");
    CHECK(ran.code == 0);
    CHECK(Json::parse(ran.out, "out").get_string("question") == "-np");
    const std::string batch = tiny.dir.write("batch", "{\"question\": \"x\"}\n");
    CHECK(tiny.run("-n 2 -np 1 --batch '" + batch + "'").code == 0);
    CHECK(tiny.run("-n 2 -r -np -q x").code == 0);
}

TEST_CASE("command line: integers are decimal and stay in their range") {
    const Tiny tiny;
    CHECK(tiny.run("-n 010 -q x").out == tiny.run("-n 10 -q x").out);
    CHECK(tiny.run("-n 010 -q x").out != tiny.run("-n 8 -q x").out);
    for (const char* wrong :
         {"-n 0x10", "-n 1e1", "-n ''", "-n 99999999999", "-k 0", "-k 0x8", "-c 4294967296", "-s -2",
          "-s 18446744073709551616", "-s 0x1", "-s 1.0", "-t -1", "-p 0x1", "-p nan", "--temp 0x1p1"}) {
        CAPTURE(wrong);
        tiny.refusal(tiny.base + "-q x " + wrong);
    }
    CHECK(contains(tiny.refusal(tiny.base + "-q x -c -1"),
                   "expected a whole number from 0 to 2147483647, found \"-1\""));
    for (const char* command : {"eval perplexity -m x --text y ", "eval qa -m x --data y ", "bench "})
        for (const char* wrong : {"-s -2", "-s 18446744073709551616", "-k 010x", "--limit -1"}) {
            if (std::string(command) == "bench " && wrong == std::string("--limit -1")) continue;
            tiny.refusal(std::string(command) + wrong);
        }
}

TEST_CASE("command line: -s -1 draws a seed and says which") {
    const Tiny tiny;
    const Ran drawn = tiny.run("-q x -n 40 --temp 2 -s -1");
    CHECK(drawn.code == 0);
    const std::string begin = "refrag: seed ";
    REQUIRE(drawn.err.starts_with(begin));
    const std::string seed = drawn.err.substr(begin.size(), drawn.err.find(' ', begin.size()) - begin.size());
    CHECK(tiny.run("-q x -n 40 --temp 2 -s " + seed).out == drawn.out);
    CHECK(tiny.run("-q x -n 40 --temp 2 -s -1").err.substr(0, 30) != drawn.err.substr(0, 30));
    CHECK(tiny.run("-q x -n 4 --temp 1 -s 18446744073709551615").code == 0);
}

TEST_CASE("command line: every output path is checked before a model is loaded") {
    const Tiny tiny;
    const std::string missing = " '" + tiny.dir.file("no/file") + "'";
    const std::string batch = tiny.dir.write("batch", "{\"question\": \"x\", \"passages\": []}\n");
    const std::string data =
        tiny.dir.write("data", "{\"text\": \"t\", \"question\": \"q\", \"answer\": \"a\"}\n");
    const std::string names[] = {
        "run -m nowhere -q x --passages '" + tiny.passages + "' --explain" + missing,
        "run -m nowhere --batch '" + batch + "' -o" + missing,
        "eval qa -m nowhere --data '" + data + "' --predictions" + missing,
        "eval perplexity -m nowhere --text '" + data + "' --windows" + missing,
        "bench -m nowhere --out" + missing,
        "bench -m nowhere --json" + missing,
    };
    for (const std::string& name : names)
        CHECK(contains(tiny.refusal(name, 1), "cannot be written: its directory does not exist"));
}

TEST_CASE("command line: a table that was computed is shown even where another output fails") {
    const Tiny tiny;
    const std::string text = tiny.dir.write(
        "text", std::string(40, 'a') + " the old mill stands on a hill. " + std::string(400, 'b'));
    const Ran ran = refrag_run(tiny.dir, "eval perplexity -m tests/golden/tiny-refrag --text '" + text +
                                             "' --context 16 --output 16 --limit 1 --windows /dev/full");
    CHECK(ran.code == 1);
    CHECK(contains(ran.out, "log_perplexity"));
    CHECK(contains(ran.err, "/dev/full: writing failed"));
    const std::string batch = tiny.dir.write("batch", "{\"question\": \"x\"}\n");
    const Ran answers = tiny.run("-n 2 --batch '" + batch + "' -o /dev/full");
    CHECK(answers.code == 1);
    CHECK(Json::parse(answers.out, "out").get_string("question") == "x");
}

TEST_CASE("command line: -o /dev/stdout adds to what a log holds") {
    const Tiny tiny;
    const std::string batch = tiny.dir.write("batch", "{\"question\": \"x\"}\n");
    const std::string log = tiny.dir.write("log", "kept\n");
    const Ran ran = shell_run(tiny.dir, "( " + binary() + " " + tiny.base + "-n 2 --batch '" + batch +
                                            "' -o /dev/stdout >> '" + log + "' ) ");
    CHECK(ran.code == 0);
    const std::string after = read_file(log, 10000);
    CHECK(after.starts_with("kept\n{"));
    CHECK(line_count(after) == 2);
}

TEST_CASE("run: passages from standard input and from a pipe") {
    const Tiny tiny;
    const Ran file = tiny.run("-n 4 -q x");
    const std::string base = "run -m tests/golden/tiny-refrag -n 4 -q x --passages ";
    CHECK(refrag_run(tiny.dir, base + "-", tiny.passages).out == file.out);
    CHECK(refrag_run(tiny.dir, base + "/dev/stdin", tiny.passages).out == file.out);
    const Ran pipe =
        shell_run(tiny.dir, "( cat '" + tiny.passages + "' | " + binary() + " " + base + "/dev/fd/0 )");
    CHECK(pipe.out == file.out);
    CHECK(contains(refrag_run(tiny.dir, "run -m x --passages - --batch -").err, "read once"));
}

TEST_CASE("run: without passages the decoder is asked alone") {
    const Tiny tiny;
    const Ran ran = refrag_run(tiny.dir, "run -m tests/golden/tiny-refrag -n 4 --json -q x");
    CHECK(ran.code == 0);
    CHECK(Json::parse(ran.out, "out").get_int("n_chunks") == 0);
}

TEST_CASE("run: one question that fails does not keep the others from being answered") {
    const Tiny tiny;
    std::string longest = "x";
    for (int i = 0; i < 700; ++i) longest += " y";
    const Ran ran = tiny.run("-n 3 -q x -q '" + longest + "' -q x");
    CHECK(ran.code == 1);
    const Ran one = tiny.run("-n 3 -q x");
    CHECK(ran.out == one.out + one.out);
    CHECK(contains(ran.err, "leaves no room for an answer"));
    CHECK(contains(ran.err, "1 of 3 questions"));
    // The window is all there is, so no larger -c is asked for.
    CHECK(!contains(ran.err, "raise -c"));
    CHECK(contains(tiny.run("-n 3 -c 4 -q x").err, "raise -c up to the decoder's window of 512"));
}

TEST_CASE("run: --skip-bad names a bad line and goes on without it") {
    const Tiny tiny;
    const std::string bad = tiny.dir.write("bad", std::string("{\"text\": 5}\n") + kPassages);
    const std::string base = "run -m tests/golden/tiny-refrag -n 4 -q x --passages '" + bad + "' ";
    CHECK(contains(tiny.refusal(base, 3), "bad: line 1: key \"text\": expected a string, found 5"));
    const Ran ran = refrag_run(tiny.dir, base + "--skip-bad");
    CHECK(ran.code == 0);
    CHECK(ran.out == tiny.run("-n 4 -q x").out);
    CHECK(contains(ran.err, "warning: "));
    CHECK(contains(ran.err, "bad: line 1: "));
}

TEST_CASE("run --batch: two requests of one id are refused with both lines") {
    const Tiny tiny;
    const auto message = [&](const std::string& lines) {
        return tiny.refusal("run -m nowhere --passages '" + tiny.passages + "' --batch '" +
                                tiny.dir.write("batch", lines) + "'",
                            3);
    };
    CHECK(contains(message("{\"id\": \"a\", \"question\": \"x\"}\n\n{\"id\": \"a\", \"question\": \"y\"}\n"),
                   "line 3: expected an id of its own, found a, which line 1 has too"));
    CHECK(contains(message("{\"id\": 2, \"question\": \"x\"}\n{\"question\": \"y\"}\n"),
                   "line 2: expected an id of its own, found 2 (its number, since it has none)"));
    CHECK(contains(message("{\"id\": 1, \"question\": \"x\"}\n{\"id\": 1.0, \"question\": \"y\"}\n"),
                   "line 2"));
}

TEST_CASE("run: a stop string never meets the space that is taken off an answer's front") {
    const Tiny tiny;
    const std::string plain = tiny.run("-n 12 -q x").out;
    const Ran stopped = tiny.run("-n 12 -q x --stop ' '");
    CHECK(stopped.code == 0);
    CHECK(stopped.out == plain.substr(0, plain.find(' ', 0)) + (contains(plain, " ") ? "\n" : ""));
}

TEST_CASE("run: a chunk length that the encoder cannot take is spoken of by its name") {
    const Tiny tiny;
    std::string text = "{\"text\": \"";
    for (int i = 0; i < 400; ++i) text += "mill ";
    const std::string passages = tiny.dir.write("long", text + "\"}\n");
    const Ran ran = refrag_run(
        tiny.dir, "run -m tests/golden/tiny-refrag -n 2 -q x -p 0 -k 300 --passages '" + passages + "'");
    CHECK(ran.code != 0);
    CHECK(contains(ran.err, "give a smaller chunk length (-k)"));
}

TEST_CASE("eval perplexity: a head of its own is used where the config says that it is tied") {
    const Tiny tiny;
    const std::string model = tiny.dir.file("model");
    std::filesystem::copy("tests/golden/tiny-refrag", model, std::filesystem::copy_options::recursive);
    const std::string path = model + "/decoder/config.json";
    std::string config = read_file(path, 1 << 20);
    const std::string untied = "\"tie_word_embeddings\":false";
    REQUIRE(contains(config, untied));
    config.replace(config.find(untied), untied.size(), "\"tie_word_embeddings\":true");
    write_file_atomic(path, config);
    const std::string text = tiny.dir.write(
        "text", std::string(40, 'a') + " the old mill stands on a hill. " + std::string(400, 'b'));
    const std::string rest = " --text '" + text + "' --context 16 --output 16 --limit 2";
    const Ran own = refrag_run(tiny.dir, "eval perplexity -m tests/golden/tiny-refrag" + rest);
    const Ran tied = refrag_run(tiny.dir, "eval perplexity -m '" + model + "'" + rest);
    CHECK(own.code == 0);
    CHECK(own.out == tied.out);
    CHECK(own.err.empty());
    CHECK(line_count(tied.err) == 1);
    CHECK(contains(tied.err, "warning: "));
    CHECK(contains(tied.err, "lm_head.weight is not the embedding"));
}
