// `index`, `ask` and `encode` as a user runs them: what is refused and how, what goes where, what a killed
// process leaves behind.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <thread>

#include "cli_test.h"
#include "store/sqlite_store.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture {
    TempDir dir;
    std::string store = dir.file("s.db");
    Fixture() { dir.write("p.jsonl", kPassages); }
    Ran index(const std::string& arguments) const {
        return refrag_run(dir, "index " + store + " " + arguments);
    }
    Ran ask(const std::string& arguments) const {
        return refrag_run(dir, "ask " + store + " " + kModel + arguments);
    }
};

// A child that runs the binary; its output goes nowhere.
pid_t spawn(const std::vector<std::string>& arguments) {
    const pid_t pid = fork();
    if (pid != 0) return pid;
    std::vector<char*> argv;
    const std::string program = binary();
    argv.push_back(const_cast<char*>(program.c_str()));
    for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    const int null = open("/dev/null", O_RDWR);
    dup2(null, 1);
    dup2(null, 2);
    execv(program.c_str(), argv.data());
    _exit(127);
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "index and ask: from files to an answer that names its passages") {
    const Ran made = index(dir.file("p.jsonl") + " " + kModel + "-k 4");
    CHECK(made.code == 0);
    CHECK(made.out == "");
    CHECK(contains(made.err, "documents 2: new 2, changed 0, unchanged 0 | passages 2 ("));
    CHECK(contains(index(dir.file("p.jsonl") + " " + kModel + "-k 4").err, "new 0, changed 0, unchanged 2"));
    const Ran list = index("--list");
    CHECK(list.out == "a\t1\tHill\n7\t1\t\n");
    CHECK(contains(index("--stats").out, "passages    2\n"));
    CHECK(json_lines(index("--stats --json").out)[0].get_int("documents") == 2);
    CHECK(index("--verify").out == "whole: 2 passages\n");

    const Ran text = ask("-q 'Where is the mill?' -n 4");
    CHECK(text.code == 0);
    CHECK(contains(text.out, "\n\n[1] a  Hill  ("));
    CHECK(contains(text.out, "chunks read as tokens)"));
    CHECK(contains(text.err, "retrieved 2 passages in "));
    const Ran json = ask("-q 'Where is the mill?' -q 'lantern' --json -n 4 --retrieve bm25 --top 1");
    CHECK(json.code == 0);
    const std::vector<Json> lines = json_lines(json.out);
    REQUIRE(lines.size() == 2);
    CHECK(lines[0].get_array("passages").at(0).get_string("id") == "a");
    CHECK(lines[1].get_array("passages").at(0).get_string("id") == "7");
    CHECK(lines[0].get_int("n_cached") == lines[0].get_int("n_chunks"));
    CHECK(lines[0].get("citations").is_array());

    // The answer is the one that `run` gives over the same passages, kept in bf16.
    const Ran run = refrag_run(dir, std::string("run ") + kModel + "-k 4 --passages " + dir.file("p.jsonl") +
                                        " -q 'Where is the mill?' -n 4 --json --cache " + dir.file("cache"));
    const Json both = json_lines(ask("-q 'Where is the mill?' -n 4 --json --retrieve bm25").out)[0];
    REQUIRE(both.get_array("passages").size() == 2);
    REQUIRE(both.get_array("passages").at(0).get_string("id") == "a");
    CHECK(both.get_string("answer") == json_lines(run.out)[0].get_string("answer"));

    CHECK(index("--delete a").code == 0);
    CHECK(index("--list").out == "7\t1\t\n");
    const Ran again = index("--delete a");
    CHECK(again.code == 3);
    CHECK(contains(again.err, "no document of the id a"));
}

TEST_CASE_FIXTURE(Fixture, "ask: --explain writes what run's does, as JSON or as a page") {
    REQUIRE(index(dir.file("p.jsonl") + " " + kModel + "-k 4").code == 0);
    const std::string base = "-q 'Where is the mill?' -q lantern -n 3 --retrieve bm25 --top 1 --explain ";
    const Ran page = ask(base + dir.file("why.html")), json = ask(base + dir.file("why.json"));
    INFO(page.err);
    REQUIRE(page.code == 0);
    REQUIRE(json.code == 0);
    const Json why = Json::parse_file(dir.file("why.json"));
    REQUIRE(why.as_array().size() == 2);
    CHECK(why.at(0).get_array("chunks").at(0).get_string("document") == "a");
    CHECK(why.at(1).get_array("chunks").at(0).get_string("document") == "7");
    const std::string text = read_file(dir.file("why.html"), 1 << 24), begin = "id=\"data\">";
    const size_t from = text.find(begin) + begin.size();
    const Json data = Json::parse(text.substr(from, text.find("</script>", from) - from), "page");
    for (size_t i = 0; i < 2; ++i) {
        const Json q = data.get_array("questions").at(i);
        CHECK(q.get_string("answer") == why.at(i).get_string("answer"));
        CHECK(q.get_number("retrieve_ms") > 0);
        CHECK(q.get_array("documents").size() == 1);
        CHECK(q.get_int("n_cached") == q.get_int("n_chunks"));
        CHECK(q.get_object("full").get_int("positions") == q.get_int("plain_tokens"));
        CHECK(q.get_object("attention").has("by_layer"));
    }
    CHECK(ask(base + dir.file("no/such.html")).code == 1);
}

TEST_CASE_FIXTURE(Fixture, "index and ask: what is refused, in one line, with the right code") {
    const auto said = [&](const Ran& ran, int code, const std::string& what) {
        CAPTURE(ran.err);
        CHECK(ran.code == code);
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, what));
    };
    said(index(""), 2, "expected FILES to index, or --delete");
    said(index(dir.file("p.jsonl")), 2, "expected -m MODEL");
    said(index(dir.file("none.jsonl") + " " + kModel), 3, "found no such path");
    CHECK(!std::filesystem::exists(store));
    said(index("--stats"), 3, "expected a passage store, found no such file");
    said(ask("-q x"), 3, "expected a passage store, found no such file");
    said(index("--follow " + dir.file("p.jsonl") + " " + kModel), 2, "expected a directory");
    dir.write("bad.jsonl", "{\"text\": \"one\"}\n{\"text\": 2}\n");
    said(index(dir.file("bad.jsonl") + " " + kModel), 3, "bad.jsonl: line 2");
    const Ran skipped = index(dir.file("bad.jsonl") + " --skip-bad " + kModel);
    CHECK(skipped.code == 0);
    CHECK(contains(skipped.err, "bad.jsonl: line 2"));
    CHECK(contains(skipped.err, "new 1"));
    said(ask("-q zebra --retrieve bm25"), 1, "no passage has a word of the question");
    said(ask("-q one --where year=1 --retrieve bm25"), 1, "that --where leaves");
    said(ask("-q one --where year"), 2, "expected KEY OP VALUE");
    said(ask("-q one --retrieve sparse"), 2, "expected bm25, dense or both");
    said(ask("-q one --embedding '[]'"), 3, "--embedding");
    said(refrag_run(dir, "ask " + store + " -m tests/golden/tiny-refrag/decoder -q one"), 3, "not by ");
    said(index(dir.file("p.jsonl") + " -k 4 " + kModel), 3, "k = 4");
    dir.write("other.db", "text\n");
    said(refrag_run(dir, "index " + dir.file("other.db") + " --list"), 3, "found another file");
    said(refrag_run(dir, "index /proc/x.db " + dir.file("p.jsonl") + " " + kModel), 1, "cannot be opened");
    // Read-only: root may write anyway.
    if (geteuid() != 0) {
        std::filesystem::permissions(store, std::filesystem::perms::owner_read);
        said(index(dir.file("p.jsonl") + " " + kModel), 1, "read-only");
        CHECK(ask("-q one -n 2").code == 0);
    }
}

TEST_CASE_FIXTURE(Fixture, "encode: parts encoded by several processes load as if one had indexed them") {
    std::string all;
    for (int i = 0; i < 12; ++i)
        all +=
            str("{\"id\": ", i, ", \"text\": \"Text ", i, " is about barley and mills.\", \"n\": ", i, "}\n");
    dir.write("all.jsonl", all);
    const std::string encode = binary() + " encode " + kModel;
    std::string together;
    for (int part = 0; part < 4; ++part) {
        std::string lines;
        for (size_t at = 0, n = 0; at < all.size(); ++n) {
            const size_t end = all.find('\n', at) + 1;
            if (n % 4 == static_cast<size_t>(part)) lines += all.substr(at, end - at);
            at = end;
        }
        dir.write("part.jsonl", lines);
        const Ran ran = shell_run(dir, encode, dir.file("part.jsonl"));
        CHECK(ran.code == 0);
        CHECK(line_count(ran.out) == 3);
        together += ran.out;
    }
    const auto sorted = [](const std::string& text) {
        std::vector<std::string> lines;
        for (const Json& line : json_lines(text)) {
            const Json passage = line.get_array("passages").at(0);
            lines.push_back(str(line.get_string("id"), line.get_string("metadata"), line.get_string("hash"),
                                passage.get_string("record"), passage.get_string("vector")));
        }
        std::sort(lines.begin(), lines.end());
        return lines;
    };
    CHECK(sorted(together) == sorted(shell_run(dir, encode + dir.file("all.jsonl")).out));
    dir.write("encoded.jsonl", together);
    const Ran loaded = index("--encoded " + dir.file("encoded.jsonl") + " " + kModel);
    CHECK(loaded.code == 0);
    CHECK(contains(loaded.err, "passages 12 ("));
    CHECK(!contains(loaded.err, "(0 chunks)"));
    CHECK(index("--verify").out == "whole: 12 passages\n");
    CHECK(contains(index("--encoded " + dir.file("encoded.jsonl")).err, "unchanged 12"));
    CHECK(contains(index(dir.file("all.jsonl") + " " + kModel).err, "unchanged 12"));
    const Ran found = ask("-q barley --json -n 2 --where 'n>=10' --retrieve bm25");
    CHECK(json_lines(found.out)[0].get_array("passages").size() == 2);
    // Another model's lines are refused before anything is written.
    const Ran other = index("--encoded " + dir.file("encoded.jsonl") + " --delete 3");
    CHECK(contains(other.err, "new 1"));
}

TEST_CASE_FIXTURE(Fixture, "index: killed at any time it loses nothing that was committed, and goes on") {
    std::string all;
    for (int i = 0; i < 3000; ++i)
        all += str("{\"id\": ", i, ", \"text\": \"Text ", i, " is about barley, mills and number ", i * 7,
                   ".\"}\n");
    dir.write("all.jsonl", all);
    const char* env = std::getenv("REFRAG_TEST_KILLS");
    const int rounds = env != nullptr ? std::atoi(env) : 6;
    int64_t before = 0;
    int n_killed = 0;
    for (int round = 0; round < rounds; ++round) {
        const pid_t pid = spawn({"index", store, dir.file("all.jsonl"), "-m", "tests/golden/tiny-refrag"});
        std::this_thread::sleep_for(std::chrono::milliseconds(20 + 37 * round % 400));
        kill(pid, SIGKILL);
        int status = 0;
        waitpid(pid, &status, 0);
        n_killed += WIFSIGNALED(status) ? 1 : 0;
        if (!std::filesystem::exists(store)) continue;
        SqliteStore kept(store, StoreMode::create);
        const StoreStats stats = kept.stats();
        CHECK(stats.n_documents >= before);
        CHECK(stats.n_documents == stats.n_passages);
        CHECK(stats.n_passages == stats.n_vectors);
        before = stats.n_documents;
        if (before == 3000) {
            kept.verify_structure([](const std::string& problem) { FAIL(problem); });
            std::filesystem::remove(store);
            before = 0;
        }
    }
    CHECK(n_killed > 0);
    CHECK(index(dir.file("all.jsonl") + " " + kModel).code == 0);
    CHECK(index("--verify").out == "whole: 3000 passages\n");
}

TEST_CASE_FIXTURE(Fixture, "index --follow: the store is as the directory is, until it is asked to stop") {
    std::filesystem::create_directory(dir.file("docs"));
    dir.write("docs/a.md", "# Mills\nThe old mill.\n");
    const pid_t pid = spawn({"index", store, dir.file("docs"), "-m", "tests/golden/tiny-refrag", "--follow",
                             "--follow-seconds", "1"});
    const auto wait_for = [&](const std::string& expected) {
        std::string found;
        for (int i = 0; i < 200; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            if (!std::filesystem::exists(store)) continue;
            found = index("--list").out;
            if (found == expected) return true;
        }
        MESSAGE(found);
        return false;
    };
    const std::string a = dir.file("docs/a.md");
    const std::string b = dir.file("docs/b.txt");
    CHECK(wait_for(a + "\t1\ta\n"));
    dir.write("docs/b.txt", "A lantern.");
    CHECK(wait_for(a + "\t1\ta\n" + b + "\t1\tb\n"));
    dir.write("docs/a.md", "# Mills\nThe old mill.\n\n# Rivers\nThe Urvik.\n");
    CHECK(wait_for(b + "\t1\tb\n" + a + "\t2\ta\n"));
    std::filesystem::remove(b);
    CHECK(wait_for(a + "\t2\ta\n"));
    kill(pid, SIGTERM);
    int status = 0;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE_FIXTURE(Fixture, "run --cache: another process finds what the first one encoded") {
    const std::string run = std::string("run ") + kModel + "--passages " + dir.file("p.jsonl") +
                            " -q 'Where is the mill?' -n 4 --json --cache " + dir.file("cache");
    const Json first = json_lines(refrag_run(dir, run).out)[0];
    const Json second = json_lines(refrag_run(dir, run).out)[0];
    CHECK(first.get_int("n_cached") == 0);
    CHECK(second.get_int("n_cached") == second.get_int("n_chunks"));
    CHECK(first.get_string("answer") == second.get_string("answer"));
    dir.write("b.jsonl", "{\"question\": \"Where is the mill?\"}\n");
    const Json batch = json_lines(
        refrag_run(dir, std::string("run ") + kModel + "--passages " + dir.file("p.jsonl") + " --batch " +
                            dir.file("b.jsonl") + " -n 4 --cache " + dir.file("cache"))
            .out)[0];
    CHECK(batch.get_int("n_cached") == batch.get_int("n_chunks"));
    CHECK(batch.get_string("answer") == first.get_string("answer"));
    const Ran wrong = refrag_run(dir, run + " --cache-type fp4");
    CHECK(wrong.code == 2);
    CHECK(contains(wrong.err, "--cache-type: expected one of f32, bf16, int8, found \"fp4\""));
    const Ran file = refrag_run(dir, std::string("run ") + kModel + "-q x --cache " + dir.file("p.jsonl"));
    CHECK(file.code == 1);
    CHECK(contains(file.err, "cannot be made"));
}
