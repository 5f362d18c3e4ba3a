// What several tests share: skipping with a reason, the optional data folder, temporary directories and
// paths. tests/main.cpp prints `skipped_tests` in the closing line. Tests are run from the root of the
// repository.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include <doctest/doctest.h>

#include "base/check.h"
#include "io/file.h"

namespace refrag_test {

// How many tests said skip().
inline int skipped_tests = 0;

// Notes that the running test cannot run here. Use: `if (test_data_dir().empty()) { skip("..."); return; }`.
// Always true, so that `if (missing && skip("why")) return;` reads well.
inline bool skip(const char* why) {
    const auto* test = doctest::getContextOptions()->currentTest;
    std::printf("SKIP: %s: %s\n", test != nullptr ? test->m_name : "?", why);
    std::fflush(stdout);
    ++skipped_tests;
    return true;
}

// The folder of optional public test data (environment variable REFRAG_TEST_DATA), or "" where it is unset or
// missing.
inline std::string test_data_dir() {
    const char* value = std::getenv("REFRAG_TEST_DATA");
    if (value == nullptr || !refrag::is_directory(value)) return "";
    return value;
}

// A file of the repository, by its path from the root.
inline std::string repo_path(const std::string& relative) {
    return relative;
}

// A directory of its own for one test, removed with everything in it at the end.
class TempDir {
  public:
    TempDir() {
        std::string pattern = (std::filesystem::temp_directory_path() / "refrag_test_XXXXXX").string();
        if (::mkdtemp(pattern.data()) == nullptr)
            refrag::fail(refrag::Status::runtime, "cannot make ", pattern);
        path_ = pattern;
    }
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;

    const std::string& path() const { return path_; }
    std::string file(const std::string& name) const { return path_ + "/" + name; }
    // Writes a file into the directory and gives its path. Not write_file_atomic: thousands of fsyncs take
    // time.
    std::string write(const std::string& name, std::string_view bytes) const {
        std::ofstream out(file(name), std::ios::binary | std::ios::trunc);
        out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        out.close();
        if (!out) refrag::fail(refrag::Status::runtime, "cannot write ", file(name));
        return file(name);
    }

  private:
    std::string path_;
};

// The message of the refrag::Error that `body` throws; "(no error)" where it throws none.
template <typename Body>
std::string error_of(Body&& body) {
    try {
        body();
    } catch (const refrag::Error& error) {
        return error.message();
    }
    return "(no error)";
}

inline bool contains(std::string_view text, std::string_view part) {
    return text.find(part) != std::string_view::npos;
}

}  // namespace refrag_test
