// Weights in safetensors files: WeightLoader brings tensors into a device's memory, checking name, shape and
// dtype, and keeping account of what was used, so that a missing or an extra tensor is refused by name. A NaN
// or an infinity in a weight is refused here, with its place, and not found as a strange answer later.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "io/safetensors.h"
#include "models/stored_weights.h"

namespace refrag {

class WeightLoader : public StoredWeights {
  public:
    // `path`: a directory with model.safetensors (or shards and their index), or one .safetensors file.
    // `optional_prefix`: names may carry it or not ("model.", "roberta."); "" for none.
    WeightLoader(Device& device, const std::string& path, std::string optional_prefix,
                 LoadedBytes loaded = {}, WeightFormat format = WeightFormat::as_stored);

    bool has(std::string_view name) const override;
    bool equal(std::string_view a, std::string_view b) const override;
    // In the file's dtype: F32, BF16, F16; or I8, whose scales are the tensor NAME_scale, F16
    // [out_dim, in_dim / 32 rounded up] (weights_tools/quantize.py).
    StoredMatrix open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    StoredVector open_vector(std::string_view name, int64_t n) override;
    // A tensor of any other name is refused. Prefixes are stripped before names are compared.
    std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const override;

    const std::string& path() const { return path_; }

  private:
    // The tensor of this name, with the prefix or without, in either spelling of a LayerNorm's parameters;
    // null where there is none. Refuses two.
    const TensorEntry* lookup(std::string_view name) const;
    void check_redundant(const TensorEntry& entry, const KnownUnused& known) const;
    // The tensor of this name, which must have this shape and one of these dtypes, counted as used.
    const TensorEntry& find(std::string_view name, const std::vector<int64_t>& shape,
                            std::initializer_list<std::string_view> dtypes);
    StoredMatrix open_int8(const TensorEntry& entry, std::string_view name, int64_t out_dim, int64_t in_dim);
    std::string place_of(const TensorEntry& entry) const;
    // Rows of a matrix of floats in its own dtype, checked.
    void read_rows(const TensorEntry& entry, int64_t in_dim, int64_t row, int64_t n, void* dst);
    // Refuses scales, F16, that are not finite or negative; the first is the tensor's element `begin`.
    void check_scales(const TensorEntry& entry, const void* scales, int64_t begin, int64_t n) const;

    std::string path_;
    std::string shown_;  // path_ as messages write it
    std::string prefix_;
    WeightFiles files_;
    std::unordered_set<std::string> used_;
};

}  // namespace refrag
