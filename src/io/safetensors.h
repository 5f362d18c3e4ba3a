// Reads safetensors files: 8 bytes header length (little endian), a JSON header that maps a name to
// {dtype, shape, data_offsets}, then the tensors' bytes without holes. Everything is validated when a file is
// opened, with one message a rule; afterwards an entry can be trusted, and only its bytes are read, by pread,
// into the caller's place. Values are little endian and need not be aligned in the file. Never executes or
// maps anything.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "io/file.h"

namespace refrag {

// Where one tensor lies. `dtype` is empty for the format's other types (I64, BOOL, F8_..): such tensors may
// be present (position_ids), are sized and listed, and can be read as raw bytes only.
struct TensorEntry {
    std::string name;
    std::string dtype_name;  // as in the file: "F32", "I64", ...
    std::optional<DType> dtype;
    std::vector<int64_t> shape;  // empty for a scalar
    size_t file = 0;             // index into WeightFiles::paths(); 0 within one SafetensorsFile
    uint64_t offset = 0;         // absolute, in bytes from the start of the file
    uint64_t bytes = 0;

    int64_t n_values() const;        // product of the shape; 1 for a scalar
    std::string shape_text() const;  // "[2, 3]"
};

// One file, validated completely by the constructor; throws Error(bad_input).
class SafetensorsFile {
  public:
    explicit SafetensorsFile(const std::string& path);

    const std::string& path() const { return file_.path(); }
    // In order of their place in the file.
    const std::vector<TensorEntry>& tensors() const { return tensors_; }
    const TensorEntry* find(std::string_view name) const;  // null where there is none
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    // Reads `bytes` bytes that begin `skip` bytes into the tensor.
    void read(const TensorEntry& entry, uint64_t skip, void* destination, size_t bytes) const;

  private:
    File file_;
    std::vector<TensorEntry> tensors_;
    std::unordered_map<std::string, size_t> by_name_;
    std::map<std::string, std::string> metadata_;
};

// The weights of one network: a single file, or shards named by an index. Const methods may be called from
// several threads at once.
class WeightFiles {
  public:
    // `path` is a .safetensors file, or a directory with model.safetensors or model.safetensors.index.json
    // (both at once is refused). Shards must be plain file names within the directory, and index and shards
    // must agree in both directions.
    static WeightFiles open(const std::string& path);

    // All tensors of all files, by name.
    const std::vector<TensorEntry>& tensors() const { return tensors_; }
    const std::vector<std::string>& paths() const { return paths_; }
    // What messages call these weights: the path given to open.
    const std::string& name() const { return name_; }

    const TensorEntry* find(std::string_view name) const;  // null where there is none
    const TensorEntry& get(std::string_view name) const;   // throws, naming file and tensor

    // Raw bytes, exactly as stored, into destination[entry.bytes] (checked against destination_bytes).
    void read(const TensorEntry& entry, void* destination, size_t destination_bytes) const;
    // Raw bytes of a part: `bytes` bytes that begin `skip` bytes into the tensor.
    void read_part(const TensorEntry& entry, uint64_t skip, void* destination, size_t bytes) const;
    // All values as float; exact for F32, F16 and BF16, refused for anything else.
    std::vector<float> read_f32(const TensorEntry& entry) const;
    std::vector<float> read_f32(std::string_view name) const { return read_f32(get(name)); }
    // The same into destination[entry.n_values()], by pieces of bounded size.
    void read_f32(const TensorEntry& entry, float* destination, size_t n_destination) const;

  private:
    void add_file(SafetensorsFile file);
    void finish();

    std::string name_;
    std::vector<std::string> paths_;
    std::vector<SafetensorsFile> files_;
    std::vector<TensorEntry> tensors_;  // sorted by name
};

}  // namespace refrag
