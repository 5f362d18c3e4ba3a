// Weights with a LoRA adapter on top: each matrix that the adapter has factors for is W + scale B A, computed
// in fp32 row by row while it is loaded and then rounded to what W is kept in. Adapters may be put on top of
// one another; between them nothing is rounded.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/threads.h"
#include "models/lora.h"
#include "models/stored_weights.h"

namespace refrag {

class LoraWeights : public StoredWeights {
  public:
    // `format` is that of this source; the one of `base` makes no difference. An adapter serves one network.
    LoraWeights(Device& device, std::unique_ptr<StoredWeights> base, LoraAdapter adapter,
                WeightFormat format = WeightFormat::as_stored);

    bool has(std::string_view name) const override { return base_->has(name); }
    bool equal(std::string_view a, std::string_view b) const override { return base_->equal(a, b); }
    StoredMatrix open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    StoredVector open_vector(std::string_view name, int64_t n) override {
        return base_->open_vector(name, n);
    }
    std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const override;

  private:
    struct Merged;
    void read_merged(const Merged& merged, DType dtype, int64_t row, int64_t n, void* dst);

    std::unique_ptr<StoredWeights> base_;
    LoraAdapter adapter_;
    ThreadPool threads_;  // B A takes longer than reading W
};

}  // namespace refrag
