// Replays every file of tests/fuzz/corpus/ through its fuzz target, on every machine and without libFuzzer: a
// case that was found once stays found.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "fuzz/targets.h"
#include "support.h"

using namespace refrag_test;

namespace {

void replay(const char* name, void (*target)(std::string_view)) {
    std::vector<std::string> paths;
    for (const auto& entry :
         std::filesystem::directory_iterator(repo_path(std::string("tests/fuzz/corpus/") + name)))
        paths.push_back(entry.path().string());
    std::sort(paths.begin(), paths.end());
    REQUIRE(paths.size() >= 5);
    uint64_t total = 0;
    for (const std::string& path : paths) {
        CAPTURE(path);
        const std::string bytes = refrag::read_file(path, 1 << 20);
        total += bytes.size();
        CHECK_NOTHROW(target(bytes));
    }
    CHECK(total < 150'000);  // the corpora stay small
}

}  // namespace

TEST_CASE("fuzz corpus: every file is refused or taken, as its target promises") {
    const std::pair<const char*, void (*)(std::string_view)> targets[] = {
        {"safetensors", refrag_fuzz::fuzz_safetensors}, {"gguf", refrag_fuzz::fuzz_gguf},
        {"config", refrag_fuzz::fuzz_config},           {"tokenizer", refrag_fuzz::fuzz_tokenizer},
        {"vocabulary", refrag_fuzz::fuzz_vocabulary},   {"requests", refrag_fuzz::fuzz_requests},
        {"passages", refrag_fuzz::fuzz_passages},
    };
    for (const auto& [name, target] : targets) replay(name, target);
}

TEST_CASE("fuzz targets fail where a promise is broken") {
    CHECK_THROWS_AS(refrag_fuzz::promise(false, "x"), std::logic_error);
    CHECK_FALSE(refrag_fuzz::refused([] {}));
    using refrag::fail;
    using refrag::Status;
    CHECK(refrag_fuzz::refused([] { fail(Status::bad_input, "x"); }));
    CHECK_THROWS_AS(refrag_fuzz::refused([] { fail(Status::bad_input, ""); }), std::logic_error);
    CHECK_THROWS_AS(refrag_fuzz::refused([] { fail(Status::bad_input, "two\nlines"); }), std::logic_error);
    CHECK_THROWS_AS(refrag_fuzz::refused([] { fail(Status::runtime, "x"); }), std::logic_error);
    CHECK_THROWS_AS(refrag_fuzz::refused([] { throw std::out_of_range("x"); }), std::out_of_range);
}
