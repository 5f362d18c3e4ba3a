// io/file: bounded reads of regular files only, atomic writes, and what happens when the ground moves.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

#include "io/file.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

size_t n_entries(const std::string& directory) {
    size_t n = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++n;
    return n;
}

Status status_of(const std::string& path) {
    try {
        read_file(path, 100);
    } catch (const Error& error) {
        return error.status();
    }
    return Status::usage;
}

}  // namespace

TEST_CASE("file: reads back what was written, any bytes") {
    const TempDir dir;
    std::string bytes;
    for (int i = 0; i < 100000; ++i) bytes.push_back(static_cast<char>(i * 7));
    const std::string path = dir.write("data", bytes);
    CHECK(read_file(path, bytes.size()) == bytes);
    CHECK(read_file(dir.write("empty", ""), 0) == "");

    const File file(path);
    CHECK(file.size() == bytes.size());
    std::string part(1000, '\0');
    file.read_at(99000, part.data(), part.size());
    CHECK(part == bytes.substr(99000));
    file.read_at(bytes.size(), nullptr, 0);
}

TEST_CASE("file: a missing file is bad input and is named") {
    const TempDir dir;
    CHECK(contains(error_of([&] { read_file(dir.file("none"), 10); }), dir.file("none")));
    CHECK(status_of(dir.file("none")) == Status::bad_input);
    CHECK(status_of("") == Status::bad_input);
    CHECK(status_of(std::string("a\0b", 3)) == Status::bad_input);
    CHECK(status_of(dir.file(std::string(5000, 'x'))) == Status::bad_input);
}

TEST_CASE("file: directories, pipes and devices are refused without hanging") {
    const TempDir dir;
    CHECK(
        contains(error_of([&] { read_file(dir.path(), 10); }), "expected a regular file, found a directory"));
    REQUIRE(::mkfifo(dir.file("fifo").c_str(), 0600) == 0);
    CHECK(contains(error_of([&] { read_file(dir.file("fifo"), 10); }), "found a pipe"));
    CHECK(contains(error_of([&] { read_file("/dev/zero", 10); }), "found a device"));
}

TEST_CASE("file: a file larger than the limit is refused before reading") {
    const TempDir dir;
    const std::string path = dir.write("data", "0123456789");
    CHECK(read_file(path, 10).size() == 10);
    CHECK(contains(error_of([&] { read_file(path, 9); }), "expected at most 9 bytes, found 10"));
}

TEST_CASE("file: a range outside the file is refused") {
    const TempDir dir;
    const File file(dir.write("data", "0123456789"));
    char buffer[16];
    CHECK(contains(error_of([&] { file.read_at(5, buffer, 6); }), "the file has 10 bytes"));
    CHECK(contains(error_of([&] { file.read_at(UINT64_MAX, buffer, 1); }), "the file has 10 bytes"));
}

TEST_CASE("file: cut while in use gives an error, not a signal") {
    const TempDir dir;
    const std::string path = dir.write("data", std::string(10000, 'x'));
    const File file(path);
    REQUIRE(::truncate(path.c_str(), 5000) == 0);
    std::string buffer(10000, '\0');
    CHECK(contains(error_of([&] { file.read_at(0, buffer.data(), buffer.size()); }),
                   "cut while in use: expected 10000 bytes, found 5000"));
}

TEST_CASE("file: rewritten while in use gives an error") {
    const TempDir dir;
    const std::string path = dir.write("data", std::string(100, 'x'));
    const File file(path);
    std::ofstream(path, std::ios::app) << "more";
    char buffer[100];
    CHECK(contains(error_of([&] { file.read_at(0, buffer, 100); }), "changed while in use"));
}

TEST_CASE("file: atomic writing replaces, keeps permissions, and leaves nothing behind") {
    const TempDir dir;
    const std::string path = dir.write("data", "old");
    REQUIRE(::chmod(path.c_str(), 0640) == 0);
    write_file_atomic(path, "new");
    CHECK(read_file(path, 10) == "new");
    struct stat info {};
    REQUIRE(::stat(path.c_str(), &info) == 0);
    CHECK((info.st_mode & 07777) == 0640);
    CHECK(n_entries(dir.path()) == 1);

    REQUIRE(::symlink("data", dir.file("link").c_str()) == 0);
    write_file_atomic(dir.file("link"), "through");
    CHECK(read_file(path, 10) == "through");
    CHECK(std::filesystem::is_symlink(dir.file("link")));
}

TEST_CASE("file: a write that cannot happen leaves no temporary file and the target untouched") {
    const TempDir dir;
    CHECK(contains(error_of([&] { write_file_atomic(dir.file("none/data"), "x"); }),
                   "cannot make a temporary file"));
    CHECK(contains(error_of([&] { write_file_atomic(dir.path(), "x"); }), "found a directory"));
    CHECK(contains(error_of([&] { write_file_atomic("/dev/null", "x"); }), "found a device"));
    CHECK(contains(error_of([&] { write_file_atomic("/dev/full", "x"); }), "found a device"));
    CHECK(n_entries(dir.path()) == 0);
}

TEST_CASE("file: paths") {
    CHECK(path_join("a", "b") == "a/b");
    CHECK(path_join("a/", "b") == "a/b");
    CHECK(path_join("", "b") == "b");
    CHECK(path_parent("a/b") == "a");
    CHECK(path_parent("b") == ".");
    CHECK(path_parent("/b") == "/");
    CHECK(path_name("a/b") == "b");
    CHECK(path_name("b") == "b");
}

TEST_CASE("file: printable makes one safe line of anything") {
    CHECK(printable("caf\xC3\xA9") == "caf\xC3\xA9");
    CHECK(printable("a\nb\x1b[0m") == "a\\x0ab\\x1b[0m");
    CHECK(printable("\xFF\xC3") == "\\xff\\xc3");
    CHECK(printable("\xC2\x85") == "\\xc2\\x85");
    CHECK(printable(std::string(300, 'x')) == std::string(200, 'x') + "...");
}
