// Reads GGUF files, versions 2 and 3: "GGUF", version, counts, typed metadata, a table of tensors, then their
// bytes, each aligned. Everything is validated when a file is opened, with one message a rule; afterwards an
// entry can be trusted, and only its bytes are read. Never executes or maps anything. What the metadata mean
// is models/gguf_config.h's business.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/sha256.h"
#include "io/file.h"
#include "io/gguf_blocks.h"

namespace refrag {

// A list of numbers, truth values or texts; only the vector that `kind` says is filled.
struct GgufList {
    enum class Kind { integers, reals, truths, texts } kind = Kind::integers;
    std::vector<int64_t> integers;
    std::vector<double> reals;
    std::vector<bool> truths;
    std::vector<std::string> texts;
    size_t size() const;
};

// Integers of any width; those above INT64_MAX are refused when the file is opened.
using GgufValue = std::variant<int64_t, double, bool, std::string, GgufList>;

struct GgufTensor {
    std::string name;
    GgufType type = GgufType::f32;
    std::vector<int64_t> shape;  // as networks say it, [rows, columns]: the file has it the other way round
    uint64_t offset = 0;         // absolute, in bytes from the start of the file
    uint64_t bytes = 0;

    int64_t n_values() const;
    std::string shape_text() const;  // "[2, 3]"
};

// One file, validated completely by the constructor; throws Error(bad_input). Const methods may be called
// from several threads at once.
class GgufFile {
  public:
    explicit GgufFile(const std::string& path);

    const std::string& path() const { return file_.path(); }
    // In order of their place in the file.
    const std::vector<GgufTensor>& tensors() const { return tensors_; }
    const GgufTensor* find(std::string_view name) const;  // null where there is none

    std::vector<std::string> keys() const;  // sorted
    bool has(std::string_view key) const { return value(key) != nullptr; }
    // Null where there is no such key.
    const GgufValue* value(std::string_view key) const;
    // Of the key; Error(bad_input) with key, expected and found where it is missing or something else.
    const std::string& text(std::string_view key) const;
    int64_t integer(std::string_view key, int64_t least, int64_t most) const;
    double real(std::string_view key) const;  // a finite one
    bool truth(std::string_view key) const;
    const std::vector<std::string>& texts(std::string_view key) const;
    const std::vector<int64_t>& integers(std::string_view key) const;
    // The reals of a list, or nothing where there is no such key.
    std::optional<std::vector<double>> reals_if_any(std::string_view key) const;
    // Refuses the key's value: "FILE: KEY: expected EXPECTED, found ...".
    [[noreturn]] void refuse(std::string_view key, const std::string& expected) const;

    // Of all bytes before the tensors': what the file says but for the weights' values.
    Sha256Digest header_digest() const;

    // Rows [row, row + n) of a tensor of one or two dimensions (one: it is one row) as fp32, into
    // destination[n * columns].
    void read_rows(const GgufTensor& tensor, int64_t row, int64_t n, float* destination) const;

  private:
    template <typename T>
    const T& typed(std::string_view key, const char* expected) const;

    File file_;
    std::unordered_map<std::string, GgufValue> metadata_;
    std::vector<GgufTensor> tensors_;
    std::unordered_map<std::string, size_t> by_name_;
    uint64_t header_bytes_ = 0;
};

// Whether `path` is a regular file that begins as GGUF files do.
bool is_gguf_file(const std::string& path);

}  // namespace refrag
