// Runs the built binary from a test as a user's shell would: exit code, what went where. Its path comes from
// REFRAG_BINARY (the Makefile sets it).
#pragma once

#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "io/json.h"
#include "support.h"

namespace refrag_test {

// The smallest REFRAG model, and passages to ask it about.
inline constexpr const char* kModel = "-m tests/golden/tiny-refrag ";
inline constexpr const char* kPassages =
    "{\"id\": \"a\", \"title\": \"Hill\", \"text\": \"The old mill stands on a hill.\"}\n"
    "{\"id\": 7, \"text\": \"A red lantern hangs over the door.\"}\n";

struct Ran {
    int code = -1;
    std::string out;
    std::string err;
};

inline std::string binary() {
    const char* path = std::getenv("REFRAG_BINARY");
    return path != nullptr ? path : "build/refrag";
}

// Runs a shell command line and keeps what it prints. `input` is a file for standard input.
inline Ran shell_run(const TempDir& dir, const std::string& command, const std::string& input = "/dev/null") {
    const std::string whole =
        command + " >'" + dir.file("out") + "' 2>'" + dir.file("err") + "' <'" + input + "'";
    Ran ran;
    const int status = std::system(whole.c_str());
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    ran.out = refrag::read_file(dir.file("out"), 1 << 24);
    ran.err = refrag::read_file(dir.file("err"), 1 << 24);
    return ran;
}

// Runs the binary with arguments in shell syntax.
inline Ran refrag_run(const TempDir& dir, const std::string& arguments,
                      const std::string& input = "/dev/null") {
    return shell_run(dir, binary() + " " + arguments, input);
}

inline size_t line_count(const std::string& text) {
    return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

// JSON Lines.
inline std::vector<refrag::Json> json_lines(const std::string& text) {
    std::vector<refrag::Json> lines;
    for (size_t begin = 0; begin < text.size();) {
        const size_t end = std::min(text.find('\n', begin), text.size());
        lines.push_back(
            refrag::Json::parse(text.substr(begin, end - begin), "line " + std::to_string(lines.size() + 1)));
        begin = end + 1;
    }
    return lines;
}

}  // namespace refrag_test
