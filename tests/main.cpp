// Runs every doctest case and ends with one line of its own: "N passed, N failed, N skipped" (test cases).
// A case that cannot run here prints SKIP and why (support.h) and counts as skipped, not as passed.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>

#include "support.h"

namespace {

// Counts cases for the closing line.
struct Counter : doctest::IReporter {
    static inline int passed = 0;
    static inline int failed = 0;
    explicit Counter(const doctest::ContextOptions&) {}
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_run_end(const doctest::TestRunStats&) override {}
    void test_case_start(const doctest::TestCaseData&) override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
        if (stats.failure_flags == 0) {
            ++passed;
        } else {
            ++failed;
        }
    }
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};

}  // namespace

REGISTER_LISTENER("counter", 1, Counter);

int main(int argc, char** argv) {
    // Commands that name no device compute on the CPU, whatever this machine has; tests of a GPU name it.
    setenv("REFRAG_DEVICE", "cpu", 1);
    doctest::Context context(argc, argv);
    const int result = context.run();
    if (context.shouldExit()) return result;
    const int skipped = refrag_test::skipped_tests;
    std::printf("%d passed, %d failed, %d skipped\n", Counter::passed - skipped, Counter::failed, skipped);
    return result != 0 || Counter::failed != 0 || Counter::passed - skipped <= 0 ? 1 : 0;
}
