// io/lines and io/output: one reader of text, one writer of results, whatever the path names.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "cli_test.h"
#include "io/lines.h"
#include "io/output.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr std::string_view mark = "\xEF\xBB\xBF";

std::vector<std::string> lines_of(std::string_view text) {
    std::vector<std::string> all;
    Lines lines(text);
    std::string_view line;
    while (lines.next(line)) all.emplace_back(line);
    CHECK(lines.number() == all.size());
    return all;
}

void check_path(const std::string& path) {
    check_output_paths({{"-o", path}});
}

// Runs `body` while standard output is another descriptor.
template <typename Body>
void with_stdout(int descriptor, Body&& body) {
    std::fflush(stdout);
    const int kept = ::dup(STDOUT_FILENO);
    REQUIRE(::dup2(descriptor, STDOUT_FILENO) >= 0);
    body();
    ::dup2(kept, STDOUT_FILENO);
    ::close(kept);
}

}  // namespace

TEST_CASE("lines: LF and CR LF end a line, a byte order mark is no part of the first") {
    using Strings = std::vector<std::string>;
    CHECK(lines_of("") == Strings{});
    CHECK(lines_of("a") == Strings{"a"});
    CHECK(lines_of("a\n") == Strings{"a"});
    CHECK(lines_of("a\r\n\nb\r") == Strings{"a", "", "b"});
    CHECK(lines_of(std::string(mark) + "a\nb") == Strings{"a", "b"});
    CHECK(lines_of("a\n" + std::string(mark) + "b")[1] == std::string(mark) + "b");
    CHECK(lines_of(mark) == Strings{});
}

TEST_CASE("text: files, pipes and standard input give the same text, without a byte order mark") {
    const TempDir dir;
    const std::string text = "one\r\ntwo \xFF";
    CHECK(read_text(dir.write("plain", text)) == text);
    CHECK(read_text(dir.write("marked", std::string(mark) + text)) == text);
    CHECK(read_text(dir.write("empty", "")).empty());
    CHECK(read_text(dir.write("mark", mark)).empty());
    CHECK(read_text("/dev/null").empty());
    REQUIRE(::mkfifo(dir.file("fifo").c_str(), 0600) == 0);
    std::thread writer([&] { write_output(dir.file("fifo"), std::string(mark) + text); });
    CHECK(read_text(dir.file("fifo")) == text);
    writer.join();
    const int kept = ::dup(STDIN_FILENO);
    for (const char* name : {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}) {
        CAPTURE(name);
        const int file = ::open(dir.file("marked").c_str(), O_RDONLY);
        REQUIRE(::dup2(file, STDIN_FILENO) >= 0);
        ::close(file);
        CHECK(read_text(name) == text);
        CHECK(read_text(name).empty());  // a stream goes on where it stands
    }
    ::dup2(kept, STDIN_FILENO);
    ::close(kept);
    CHECK(contains(error_of([&] { read_text(dir.path()); }), "expected a regular file, found a directory"));
    CHECK(contains(error_of([&] { read_text("/dev/zero", 1 << 20); }), "expected at most 1048576 bytes"));
    CHECK(error_of([&] { read_text(dir.write("z", "\x1F\x8B\x08x")); }) ==
          dir.file("z") + ": expected text in UTF-8, found what looks like gzip-compressed data");
}

TEST_CASE("JSON Lines: blank lines are passed over and counted, a document over several lines is named") {
    std::vector<std::pair<int64_t, size_t>> seen;
    for_each_json_line(std::string(mark) + "\r\n1\r\n \t\n2", "n",
                       [&](const Json& value, size_t line) { seen.emplace_back(value.as_int(), line); });
    CHECK(seen == std::vector<std::pair<int64_t, size_t>>{{1, 2}, {2, 4}});
    const auto refusal = [](std::string_view text) {
        return error_of(
            [&] { for_each_json_line(text, "n", [](const Json& value, size_t) { value.as_int(); }); });
    };
    CHECK(refusal("1\nx").starts_with("n: line 2: not valid JSON"));
    CHECK(refusal("1\n\n[2]") == "n: line 3: expected an integer, found an array of 1");
    for (const char* document : {"{\n\"a\": 1\n}", "[\n1,\n2\n]", "\n{\"a\": 1,\n\"b\": 2}"}) {
        CAPTURE(document);
        CHECK(refusal(document) ==
              "n: expected JSON Lines, one value on each line, found one JSON document over several lines");
    }
}

TEST_CASE("output: devices, pipes and descriptors are written to, only regular files are replaced") {
    const TempDir dir;
    const std::string log = dir.write("log", "kept\n");
    for (const char* name : {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}) {
        CAPTURE(name);
        const int file = ::open(log.c_str(), O_WRONLY | O_APPEND);
        with_stdout(file, [&] { write_output(name, "x\n"); });
        ::close(file);
    }
    CHECK(read_file(log, 100) == "kept\nx\nx\nx\nx\n");
    // The same file by its own name, while standard output writes to it.
    const int file = ::open(log.c_str(), O_WRONLY | O_APPEND);
    with_stdout(file, [&] { write_output(log, "y\n"); });
    ::close(file);
    CHECK(read_file(log, 100) == "kept\nx\nx\nx\nx\ny\n");
    REQUIRE(::symlink("/dev/null", dir.file("null").c_str()) == 0);
    write_output(dir.file("null"), "x");
    CHECK(std::filesystem::is_symlink(dir.file("null")));
    CHECK(contains(error_of([] { write_output("/dev/full", "x"); }), "/dev/full: writing failed"));
    write_output(log, "new");
    CHECK(read_file(log, 100) == "new");
}

TEST_CASE("output: a path that cannot be written is refused beforehand, the rest is accepted") {
    const TempDir dir;
    REQUIRE(::mkfifo(dir.file("fifo").c_str(), 0600) == 0);
    for (const std::string& good :
         {std::string("-"), std::string("/dev/null"), std::string("/dev/stdout"), dir.file("new"),
          dir.write("old", "x"), dir.file("fifo"), std::string()}) {
        CAPTURE(good);
        CHECK_NOTHROW(check_path(good));
    }
    CHECK(!std::filesystem::exists(dir.file("new")));
    const auto refusal = [](const std::string& path) { return error_of([&] { check_path(path); }); };
    CHECK(refusal(dir.file("no/file")) ==
          "-o " + dir.file("no/file") + ": cannot be written: its directory does not exist");
    CHECK(contains(refusal(dir.path()), "it is a directory"));
    CHECK(contains(refusal(dir.file("new/")), "the name of a directory"));
    CHECK(contains(refusal(dir.file("old/x")), "its directory does not exist"));
    CHECK(contains(refusal("/dev/fd/999"), "descriptor 999 is not open"));
    CHECK(contains(refusal("/dev/fd/0"), "open for reading alone"));
    CHECK(contains(error_of([&] {
                       check_output_paths({{"--out", dir.file("x")}, {"--json", dir.path() + "/./x"}});
                   }),
                   "--out and --json name one file"));
}
