// See random_weights.h.
#include "models/random_weights.h"

#include <bit>
#include <cmath>
#include <utility>

namespace refrag {
namespace {

// The finisher of splitmix64: neighbouring inputs give unrelated outputs.
uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// FNV-1a.
uint64_t hash_of(std::string_view text) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    return hash;
}

// The sum of four bytes, centred: bell-shaped, and a few instructions a value.
float centred(uint32_t bits) {
    const uint32_t pairs = (bits & 0x00ff00ffu) + ((bits >> 8) & 0x00ff00ffu);
    return static_cast<float>(static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16)) - 510);
}

// Variance of a byte is (256^2 - 1) / 12, of four 21845.
constexpr float kVarianceOfFour = 21845.0f;

}  // namespace

void random_row(uint64_t tensor_seed, int64_t row, int64_t in_dim, uint16_t* out) {
    const float scale = 1.0f / std::sqrt(kVarianceOfFour * static_cast<float>(in_dim));
    uint64_t state = mixed(tensor_seed + static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u) | 1u;
    for (int64_t i = 0; i < in_dim; i += 2) {
        state ^= state << 13;  // xorshift64
        state ^= state >> 7;
        state ^= state << 17;
        const float first = centred(static_cast<uint32_t>(state)) * scale;
        out[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(first) >> 16);
        if (i + 1 == in_dim) break;
        const float second = centred(static_cast<uint32_t>(state >> 32)) * scale;
        out[i + 1] = static_cast<uint16_t>(std::bit_cast<uint32_t>(second) >> 16);
    }
}

RandomWeights::RandomWeights(Device& device, uint64_t seed, LoadedBytes loaded, WeightFormat format)
    : device_(device),
      seed_(seed),
      loaded_(std::move(loaded)),
      format_(format),
      threads_(default_threads()) {}

std::unique_ptr<Matrix> RandomWeights::matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    std::unique_ptr<Matrix> made = make(name, out_dim, in_dim, WeightFormat::as_stored);
    held_bytes_ += made->device_bytes();
    return made;
}

std::unique_ptr<Matrix> RandomWeights::layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    std::unique_ptr<Matrix> made = make(name, out_dim, in_dim, format_);
    held_bytes_ += made->device_bytes();
    return made;
}

std::unique_ptr<Matrix> RandomWeights::make(std::string_view name, int64_t out_dim, int64_t in_dim,
                                            WeightFormat format) {
    parameters_ += static_cast<uint64_t>(out_dim * in_dim);
    // The values follow from this.
    add_to_digest(str("random ", seed_, " ", name, " [", out_dim, ", ", in_dim, "] ",
                      format == WeightFormat::int8 ? "int8" : "as stored"));
    const uint64_t tensor_seed = mixed(seed_ ^ hash_of(name));
    const auto read = [&](int64_t begin, int64_t n, void* dst) {
        auto* out = static_cast<uint16_t*>(dst);
        threads_.run(n, [&](int64_t i) { random_row(tensor_seed, begin + i, in_dim, out + i * in_dim); });
        if (loaded_) loaded_(static_cast<uint64_t>(n * in_dim) * sizeof(uint16_t));
    };
    if (format == WeightFormat::as_stored) return device_.make_matrix(DType::bf16, out_dim, in_dim, read);
    return make_int8_matrix(device_, DType::bf16, out_dim, in_dim, read,
                            [](int64_t, int64_t) { fail(Status::runtime, "random weights are small"); });
}

DeviceVector RandomWeights::vector(std::string_view name, int64_t n) {
    parameters_ += static_cast<uint64_t>(n);
    add_to_digest(str("random ", seed_, " ", name, " [", n, "]"));
    held_bytes_ += static_cast<uint64_t>(n) * sizeof(float);
    // "input_layernorm.weight", "attention.output.LayerNorm.weight", "layers.0.norm1.weight", ...
    const bool scale = name.ends_with(".weight");
    return DeviceVector(device_, std::vector<float>(static_cast<size_t>(n), scale ? 1.0f : 0.0f));
}

std::vector<std::string> RandomWeights::finish(const std::vector<KnownUnused>& /*known_unused*/) const {
    return {};
}

}  // namespace refrag
