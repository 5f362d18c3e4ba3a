// A decoder's weights in a GGUF file, under the names that Hugging Face gives them. Quantised tensors become
// BF16 as they are read, or, where 8 bits are asked for, those; F32, F16 and BF16 stay what they are. The
// rows of q and k, which a LLaMA's file holds with the two halves of each head interleaved, are put back in
// order.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "io/gguf.h"
#include "models/stored_weights.h"
#include "models/transformer_config.h"

namespace refrag {

class GgufWeights : public StoredWeights {
  public:
    GgufWeights(Device& device, std::shared_ptr<const GgufFile> file, const DecoderConfig& config,
                LoadedBytes loaded = {}, WeightFormat format = WeightFormat::as_stored);

    bool has(std::string_view name) const override;
    StoredMatrix open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) override;
    StoredVector open_vector(std::string_view name, int64_t n) override;
    // Refuses every tensor that was not opened: such files hold none that a network may leave alone.
    std::vector<std::string> finish(const std::vector<KnownUnused>& known_unused) const override;

  private:
    // The tensor of a network's name, in this shape, counted as used.
    const GgufTensor& find(std::string_view name, const std::vector<int64_t>& shape);
    // Heads whose rows lie interleaved in the tensor of this name; 0 for none.
    int64_t interleaved_heads(std::string_view name) const;
    void read_rows(const GgufTensor& tensor, int64_t heads, DType dtype, int64_t row, int64_t n, void* dst);
    std::string place_of(const GgufTensor& tensor) const;

    std::shared_ptr<const GgufFile> file_;
    bool is_interleaved_;  // q and k; files of LLaMA alone
    int64_t n_heads_;
    int64_t n_kv_heads_;
    std::unordered_set<std::string> used_;
};

// The name in a GGUF file of what Hugging Face's LLaMA calls `name` (without "model."); "" for a name that
// has no place there.
std::string gguf_name(std::string_view name);

}  // namespace refrag
