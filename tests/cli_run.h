// Runs the built binary (REFRAG_BINARY, set by the Makefile) as a user's shell would.
#pragma once

#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "support.h"

namespace refrag_test {

struct Ran {
    int code = -1;
    std::string out;
    std::string err;
};

inline std::string binary() {
    const char* path = std::getenv("REFRAG_BINARY");
    return path != nullptr ? path : "build/refrag";
}

// Runs a shell command line and keeps what it prints.
inline Ran shell_run(const TempDir& dir, const std::string& command) {
    const std::string whole = command + " >'" + dir.file("out") + "' 2>'" + dir.file("err") + "' </dev/null";
    Ran ran;
    const int status = std::system(whole.c_str());
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    ran.out = refrag::read_file(dir.file("out"), 1 << 24);
    ran.err = refrag::read_file(dir.file("err"), 1 << 24);
    return ran;
}

// Runs the binary with arguments in shell syntax.
inline Ran refrag_run(const TempDir& dir, const std::string& arguments) {
    return shell_run(dir, binary() + " " + arguments);
}

inline size_t lines(const std::string& text) {
    return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

}  // namespace refrag_test
