// `refrag bench` as a user runs it: its JSON is a promise, what cannot be done is refused with one line. And
// bench/plot.py, which reads that JSON.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cli/bench_report.h"
#include "cli_test.h"
#include "every_backend.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::line_count;
using refrag_test::Ran;
using refrag_test::refrag_run;
using refrag_test::shell_run;
using refrag_test::skip;
using refrag_test::TempDir;

namespace {

// A small model of two contexts in its window of 512, as few rounds as there can be.
const char* const kSmallAnywhere =
    "bench -m tests/golden/tiny-refrag --context 32,64 -k 8,16 -p 0,0.25 -n 3 --repeats 1 ";
const std::string kSmall = std::string(kSmallAnywhere) + "--device cpu ";

// One row that a GPU of 800 TFLOP/s and 4 TB/s gave, and one that it could not.
refrag::BenchReport gpu_report() {
    refrag::BenchReport report;
    report.cpu = "Some CPU";
    report.backend = "cuda: Some GPU";
    report.threads = 16;
    report.gpu = refrag::BenchGpu{"Some GPU", {800e3, 50e3, 4000.0, 4200.0}};
    report.model = "llama-2-7b with roberta-large, random weights";
    report.parameters = 7000000000;
    report.load_s = 4.0;
    refrag::BenchRow row;
    row.full = true;
    row.context = 16384;
    row.figures = refrag::BenchFigures{};
    row.figures->prefill_gflops = 400e3;
    row.figures->decode_gbs = 3000.0;
    report.rows = {row, {}};
    return report;
}

std::vector<std::string> keys_of(const Json& object) {
    std::vector<std::string> keys;
    for (size_t i = 0; i < object.size(); ++i) keys.emplace_back(object.key_at(i));
    return keys;
}

std::string python() {
    const char* path = std::getenv("REFRAG_PYTHON");
    return path != nullptr ? path : "python3";
}

Ran plot(const TempDir& dir, const std::string& arguments) {
    return shell_run(dir, python() + " bench/plot.py " + arguments);
}

}  // namespace

TEST_CASE("bench writes the machine's peaks and a row for every combination, with the promised keys") {
    const TempDir dir;
    const Ran ran = refrag_run(dir, kSmall + "-o json");
    REQUIRE(ran.code == 0);
    CHECK(ran.err.empty());  // no progress without a terminal
    const Json result = Json::parse(ran.out, "bench");
    CHECK(keys_of(result) == std::vector<std::string>{"machine", "rows"});
    const Json machine = result.get_object("machine");
    CHECK_FALSE(machine.get_string("cpu").empty());
    CHECK(machine.get_int("threads") >= 1);
    for (const char* key : {"peak_bf16_gflops", "peak_fp32_gflops", "peak_int8_gops", "read_gbs", "load_s"})
        CHECK(machine.get_number(key) > 0.0);
    CHECK_FALSE(machine.get_string("bf16_instruction").empty());
    const Json rows = result.get_array("rows");
    REQUIRE(rows.size() == 2 * (1 + 2 * 2) * 2);
    const std::vector<std::string> keys = {"mode",
                                           "context",
                                           "k",
                                           "p",
                                           "cached",
                                           "batch",
                                           "positions",
                                           "ttft_ms",
                                           "ttit_ms",
                                           "tokens_per_s",
                                           "prefill_gflops",
                                           "prefill_share_of_peak",
                                           "decode_gbs",
                                           "decode_share_of_read",
                                           "kv_bytes",
                                           "ttft_ratio",
                                           "ttit_ratio",
                                           "throughput_ratio",
                                           "repeats",
                                           "spread"};
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        CAPTURE(i);
        REQUIRE(keys_of(row) == keys);
        const bool full = row.get_string("mode") == "full";
        CHECK(row.find("k").has_value() == !full);
        CHECK(row.find("p").has_value() == !full);
        CHECK(row.get("spread").is_null());
        CHECK(row.get_int("repeats") == 1);
        // Shares and ratios follow from what is written beside them.
        const Json base = rows.at(i / 10 * 10 + (row.get_bool("cached") ? 0 : 1));
        CHECK(base.get_string("mode") == "full");
        CHECK(base.get_int("context") == row.get_int("context"));
        const auto near = [](double value) { return doctest::Approx(value).epsilon(1e-12); };
        CHECK(row.get_number("ttft_ratio") == near(base.get_number("ttft_ms") / row.get_number("ttft_ms")));
        CHECK(row.get_number("ttit_ratio") == near(base.get_number("ttit_ms") / row.get_number("ttit_ms")));
        CHECK(row.get_number("throughput_ratio") ==
              near(row.get_number("tokens_per_s") / base.get_number("tokens_per_s")));
        CHECK(row.get_number("prefill_share_of_peak") ==
              near(row.get_number("prefill_gflops") / machine.get_number("peak_bf16_gflops")));
        CHECK(row.get_number("decode_share_of_read") ==
              near(row.get_number("decode_gbs") / machine.get_number("read_gbs")));
    }

    // plot.py draws it as PNG and SVG, and the same input gives the same picture.
    if (shell_run(dir, python() + " -c 'import matplotlib'").code != 0 && skip("no matplotlib")) return;
    const std::string file = dir.write("result.json", ran.out);
    REQUIRE(plot(dir, file).code == 0);
    CHECK(read_file(dir.file("result.png"), 1 << 24).starts_with("\x89PNG\r\n"));
    const std::string svg = read_file(dir.file("result.svg"), 1 << 24);
    CHECK(contains(svg, "<svg"));
    REQUIRE(plot(dir, file + " --out " + dir.file("again")).code == 0);
    CHECK(read_file(dir.file("again.svg"), 1 << 24) == svg);
    CHECK(plot(dir, file + " -p 0.5").code == 3);  // a share that is not there
    const Ran twice = plot(dir, file + " " + file);
    CHECK(twice.code == 3);
    CHECK(contains(twice.err, "is in"));
    CHECK(plot(dir, file + " -p 0.25 --out " + dir.file("no/such/dir")).code == 1);
}

TEST_CASE("bench writes Markdown and CSV of the same rows, to a file where asked") {
    const TempDir dir;
    const Ran markdown = refrag_run(dir, kSmall + "--from cached --skip-known");
    REQUIRE(markdown.code == 0);
    CHECK(contains(markdown.out, "peaks of "));
    CHECK(contains(markdown.out, "| mode | context | k | p | from |"));
    CHECK(contains(markdown.out, "| refrag | 64 | 16 | 0.25 | cached | 1 | "));
    const Ran csv = refrag_run(dir, kSmall + "--modes refrag -o csv --out " + dir.file("rows.csv"));
    REQUIRE(csv.code == 0);
    CHECK(csv.out.empty());
    const std::string lines = read_file(dir.file("rows.csv"), 1 << 20);
    CHECK(line_count(lines) == 1 + 2 * 2 * 2 * 2);
    CHECK(lines.starts_with("mode,context,k,p,cached,batch,positions,ttft_ms,"));
    CHECK(contains(lines, "refrag,32,8,0,true,1,"));
}

TEST_CASE("bench writes its result as JSON to a second file where asked") {
    const TempDir dir;
    const Ran ran = refrag_run(dir, kSmall + "--from cached --json " + dir.file("rows.json"));
    REQUIRE(ran.code == 0);
    CHECK(contains(ran.out, "| mode | context |"));
    const Json result = Json::parse(read_file(dir.file("rows.json"), 1 << 20), "rows.json");
    CHECK(result.get_array("rows").size() == 10);
}

TEST_CASE("bench: a report from a GPU names it and holds the figures against its own peaks") {
    const refrag::BenchReport report = gpu_report();
    const Json result = Json::parse(refrag::write_bench_report(report, "json"), "report");
    const Json machine = result.get_object("machine");
    CHECK(keys_of(machine) == std::vector<std::string>{"cpu", "gpu", "threads", "peak_bf16_gflops",
                                                       "peak_fp32_gflops", "read_gbs", "copy_gbs", "backend",
                                                       "model", "parameters", "load_s", "load_peak_rss_bytes",
                                                       "peak_rss_bytes"});
    CHECK(machine.get_string("gpu") == "Some GPU");
    CHECK(machine.get_string("backend") == "cuda: Some GPU");
    CHECK(machine.get_number("copy_gbs") == 4200.0);
    const Json rows = result.get_array("rows");
    CHECK(rows.at(0).get_number("prefill_share_of_peak") == 0.5);
    CHECK(rows.at(0).get_number("decode_share_of_read") == 0.75);
    CHECK(rows.at(1).get("prefill_share_of_peak").is_null());

    const std::string markdown = refrag::write_bench_report(report, "md");
    CHECK(contains(markdown,
                   "in all, beside the GPU's\nSome GPU; cuda: Some GPU; beside it Some CPU\n"
                   "peaks of Some GPU: bf16 800000 GFLOP/s, fp32 50000 GFLOP/s, memory read 4000.0 GB/s, "
                   "copied 4200.0 GB/s (read and written)\n\n| mode |"));
    CHECK(contains(markdown, "| 400000 (0.50) | 3000.0 (0.75) |"));

    // Four columns of the machine in every line; there is no peak of int8.
    const std::string csv = refrag::write_bench_report(report, "csv");
    CHECK(contains(csv, ",peak_bf16_gflops,peak_fp32_gflops,peak_int8_gops,read_gbs\n"));
    CHECK(contains(csv, ",8e+05,50000,,4000\n"));
}

TEST_CASE("bench on a GPU measures the card's peaks and names it") {
    if (!refrag_test::has_gpu() && skip("no GPU")) return;
    const TempDir dir;
    const Ran ran = refrag_run(dir, std::string(kSmallAnywhere) + "--from cached --device cuda -o json");
    REQUIRE(ran.code == 0);
    const Json result = Json::parse(ran.out, "bench"), machine = result.get_object("machine");
    CHECK_FALSE(machine.get_string("gpu").empty());
    CHECK(machine.get_string("backend") == "cuda: " + machine.get_string("gpu"));
    for (const char* key : {"peak_bf16_gflops", "peak_fp32_gflops", "read_gbs", "copy_gbs"})
        CHECK(machine.get_number(key) > 0.0);
    CHECK(machine.get_number("peak_bf16_gflops") > machine.get_number("peak_fp32_gflops"));
    CHECK(machine.find("peak_int8_gops") == std::nullopt);
    const Json row = result.get_array("rows").at(1);
    CHECK(row.get_number("decode_share_of_read") ==
          doctest::Approx(row.get_number("decode_gbs") / machine.get_number("read_gbs")).epsilon(1e-12));
    const Ran huge = refrag_run(dir, "bench --context 1048576 -b 1000 --device cuda");
    CHECK(huge.code == 1);
    CHECK(contains(huge.err, "bench: llama-2-7b with roberta-large needs "));
    CHECK(contains(huge.err, " GB of GPU memory (weights 1"));
}

TEST_CASE("bench refuses what exceeds memory with both numbers, and options that make no sense") {
    const TempDir dir;
    const Ran huge = refrag_run(dir, "bench --shape llama-3.1-8b --context 1048576 -b 1000 --device cpu");
    CHECK(huge.code == 1);
    CHECK(line_count(huge.err) == 1);
    CHECK(contains(huge.err, "bench: llama-3.1-8b with roberta-base needs "));
    CHECK(contains(huge.err, " GB of memory (weights 16."));
    CHECK(contains(huge.err, " GB are available: choose a smaller --shape"));
    CHECK(huge.out.empty());
    const auto refused = [&](const std::string& arguments, const std::string& message) {
        const Ran ran = refrag_run(dir, "bench " + arguments);
        CAPTURE(arguments);
        CHECK(ran.code == 2);
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, message));
    };
    refused("--shape gpt-2", "--shape: expected llama-160m|");
    refused("--encoder-shape bert", "--encoder-shape: expected roberta-base|");
    refused("-m x --shape llama-160m", "excludes");
    refused("--modes full,half", "--modes: expected full, refrag or both; found \"half\"");
    refused("--from disk", "--from: expected cached, text or both; found \"disk\"");
    refused("--context 0", "found 0");
    refused("--context 64 -p 2", "found 2");
    refused("-n 1", "--output-tokens");
    refused("-o yaml", "-o: expected md, json or csv");
    refused("-m tests/golden/tiny-refrag --context 64 -k 64",
            "-k 64 needs 66 encoder positions, the encoder has 38");
    const Ran missing = refrag_run(dir, "bench -m " + dir.file("none"));
    CHECK(missing.code == 3);
    CHECK(line_count(missing.err) == 1);
}

TEST_CASE("bench says which rows pass the decoder's window, and still gives the others") {
    const TempDir dir;
    const Ran ran = refrag_run(
        dir,
        "bench -m tests/golden/tiny-refrag --context 600 -k 8 -p 0 -n 3 --repeats 1 --from cached -o json "
        "--device cpu");
    REQUIRE(ran.code == 0);
    CHECK(contains(ran.err, "mode full, context 600: prompt and answer pass the decoder's window of 512"));
    const Json rows = Json::parse(ran.out, "bench").get_array("rows");
    REQUIRE(rows.size() == 2);
    CHECK(rows.at(0).get("ttft_ms").is_null());
    CHECK(rows.at(0).get_int("repeats") == 0);
    CHECK(rows.at(1).get_number("ttft_ms") > 0.0);
    CHECK(rows.at(1).get("ttft_ratio").is_null());
}

TEST_CASE("plot.py refuses what is no result of bench, in one line and without a picture") {
    const TempDir dir;
    if (shell_run(dir, python() + " --version").code != 0 && skip("no python3")) return;
    const auto refused = [&](const std::string& text, const std::string& message) {
        const Ran ran = plot(dir, dir.write("result.json", text));
        CAPTURE(text);
        CHECK(ran.code == 3);
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, message));
        CHECK_FALSE(is_file(dir.file("result.png")));
    };
    refused("{", "not JSON");
    refused("[]", "an object with \"rows\"");
    refused("{\"machine\": {}}", "an object with \"rows\"");
    refused("{\"machine\": {}, \"rows\": [{\"mode\": \"refrag\"}]}", "rows[0]: expected the key \"context\"");
    refused("{\"machine\": {}, \"rows\": []}", "no refrag rows");
    CHECK(plot(dir, dir.file("none.json")).code == 3);
    CHECK(plot(dir, "").code == 2);
}
