// See output.h.
#include "io/output.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <memory>

#include "io/file.h"
#include "io/posix.h"

namespace refrag {
namespace {

constexpr int max_links = 40;

std::string resolved(const std::string& path) {
    const std::unique_ptr<char, void (*)(void*)> real(::realpath(path.c_str(), nullptr), ::free);
    return real == nullptr ? std::string() : std::string(real.get());
}

// Is it where this process's descriptors are: /proc/PID/fd or /proc/PID/task/TID/fd?
bool is_descriptor_directory(const std::string& directory) {
    const std::string own = str("/proc/", ::getpid(), "/");
    return directory.starts_with(own) && directory.ends_with("/fd");
}

std::optional<int> descriptor_number(const std::string& name) {
    int number = -1;
    const auto result = std::from_chars(name.data(), name.data() + name.size(), number);
    const bool whole = result.ec == std::errc() && result.ptr == name.data() + name.size();
    return whole && number >= 0 ? std::optional<int>(number) : std::nullopt;
}

// The descriptor to write to in place of a path, where there is one already.
std::optional<int> open_output(const std::string& path) {
    if (path == "-") return STDOUT_FILENO;
    if (const std::optional<int> descriptor = own_descriptor(path)) return descriptor;
    struct stat info {};
    if (!examine(path, info) || !S_ISREG(info.st_mode)) return std::nullopt;
    for (const int stream : {STDOUT_FILENO, STDERR_FILENO}) {
        struct stat held {};
        if (::fstat(stream, &held) == 0 && held.st_dev == info.st_dev && held.st_ino == info.st_ino)
            return stream;
    }
    return std::nullopt;
}

// One name for one place, as far as that can be known before the file is there.
std::string place_of(const std::string& path) {
    const std::string whole = resolved(path);
    return whole.empty() ? path_join(resolved(path_parent(path)), path_name(path)) : whole;
}

void check_output_path(const OutputPath& output) {
    const std::string shown = str(output.option, " ", printable(output.path));
    const auto check = [&](bool ok, const auto&... parts) {
        if (!ok) fail(Status::runtime, shown, ": cannot be written: ", parts...);
    };
    if (const std::optional<int> descriptor = open_output(output.path)) {
        const int flags = ::fcntl(*descriptor, F_GETFL);
        check(flags >= 0, "descriptor ", *descriptor, " is not open");
        check((flags & O_ACCMODE) != O_RDONLY, "descriptor ", *descriptor, " is open for reading alone");
        return;
    }
    check(output.path.find('\0') == std::string::npos, "a file name has no zero byte");
    struct stat info {};
    const bool exists = examine(output.path, info);
    check(exists || !output.path.ends_with('/'), "it is the name of a directory");
    if (exists && !S_ISREG(info.st_mode)) {
        check(S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode), "it is ", kind_of(info.st_mode));
        check(::access(output.path.c_str(), W_OK) == 0, system_text(errno));
        return;
    }
    // The new file is made beside the old one.
    const std::string directory = path_parent(exists ? place_of(output.path) : output.path);
    check(is_directory(directory), "its directory does not exist");
    check(::access(directory.c_str(), W_OK | X_OK) == 0, "its directory: ", system_text(errno));
}

}  // namespace

std::optional<int> own_descriptor(const std::string& path) {
    if (path.find('\0') != std::string::npos) return std::nullopt;
    std::string at = path;
    for (int i = 0; i < max_links; ++i) {
        const std::string directory = resolved(path_parent(at));
        if (directory.empty()) return std::nullopt;
        if (is_descriptor_directory(directory)) return descriptor_number(path_name(at));
        std::array<char, PATH_MAX> link{};
        const ssize_t n = ::readlink(at.c_str(), link.data(), link.size());
        if (n <= 0 || static_cast<size_t>(n) == link.size()) return std::nullopt;
        const std::string_view target(link.data(), static_cast<size_t>(n));
        at = target.front() == '/' ? std::string(target) : path_join(directory, target);
    }
    return std::nullopt;
}

void check_output_paths(std::initializer_list<OutputPath> outputs) {
    for (const OutputPath& output : outputs) {
        if (output.path.empty()) continue;
        check_output_path(output);
        for (const OutputPath* other = outputs.begin(); other != &output; ++other) {
            REFRAG_CHECK(other->path.empty() || place_of(other->path) != place_of(output.path), Status::usage,
                         other->option, " and ", output.option, " name one file, ", printable(output.path),
                         ": expected two");
        }
    }
}

void write_output(const std::string& path, std::string_view bytes) {
    const std::string shown = path == "-" ? "standard output" : printable(path);
    if (const std::optional<int> descriptor = open_output(path)) return write_all(*descriptor, bytes, shown);
    struct stat info {};
    if (!examine(path, info) || !(S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode)))
        return write_file_atomic(path, bytes);
    const int descriptor = retried([&] { return ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY); });
    if (descriptor < 0) fail(Status::runtime, shown, ": cannot be opened: ", system_text(errno));
    struct Close {
        int descriptor;
        ~Close() { ::close(descriptor); }
    };
    const Close close{descriptor};
    write_all(descriptor, bytes, shown);
}

}  // namespace refrag
