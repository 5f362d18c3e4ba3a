// What a network asks its tensors of: a WeightSource. Where they lie is each source's own business:
// safetensors files (weights.h), GGUF files (gguf_weights.h), either with an adapter on top (lora_weights.h),
// or nowhere (random_weights.h).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/sha256.h"
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

}  // namespace refrag
