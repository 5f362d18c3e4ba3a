// `refrag run` from outside: sampling and stopping options, log-probabilities, and --batch: the same answers
// as one at a time, in the file's order, and what is refused before anything is loaded.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>

#include "cli/run.h"
#include "cli_test.h"
#include "refrag/requests.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// One question over kPassages.
struct Single {
    Single() {
        base = std::string("run ") + kModel + "--passages '" + dir.write("p", kPassages) + "' -q Why ";
    }
    Ran operator()(const std::string& options) const { return refrag_run(dir, base + options); }
    TempDir dir;
    std::string base;
};

Json one(const Ran& ran) {
    REQUIRE(ran.code == 0);
    return Json::parse(ran.out, "stdout");
}

}  // namespace

TEST_CASE("run: every sampling option reaches the sampler, and is refused by name when out of range") {
    const Single run;
    const std::string plain = run("-n 16").out;
    CHECK(
        run("-n 16 --repeat-penalty 1 --presence-penalty 0 --frequency-penalty 0 --top-k 0 --min-p 0").out ==
        plain);
    CHECK(run("-n 16 --temp 1 --top-k 1").out == plain);
    CHECK(run("-n 16 --temp 1 --min-p 1").out == plain);
    CHECK(run("-n 16 --temperature 1 --top-p 1e-9").out == plain);
    CHECK(run("-n 16 --temp 1").out != plain);
    // A token said or read before is as good as forbidden.
    CHECK(run("-n 16 --repeat-penalty 1e6").out != plain);
    CHECK(run("-n 16 --repetition-penalty 1e6 --repeat-last-n 0").out == plain);
    CHECK(run("-n 40 --frequency-penalty 2").out != run("-n 40").out);
    CHECK(run("-n 40 --presence-penalty 2").out != run("-n 40").out);
    for (const char* wrong : {"--temp -1",
                              "--temp nan",
                              "--temp inf",
                              "--top-k -2",
                              "--top-p 0",
                              "--top-p nan",
                              "--min-p 1.1",
                              "--min-p nan",
                              "--repeat-penalty 0",
                              "--repeat-penalty nan",
                              "--presence-penalty 3",
                              "--frequency-penalty -2.5",
                              "--frequency-penalty nan",
                              "--repeat-last-n -2",
                              "--top-k 1.5",
                              "--stop ''",
                              "--stop \"$(printf '\\377')\"",
                              "-n 0",
                              "-n -2",
                              "-n 1.5",
                              "--logprobs 21 --json",
                              "--logprobs -1 --json",
                              "--logprobs 1",
                              "-c -1",
                              "-c 513",
                              "--batch x",
                              "-o x",
                              "-np 2"}) {
        CAPTURE(wrong);
        const Ran ran = run(wrong);
        CHECK(ran.code == 2);
        CHECK(ran.out.empty());
        CHECK(line_count(ran.err) == 1);
    }
    CHECK(contains(run("--min-p nan").err, "min-p: expected a number from 0 to 1, found nan"));
    CHECK(contains(run("--logprobs 1").err, "add --json"));
    CHECK(contains(run("-o x").err, "--output requires --batch"));
    CHECK(contains(run("--batch x").err, "found both"));
    const Ran neither = refrag_run(run.dir, std::string("run ") + kModel);
    CHECK(neither.code == 2);
    CHECK(contains(neither.err, "-q TEXT or --batch FILE, found neither"));
}

TEST_CASE("run: --stop, -n -1, --ignore-eos and --logprobs") {
    const Single run;
    const Json whole = one(run("-n 40 --json"));
    const std::string text = whole.get_string("answer");
    CHECK(!whole.has("stop"));
    CHECK(!whole.has("logprobs"));
    REQUIRE(contains(text, "e"));
    const Json stopped = one(run("-n 40 --json --stop never -r e --reverse-prompt '{}' --stop '[a,b]'"));
    CHECK(stopped.get_string("finish") == "stop");
    CHECK(stopped.get_string("stop") == "e");
    CHECK(stopped.get_string("answer") == text.substr(0, text.find('e')));
    CHECK(run("-n 40 --stop e").out == text.substr(0, text.find('e')) + "\n");

    const Json endless = one(run("-n -1 --ignore-eos -c 100 --json --temp 1"));
    CHECK(endless.get_string("finish") == "context");
    CHECK(endless.get_int("positions") + endless.get_int("new_tokens") == 101);

    const Json json = one(run("-n 6 --json --logprobs 3"));
    const Json tokens = json.get_array("logprobs");
    REQUIRE(tokens.size() == static_cast<size_t>(json.get_int("new_tokens")));
    std::string bytes;
    for (size_t i = 0; i < tokens.size(); ++i) {
        const Json token = tokens.at(i);
        token.check_keys({"token", "id", "logprob", "bytes", "top"});
        const Json top = token.get_array("top");
        REQUIRE(top.size() == 3);
        // Greedy: the token itself is the most likely.
        CHECK(top.at(0).get_int("id") == token.get_int("id"));
        CHECK(top.at(0).get_number("logprob") == token.get_number("logprob"));
        CHECK(top.at(0).get_number("logprob") >= top.at(1).get_number("logprob"));
        CHECK(token.get_number("logprob") < 0.0);
        // "bytes" where the text alone would not say what the token is.
        if (!token.has("bytes")) {
            bytes += token.get_string("token");
            continue;
        }
        CHECK(contains(token.get_string("token"), "\xef\xbf\xbd"));
        const Json list = token.get_array("bytes");
        for (size_t b = 0; b < list.size(); ++b)
            bytes.push_back(static_cast<char>(static_cast<unsigned char>(list.at(b).as_int(0, 255))));
    }
    if (bytes.starts_with(' ')) bytes.erase(0, 1);
    JsonWriter replaced;  // writes U+FFFD for what is not UTF-8, as the answer has it
    replaced.string(bytes);
    CHECK(Json::parse(replaced.text(), "bytes").as_string() == json.get_string("answer"));
    CHECK(one(run("-n 2 --json --logprobs 0")).get_array("logprobs").at(0).get_array("top").size() == 0);
}

TEST_CASE("run --batch gives what run gives, in the file's order, whatever runs in parallel") {
    const TempDir dir;
    const std::string passages = dir.write("p", kPassages);
    std::string batch;
    std::vector<std::string> questions;
    for (int i = 0; i < 11; ++i) {
        questions.push_back(str("What about ", std::string(static_cast<size_t>(i * 5 % 23), 'x'), i, "?"));
        JsonWriter line;
        line.begin_object();
        if (i % 3 == 0) line.key("id").string(str("number ", i));
        if (i % 3 == 1) line.key("id").integer(100 + i);
        line.key("question").string(questions.back());
        line.end_object();
        batch += line.text() + (i == 4 ? "\r\n\n" : "\n");
    }
    const std::string file = dir.write("batch.jsonl", "\xEF\xBB\xBF" + batch);
    const std::string common = std::string("run ") + kModel + "--passages '" + passages + "' --logprobs 2 ";
    for (const std::string sampling :
         {"-n 20 ", "-n 12 --temp 1 --top-p 0.9 -s 4 --repeat-penalty 1.2 --stop e "}) {
        CAPTURE(sampling);
        std::string each = common + sampling + "--json";
        for (const std::string& question : questions) each += " -q '" + question + "'";
        const std::vector<Json> singles = json_lines(refrag_run(dir, each).out);
        REQUIRE(singles.size() == questions.size());
        for (const char* parallel : {"-np 1", "--parallel 3", "-np 64"}) {
            CAPTURE(parallel);
            const Ran ran = refrag_run(dir, common + sampling + "--batch '" + file + "' " + parallel);
            CHECK(ran.code == 0);
            CHECK(line_count(ran.err) == 1);
            CHECK(ran.err.starts_with("requests 11, failed 0, tokens "));
            CHECK(contains(ran.err, "median TTFT"));
            const std::vector<Json> results = json_lines(ran.out);
            REQUIRE(results.size() == singles.size());
            for (size_t i = 0; i < results.size(); ++i) {
                CAPTURE(i);
                const Json& a = results[i];
                const Json& b = singles[i];
                if (i % 3 == 0) CHECK(a.get_string("id") == str("number ", i));
                if (i % 3 == 1) CHECK(a.get_int("id") == static_cast<int64_t>(100 + i));
                if (i % 3 == 2) CHECK(a.get_int("id") == static_cast<int64_t>(i + 1));
                for (const char* key : {"question", "answer", "finish", "policy"})
                    CHECK(a.get_string(key) == b.get_string(key));
                CHECK(a.get_string_or("stop", "none") == b.get_string_or("stop", "none"));
                for (const char* key :
                     {"k", "n_chunks", "n_expanded", "positions", "plain_tokens", "new_tokens"})
                    CHECK(a.get_int(key) == b.get_int(key));
                // Every field that --json has, and "id".
                CHECK(a.size() == b.size() + 1);
                const Json x = a.get_array("logprobs");
                const Json y = b.get_array("logprobs");
                REQUIRE(x.size() == y.size());
                for (size_t t = 0; t < x.size(); ++t) {
                    CHECK(x.at(t).get_int("id") == y.at(t).get_int("id"));
                    CHECK(x.at(t).get_number("logprob") == y.at(t).get_number("logprob"));
                }
            }
        }
    }
    // To a file, from standard input: the same bytes but for the times.
    const Ran to_file =
        refrag_run(dir, common + "-n 3 --batch - -o '" + dir.file("answers.jsonl") + "'", file);
    CHECK(to_file.code == 0);
    CHECK(to_file.out.empty());
    CHECK(json_lines(read_file(dir.file("answers.jsonl"), 1 << 20)).size() == 11);
}

TEST_CASE(
    "run --batch: passages of each line, shared where they are the same; a failed request is one line") {
    const TempDir dir;
    std::string too_long;
    while (too_long.size() < 9000) too_long += "barley ";
    const std::string file =
        dir.write("batch.jsonl",
                  "{\"question\": \"One?\", \"passages\": [\"The old mill stands on a hill.\"]}\n"
                  "{\"id\": \"long\", \"question\": \"Two?\", \"passages\": [{\"id\": 3, \"text\": \"" +
                      too_long +
                      "\"}]}\n"
                      "{\"question\": \"Three?\", \"passages\": [{\"text\": \"The old mill stands on a "
                      "hill.\", \"score\": 1}]}\n"
                      "{\"question\": \"Four?\", \"passages\": []}\n"
                      "{\"question\": \"Five?\", \"passages\": null}\n");
    const std::string common = std::string("run ") + kModel + "--passages '" + dir.write("p", kPassages) +
                               "' -n 4 --batch '" + file + "' ";
    const Ran ran = refrag_run(dir, common);
    CHECK(ran.code == 1);
    CHECK(line_count(ran.err) == 2);
    CHECK(ran.err.starts_with("requests 5, failed 1, "));
    CHECK(contains(ran.err, "refrag: 1 of 5 requests failed"));
    const std::vector<Json> results = json_lines(ran.out);
    REQUIRE(results.size() == 5);
    results[1].check_keys({"id", "question", "error"});
    CHECK(results[1].get_string("id") == "long");
    CHECK(contains(results[1].get_string("error"), "leaves no room for an answer in a context of 512"));
    CHECK(results[0].get_int("n_chunks") == results[2].get_int("n_chunks"));
    CHECK(results[0].get_int("n_cached") == 0);
    CHECK(results[2].get_int("n_cached") == results[2].get_int("n_chunks"));
    CHECK(results[3].get_int("n_chunks") == 0);
    CHECK(results[4].get_int("n_chunks") > results[0].get_int("n_chunks"));
    // The file is written all the same.
    CHECK(refrag_run(dir, common + "-o '" + dir.file("o") + "'").code == 1);
    CHECK(line_count(read_file(dir.file("o"), 1 << 20)) == 5);
    // Without the long one the cache is no larger than the longest request needs.
    const Ran small = refrag_run(dir, std::string("run ") + kModel + "-n 4 -np 2 --batch '" +
                                          dir.write("small",
                                                    "{\"question\": \"x\", \"passages\": []}\n"
                                                    "{\"question\": \"y\", \"passages\": []}\n"
                                                    "{\"question\": \"z\", \"passages\": []}\n") +
                                          "'");
    CHECK(small.code == 0);
    const int64_t positions = json_lines(small.out).at(0).get_int("positions");
    CHECK(contains(small.err, str("2 at a time, ", positions + 4, " positions each")));
}

TEST_CASE("run --batch: the whole file is checked before the model is loaded, each message names the line") {
    const TempDir dir;
    const auto message = [&](const std::string& content, const std::string& more = "") {
        const std::string file = dir.write("batch.jsonl", content);
        // No such model: what is found before loading it is found here.
        const Ran ran = refrag_run(dir, "run -m nowhere --batch '" + file + "' " + more);
        CHECK(ran.code == 3);
        CHECK(ran.out.empty());
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, file));
        return ran.err;
    };
    const std::string good = "{\"question\": \"x\", \"passages\": [\"y\"]}\n";
    CHECK(contains(message(""), "expected at least one request"));
    CHECK(contains(message("\n \n"), "expected at least one request"));
    CHECK(contains(message(good + "\n{\"question\": 5}\n"), "line 3"));
    CHECK(contains(message(good + "{\"passages\": []}\n"), "line 2: "));
    CHECK(contains(message(good + "{\"question\": \"x\"}\n"), "line 2: expected \"passages\" here"));
    CHECK(contains(message(good + "{\"question\": \"x\", \"question\": \"y\"}\n"), "line 2"));
    CHECK(contains(message("{\"question\": \"x\", \"passage\": []}\n"), "unknown key \"passage\""));
    CHECK(contains(message("{\"question\": \"x\", \"passages\": [5]}\n"), "key \"passages[0]\""));
    CHECK(contains(message("{\"question\": \"x\", \"passages\": [{\"title\": \"t\"}]}\n"), "text"));
    CHECK(contains(message("{\"question\": \"x\", \"passages\": \"y\"}\n"), "an array"));
    CHECK(contains(message("{\"question\": \"x\", \"passages\": [], \"id\": 1.5}\n"),
                   "a string or an integer"));
    CHECK(contains(message("[]\n"), "an object with \"question\""));
    CHECK(contains(message("{\"question\": \"x\"\n"), "line 1"));
    CHECK(contains(message("{\"question\": \"\xff\", \"passages\": []}\n"), "line 1"));
    // A good file gets as far as the model.
    const Ran no_model = refrag_run(dir, "run -m nowhere --batch '" + dir.write("good", good) + "'");
    CHECK(no_model.code == 3);
    CHECK(contains(no_model.err, "nowhere"));
    CHECK(refrag_run(dir, "run -m nowhere --batch '" + dir.file("missing") + "'").code == 3);
    const Ran nowhere = refrag_run(
        dir, "run -m nowhere --batch '" + dir.file("good") + "' -o '" + dir.file("no/such/file") + "'");
    CHECK(nowhere.code == 1);
    CHECK(contains(nowhere.err, "its directory does not exist"));
    const Ran explain = refrag_run(dir, "run -m nowhere --explain x --batch '" + dir.file("good") + "'");
    CHECK(explain.code == 2);
    const Ran zero = refrag_run(dir, "run -m nowhere -np 0 --batch '" + dir.file("good") + "'");
    CHECK(zero.code == 2);
}
