// The binary from outside: exit codes, one clear line for each error, what goes to standard output and what
// does not. The path of the binary comes from REFRAG_BINARY (the Makefile sets it).
#include <doctest/doctest.h>

#include <string>

#include "cli_test.h"
#include "every_backend.h"
#include "io/json.h"

using namespace refrag;
using namespace refrag_test;

TEST_CASE("help, version and usage errors") {
    const TempDir dir;
    CHECK(refrag_run(dir, "--help").code == 0);
    const Ran version = refrag_run(dir, "--version");
    CHECK(version.code == 0);
    CHECK(version.out.starts_with("refrag "));
    for (const char* command : {"run", "eval", "eval perplexity", "inspect", "tokenize"}) {
        CAPTURE(command);
        const Ran help = refrag_run(dir, std::string(command) + " --help");
        CHECK(help.code == 0);
        CHECK(!help.out.empty());
        CHECK(help.err.empty());
    }
    CHECK(contains(refrag_run(dir, "run --help").out, "llama.cpp"));
    for (const char* wrong :
         {"", "fly", "run", "run --nonsense", "run -m x", "eval", "run -m x -q y --passages z -p 2",
          "run -m x -q y --passages z -k 0", "run -m x -q y --passages z -n nine"}) {
        CAPTURE(wrong);
        const Ran ran = refrag_run(dir, wrong);
        CHECK(ran.code == 2);
        CHECK(ran.out.empty());
        CHECK(line_count(ran.err) == 1);
        CHECK(ran.err.starts_with("refrag: "));
    }
}

TEST_CASE("run answers, streams to standard output, and explains every chunk") {
    const TempDir dir;
    const std::string passages = dir.write("passages.jsonl", kPassages);
    const std::string base = std::string("run ") + kModel + "--passages '" + passages + "' -n 6 ";
    const Ran plain = refrag_run(dir, base + "-q 'What hangs?'");
    CHECK(plain.code == 0);
    CHECK(contains(plain.err, "chunks "));
    CHECK(contains(plain.err, "TTFT"));
    CHECK(line_count(plain.err) == 1);

    const Ran json =
        refrag_run(dir, base + "-q 'What hangs?' --json --explain '" + dir.file("why.json") + "'");
    CHECK(json.code == 0);
    const Json answer = Json::parse(json.out, "stdout");
    CHECK(answer.get_string("answer") + "\n" == plain.out);
    CHECK(answer.get_string("policy") == "model");
    CHECK(answer.get_int("positions") < answer.get_int("plain_tokens"));
    const Json why = Json::parse_file(dir.file("why.json"));
    CHECK(why.get_string("answer") == answer.get_string("answer"));
    const Json chunks = why.get_array("chunks");
    REQUIRE(chunks.size() == static_cast<size_t>(answer.get_int("n_chunks")));
    CHECK(chunks.at(0).get_string("document") == "a");
    CHECK(chunks.at(chunks.size() - 1).get_string("document") == "7");
    int64_t expanded = 0;
    std::string first_document;
    for (size_t i = 0; i < chunks.size(); ++i) {
        const Json chunk = chunks.at(i);
        chunk.get_number("logit");
        expanded += chunk.get_bool("expanded") ? 1 : 0;
        CHECK(chunk.get_int("n_positions") == (chunk.get_bool("expanded") ? chunk.get_int("tokens") : 1));
        if (chunk.get_string("document") == "a") first_document += chunk.get_string("text");
    }
    CHECK(first_document == "Hill\nThe old mill stands on a hill.");
    CHECK(expanded == answer.get_int("n_expanded"));
    for (const char* stage : {"tokenize", "encode", "sense", "project", "prefill", "sample", "decode"}) {
        CHECK(why.get_object("times_ms").get_number(stage) >= 0.0);
    }

    // Several questions: the second finds the passages cached.
    const Ran two = refrag_run(dir, base + "-q 'What hangs?' -q 'Where is the mill?' --json");
    CHECK(two.code == 0);
    CHECK(line_count(two.out) == 2);
    const Json second = Json::parse(two.out.substr(two.out.find('\n')), "second line");
    CHECK(second.get_int("n_cached") == static_cast<int64_t>(chunks.size()));
}

TEST_CASE("run: the same seed gives the same text, and sampling options are checked") {
    const TempDir dir;
    const std::string passages = dir.write("passages.txt", "One passage.\n\nAnother passage.\n");
    const std::string base = std::string("run ") + kModel + "--passages '" + passages + "' -q Why -n 12 ";
    CHECK(refrag_run(dir, base + "--temp 1 -s 5").out == refrag_run(dir, base + "--temp 1 -s 5 -t 1").out);
    CHECK(refrag_run(dir, base + "--temp 1 -s 5").out != refrag_run(dir, base + "--temp 1 -s 6").out);
    CHECK(refrag_run(dir, base + "--temp -1").code == 2);
    CHECK(refrag_run(dir, base + "--top-p 0").code == 2);
    CHECK(refrag_run(dir, base + "--policy best").code == 2);
    CHECK(refrag_run(dir, base + "--device tpu").code == 2);
    const Ran cuda = refrag_run(dir, base + "--device cuda");
    CHECK(cuda.code == (refrag_test::has_gpu() ? 0 : 1));
    if (cuda.code == 1) CHECK(contains(cuda.err, "refrag: --device cuda: "));
    CHECK(refrag_run(dir, base + "--gpu-memory-fraction 0").code == 2);
    CHECK(refrag_run(dir, base + "--deterministic").code == 0);
    const Ran odd = refrag_run(dir, base + "-k 5");
    CHECK(odd.code == 0);
    CHECK(contains(odd.err, "warning: -k 5"));
}

TEST_CASE("bad files give code 3 and one line that names them") {
    const TempDir dir;
    const std::string good = dir.write("good.txt", "A passage.\n");
    const auto with_passages = [&](const std::string& path) {
        return refrag_run(dir, std::string("run ") + kModel + "-q Why --passages '" + path + "'");
    };
    const std::string broken = dir.write("broken.jsonl", "{\"text\": \"fine\"}\n{\"text\": 5}\n");
    for (const std::string& path : {dir.file("missing"), broken, dir.write("empty", ""), dir.path()}) {
        CAPTURE(path);
        const Ran ran = with_passages(path);
        CHECK(ran.code == 3);
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, path));
        CHECK(ran.out.empty());
    }
    const Ran no_model = refrag_run(dir, "run -m '" + dir.path() + "' -q Why --passages '" + good + "'");
    CHECK(no_model.code == 3);
    CHECK(contains(no_model.err, "refrag.json"));
    CHECK(line_count(no_model.err) == 1);
    // An explain file that cannot be written fails at run time, after the answer.
    const Ran unwritable = refrag_run(dir, std::string("run ") + kModel + "-q Why -n 2 --passages '" + good +
                                               "' --explain '" + dir.file("no/such/dir.json") + "'");
    CHECK(unwritable.code == 1);
}

TEST_CASE("eval perplexity writes a table, CSV, or the JSON rows of its contract") {
    const TempDir dir;
    std::string text;
    for (int i = 0; i < 60; ++i) text += str("Row ", i, " of the barley fields near hill ", i * 3, ".\n");
    const std::string file = dir.write("text.txt", text);
    const std::string base = std::string("eval perplexity ") + kModel + "--text '" + file +
                             "' --context 32 --output 16 --limit 3 ";
    const Ran json = refrag_run(dir, base + "-k 4,8 -p 0,0.5 -o json");
    REQUIRE(json.code == 0);
    const Json rows = Json::parse(json.out, "stdout");
    REQUIRE(rows.as_array().size() == 10);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        row.check_keys({"mode", "context", "output", "k", "p", "policy", "log_perplexity", "standard_error",
                        "share_recovered", "n"});
        CHECK(row.get_int("context") == 32);
        CHECK(row.get_int("output") == 16);
        CHECK(row.get_number("log_perplexity") > 0.0);
        CHECK(row.get_int("n") == 3);
        const bool refrag_row = row.get_string("mode") == "refrag";
        CHECK(row.get("policy").is_null() == !refrag_row);
    }
    CHECK(rows.at(0).get("k").is_null());
    CHECK(line_count(refrag_run(dir, base).out) == 6);
    CHECK(line_count(refrag_run(dir, base + "-o csv").out) == 5);
    CHECK(refrag_run(dir, base + "-o xml").code == 2);
    CHECK(refrag_run(dir, base + "--modes none,most").code == 2);
    CHECK(refrag_run(dir, std::string("eval perplexity ") + kModel + "--text '" + dir.file("missing") + "'")
              .code == 3);
    const Ran too_short = refrag_run(
        dir, std::string("eval perplexity ") + kModel + "--text '" + file + "' --context 100000 --output 16");
    CHECK(too_short.code == 2);
    CHECK(contains(too_short.err, "expected at least 100016"));
}

TEST_CASE("inspect shows shapes and the tensors left unused") {
    const TempDir dir;
    const Ran text = refrag_run(dir, std::string("inspect ") + kModel);
    CHECK(text.code == 0);
    CHECK(contains(text.out, "decoder     llama, dim 40"));
    CHECK(contains(text.out, "memory      weights "));
    const Ran json = refrag_run(dir, std::string("inspect --json ") + kModel);
    CHECK(contains(json.out, "\"workspace_bytes\": "));
    CHECK(contains(json.out, "\"fits\": true"));
    CHECK(json.code == 0);
    const Json model = Json::parse(json.out, "stdout");
    CHECK(model.get_object("decoder").get_int("dim") == 40);
    CHECK(model.get_int("parameters") > 0);
}
