// Brings a network's tensors from safetensors files into a backend's memory, checking name, shape and dtype,
// and keeping account of what was used, so that a missing or an extra tensor is refused by name. A NaN or an
// infinity in a weight is refused here, with its place, and not found as a strange answer later.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "io/safetensors.h"
#include "ops/backend.h"

namespace refrag {

// A parameter vector [1, n] in F32, in a backend's memory.
class DeviceVector {
  public:
    DeviceVector() = default;
    DeviceVector(Backend& backend, const std::vector<float>& values);
    Tensor view() const { return view_; }  // empty when the network has no such vector

  private:
    Buffer buffer_;
    Tensor view_;
};

class WeightLoader {
  public:
    // `path`: a directory with model.safetensors (or shards and their index), or one .safetensors file.
    // `optional_prefix`: names may carry it or not ("model.", "roberta."); "" for none.
    WeightLoader(Backend& backend, const std::string& path, std::string optional_prefix);

    bool has(std::string_view name) const;
    // W [out_dim, in_dim] in the file's dtype (F32, BF16, F16).
    std::unique_ptr<Matrix> matrix(std::string_view name, int64_t out_dim, int64_t in_dim);
    // [n], widened to F32.
    DeviceVector vector(std::string_view name, int64_t n);

    // Every tensor that nothing asked for must be one of `known_unused` (a name after prefix stripping, or a
    // suffix beginning with '*'); returns those, sorted. Anything else is refused by name.
    std::vector<std::string> finish(const std::vector<std::string>& known_unused) const;

    uint64_t parameters() const { return parameters_; }
    const std::string& path() const { return path_; }

  private:
    const TensorEntry& find(std::string_view name, const std::vector<int64_t>& shape);
    // Refuses NaN and infinities among n values of `dtype`, the first of which is the tensor's element
    // `begin`.
    void check_finite(const TensorEntry& entry, DType dtype, const void* values, int64_t begin,
                      int64_t n) const;

    Backend& backend_;
    std::string path_;
    std::string shown_;  // path_ as messages write it
    std::string prefix_;
    WeightFiles files_;
    std::unordered_set<std::string> used_;
    uint64_t parameters_ = 0;
};

}  // namespace refrag
