// Errors and checks: what every room uses to refuse bad input.
// One exception type, one status list. Nothing here ends the process, and nothing prints.
#pragma once

#include <exception>
#include <locale>
#include <sstream>
#include <string>
#include <utility>

namespace refrag {

// What kind of failure an Error is. The CLI maps these to its exit codes (1 run time, 2 usage, 3 bad
// file).
enum class Status {
    runtime,        // something failed while running (read error, a device that fails)
    usage,          // the caller asked for something that makes no sense
    bad_input,      // a file's content is wrong
    too_long,       // a prompt does not fit where it is to be read
    out_of_memory,  // an allocation failed
    unavailable     // what runs elsewhere cannot be reached, or failed there
};

// The only exception type thrown on purpose. `message` is one line: what, where, expected, found.
class Error : public std::exception {
  public:
    Error(Status status, std::string message) : status_(status), message_(std::move(message)) {}
    Status status() const noexcept { return status_; }
    const std::string& message() const noexcept { return message_; }
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    Status status_;
    std::string message_;
};

// Joins its arguments into one string: str("row ", 3, " of ", n). Throws std::bad_alloc, never gives a part.
template <typename... Args>
std::string str(const Args&... args) {
    std::ostringstream out;
    out.imbue(std::locale::classic());  // 1024 is never "1.024", whatever locale the host has set
    // A stream keeps a failed allocation to itself and goes on with a part of the text; half a file's name
    // must not be used.
    out.exceptions(std::ios_base::badbit);
    (out << ... << args);
    return out.str();
}

template <typename... Args>
[[noreturn]] void fail(Status status, const Args&... args) {
    throw Error(status, str(args...));
}

}  // namespace refrag

// Always on: for what files, callers or drivers give. REFRAG_CHECK(ok, Status::bad_input, "what ", found).
#define REFRAG_CHECK(condition, status, ...)                     \
    do {                                                         \
        if (!(condition)) ::refrag::fail((status), __VA_ARGS__); \
    } while (false)

// Our own invariants; compiled out with NDEBUG.
#ifdef NDEBUG
#define REFRAG_DCHECK(condition) ((void)0)
#else
#define REFRAG_DCHECK(condition)                                                                       \
    do {                                                                                               \
        if (!(condition))                                                                              \
            ::refrag::fail(::refrag::Status::runtime, "internal invariant broken: " #condition " at ", \
                           __FILE__, ":", __LINE__);                                                   \
    } while (false)
#endif
