// See transformer_config.h. Both spellings are read: transformers 4 (rope_theta + rope_scaling) and 5
// (rope_parameters).
#include "models/transformer_config.h"

#include <algorithm>
#include <array>
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
                                                          "attn_temperature_tuning",
                                                          "use_qk_norm",
                                                          "qk_layernorm",
                                                          "attention_chunk_size",
                                                          "pe_config",
                                                          "parallel_attn",
                                                          "alibi"};
    for (const std::string_view key : must_be_absent) {
        const std::optional<Json> value = json.find(key);
        if (!value) continue;
        if (value->is_bool() && !value->as_bool()) continue;
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

YarnRopeScaling read_yarn(const Json& rope, int64_t max_seq_len) {
    YarnRopeScaling s;
    s.original_max_seq_len =
        rope.get_int_or("original_max_position_embeddings", max_seq_len, 1, kMaxDim * 64);
    s.factor = rope.get_number_or(
        "factor", static_cast<double>(max_seq_len) / static_cast<double>(s.original_max_seq_len), 1.0, 1e6);
    s.beta_fast = rope.get_number_or("beta_fast", 32.0, 1e-6, 1e6);
    s.beta_slow = rope.get_number_or("beta_slow", 1.0, 1e-6, 1e6);
    s.truncate = rope.get_bool_or("truncate", true);
    const auto mscale = [&](double weight) {
        return s.factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(s.factor) + 1.0;
    };
    const double own = rope.get_number_or("mscale", 0.0, 0.0, 1e3);
    const double all = rope.get_number_or("mscale_all_dim", 0.0, 0.0, 1e3);
    const double by_factor = own != 0.0 && all != 0.0 ? mscale(own) / mscale(all) : mscale(1.0);
    s.attention_factor = rope.get_number_or("attention_factor", by_factor, 1e-6, 1e6);
    return s;
}

// rope_scaling of transformers 4 or rope_parameters of 5.
void read_rope(const Json& rope, DecoderConfig& config) {
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
    } else if (type->as_string() == "yarn") {
        config.rope_yarn = read_yarn(rope, config.max_seq_len);
    } else if (type->as_string() == "dynamic") {
        // It changes what lies beyond max_position_embeddings, and the window ends there.
        rope.get_number("factor", 1.0, 1e6);
    } else {
        type->refuse("\"default\", \"linear\", \"dynamic\", \"yarn\" or \"llama3\"");
    }
}

// Whether a family's layers may see a window alone: none, all of them, or where use_sliding_window says so.
enum class Windows { none, all_layers, if_used };

// What a model_type means where config.json does not say it.
struct Family {
    std::string_view name;
    double theta = 10000.0;
    double norm_eps = 1e-6;
    int64_t max_seq_len = 2048;
    int32_t n_kv_heads = 0;  // 0: as many as n_heads
    int32_t head_dim = 0;    // 0: dim / n_heads
    bool tied = false;
    bool qkv_bias = false;    // whatever attention_bias says; o has none then
    bool skips_rope = false;  // no_rope_layers, no_rope_layer_interval; windows are those layers'
    Windows windows = Windows::none;
    QkNorm qk_norm = QkNorm::none;
    NormPlace norm_place = NormPlace::before;
};

constexpr std::array<Family, 6> kFamilies = {{
    {.name = "llama"},
    {.name = "mistral", .max_seq_len = 131072, .n_kv_heads = 8, .windows = Windows::all_layers},
    {.name = "qwen2", .max_seq_len = 32768, .qkv_bias = true, .windows = Windows::if_used},
    {.name = "qwen3",
     .max_seq_len = 32768,
     .head_dim = 128,
     .windows = Windows::if_used,
     .qk_norm = QkNorm::per_head},
    {.name = "olmo2", .norm_eps = 1e-5, .qk_norm = QkNorm::full_width, .norm_place = NormPlace::after},
    {.name = "smollm3",
     .theta = 2000000.0,
     .max_seq_len = 32768,
     .n_kv_heads = 4,
     .tied = true,
     .skips_rope = true,
     .windows = Windows::if_used},
}};

const Family& family_of(const Json& json) {
    const std::optional<Json> type = json.find("model_type");
    if (!type) return kFamilies[0];
    std::string names;
    for (const Family& family : kFamilies) {
        if (family.name == type->as_string()) return family;
        names += str(names.empty() ? "\"" : ", \"", family.name, "\"");
    }
    type->refuse(str("one of ", names));
}

// "layer_types", or nothing: whether each layer slides.
std::optional<std::vector<bool>> read_layer_types(const Json& json, int32_t n_layers) {
    const std::optional<Json> types = json.find("layer_types");
    if (!types) return std::nullopt;
    if (std::ssize(types->as_array()) != n_layers)
        types->refuse(str("one for each of ", n_layers, " layers"));
    std::vector<bool> slides;
    for (int32_t i = 0; i < n_layers; ++i) {
        const Json type = types->at(static_cast<size_t>(i));
        const bool full = type.as_string() == "full_attention";
        if (!full && type.as_string() != "sliding_attention")
            type.refuse("\"full_attention\" or \"sliding_attention\"");
        slides.push_back(!full);
    }
    return slides;
}

// Which layers see a window alone. After c.rotates is known.
void read_windows(const Json& json, const Family& family, DecoderConfig& c) {
    const std::optional<std::vector<bool>> types = read_layer_types(json, c.n_layers);
    const bool any = types && std::find(types->begin(), types->end(), true) != types->end();
    const bool all = types && std::find(types->begin(), types->end(), false) == types->end();
    // Mistral's has a window where its file says nothing of one.
    const bool unsaid = family.windows == Windows::all_layers && !json.has("sliding_window");
    int64_t window = unsaid ? 4096 : json.get_int_or("sliding_window", 0, 0);
    if (window >= c.max_seq_len) window = 0;  // nothing falls out of it
    if (family.windows == Windows::if_used && !json.get_bool_or("use_sliding_window", false)) window = 0;
    if (family.windows == Windows::none && window > 0)
        json.get("sliding_window")
            .refuse(str("null, or at least max_position_embeddings = ", c.max_seq_len, " (a ", family.name,
                        " has no window)"));
    if (any && (family.windows == Windows::none || (family.windows == Windows::all_layers && !all)))
        json.get("layer_types").refuse(str("layers of one kind, as a ", family.name, " has them"));
    if (window == 0) return;
    const int64_t first =
        family.windows == Windows::if_used ? json.get_int_or("max_window_layers", 28, 0, 1 << 20) : 0;
    for (int32_t i = 0; i < c.n_layers; ++i) {
        const bool usual = family.skips_rope ? !c.layer_rotates(i) : i >= first;
        const bool slides =
            types && family.windows == Windows::if_used ? (*types)[static_cast<size_t>(i)] : usual;
        c.windows.push_back(slides ? static_cast<int32_t>(window) : 0);
    }
}

// SmolLM3: layers that leave q and k as they are.
void read_rotations(const Json& json, const Family& family, DecoderConfig& c) {
    const std::optional<Json> layers = json.find("no_rope_layers");
    if (!family.skips_rope) {
        if (layers && !(layers->is_bool() && !layers->as_bool()))
            layers->refuse("this key to be absent (it changes the network, and is not supported)");
        return;
    }
    const int64_t interval = json.get_int_or("no_rope_layer_interval", 4, 1, 1 << 20);
    if (layers && std::ssize(layers->as_array()) != c.n_layers)
        layers->refuse(str("one for each of ", c.n_layers, " layers"));
    for (int32_t i = 0; i < c.n_layers; ++i)
        c.rotates.push_back(layers ? layers->at(static_cast<size_t>(i)).as_int(0, 1) == 1
                                   : (i + 1) % interval != 0);
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

// What YaRN multiplies frequency m by.
double yarn_share(const YarnRopeScaling& s, int32_t m, int32_t head_dim, double theta) {
    const auto dimension = [&](double turns) {
        const double most = static_cast<double>(s.original_max_seq_len);
        return head_dim * std::log(most / (turns * 2.0 * std::numbers::pi)) / (2.0 * std::log(theta));
    };
    double low = dimension(s.beta_fast), high = dimension(s.beta_slow);
    if (s.truncate) {
        low = std::floor(low);
        high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, head_dim - 1.0);
    if (low == high) high += 0.001;
    const double ramp = std::clamp((m - low) / (high - low), 0.0, 1.0);
    return ramp / s.factor + (1.0 - ramp);
}

}  // namespace

float DecoderConfig::attention_scale() const {
    const double factor = rope_yarn ? rope_yarn->attention_factor : 1.0;
    return static_cast<float>(factor * factor / std::sqrt(static_cast<double>(head_dim)));
}

std::vector<float> DecoderConfig::inverse_frequencies() const {
    const int32_t half = head_dim / 2;
    std::vector<float> inv_freq(static_cast<size_t>(half));
    for (int32_t m = 0; m < half; ++m) {
        double f = 1.0 / std::pow(rope_theta, 2.0 * m / head_dim);
        f /= rope_linear_factor;
        if (rope_yarn) f *= yarn_share(*rope_yarn, m, head_dim, rope_theta);
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

DecoderConfig load_decoder_config(const std::string& dir) {
    const Json json = Json::parse_file(path_join(dir, "config.json"));
    DecoderConfig c;
    const Family& family = family_of(json);
    c.family = family.name;
    require_string(json, "hidden_act", {"silu", "swish"});  // two names of one function
    refuse_foreign_maths(json);
    c.dim = get_i32(json, "hidden_size", 1, kMaxDim);
    c.hidden_dim = get_i32(json, "intermediate_size", 1, kMaxDim);
    c.n_layers = get_i32(json, "num_hidden_layers", 1, 4096);
    c.n_heads = get_i32(json, "num_attention_heads", 1, 4096);
    const int32_t usual_kv_heads =
        family.n_kv_heads == 0 ? c.n_heads : std::min(family.n_kv_heads, c.n_heads);
    c.n_kv_heads = static_cast<int32_t>(json.get_int_or("num_key_value_heads", usual_kv_heads, 1, c.n_heads));
    if (c.n_heads % c.n_kv_heads != 0) {
        json.get("num_key_value_heads").refuse(str("a divisor of num_attention_heads = ", c.n_heads));
    }
    if (!json.find("head_dim") && family.head_dim == 0 && c.dim % c.n_heads != 0) {
        json.get("hidden_size").refuse(str("a multiple of num_attention_heads = ", c.n_heads));
    }
    const int32_t usual_head_dim = family.head_dim == 0 ? c.dim / c.n_heads : family.head_dim;
    c.head_dim = static_cast<int32_t>(json.get_int_or("head_dim", usual_head_dim, 1, 65536));
    REFRAG_CHECK(c.head_dim % 2 == 0, Status::bad_input, json.name(), ": expected an even head_dim, found ",
                 c.head_dim);
    c.vocab_size = get_i32(json, "vocab_size", 1, 1 << 24);
    c.max_seq_len =
        static_cast<int32_t>(json.get_int_or("max_position_embeddings", family.max_seq_len, 1, 1 << 28));
    c.norm_eps = static_cast<float>(json.get_number_or("rms_norm_eps", family.norm_eps, 0.0, 1.0));
    c.tied_embeddings = json.get_bool_or("tie_word_embeddings", family.tied);
    c.norm_place = family.norm_place;
    c.qk_norm = family.qk_norm;
    c.o_bias = json.get_bool_or("attention_bias", false);
    if (family.qkv_bias && c.o_bias) json.get("attention_bias").refuse("false, or no such key");
    c.qkv_bias = c.o_bias || family.qkv_bias;
    c.mlp_bias = json.get_bool_or("mlp_bias", false);
    read_rotations(json, family, c);
    read_windows(json, family, c);
    c.rope_theta = json.get_number_or("rope_theta", family.theta, 1.0, 1e12);
    if (const auto rope = json.find("rope_scaling")) read_rope(rope->as_object(), c);
    if (const auto rope = json.find("rope_parameters")) read_rope(rope->as_object(), c);
    if (const auto bos = json.find("bos_token_id")) {
        c.bos_id = static_cast<int32_t>(bos->as_int(0, c.vocab_size - 1));
    }
    c.eos_ids = read_eos(json, c.vocab_size);
    read_generation_config(dir, c);
    return c;
}

void read_generation_config(const std::string& dir, DecoderConfig& config) {
    const std::string path = path_join(dir, "generation_config.json");
    if (!is_file(path)) return;
    std::vector<int32_t> ids = read_eos(Json::parse_file(path), config.vocab_size);
    if (!ids.empty()) config.eos_ids = std::move(ids);
}

RobertaConfig load_roberta_config(const std::string& dir) {
    const Json json = Json::parse_file(path_join(dir, "config.json"));
    RobertaConfig c;
    require_string(json, "model_type", {"roberta", "xlm-roberta", "bert"});
    c.is_bert = json.get_string_or("model_type", "roberta") == "bert";
    require_string(json, "hidden_act", {"gelu"});
    require_string(json, "position_embedding_type", {"absolute"});
    for (const std::string_view key : {"is_decoder", "add_cross_attention"}) {
        if (json.get_bool_or(key, false))
            json.get(key).refuse("false (the encoder attends in both directions)");
    }
    refuse_foreign_maths(json);
    for (const char* key : {"layer_types", "no_rope_layers"}) {
        if (const auto value = json.find(key))
            value->refuse("this key to be absent (it changes the network, and is not supported)");
    }
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
    if (c.is_bert) {
        c.pad_id = token_id("pad_token_id", 0);
        c.bos_id = c.eos_id = -1;  // the tokenizer's to say
        c.first_position = 0;
        return c;
    }
    c.bos_id = token_id("bos_token_id", 0);
    c.pad_id = token_id("pad_token_id", 1);
    c.eos_id = token_id("eos_token_id", 2);
    c.first_position = c.pad_id + 1;
    if (c.max_seq_len() < 1) {
        json.get("max_position_embeddings").refuse(str("more than pad_token_id + 1 = ", c.pad_id + 1));
    }
    return c;
}

}  // namespace refrag
