// What the two Hugging Face networks' config.json say, checked. Everything that would change the maths and is
// not implemented is refused by name. A decoder's family is known here alone: what it means for the network
// is said in DecoderConfig, field by field.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace refrag {

// RoPE frequency scaling of LLaMA 3.1 (long wavelengths slowed down, the middle blended); `factor` > 1.
struct Llama3RopeScaling {
    double factor = 1.0;
    double low_freq_factor = 1.0;
    double high_freq_factor = 4.0;
    int64_t original_max_seq_len = 8192;
};

// YaRN: low frequencies interpolated by `factor`, high ones as they are, a ramp between.
struct YarnRopeScaling {
    double factor = 1.0;
    double attention_factor = 1.0;  // of q and of k
    double beta_fast = 32.0;        // turns within original_max_seq_len at which the ramp begins,
    double beta_slow = 1.0;         // and ends
    bool truncate = true;           // its ends to whole dimensions
    int64_t original_max_seq_len = 0;
};

// Where a block's norm stands: x += block(norm(x)), or x += norm(block(x)).
enum class NormPlace { before, after };

// RMSNorm of q and k before they are rotated: over each head's width, or over all heads' together.
enum class QkNorm { none, per_head, full_width };

struct DecoderConfig {
    std::string family = "llama";  // model_type: for the user to read
    int32_t dim = 0;               // hidden_size
    int32_t hidden_dim = 0;        // intermediate_size
    int32_t n_layers = 0;
    int32_t n_heads = 0;
    int32_t n_kv_heads = 0;
    int32_t head_dim = 0;
    int32_t vocab_size = 0;
    int32_t max_seq_len = 0;  // max_position_embeddings
    float norm_eps = 0;
    double rope_theta = 10000.0;
    double rope_linear_factor = 1.0;  // "linear" scaling: positions divided by this
    std::optional<Llama3RopeScaling> rope_llama3;
    std::optional<YarnRopeScaling> rope_yarn;
    std::vector<float> rope_factors;  // [head_dim / 2], each frequency's own divisor; empty: none
    bool tied_embeddings = false;
    bool qkv_bias = false;
    bool o_bias = false;
    bool mlp_bias = false;
    NormPlace norm_place = NormPlace::before;
    QkNorm qk_norm = QkNorm::none;
    // [n_layers], or empty: how many entries a row of the layer sees, its own among them; 0: all.
    std::vector<int32_t> windows;
    // [n_layers], or empty: whether the layer rotates q and k.
    std::vector<bool> rotates;
    std::optional<int32_t> bos_id;
    std::vector<int32_t> eos_ids;  // from config.json; generation_config.json overrides them

    // Frequencies of RoPE, [head_dim / 2], after scaling.
    std::vector<float> inverse_frequencies() const;
    // What q . k is multiplied by.
    float attention_scale() const;
    int32_t window(int32_t layer) const { return windows.empty() ? 0 : windows[static_cast<size_t>(layer)]; }
    bool layer_rotates(int32_t layer) const { return rotates.empty() || rotates[static_cast<size_t>(layer)]; }
};

struct RobertaConfig {
    bool is_bert =
        false;  // model_type "bert": positions from 0, and <s>, </s> are the tokenizer's [CLS], [SEP]
    int32_t dim = 0;
    int32_t hidden_dim = 0;
    int32_t n_layers = 0;
    int32_t n_heads = 0;
    int32_t vocab_size = 0;
    int32_t max_positions = 0;   // rows of the position table; those before first_position are never used
    int32_t first_position = 2;  // pad_id + 1
    int32_t type_vocab_size = 1;
    float norm_eps = 0;
    int32_t bos_id = 0;  // -1: the configuration does not say
    int32_t pad_id = 1;
    int32_t eos_id = 2;

    // Longest sequence, special tokens included.
    int32_t max_seq_len() const { return max_positions - first_position; }
};

// Read DIR/config.json (and, for the decoder, DIR/generation_config.json where there is one).
// Status::bad_input with file, key, expected, found.
DecoderConfig load_decoder_config(const std::string& dir);
// What generation_config.json in DIR, where there is one, says instead of the configuration: eos_ids.
void read_generation_config(const std::string& dir, DecoderConfig& config);
RobertaConfig load_roberta_config(const std::string& dir);

}  // namespace refrag
