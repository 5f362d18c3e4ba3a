// See gguf_config.h.
#include "models/gguf_config.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

constexpr int64_t kLargestDim = 1 << 20;

// What an architecture's name means for the network; its tensors say the rest.
struct GgufFamily {
    std::string_view name;
    QkNorm qk_norm = QkNorm::none;
};
constexpr std::array<GgufFamily, 3> kGgufFamilies = {{{"llama"}, {"qwen2"}, {"qwen3", QkNorm::per_head}}};

// What is read below, and what says nothing of the maths.
constexpr std::array<std::string_view, 30> kKnownKeys = {"block_count",
                                                         "context_length",
                                                         "embedding_length",
                                                         "feed_forward_length",
                                                         "vocab_size",
                                                         "attention.head_count",
                                                         "attention.head_count_kv",
                                                         "attention.key_length",
                                                         "attention.value_length",
                                                         "attention.layer_norm_rms_epsilon",
                                                         "attention.sliding_window",
                                                         "attention.causal",
                                                         "attention.scale",
                                                         "attention.clamp_kqv",
                                                         "attention.max_alibi_bias",
                                                         "rope.dimension_count",
                                                         "rope.freq_base",
                                                         "rope.scale_linear",
                                                         "rope.scaling.type",
                                                         "rope.scaling.factor",
                                                         "rope.scaling.attn_factor",
                                                         "rope.scaling.original_context_length",
                                                         "rope.scaling.finetuned",
                                                         "expert_count",
                                                         "expert_used_count",
                                                         "use_parallel_residual",
                                                         "logit_scale",
                                                         "embedding_scale",
                                                         "residual_scale",
                                                         "tensor_data_layout"};

// A file's keys are called after its architecture: "llama.block_count".
class FamilyKeys {
  public:
    explicit FamilyKeys(const GgufFile& file) : prefix_(file.text("general.architecture") + ".") {}
    std::string operator()(std::string_view name) const { return std::string(prefix_).append(name); }
    const std::string& prefix() const { return prefix_; }

  private:
    std::string prefix_;
};

void refuse_foreign_files(const GgufFile& file) {
    if (file.has("general.type") && file.text("general.type") != "model")
        file.refuse("general.type", "\"model\"");
    const std::string& name = file.text("general.architecture");
    if (std::none_of(kGgufFamilies.begin(), kGgufFamilies.end(),
                     [&](const GgufFamily& family) { return family.name == name; }))
        file.refuse("general.architecture",
                    "\"llama\" (LLaMA 1 to 3, TinyLlama, SmolLM, Mistral), \"qwen2\" or "
                    "\"qwen3\"");
    if (file.has("split.count") && file.integer("split.count", 0, 1 << 20) > 1)
        file.refuse("split.count", "1 (a file that was cut in parts: join them first)");
    if (file.has("general.quantization_version") && file.integer("general.quantization_version", 0, 99) != 2)
        file.refuse("general.quantization_version", "2");
}

void refuse_foreign_maths(const GgufFile& file, const DecoderConfig& c) {
    const FamilyKeys key_of(file);
    for (const std::string& key : file.keys()) {
        if (!key.starts_with(key_of.prefix())) continue;
        const std::string_view name = std::string_view(key).substr(key_of.prefix().size());
        if (std::find(kKnownKeys.begin(), kKnownKeys.end(), name) == kKnownKeys.end())
            file.refuse(key, "this key to be absent (it may change the network, and is not supported)");
    }
    for (const char* name : {"expert_count", "expert_used_count"}) {
        if (file.has(key_of(name)) && file.integer(key_of(name), 0, 1 << 20) != 0)
            file.refuse(key_of(name), "0 (a mixture of experts is not supported)");
    }
    const auto number = [&](const char* name, double expected) {
        const std::string key = key_of(name);
        if (file.has(key) && std::abs(file.real(key) - expected) > 1e-6 * std::abs(expected))
            file.refuse(key, str(expected, " (any other value changes the network, and is not supported)"));
    };
    for (const char* name : {"rope.scaling.attn_factor", "logit_scale", "embedding_scale", "residual_scale"})
        number(name, 1.0);
    for (const char* name : {"attention.clamp_kqv", "attention.max_alibi_bias"}) number(name, 0.0);
    number("attention.scale", 1.0 / std::sqrt(static_cast<double>(c.head_dim)));
    if (file.has(key_of("attention.causal")) && !file.truth(key_of("attention.causal")))
        file.refuse(key_of("attention.causal"), "true");
    if (file.has(key_of("use_parallel_residual")) && file.truth(key_of("use_parallel_residual")))
        file.refuse(key_of("use_parallel_residual"), "false");
}

// All layers', as a Mistral's.
void read_window(const GgufFile& file, DecoderConfig& c) {
    const FamilyKeys key_of(file);
    const std::string window = key_of("attention.sliding_window");
    if (!file.has(window)) return;
    const int64_t found = file.integer(window, 0, INT32_MAX);
    // A window that nothing falls out of is none.
    if (found != 0 && found < c.max_seq_len)
        c.windows.assign(static_cast<size_t>(c.n_layers), static_cast<int32_t>(found));
}

void read_rope(const GgufFile& file, DecoderConfig& c) {
    const FamilyKeys key_of(file);
    const std::string rotated = key_of("rope.dimension_count");
    if (file.has(rotated) && file.integer(rotated, 1, kLargestDim) != c.head_dim)
        file.refuse(rotated, str(c.head_dim, ", a head's width (rotating a part of it is not supported)"));
    const std::string base = key_of("rope.freq_base");
    if (file.has(base)) {
        c.rope_theta = file.real(base);
        if (c.rope_theta < 1.0 || c.rope_theta > 1e12) file.refuse(base, "a number of 1 to 1e12");
    }
    const std::string type = key_of("rope.scaling.type");
    const std::string factor = key_of("rope.scaling.factor");
    const std::string older_factor = key_of("rope.scale_linear");
    std::string kind = file.has(type) ? file.text(type) : "";
    if (!kind.empty() && kind != "none" && kind != "linear" && kind != "yarn")
        file.refuse(type, "\"none\", \"linear\" or \"yarn\"");
    // A factor alone means linear scaling; 0 stands for none.
    const std::string& given = file.has(factor) ? factor : older_factor;
    if (kind != "none" && file.has(given) && file.real(given) != 0.0) {
        const double by = file.real(given);
        if (!(by >= 1.0 && by <= 1e6)) file.refuse(given, "a number of 1 to 1e6");
        if (kind == "yarn") {
            const std::string original = key_of("rope.scaling.original_context_length");
            c.rope_yarn = YarnRopeScaling{.factor = by, .attention_factor = 0.1 * std::log(by) + 1.0};
            c.rope_yarn->original_max_seq_len =
                file.has(original) ? file.integer(original, 1, 1 << 28) : c.max_seq_len;
        } else {
            c.rope_linear_factor = by;
        }
    } else if (kind == "yarn") {
        file.refuse(type, str("a ", factor, " beside it"));
    }
    const GgufTensor* table = file.find(kGgufRopeFactors);
    if (table == nullptr) return;
    const std::string place = str(printable(file.path()), ": tensor \"", kGgufRopeFactors, "\"");
    const std::vector<int64_t> shape = {c.head_dim / 2};
    REFRAG_CHECK(table->shape == shape, Status::bad_input, place, ": expected shape [", shape[0], "], found ",
                 table->shape_text());
    c.rope_factors.resize(static_cast<size_t>(shape[0]));
    file.read_rows(*table, 0, 1, c.rope_factors.data());
    for (size_t i = 0; i < c.rope_factors.size(); ++i) {
        const float f = c.rope_factors[i];
        REFRAG_CHECK(f >= 1e-6f && f <= 1e6f, Status::bad_input, place,
                     ": expected factors of 1e-6 to 1e6, found ", f, " at element [", i, "]");
    }
}

std::optional<int32_t> token_id(const GgufFile& file, const char* key, int32_t vocab_size) {
    if (!file.has(key)) return std::nullopt;
    return static_cast<int32_t>(file.integer(key, 0, vocab_size - 1));
}

}  // namespace

DecoderConfig read_gguf_config(const GgufFile& file) {
    refuse_foreign_files(file);
    const FamilyKeys key_of(file);
    DecoderConfig c;
    c.family = file.text("general.architecture");
    c.qk_norm = std::find_if(kGgufFamilies.begin(), kGgufFamilies.end(), [&](const GgufFamily& family) {
                    return family.name == c.family;
                })->qk_norm;
    const auto integer = [&](const char* name, int64_t most) {
        return static_cast<int32_t>(file.integer(key_of(name), 1, most));
    };
    c.dim = integer("embedding_length", kLargestDim);
    c.hidden_dim = integer("feed_forward_length", kLargestDim);
    c.n_layers = integer("block_count", 4096);
    c.n_heads = integer("attention.head_count", 4096);
    c.max_seq_len = integer("context_length", 1 << 28);
    const std::string kv = key_of("attention.head_count_kv");
    c.n_kv_heads = file.has(kv) ? static_cast<int32_t>(file.integer(kv, 1, c.n_heads)) : c.n_heads;
    if (c.n_heads % c.n_kv_heads != 0)
        file.refuse(kv, str("a divisor of ", key_of("attention.head_count"), " = ", c.n_heads));
    const std::string width = key_of("attention.key_length");
    if (file.has(width)) {
        c.head_dim = static_cast<int32_t>(file.integer(width, 2, 65536));
        if (c.head_dim % 2 != 0) file.refuse(width, "an even number");
    } else {
        if (c.dim % (2 * c.n_heads) != 0)
            file.refuse(key_of("embedding_length"),
                        str("a multiple of twice ", key_of("attention.head_count"), " = ", c.n_heads));
        c.head_dim = c.dim / c.n_heads;
    }
    const std::string value_width = key_of("attention.value_length");
    if (file.has(value_width) && file.integer(value_width, 1, 65536) != c.head_dim)
        file.refuse(value_width, str(c.head_dim, ", as wide as a key"));
    const std::string epsilon = key_of("attention.layer_norm_rms_epsilon");
    c.norm_eps = static_cast<float>(file.real(epsilon));
    if (!(c.norm_eps >= 0.0f && c.norm_eps <= 1.0f)) file.refuse(epsilon, "a number of 0 to 1");

    const GgufTensor* embedding = file.find("token_embd.weight");
    REFRAG_CHECK(embedding != nullptr && embedding->shape.size() == 2, Status::bad_input,
                 printable(file.path()), ": tensor \"token_embd.weight\": expected a matrix, found ",
                 embedding == nullptr ? std::string("none") : str("shape ", embedding->shape_text()));
    REFRAG_CHECK(embedding->shape[0] >= 1 && embedding->shape[0] <= 1 << 24, Status::bad_input,
                 printable(file.path()), ": tensor \"token_embd.weight\": expected 1 to ", 1 << 24,
                 " rows, found ", embedding->shape[0]);
    c.vocab_size = static_cast<int32_t>(embedding->shape[0]);
    const std::string vocabulary = key_of("vocab_size");
    if (file.has(vocabulary) && file.integer(vocabulary, 1, 1 << 24) != c.vocab_size)
        file.refuse(vocabulary, str(c.vocab_size, ", the rows of token_embd.weight"));
    c.tied_embeddings = file.find("output.weight") == nullptr;
    c.qkv_bias = file.find("blk.0.attn_q.bias") != nullptr;
    c.o_bias = file.find("blk.0.attn_output.bias") != nullptr;
    c.mlp_bias = file.find("blk.0.ffn_gate.bias") != nullptr;

    read_rope(file, c);
    read_window(file, c);
    refuse_foreign_maths(file, c);
    c.bos_id = token_id(file, "tokenizer.ggml.bos_token_id", c.vocab_size);
    for (const char* key :
         {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
        const std::optional<int32_t> id = token_id(file, key, c.vocab_size);
        if (id && std::find(c.eos_ids.begin(), c.eos_ids.end(), *id) == c.eos_ids.end())
            c.eos_ids.push_back(*id);
    }
    return c;
}

}  // namespace refrag
