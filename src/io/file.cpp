// Bounded file access by POSIX calls. Every call that can be interrupted is retried; every failure names the
// path, what was being done and what the system said.
#include "io/file.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "base/utf8.h"
#include "io/output.h"
#include "io/posix.h"

namespace refrag {

namespace {

int64_t modified_ns(const struct stat& info) {
    return static_cast<int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec;
}

}  // namespace

std::string checked_path(const std::string& path) {
    REFRAG_CHECK(!path.empty(), Status::bad_input, "an empty file name cannot be opened");
    REFRAG_CHECK(path.find('\0') == std::string::npos, Status::bad_input, "file name ", printable(path),
                 ": expected no zero byte in it");
    return path;
}

bool examine(const std::string& path, struct stat& info) {
    if (path.find('\0') != std::string::npos) return false;
    if (retried([&] { return ::stat(path.c_str(), &info); }) == 0) return true;
    if (errno != ENOENT && errno != ENOTDIR && errno != ENAMETOOLONG)
        fail(status_of(errno), printable(path), ": cannot be examined: ", system_text(errno));
    return false;
}

void write_all(int descriptor, std::string_view bytes, const std::string& shown) {
    size_t done = 0;
    while (done < bytes.size()) {
        const size_t want = std::min(bytes.size() - done, max_transfer_bytes);
        const ssize_t put = retried([&] { return ::write(descriptor, bytes.data() + done, want); });
        if (put < 0) fail(Status::runtime, shown, ": writing failed: ", system_text(errno));
        REFRAG_CHECK(put > 0, Status::runtime, shown, ": writing failed: no byte was taken");
        done += static_cast<size_t>(put);
    }
}

File::File(const std::string& path) : path_(checked_path(path)) {
    // O_NONBLOCK: opening a pipe without a writer must not hang; it means nothing for regular files.
    descriptor_ = retried([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); });
    if (descriptor_ < 0) fail(status_of(errno), printable(path), ": cannot be opened: ", system_text(errno));
    struct stat info {};
    const int error = ::fstat(descriptor_, &info) == 0 ? 0 : errno;
    if (error != 0 || !S_ISREG(info.st_mode)) {
        ::close(descriptor_);
        descriptor_ = -1;
        if (error != 0) fail(Status::runtime, printable(path), ": cannot be examined: ", system_text(error));
        fail(Status::bad_input, printable(path), ": expected a regular file, found ", kind_of(info.st_mode));
    }
    size_ = static_cast<uint64_t>(info.st_size);
    modified_ns_ = modified_ns(info);
}

File::~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(other.size_),
      modified_ns_(other.modified_ns_) {}

File& File::operator=(File&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(size_, other.size_);
    std::swap(modified_ns_, other.modified_ns_);
    return *this;
}

void File::read_at(uint64_t offset, void* destination, size_t bytes) const {
    REFRAG_CHECK(offset <= size_ && bytes <= size_ - offset, Status::bad_input, printable(path_),
                 ": cannot read ", bytes, " bytes at ", offset, ": the file has ", size_, " bytes");
    auto* place = static_cast<char*>(destination);
    size_t done = 0;
    while (done < bytes) {
        const size_t want = std::min(bytes - done, max_transfer_bytes);
        const ssize_t got = retried(
            [&] { return ::pread(descriptor_, place + done, want, static_cast<off_t>(offset + done)); });
        if (got < 0) fail(Status::runtime, printable(path_), ": reading failed: ", system_text(errno));
        REFRAG_CHECK(got > 0, Status::runtime, printable(path_), ": the file was cut while in use: expected ",
                     size_, " bytes, found ", offset + done);
        done += static_cast<size_t>(got);
    }
    struct stat info {};
    if (::fstat(descriptor_, &info) != 0)
        fail(Status::runtime, printable(path_), ": cannot be examined: ", system_text(errno));
    REFRAG_CHECK(static_cast<uint64_t>(info.st_size) == size_, Status::runtime, printable(path_),
                 ": the file changed while in use: expected ", size_, " bytes, found ", info.st_size);
    REFRAG_CHECK(modified_ns(info) == modified_ns_, Status::runtime, printable(path_),
                 ": the file was written to while in use");
}

std::string read_file(const std::string& path, uint64_t max_bytes) {
    const File file(path);
    REFRAG_CHECK(file.size() <= max_bytes, Status::bad_input, printable(path), ": expected at most ",
                 max_bytes, " bytes, found ", file.size());
    std::string bytes(static_cast<size_t>(file.size()), '\0');
    file.read_at(0, bytes.data(), bytes.size());
    return bytes;
}

namespace {

// A descriptor read to its end.
std::string read_stream(int descriptor, const std::string& shown, uint64_t max_bytes) {
    std::string bytes;
    size_t used = 0;
    while (true) {
        bytes.resize(std::max<size_t>(used + 65536, used * 2));
        const ssize_t got =
            retried([&] { return ::read(descriptor, bytes.data() + used, bytes.size() - used); });
        if (got < 0) fail(Status::runtime, shown, ": reading failed: ", system_text(errno));
        if (got == 0) break;
        used += static_cast<size_t>(got);
        REFRAG_CHECK(used <= max_bytes, Status::bad_input, shown, ": expected at most ", max_bytes, " bytes");
    }
    bytes.resize(used);
    return bytes;
}

}  // namespace

std::string input_name(const std::string& path) {
    return path == "-" ? "standard input" : path;
}

std::string read_input(const std::string& path, uint64_t max_bytes) {
    const std::string shown = printable(input_name(path));
    if (path == "-") return read_stream(STDIN_FILENO, shown, max_bytes);
    if (const auto own = own_descriptor(checked_path(path))) return read_stream(*own, shown, max_bytes);
    struct stat info {};
    if (!examine(path, info) || !(S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode)))
        return read_file(path, max_bytes);
    const int descriptor = retried([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY); });
    if (descriptor < 0) fail(status_of(errno), shown, ": cannot be opened: ", system_text(errno));
    struct Close {
        int descriptor;
        ~Close() { ::close(descriptor); }
    };
    const Close close{descriptor};
    return read_stream(descriptor, shown, max_bytes);
}

namespace {

// A file being written beside its target; removed unless keep() was called.
class TemporaryFile {
  public:
    explicit TemporaryFile(const std::string& directory) {
        static std::atomic<uint64_t> counter{0};
        for (int attempt = 0; attempt < 1000; ++attempt) {
            path_ = path_join(directory, str(".refrag-", ::getpid(), "-", counter.fetch_add(1), ".tmp"));
            descriptor_ =
                retried([&] { return ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
            if (descriptor_ >= 0) return;
            if (errno != EEXIST) break;
        }
        fail(Status::runtime, printable(directory),
             ": cannot make a temporary file in it: ", system_text(errno));
    }
    ~TemporaryFile() {
        if (descriptor_ >= 0) ::close(descriptor_);
        if (!path_.empty()) ::unlink(path_.c_str());
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    int descriptor() const { return descriptor_; }
    const std::string& path() const { return path_; }
    // The descriptor is gone whatever close says; interrupted, it has only not waited for the disk, which
    // fsync has done before.
    bool close_checked() { return ::close(std::exchange(descriptor_, -1)) == 0 || errno == EINTR; }
    void keep() { path_.clear(); }

  private:
    std::string path_;
    int descriptor_ = -1;
};

void sync_directory(const std::string& directory) {
    const int descriptor =
        retried([&] { return ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
    if (descriptor < 0) return;  // no right to list it: the rename stands, only its durability is not forced
    const int result = retried([&] { return ::fsync(descriptor); });
    const int error = errno;
    ::close(descriptor);
    // Some file systems have no fsync for directories and say EINVAL.
    if (result != 0 && error != EINVAL)
        fail(Status::runtime, printable(directory), ": fsync failed: ", system_text(error));
}

}  // namespace

void write_file_atomic(const std::string& path, std::string_view bytes) {
    std::string target = checked_path(path);
    struct stat info {};
    const bool exists = examine(target, info);
    if (exists) {
        REFRAG_CHECK(S_ISREG(info.st_mode), Status::bad_input, printable(path),
                     ": cannot be written: expected a regular file or none, found ", kind_of(info.st_mode));
        // The file behind a link is replaced, not the link.
        const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(target.c_str(), nullptr), ::free);
        if (resolved == nullptr)
            fail(status_of(errno), printable(path), ": cannot be resolved: ", system_text(errno));
        target = resolved.get();
    }
    const std::string directory = path_parent(target);

    TemporaryFile file(directory);
    const auto check = [&](bool ok, const char* what) {
        if (!ok) fail(Status::runtime, printable(path), ": ", what, " failed: ", system_text(errno));
    };
    if (exists) check(::fchmod(file.descriptor(), info.st_mode & 07777) == 0, "setting permissions");
    write_all(file.descriptor(), bytes, printable(path));
    check(retried([&] { return ::fsync(file.descriptor()); }) == 0, "fsync");
    check(file.close_checked(), "closing");
    check(::rename(file.path().c_str(), target.c_str()) == 0, "renaming the temporary file");
    file.keep();
    sync_directory(directory);
}

std::string path_join(std::string_view directory, std::string_view name) {
    std::string path(directory);
    if (!path.empty() && path.back() != '/') path.push_back('/');
    return path.append(name);
}

std::string path_parent(std::string_view path) {
    const size_t slash = path.rfind('/');
    if (slash == std::string_view::npos) return ".";
    return std::string(path.substr(0, std::max<size_t>(slash, 1)));
}

std::string path_name(std::string_view path) {
    const size_t slash = path.rfind('/');
    return std::string(slash == std::string_view::npos ? path : path.substr(slash + 1));
}

bool is_file(const std::string& path) {
    struct stat info {};
    return examine(path, info) && S_ISREG(info.st_mode);
}

bool is_directory(const std::string& path) {
    struct stat info {};
    return examine(path, info) && S_ISDIR(info.st_mode);
}

std::string printable(std::string_view text, size_t max_chars) {
    static constexpr char digits[] = "0123456789abcdef";
    std::string out;
    size_t at = 0;
    while (at < text.size()) {
        if (out.size() >= max_chars) return out + "...";
        const Utf8Step step = decode_utf8(text, at);
        const bool control = step.code < 0x20 || (step.code >= 0x7F && step.code < 0xA0) ||
                             step.code == 0x2028 || step.code == 0x2029;
        if (step.valid && !control) {
            out.append(text.substr(at, step.bytes));
        } else {
            for (size_t i = at; i < at + step.bytes; ++i) {
                const auto byte = static_cast<unsigned char>(text[i]);
                out.append("\\x").push_back(digits[byte >> 4]);
                out.push_back(digits[byte & 15]);
            }
        }
        at += step.bytes;
    }
    return out;
}

}  // namespace refrag
