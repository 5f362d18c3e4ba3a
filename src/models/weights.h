// Where a network's tensors come from: WeightSource, what a network asks for; WeightLoader, which brings them
// from safetensors files into a device's memory, checking name, shape and dtype, and keeping account of what
// was used, so that a missing or an extra tensor is refused by name. A NaN or an infinity in a weight is
// refused here, with its place, and not found as a strange answer later. (random_weights.h is the other
// source.)
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/sha256.h"
#include "io/safetensors.h"
#include "models/int8_weights.h"
#include "ops/backend.h"

namespace refrag {

// A parameter vector [1, n] in F32, in a device's memory.
class DeviceVector {
  public:
    DeviceVector() = default;
    DeviceVector(Device& device, const std::vector<float>& values);
    Tensor view() const { return view_; }  // empty when the network has no such vector

  private:
    Buffer buffer_;
    Tensor view_;
};

// Told how many bytes of weights have been brought since the last call; may be empty. Called on the thread
// that loads.
using LoadedBytes = std::function<void(uint64_t bytes)>;

// A tensor that a network does not read. Where `is_redundant` is given it must hold of the tensor's values,
// or the tensor is refused: a file that says something else than its config.json is not read as if it did
// not.
struct KnownUnused {
    std::string name;  // or a suffix beginning with '*'
    std::function<bool(std::span<const double> values)> is_redundant = {};
    std::string expected = {};  // in words, for the message
};

class WeightSource {
  public:
    virtual ~WeightSource() = default;
    // W [out_dim, in_dim].
    virtual std::unique_ptr<Matrix> matrix(std::string_view name, int64_t out_dim, int64_t in_dim) = 0;
    // The same for a network's many large products: quantised where the source was asked for that.
    virtual std::unique_ptr<Matrix> layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) = 0;
    // [n] in F32.
    virtual DeviceVector vector(std::string_view name, int64_t n) = 0;
    // Called when the network has all it needs. Every tensor that nothing asked for must be one of
    // `known_unused`, and redundant where that is asked; returns those, sorted.
    virtual std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const = 0;
    // Is there a tensor of this name that a network may leave alone?
    virtual bool has(std::string_view) const { return false; }
    // Do two tensors that are there hold the same values?
    virtual bool equal(std::string_view, std::string_view) const { return false; }
    // Values given so far, to all networks that share this source, and the bytes that they take in the
    // device's memory.
    virtual uint64_t parameters() const = 0;
    virtual uint64_t held_bytes() const = 0;

    // From here on every tensor given, its name, shape, format and values, is part of a digest, taken as the
    // values are read; take_digest() ends it and gives it.
    void begin_digest() { digest_.emplace(); }
    Sha256Digest take_digest() {
        const Sha256Digest digest = digest_.value().digest();
        digest_.reset();
        return digest;
    }

  protected:
    void add_to_digest(std::string_view description) {
        if (digest_) digest_->add_field(description);
    }
    // Raw values: what a description before them has announced.
    void add_to_digest(const void* values, size_t bytes) {
        if (digest_) digest_->add(values, bytes);
    }

  private:
    std::optional<Sha256> digest_;
};

class WeightLoader : public WeightSource {
  public:
    // `path`: a directory with model.safetensors (or shards and their index), or one .safetensors file.
    // `optional_prefix`: names may carry it or not ("model.", "roberta."); "" for none.
    WeightLoader(Device& device, const std::string& path, std::string optional_prefix,
                 LoadedBytes loaded = {}, WeightFormat format = WeightFormat::as_stored);

    bool has(std::string_view name) const override;
    bool equal(std::string_view a, std::string_view b) const override;
    // In the file's dtype: F32, BF16, F16; or I8, whose scales are the tensor NAME_scale, F16
    // [out_dim, in_dim / 32 rounded up] (weights_tools/quantize.py).
    std::unique_ptr<Matrix> matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    std::unique_ptr<Matrix> layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    DeviceVector vector(std::string_view name, int64_t n) override;
    // A tensor of any other name is refused. Prefixes are stripped before names are compared.
    std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const override;

    uint64_t parameters() const override { return parameters_; }
    uint64_t held_bytes() const override { return held_bytes_; }
    const std::string& path() const { return path_; }

  private:
    // The tensor of this name, with the prefix or without, in either spelling of a LayerNorm's parameters;
    // null where there is none. Refuses two.
    const TensorEntry* lookup(std::string_view name) const;
    void check_redundant(const TensorEntry& entry, const KnownUnused& known) const;
    // The tensor of this name, which must have this shape and one of these dtypes, counted as used.
    const TensorEntry& find(std::string_view name, const std::vector<int64_t>& shape,
                            std::initializer_list<std::string_view> dtypes);
    std::unique_ptr<Matrix> make(std::string_view name, int64_t out_dim, int64_t in_dim, WeightFormat format);
    std::unique_ptr<Matrix> make_stored_int8(const TensorEntry& entry, std::string_view name, int64_t out_dim,
                                             int64_t in_dim);
    // Rows of a matrix of floats, checked.
    void read_rows(const TensorEntry& entry, int64_t in_dim, int64_t row, int64_t n, void* dst);
    // Refuses NaN and infinities among n values of `dtype`, the first of which is the tensor's element
    // `begin`.
    void check_finite(const TensorEntry& entry, DType dtype, const void* values, int64_t begin,
                      int64_t n) const;
    // The same for n F16 scales, which may not be negative either.
    void check_scales(const TensorEntry& entry, const void* scales, int64_t begin, int64_t n) const;
    [[noreturn]] void refuse_value(const TensorEntry& entry, const char* expected, const std::string& found,
                                   int64_t index) const;

    Device& device_;
    std::string path_;
    std::string shown_;  // path_ as messages write it
    std::string prefix_;
    WeightFiles files_;
    LoadedBytes loaded_;
    WeightFormat format_;
    std::unordered_set<std::string> used_;
    uint64_t parameters_ = 0;
    uint64_t held_bytes_ = 0;
};

}  // namespace refrag
