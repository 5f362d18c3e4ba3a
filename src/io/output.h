// Where results go. Regular files are replaced whole; a device, a pipe or an open descriptor is written to.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

namespace refrag {

// An option of a command that names a file to write; an empty path: not given.
struct OutputPath {
    const char* option;
    const std::string& path;
};

// Refuses what write_output could not write, before any work is done: a directory that is missing or closed
// to writing, a directory or a socket in the file's place, a descriptor that is not open for writing, two
// options with one file. Status::runtime, or Status::usage for two options with one file.
void check_output_paths(std::initializer_list<OutputPath> outputs);

// Writes `bytes` to `path`. "-", /dev/stdout, /dev/fd/N: to that descriptor, where it stands. A device or a
// pipe: opened and written to. So is the file that standard output or standard error goes to: replaced by a
// rename it would lose what those streams wrote. Anything else: write_file_atomic.
void write_output(const std::string& path, std::string_view bytes);

// The descriptor of this process that a path names, links followed ("/dev/stdin", "/dev/fd/63").
std::optional<int> own_descriptor(const std::string& path);

}  // namespace refrag
