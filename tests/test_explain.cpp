// `run --explain FILE.html`: the page's data against what the JSON form and the answer say, text that would
// break out of it, and the page itself in a browser (explain_page.py), where there is one.
#include <cmath>

#include "cli/explain_data.h"
#include "cli/explain_page.h"
#include "cli_test.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::kModel;
using refrag_test::Ran;
using refrag_test::refrag_run;
using refrag_test::shell_run;
using refrag_test::TempDir;

namespace {

// Ends the data, starts markup, opens what only an HTML parser of script texts sees; cuts inside characters.
constexpr const char* kHostile =
    "{\"id\": \"</script><img src=x onerror='window.hacked=1'>\", \"title\": \"<b>T</b>\", \"text\": "
    "\"</script><script>window.hacked=1</script><img src='http://localhost:9/x' onerror='window.hacked=1'>"
    "<!--<script> &amp; \\\" \\\\ \\u2028\\u2029 end\"}\n"
    "{\"id\": \"a\", \"text\": \"caf\\u00e9s \\u6c34\\u6c34\\u6c34 \\ud83d\\udc69\\u200d\\ud83c\\udf3e by "
    "the "
    "sea\"}\n"
    "{\"id\": \"a\", \"text\": \"The old mill stands on a hill. A red lantern hangs over the door.\"}\n";
constexpr const char* kPlainModel = "-m tests/golden/tiny-refrag/decoder ";

std::string page_data(const std::string& page) {
    const std::string begin = "<script type=\"application/json\" id=\"data\">";
    const size_t at = page.find(begin);
    REQUIRE(at != std::string::npos);
    const size_t from = at + begin.size();
    return page.substr(from, page.find("</script>", from) - from);
}

Json data_of(const std::string& path) {
    return Json::parse(page_data(read_file(path, 1 << 24)), "page");
}

// Sums over runs are rounded to 1e-6, by half of it each.
void check_rows_sum_to_one(const Json& rows, size_t n_runs) {
    for (size_t i = 0; i < rows.size(); ++i) {
        REQUIRE(rows.at(i).size() == n_runs);
        double sum = 0;
        for (size_t r = 0; r < n_runs; ++r) sum += rows.at(i).at(r).as_number(0.0, 1.0);
        CHECK(std::fabs(sum - 1.0) <= 5e-7 * static_cast<double>(n_runs) + 1e-6);
    }
}

// One question of a page's data against itself and, chunk by chunk, against the JSON form.
void check_question(const Json& q, const Json& why) {
    for (const char* key : {"question", "answer", "policy", "unexpanded", "finish"})
        CHECK(q.get_string(key) == why.get_string(key));
    for (const char* key :
         {"k", "n_chunks", "n_expanded", "n_cached", "positions", "plain_tokens", "new_tokens"})
        CHECK(q.get_int(key) == why.get_int(key));
    const Json chunks = q.get_array("chunks"), expected = why.get_array("chunks");
    const Json documents = q.get_array("documents");
    REQUIRE(chunks.size() == expected.size());
    for (size_t c = 0; c < chunks.size(); ++c) {
        for (const char* key : {"begin", "end", "tokens", "position", "n_positions"})
            CHECK(chunks.at(c).get_int(key) == expected.at(c).get_int(key));
        CHECK(chunks.at(c).get_bool("expanded") == expected.at(c).get_bool("expanded"));
        CHECK(chunks.at(c).get("logit").is_null() == expected.at(c).get("logit").is_null());
        if (!chunks.at(c).get("logit").is_null())
            CHECK(chunks.at(c).get_number("logit") == expected.at(c).get_number("logit"));
        const auto document = static_cast<size_t>(chunks.at(c).get_int("document"));
        CHECK(documents.at(document).get_string("id") == expected.at(c).get_string("document"));
        CHECK(!contains(chunks.at(c).get_string("text"), "\xEF\xBF\xBD"));  // characters are whole
    }
    // The input: chunk after chunk where it stands.
    const Json input = q.get_array("input");
    int64_t position = 0;
    for (size_t r = 0; r < input.size(); ++r) {
        const Json run = input.at(r);
        const int64_t n = run.get_int("n", 1);
        if (run.has("chunk")) {
            const Json chunk = chunks.at(static_cast<size_t>(run.get_int("chunk")));
            CHECK(chunk.get_int("position") == position);
            CHECK(chunk.get_int("n_positions") == n);
            CHECK(run.has("tokens") == chunk.get_bool("expanded"));
        }
        if (run.has("tokens")) CHECK(std::ssize(run.get_array("tokens")) == n);
        position += n;
    }
    const int64_t n_said = std::ssize(q.get_array("answer_tokens"));
    CHECK(position == q.get_int("positions") + std::max<int64_t>(0, n_said - 1));
    const Json attention = q.get_object("attention");
    CHECK(attention.get_array("by_layer").size() == 2);
    CHECK(std::ssize(attention.get_array("by_token")) == std::max<int64_t>(1, n_said));
    check_rows_sum_to_one(attention.get("by_layer"), input.size());
    check_rows_sum_to_one(attention.get("by_token"), input.size());
}

struct Explained {
    Json data, why;
};

// The same command with both kinds of files.
Explained explain(const TempDir& dir, const std::string& arguments) {
    CAPTURE(arguments);
    for (const char* file : {"why.html", "why.json"}) {
        const Ran ran = refrag_run(dir, "run " + arguments + " --explain '" + dir.file(file) + "'");
        INFO(ran.err);
        REQUIRE(ran.code == 0);
    }
    return {data_of(dir.file("why.html")), Json::parse_file(dir.file("why.json"))};
}

}  // namespace

TEST_CASE("explain: a file's ending says whether it is a page") {
    for (const char* path : {"a.html", "b/c.htm", "d.HTML", "e.Htm", ".html", "f.json.html"})
        CHECK(is_page_path(path));
    for (const char* path :
         {"", "-", "html", "a.json", "a.html/b", "a.html.gz", "a.htmlx", "dir.html/", "a."})
        CHECK_FALSE(is_page_path(path));
}

TEST_CASE("explain: whole characters, each in the chunk that holds its first byte") {
    const std::string text =
        "a\xC3\xA9\xE6\xB0\xB4z\xFF\xE6\xB0!";  // a, e acute, water, z, two that are none, !
    using Ends = std::vector<size_t>;
    CHECK(whole_characters(text, {1, 2, 3, 6, 11}) == Ends{1, 3, 3, 6, 11});
    CHECK(whole_characters(text, {4, 5, 6, 7, 8, 9, 10}) == Ends{6, 6, 6, 7, 8, 10, 10});
    CHECK(whole_characters("", {}).empty());
}

TEST_CASE("explain: nothing in the data can end its element") {
    JsonWriter json;
    const std::string text = "</script><!--<script>]]>\xE2\x80\xA8\xE2\x80\xA9\xE2\x80\xAA\xFF";
    json.begin_object().key("questions").begin_array().string(text).end_array().end_object();
    const std::string page = explain_page(json.text());
    const std::string data = page_data(page);
    CHECK(data.find_first_of("<") == std::string::npos);
    CHECK(!contains(data, "\xE2\x80\xA8"));
    CHECK(!contains(data, "\xE2\x80\xA9"));
    CHECK(Json::parse(data, "data").get_array("questions").at(0).as_string() ==
          text.substr(0, text.size() - 1) + "\xEF\xBF\xBD");
    // Two elements and no more: the data, and the script that the policy names.
    size_t n_scripts = 0;
    for (size_t at = page.find("<script"); at != std::string::npos; at = page.find("<script", at + 1))
        ++n_scripts;
    CHECK(n_scripts == 2);
    CHECK(contains(page, "default-src 'none'"));
}

TEST_CASE("explain: the page's data is the answer's") {
    const TempDir dir;
    const std::string passages = "--passages '" + dir.write("p.jsonl", kHostile) + "' ";
    const std::string tiny = kModel + passages;
    for (const std::string& arguments :
         {tiny + "-n 6 -q 'What hangs?'", tiny + "-n 6 -q Where -p 1", tiny + "-n 6 -q Where -p 0 -k 4",
          tiny + "-n 6 -q Where --policy bm25 --unexpanded drop", tiny + "-q Where --policy random -s 3 -n 1",
          std::string(kModel) + "-q Alone -n 4", kPlainModel + passages + "-n 6 -q Where",
          tiny + "-n 6 -q Where --policy perplexity-desc --temp 1"}) {
        CAPTURE(arguments);
        const Explained explained = explain(dir, arguments);
        REQUIRE(explained.data.get_array("questions").size() == 1);
        const Json q = explained.data.get_array("questions").at(0);
        check_question(q, explained.why);
        const Json full = q.get_object("full");
        CHECK(full.get_int("positions") == q.get_int("plain_tokens"));
        CHECK(full.get_number("ttft_ms") > 0);
        CHECK(full.get_object("times_ms").get_number("encode") < 1.0);
    }
}

TEST_CASE("explain: several questions, what is kept between them, and a full context that does not fit") {
    const TempDir dir;
    const std::string base =
        kModel + ("--passages '" + dir.write("p.jsonl", kHostile)) + "' -n 3 -q 'What hangs?' -q Where ";
    const Explained both = explain(dir, base);
    REQUIRE(both.data.get_array("questions").size() == 2);
    for (size_t i = 0; i < 2; ++i) check_question(both.data.get_array("questions").at(i), both.why.at(i));
    const Json second = both.data.get_array("questions").at(1);
    CHECK(second.get_int("n_cached") == second.get_int("n_chunks"));
    // The full context of the second question finds what the first one's left, as the second itself does.
    CHECK(second.get_object("full").get_int("n_reused") > 0);
    const Json fresh = explain(dir, base + "--no-prefix-cache").data.get_array("questions").at(1);
    CHECK(fresh.get_object("full").get_int("n_reused") == 0);

    const int64_t context = second.get_int("positions") + 8;
    REQUIRE(context < second.get_int("plain_tokens"));
    const Explained narrow = explain(dir, base + "-p 0 -c " + std::to_string(context));
    const Json q = narrow.data.get_array("questions").at(0);
    check_question(q, narrow.why.at(0));
    CHECK(contains(q.get_object("full").get_string("error"), "decoder positions"));
}

TEST_CASE("explain: the page in a browser") {
    const TempDir dir;
    std::string chromium;
    for (const char* name : {"chromium", "chromium-browser", "google-chrome"})
        if (chromium.empty() && shell_run(dir, std::string("command -v ") + name).code == 0) chromium = name;
    if (chromium.empty() && refrag_test::skip("no chromium to show the page in")) return;
    if (shell_run(dir, "python3 -c ''").code != 0 && refrag_test::skip("no python3 to drive chromium"))
        return;
    const std::string passages = "--passages '" + dir.write("p.jsonl", kHostile) + "' ";
    for (const std::string& arguments :
         {kModel + passages + "-q '<img src=x onerror=window.hacked=1>' -q 'What hangs?' -n 6",
          kModel + passages + "-q Where -p 0 -k 4 -c 110 -n 6", kPlainModel + passages + "-q Where -n 1",
          std::string(kModel) + "-q Alone -n 4"}) {
        CAPTURE(arguments);
        const std::string page = dir.file("page.html");
        REQUIRE(refrag_run(dir, "run " + arguments + " --explain '" + page + "'").code == 0);
        const Ran ran = shell_run(dir, "python3 tests/explain_page.py " + chromium + " '" + page + "'");
        INFO(ran.out);
        INFO(ran.err);
        CHECK(ran.code == 0);
    }
}
