// Bounded file access: every read has a known place and length, every write is whole or not there.
// Model files are regular files (a FIFO or a device could block for ever); nothing is mapped into memory, so
// a file cut short while in use gives an Error and never a signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace refrag {

// A regular file open for reading. Movable; read_at may be called from several threads at once.
class File {
  public:
    // Throws Error(bad_input) where the file is missing, unreadable or not a regular file.
    explicit File(const std::string& path);
    ~File();
    File(File&& other) noexcept;
    File& operator=(File&& other) noexcept;
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const noexcept { return path_; }
    // Size in bytes when the file was opened.
    uint64_t size() const noexcept { return size_; }

    // Reads exactly `bytes` bytes at `offset` into `destination` (not null unless bytes is 0). Throws where
    // the range lies outside the file, the file was cut or rewritten since it was opened, or the disk fails.
    void read_at(uint64_t offset, void* destination, size_t bytes) const;

  private:
    std::string path_;
    int descriptor_ = -1;
    uint64_t size_ = 0;
    int64_t modified_ns_ = 0;
};

// The whole file as bytes; refuses what is larger than max_bytes before reading it.
std::string read_file(const std::string& path, uint64_t max_bytes);

// What a user names as input: "-" is standard input; a pipe, a device and a descriptor (`<(...)`) are read to
// their end; anything else is read_file's. Refuses more than max_bytes.
std::string read_input(const std::string& path, uint64_t max_bytes);
// "standard input" for "-", else the path: how messages name it.
std::string input_name(const std::string& path);

// Writes a file whole or not at all: temporary file in the same directory, fsync, rename, fsync of the
// directory. An existing file keeps its permission bits. On failure the temporary file is removed and `path`
// is untouched; only where the last step, the directory's fsync, fails, does `path` hold the new bytes.
void write_file_atomic(const std::string& path, std::string_view bytes);

// "dir" + "name" with one slash between; an empty dir gives name.
std::string path_join(std::string_view directory, std::string_view name);
// The part before the last slash: "." where there is none, "/" for "/x".
std::string path_parent(std::string_view path);
// The part after the last slash.
std::string path_name(std::string_view path);
// Whether there is one at `path`, links followed. Throws where that cannot be known (no right to look, a disk
// that fails): a file that cannot be seen must not pass for one that is not there.
bool is_file(const std::string& path);  // a regular file
bool is_directory(const std::string& path);

// A path or other foreign text as it may stand in a message: one line, control bytes and invalid UTF-8
// escaped as \xNN, cut with "..." after max_chars bytes.
std::string printable(std::string_view text, size_t max_chars = 200);

}  // namespace refrag
