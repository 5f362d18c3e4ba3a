// What the files of io/ share in their use of the system: calls that are made again after a signal, errno in
// words, what kind of thing a path names. Internal to src/io.
#pragma once

#include <sys/stat.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "base/check.h"

namespace refrag {

// The system's words for an errno value (strerror is not safe in several threads).
inline std::string system_text(int error) {
    return std::generic_category().message(error);
}

// Of an error about a path: bad input where the path itself is wrong.
inline Status status_of(int error) {
    switch (error) {
        case ENOENT:
        case ENOTDIR:
        case EACCES:
        case EPERM:
        case ELOOP:
        case ENAMETOOLONG:
        case EISDIR:
            return Status::bad_input;
        default:
            return Status::runtime;
    }
}

inline const char* kind_of(mode_t mode) {
    if (S_ISDIR(mode)) return "a directory";
    if (S_ISFIFO(mode)) return "a pipe";
    if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
    if (S_ISSOCK(mode)) return "a socket";
    return "a file of another kind";
}

// A system call, made again where a signal interrupted it. -1 with errno on failure.
template <typename Call>
auto retried(Call&& call) {
    auto result = call();
    while (result < 0 && errno == EINTR) result = call();
    return result;
}

constexpr size_t max_transfer_bytes = size_t{1} << 30;  // Linux moves at most about 2 GiB a call

// Refuses an empty path and one with a zero byte in it.
std::string checked_path(const std::string& path);

// stat() of whatever is at `path`; false where nothing is there. Any other failure is an Error: not being
// able to look is not the same as not being there.
bool examine(const std::string& path, struct stat& info);

// Writes all bytes; `shown` begins the message when the system does not take them. Status::runtime.
void write_all(int descriptor, std::string_view bytes, const std::string& shown);

}  // namespace refrag
