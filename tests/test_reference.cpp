// The binary against weights_tools/reference.py, the pipeline in NumPy: the same chunks, policy logits,
// choice, tokens, log-probabilities and text, over two models and texts that are hard to cut. Needs a python3
// with numpy.
#include <doctest/doctest.h>

#include <cmath>

#include "cli_test.h"
#include "cpu/cpu_backend.h"

using namespace refrag;
using refrag_test::Ran;
using refrag_test::shell_run;
using refrag_test::TempDir;

namespace {

// The reference sums in double, the binary in fp32: a few layers of sums of several hundred terms of order 1.
constexpr double kBound = 1e-4;

// Titles and none, a special token's spelling, characters of several tokens, white space before and within
// words.
constexpr const char* kPassages =
    "{\"title\": \"Velmora\", \"text\": \"Velmora is a city in Trask. Velmora was founded in 1482. The "
    "workshops of Velmora produce clocks.\"}\n"
    "{\"text\": \"The Orsin's a river; its length isn't 312 km. <s>Farmers</s>   along\\n\\n it grow barley. "
    "\"}\n"
    "{\"title\": \"Tea\", \"text\": \"Tea reached the caf\\u00e9s by ship;\\u00a0\\u6c34 and leaves\\t, no "
    "more\\u2026 \\u0661\\u0662 \\u00bd \\ud83d\\udc69\\u200d\\ud83c\\udf3e e\\u0301\"}\n";

Json succeeded(const Ran& ran) {
    INFO(ran.err);
    REQUIRE(ran.code == 0);
    return Json::parse(ran.out, "stdout");
}

void check_equal(const Json& binary, const Json& reference) {
    CHECK(binary.get_string("answer") == reference.get_string("answer"));
    CHECK(binary.get_int("positions") == reference.get_int("positions"));

    const Json chunks = binary.get_array("chunks"), expected_chunks = reference.get_array("chunks");
    REQUIRE(chunks.size() == expected_chunks.size());
    for (size_t i = 0; i < chunks.size(); ++i) {
        CAPTURE(i);
        const Json chunk = chunks.at(i), expected = expected_chunks.at(i);
        CHECK(chunk.get_int("tokens") == std::ssize(expected.get_array("ids")));
        CHECK(chunk.get_bool("expanded") == expected.get_bool("expanded"));
        CHECK(std::abs(chunk.get_number("logit") - expected.get_number("logit")) < kBound);
    }

    const Json tokens = binary.get_array("logprobs"), expected_tokens = reference.get_array("logprobs");
    REQUIRE(tokens.size() == expected_tokens.size());
    for (size_t t = 0; t < tokens.size(); ++t) {
        CAPTURE(t);
        const Json top = tokens.at(t).get_array("top"), expected_top = expected_tokens.at(t);
        CHECK(tokens.at(t).get_int("id") == expected_top.at(0).get_int("id"));
        // Position by position, since nearly equal ones further down may change places.
        REQUIRE(top.size() == expected_top.size());
        for (size_t j = 0; j < top.size(); ++j) {
            CHECK(std::abs(top.at(j).get_number("logprob") - expected_top.at(j).get_number("logprob")) <
                  kBound);
        }
    }
}

}  // namespace

TEST_CASE("the binary computes what weights_tools/reference.py computes") {
    const TempDir dir;
    if (shell_run(dir, "python3 -c 'import numpy'").code != 0 &&
        refrag_test::skip("no python3 with numpy to run weights_tools/reference.py"))
        return;
    const std::string passages = "'" + dir.write("passages.jsonl", kPassages) + "'";
    // Instruction sets on which BF16 weights are widened and everything is summed in fp32.
    const std::string fp32 =
        std::string("REFRAG_CPU_ISA=") + (cpu_supports(CpuIsa::avx2) ? "avx2 " : "scalar ");
    const std::string question = " -q 'What do the workshops of Velmora produce?' ";
    for (const char* options : {
             "-m weights_tools/refrag-nano -n 6",
             "-m weights_tools/refrag-nano -n 6 -k 8 -p 0.1",
             "-m tests/golden/tiny-refrag -n 24 -p 0.3",
             "-m tests/golden/tiny-refrag -n 24 -k 5 -p 0.001",
         }) {
        CAPTURE(options);
        const std::string request = options + (" --passages " + passages) + question;
        const Ran reference = shell_run(dir, "python3 weights_tools/reference.py " + request + " --json");
        const Ran binary = shell_run(dir, fp32 + refrag_test::binary() + " run " + request +
                                              " --json --logprobs 5 --explain '" + dir.file("explain") + "'");
        REQUIRE(binary.code == 0);
        check_equal(Json::parse_file(dir.file("explain")), succeeded(reference));
    }
}
