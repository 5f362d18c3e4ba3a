// See transformer_config.h. Both spellings are read: transformers 4 (rope_theta + rope_scaling) and 5
// (rope_parameters).
#include "models/transformer_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"

namespace refrag {
namespace {

constexpr int64_t kMaxDim = 1 << 20;

int32_t get_i32(const Json& json, std::string_view key, int64_t min, int64_t max) {
    return static_cast<int32_t>(json.get_int(key, min, max));
}

// Keys of related architectures that change the result; each is accepted only with the value that changes
// nothing.
void refuse_foreign_maths(const Json& json) {
    static constexpr std::string_view must_be_absent[] = {"quantization_config",
                                                          "final_logit_softcapping",
                                                          "attn_logit_softcapping",
                                                          "query_pre_attn_scalar",
                                                          "clip_qkv",
                                                          "num_local_experts",
                                                          "num_experts",
                                                          "layer_types",
                                                          "attn_temperature_tuning",
                                                          "use_qk_norm",
                                                          "qk_layernorm",
                                                          "no_rope_layers",
                                                          "attention_chunk_size",
                                                          "pe_config",
                                                          "parallel_attn",
                                                          "alibi"};
    for (const std::string_view key : must_be_absent) {
        const std::optional<Json> value = json.find(key);
        if (!value) continue;
        if (value->is_bool() && !value->as_bool()) continue;
        if (key == "layer_types") {  // transformers 5 writes it out where every layer attends in full
            bool full = true;
            for (size_t i = 0; i < value->as_array().size(); ++i) {
                full = full && value->at(i).as_string() == "full_attention";
            }
            if (full) continue;
        }
        value->refuse("this key to be absent (it changes the network, and is not supported)");
    }
    static constexpr std::string_view must_be_one[] = {"partial_rotary_factor", "attention_multiplier",
                                                       "residual_multiplier",   "embedding_multiplier",
                                                       "logits_scaling",        "logit_scale"};
    for (const std::string_view key : must_be_one) {
        if (const std::optional<Json> value = json.find(key); value && value->as_number() != 1.0) {
            value->refuse("1 (any other value changes the network, and is not supported)");
        }
    }
}

void require_string(const Json& json, std::string_view key, std::initializer_list<std::string_view> allowed) {
    const std::optional<Json> value = json.find(key);
    if (!value) return;
    const std::string_view found = value->as_string();
    std::string expected;
    for (const std::string_view a : allowed) {
        if (a == found) return;
        expected += str(expected.empty() ? "\"" : " or \"", a, "\"");
    }
    value->refuse(expected);
}

// rope_scaling of transformers 4 or rope_parameters of 5.
void read_rope(const Json& rope, LlamaConfig& config) {
    // transformers 5 writes them by layer type where a model has several; here all layers attend in full.
    if (const auto full = rope.find("full_attention"); full && full->is_object()) {
        for (size_t i = 0; i < rope.size(); ++i) {
            if (rope.key_at(i) != "full_attention" && !rope.at(i).is_null())
                rope.at(i).refuse("no parameters for layers other than full_attention");
        }
        return read_rope(*full, config);
    }
    if (const auto theta = rope.find("rope_theta")) config.rope_theta = theta->as_number(1.0, 1e12);
    if (const auto part = rope.find("partial_rotary_factor"); part && part->as_number() != 1.0) {
        part->refuse("1 (rotating a part of each head is not supported)");
    }
    std::optional<Json> type = rope.find("rope_type");
    if (!type) type = rope.find("type");
    if (!type) {  // without a type a factor has no meaning that could be trusted
        if (const auto factor = rope.find("factor")) factor->refuse("a rope_type beside it");
        return;
    }
    if (type->as_string() == "default") return;
    if (type->as_string() == "linear") {
        config.rope_linear_factor = rope.get_number("factor", 1.0, 1e6);
    } else if (type->as_string() == "llama3") {
        Llama3RopeScaling s;
        s.factor = rope.get_number("factor", 1.0, 1e6);
        s.low_freq_factor = rope.get_number("low_freq_factor", 1e-6, 1e6);
        s.high_freq_factor = rope.get_number("high_freq_factor", 1e-6, 1e6);
        s.original_max_seq_len =
            rope.get_int_or("original_max_position_embeddings", config.max_seq_len, 1, kMaxDim * 64);
        if (s.high_freq_factor <= s.low_freq_factor) {
            rope.get("high_freq_factor").refuse("a number above low_freq_factor");
        }
        config.rope_llama3 = s;
    } else {
        type->refuse("\"default\", \"linear\" or \"llama3\"");
    }
}

std::vector<int32_t> read_eos(const Json& json, int32_t vocab_size) {
    std::vector<int32_t> ids;
    const std::optional<Json> eos = json.find("eos_token_id");
    if (!eos) return ids;
    if (eos->is_array()) {
        for (size_t i = 0; i < eos->size(); ++i) {
            ids.push_back(static_cast<int32_t>(eos->at(i).as_int(0, vocab_size - 1)));
        }
    } else {
        ids.push_back(static_cast<int32_t>(eos->as_int(0, vocab_size - 1)));
    }
    return ids;
}

}  // namespace

std::vector<float> LlamaConfig::inverse_frequencies() const {
    const int32_t half = head_dim / 2;
    std::vector<float> inv_freq(static_cast<size_t>(half));
    for (int32_t m = 0; m < half; ++m) {
        double f = 1.0 / std::pow(rope_theta, 2.0 * m / head_dim);
        f /= rope_linear_factor;
        if (!rope_factors.empty()) f /= static_cast<double>(rope_factors[static_cast<size_t>(m)]);
        if (rope_llama3) {
            const Llama3RopeScaling& s = *rope_llama3;
            const double wavelength = 2.0 * std::numbers::pi / f;
            const double turns = static_cast<double>(s.original_max_seq_len) / wavelength;
            if (turns < s.low_freq_factor) {
                f /= s.factor;
            } else if (turns <= s.high_freq_factor) {
                const double keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
                f = (1.0 - keep) * f / s.factor + keep * f;
            }
        }
        inv_freq[static_cast<size_t>(m)] = static_cast<float>(f);
    }
    return inv_freq;
}

LlamaConfig load_llama_config(const std::string& dir) {
    const Json json = Json::parse_file(path_join(dir, "config.json"));
    LlamaConfig c;
    require_string(json, "model_type", {"llama", "mistral"});
    require_string(json, "hidden_act", {"silu", "swish"});  // two names of one function
    refuse_foreign_maths(json);
    c.dim = get_i32(json, "hidden_size", 1, kMaxDim);
    c.hidden_dim = get_i32(json, "intermediate_size", 1, kMaxDim);
    c.n_layers = get_i32(json, "num_hidden_layers", 1, 4096);
    c.n_heads = get_i32(json, "num_attention_heads", 1, 4096);
    c.n_kv_heads = static_cast<int32_t>(json.get_int_or("num_key_value_heads", c.n_heads, 1, c.n_heads));
    if (c.n_heads % c.n_kv_heads != 0) {
        json.get("num_key_value_heads").refuse(str("a divisor of num_attention_heads = ", c.n_heads));
    }
    if (!json.find("head_dim") && c.dim % c.n_heads != 0) {
        json.get("hidden_size").refuse(str("a multiple of num_attention_heads = ", c.n_heads));
    }
    c.head_dim = static_cast<int32_t>(json.get_int_or("head_dim", c.dim / c.n_heads, 1, 65536));
    REFRAG_CHECK(c.head_dim % 2 == 0, Status::bad_input, json.name(), ": expected an even head_dim, found ",
                 c.head_dim);
    c.vocab_size = get_i32(json, "vocab_size", 1, 1 << 24);
    c.max_seq_len = static_cast<int32_t>(json.get_int_or("max_position_embeddings", 2048, 1, 1 << 28));
    c.norm_eps = static_cast<float>(json.get_number_or("rms_norm_eps", 1e-6, 0.0, 1.0));
    c.tied_embeddings = json.get_bool_or("tie_word_embeddings", false);
    c.attention_bias = json.get_bool_or("attention_bias", false);
    c.mlp_bias = json.get_bool_or("mlp_bias", false);
    if (const auto window = json.find("sliding_window"); window && window->as_int(0) < c.max_seq_len) {
        window->refuse(str("null, or at least max_position_embeddings = ", c.max_seq_len,
                           " (sliding-window attention is not supported)"));
    }
    c.rope_theta = json.get_number_or("rope_theta", 10000.0, 1.0, 1e12);
    if (const auto rope = json.find("rope_scaling")) read_rope(rope->as_object(), c);
    if (const auto rope = json.find("rope_parameters")) read_rope(rope->as_object(), c);
    if (const auto bos = json.find("bos_token_id")) {
        c.bos_id = static_cast<int32_t>(bos->as_int(0, c.vocab_size - 1));
    }
    c.eos_ids = read_eos(json, c.vocab_size);
    read_generation_config(dir, c);
    return c;
}

void read_generation_config(const std::string& dir, LlamaConfig& config) {
    const std::string path = path_join(dir, "generation_config.json");
    if (!is_file(path)) return;
    std::vector<int32_t> ids = read_eos(Json::parse_file(path), config.vocab_size);
    if (!ids.empty()) config.eos_ids = std::move(ids);
}

RobertaConfig load_roberta_config(const std::string& dir) {
    const Json json = Json::parse_file(path_join(dir, "config.json"));
    RobertaConfig c;
    require_string(json, "model_type", {"roberta", "xlm-roberta"});
    require_string(json, "hidden_act", {"gelu"});
    require_string(json, "position_embedding_type", {"absolute"});
    for (const std::string_view key : {"is_decoder", "add_cross_attention"}) {
        if (json.get_bool_or(key, false))
            json.get(key).refuse("false (the encoder attends in both directions)");
    }
    refuse_foreign_maths(json);
    c.dim = get_i32(json, "hidden_size", 1, kMaxDim);
    c.hidden_dim = get_i32(json, "intermediate_size", 1, kMaxDim);
    c.n_layers = get_i32(json, "num_hidden_layers", 1, 4096);
    c.n_heads = get_i32(json, "num_attention_heads", 1, 4096);
    if (c.dim % c.n_heads != 0)
        json.get("hidden_size").refuse(str("a multiple of num_attention_heads = ", c.n_heads));
    c.vocab_size = get_i32(json, "vocab_size", 1, 1 << 24);
    c.max_positions = get_i32(json, "max_position_embeddings", 1, 1 << 24);
    c.type_vocab_size = static_cast<int32_t>(json.get_int_or("type_vocab_size", 2, 1, 1024));
    c.norm_eps = static_cast<float>(json.get_number_or("layer_norm_eps", 1e-12, 0.0, 1.0));
    const auto token_id = [&](std::string_view key, int32_t fallback) {
        // A list of one, as generation settings are written, is the number in it.
        const auto value = json.find(key);
        const bool is_list = value && value->is_array() && value->size() == 1;
        const auto id = static_cast<int32_t>(is_list ? value->at(0).as_int(0, c.vocab_size - 1)
                                                     : json.get_int_or(key, fallback, 0, c.vocab_size - 1));
        REFRAG_CHECK(id < c.vocab_size, Status::bad_input, json.name(), ": expected a vocab_size above ", key,
                     " = ", id, " (its default), found ", c.vocab_size);
        return id;
    };
    c.bos_id = token_id("bos_token_id", 0);
    c.pad_id = token_id("pad_token_id", 1);
    c.eos_id = token_id("eos_token_id", 2);
    if (c.max_seq_len() < 1) {
        json.get("max_position_embeddings").refuse(str("more than pad_token_id + 1 = ", c.pad_id + 1));
    }
    return c;
}

}  // namespace refrag
