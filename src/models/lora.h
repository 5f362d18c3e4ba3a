// A PEFT adapter directory: adapter_config.json and adapter_model.safetensors. LoRA (Hu et al. 2021) on
// linear layers: beside a matrix W [out, in] lie A [r, in] and B [out, r], and the network computes with W +
// scale B A. What an adapter may be beyond that is refused by name. lora_weights.h merges it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "io/json.h"
#include "io/safetensors.h"

namespace refrag {

// What belongs to one matrix, in F32.
struct LoraFactors {
    int64_t rank = 0;
    float scale = 0;
    std::vector<float> a;  // [rank, in_dim]
    std::vector<float> b;  // [out_dim, rank]
    // A copy of W that PEFT saves where the head is adapted; null as a rule.
    const TensorEntry* copy = nullptr;
};

class LoraAdapter {
  public:
    // Reads the configuration and the tensors' table. Status::bad_input with file, key, expected, found.
    explicit LoraAdapter(const std::string& dir);

    const std::string& dir() const { return dir_; }
    int64_t rank() const { return rank_; }
    double alpha() const { return alpha_; }
    size_t n_matrices() const { return n_matrices_; }  // that the file has factors for

    // Of the matrix that a network calls `name` ("layers.0.self_attn.q_proj.weight"); null where the adapter
    // leaves it alone. Checks that configuration, shapes and ranks agree, and that all values are finite.
    std::shared_ptr<const LoraFactors> open(std::string_view name, int64_t out_dim, int64_t in_dim);
    // Refuses a copy whose rows [row, row + n) are not these, w [n, in_dim].
    void check_copy(const TensorEntry& copy, int64_t row, int64_t n, const float* w) const;
    // Called when the network has all its matrices: refuses tensors and target_modules that nothing asked
    // for.
    void finish() const;

  private:
    void read_config(const Json& json);
    void read_patterns(const Json& json);
    // Whether the configuration says that the adapter has a pair for this module; none where it leaves that
    // to the file, as a regular expression does.
    std::optional<bool> targets(const std::string& module);
    bool in_layers(std::string_view module) const;
    std::string place_of(const TensorEntry& entry) const;
    void check_entry(const TensorEntry& entry, const std::vector<int64_t>& shape) const;
    std::vector<float> read(const std::string& name, const std::vector<int64_t>& shape);

    struct Pattern {
        std::string name;
        double value;
    };
    // Of the first pattern that is the module's name or its end.
    static double find(const std::vector<Pattern>& patterns, std::string_view module, double otherwise);

    std::string dir_;
    std::string config_path_;
    WeightFiles files_;
    int64_t rank_ = 0;
    double alpha_ = 0;
    bool by_root_ = false;  // scale = alpha / sqrt(r), not alpha / r
    std::vector<Pattern> ranks_, alphas_;
    std::vector<std::string> targets_;  // empty: all_linear_, or what the file has
    bool all_linear_ = false;
    std::vector<std::string> excluded_;
    std::vector<int64_t> layers_;  // empty: all
    size_t n_matrices_ = 0;
    std::unordered_set<std::string> used_;
    std::unordered_set<std::string> matched_;  // of targets_
};

// Whether DIR holds an adapter.
bool is_lora_directory(const std::string& dir);

}  // namespace refrag
