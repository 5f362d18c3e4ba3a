// Random weights instead of a file's, for measuring: a network's speed depends on its shapes, not on what it
// has learnt. Matrices are BF16 (or made of such), about normal with standard deviation 1 / sqrt(in_dim), so
// that activations neither grow without bound nor fade. Scales of norms are 1, every other vector is 0. The
// values depend on the seed, the tensor's name and the row alone. They are made row by row straight into the
// device's packing: no second copy exists at any time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/threads.h"
#include "models/int8_weights.h"
#include "models/weight_source.h"

namespace refrag {

class RandomWeights : public WeightSource {
  public:
    RandomWeights(Device& device, uint64_t seed, LoadedBytes loaded = {},
                  WeightFormat format = WeightFormat::as_stored);

    std::unique_ptr<Matrix> matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    std::unique_ptr<Matrix> layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    DeviceVector vector(std::string_view name, int64_t n) override;
    // There is nothing that could be left over.
    std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const override;
    uint64_t parameters() const override { return parameters_; }
    uint64_t held_bytes() const override { return held_bytes_; }

  private:
    std::unique_ptr<Matrix> make(std::string_view name, int64_t out_dim, int64_t in_dim, WeightFormat format);

    Device& device_;
    uint64_t seed_;
    LoadedBytes loaded_;
    WeightFormat format_;
    ThreadPool threads_;  // drawing takes longer than packing
    uint64_t parameters_ = 0;
    uint64_t held_bytes_ = 0;
};

// Row `row` of the tensor whose seed this is: in_dim values as BF16 bits. Thread-safe.
void random_row(uint64_t tensor_seed, int64_t row, int64_t in_dim, uint16_t* out);

}  // namespace refrag
