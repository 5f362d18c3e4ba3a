// See lora.h.
#include "models/lora.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "base/check.h"
#include "io/file.h"
#include "models/stored_weights.h"

namespace refrag {
namespace {

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kTensors = "adapter_model.safetensors";
constexpr std::string_view kAdapterPrefix = "base_model.model.";

// Keys that say nothing of the adapter's maths: where it comes from, how it was trained.
constexpr std::array<std::string_view, 17> kFreeKeys = {"task_type",
                                                        "auto_mapping",
                                                        "peft_version",
                                                        "base_model_name_or_path",
                                                        "revision",
                                                        "inference_mode",
                                                        "lora_dropout",
                                                        "megatron_core",
                                                        "qalora_group_size",
                                                        "runtime_config",
                                                        "eva_config",
                                                        "loftq_config",
                                                        "ensure_weight_tying",
                                                        "corda_config",
                                                        "lora_ga_config",
                                                        "megatron_config",
                                                        "exclude_modules"};
constexpr std::array<std::string_view, 12> kReadKeys = {
    "peft_type",     "r",    "lora_alpha",          "target_modules", "use_rslora",        "rank_pattern",
    "alpha_pattern", "bias", "layers_to_transform", "layers_pattern", "init_lora_weights", "fan_in_fan_out"};
// Other methods and additions; each is accepted only where it is not in use.
constexpr std::array<std::string_view, 13> kForeignKeys = {
    "use_dora",          "lora_bias",         "use_qalora",
    "use_bdlora",        "modules_to_save",   "trainable_token_indices",
    "layer_replication", "target_parameters", "alora_invocation_tokens",
    "arrow_config",      "kasa_config",       "velora_config",
    "monteclora_config"};

bool has(std::span<const std::string_view> names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

bool is_unused(const Json& value) {
    if (value.is_null()) return true;
    if (value.is_bool()) return !value.as_bool();
    return (value.is_array() || value.is_object()) && value.size() == 0;
}

// Whether `name` is `end` or ends with a dot and it.
bool is_end_of(std::string_view name, std::string_view end) {
    if (!name.ends_with(end)) return false;
    return name.size() == end.size() || name[name.size() - end.size() - 1] == '.';
}

// The names in a list, or in a text alone.
std::vector<std::string> names_of(const Json& value) {
    if (value.is_string()) return {std::string(value.as_string())};
    std::vector<std::string> names;
    for (size_t i = 0; i < value.as_array().size(); ++i) names.emplace_back(value.at(i).as_string());
    return names;
}

bool is_module_name(std::string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
               c == '.';
    });
}

// The module of a network's matrix in Hugging Face's tree.
std::string module_of(std::string_view name) {
    if (name.ends_with(".weight")) name.remove_suffix(7);
    return name == "lm_head" ? std::string(name) : str("model.", name);
}

}  // namespace

bool is_lora_directory(const std::string& dir) {
    return is_file(path_join(dir, kConfig));
}

LoraAdapter::LoraAdapter(const std::string& dir) : dir_(dir), config_path_(path_join(dir, kConfig)) {
    read_config(Json::parse_file(config_path_, 1u << 20).as_object());
    files_ = WeightFiles::open(path_join(dir, kTensors));
    for (const TensorEntry& entry : files_.tensors())
        if (entry.name.ends_with(".lora_A.weight")) ++n_matrices_;
}

void LoraAdapter::read_config(const Json& json) {
    for (size_t i = 0; i < json.size(); ++i) {
        const std::string_view key = json.key_at(i);
        if (has(kFreeKeys, key) || has(kReadKeys, key)) continue;
        const char* const why = has(kForeignKeys, key) ? "(it is not supported)"
                                                       : "(it may change the adapter, and is not known)";
        if (!is_unused(json.at(i))) json.at(i).refuse(str("this key to be absent or empty ", why));
    }
    if (json.get_string("peft_type") != "LORA") json.get("peft_type").refuse("\"LORA\"");
    rank_ = json.get_int("r", 1, 1 << 16);
    alpha_ = json.get_number("lora_alpha", 1e-9, 1e9);
    by_root_ = json.get_bool_or("use_rslora", false);
    if (json.get_string_or("bias", "none") != "none") json.get("bias").refuse("\"none\"");
    if (json.get_bool_or("fan_in_fan_out", false))
        json.get("fan_in_fan_out").refuse("false (the network's matrices are [out, in])");
    // Other beginnings take something off the base model's weights, which are then not the published ones.
    if (const auto begun = json.find("init_lora_weights"); begun && !begun->is_bool()) {
        const std::string_view word = begun->as_string();
        if (word != "gaussian" && word != "eva" && word != "orthogonal")
            begun->refuse(
                "true, false, \"gaussian\", \"eva\" or \"orthogonal\" (with others the base model's "
                "weights are changed as well)");
    }
    const Json target = json.get("target_modules");
    if (target.is_string()) {
        all_linear_ = target.as_string() == "all-linear";
    } else {
        targets_ = names_of(target);
        if (targets_.empty()) target.refuse("at least one module");
    }
    if (const auto excluded = json.find("exclude_modules")) {
        if (excluded->is_string()) excluded->refuse("a list of modules (an expression is not supported)");
        excluded_ = names_of(*excluded);
    }
    if (const auto layers = json.find("layers_to_transform")) {
        if (targets_.empty()) layers->refuse("null, where target_modules is no list");
        if (layers->is_int()) layers_ = {layers->as_int(0, 1 << 16)};
        for (size_t i = 0; !layers->is_int() && i < layers->as_array().size(); ++i)
            layers_.push_back(layers->at(i).as_int(0, 1 << 16));
    }
    if (const auto pattern = json.find("layers_pattern")) {
        for (const std::string& name : names_of(*pattern))
            if (!name.empty() && name != "layers") pattern->refuse("\"layers\"");
    }
    read_patterns(json);
}

void LoraAdapter::read_patterns(const Json& json) {
    const auto read = [&](const char* key, std::vector<Pattern>& patterns, double least, double most) {
        const auto object = json.find(key);
        for (size_t i = 0; object && i < object->as_object().size(); ++i) {
            const std::string_view name = object->key_at(i);
            const std::string_view bare = name.substr(name.starts_with('^') ? 1 : 0);
            if (!is_module_name(bare))
                object->at(i).refuse("a module's name or its end as key (an expression is not supported)");
            patterns.push_back({std::string(name), object->at(i).as_number(least, most)});
        }
    };
    read("rank_pattern", ranks_, 1, 1 << 16);
    read("alpha_pattern", alphas_, 1e-9, 1e9);
}

double LoraAdapter::find(const std::vector<Pattern>& patterns, std::string_view module, double otherwise) {
    for (const Pattern& pattern : patterns) {
        const bool whole = pattern.name.starts_with('^');
        if (whole ? module == std::string_view(pattern.name).substr(1) : is_end_of(module, pattern.name))
            return pattern.value;
    }
    return otherwise;
}

bool LoraAdapter::in_layers(std::string_view module) const {
    if (layers_.empty()) return true;
    constexpr std::string_view begin = "model.layers.";
    if (!module.starts_with(begin)) return false;
    int64_t layer = -1;
    std::from_chars(module.data() + begin.size(), module.data() + module.size(), layer);
    return std::find(layers_.begin(), layers_.end(), layer) != layers_.end();
}

std::optional<bool> LoraAdapter::targets(const std::string& module) {
    for (const std::string& name : excluded_)
        if (is_end_of(module, name)) return false;
    if (all_linear_) return module.starts_with("model.layers.");
    if (targets_.empty()) return std::nullopt;
    bool found = false;
    for (const std::string& name : targets_) {
        if (!is_end_of(module, name)) continue;
        matched_.insert(name);
        // A module that is named whole is meant in any layer.
        found = found || module == name || in_layers(module);
    }
    return found;
}

std::shared_ptr<const LoraFactors> LoraAdapter::open(std::string_view name, int64_t out_dim, int64_t in_dim) {
    const std::string module = module_of(name);
    const std::string a_name = str(kAdapterPrefix, module, ".lora_A.weight");
    const std::string b_name = str(kAdapterPrefix, module, ".lora_B.weight");
    const bool is_there = files_.find(a_name) != nullptr || files_.find(b_name) != nullptr;
    const std::optional<bool> expected = targets(module);
    if (!expected.value_or(is_there)) {
        REFRAG_CHECK(!is_there, Status::bad_input, printable(files_.name()), ": tensor \"", a_name,
                     "\": expected none, as target_modules of ", kConfig, " does not name ", module);
        return nullptr;
    }
    REFRAG_CHECK(
        module != "model.embed_tokens", Status::bad_input, printable(config_path_),
        ": key \"target_modules\": expected linear layers, found embed_tokens (adapters on tables are "
        "not supported)");
    auto factors = std::make_shared<LoraFactors>();
    const double rank = find(ranks_, module, static_cast<double>(rank_));
    const double alpha = find(alphas_, module, alpha_);
    factors->rank = static_cast<int64_t>(rank);
    factors->scale = static_cast<float>(alpha / (by_root_ ? std::sqrt(rank) : rank));
    factors->a = read(a_name, {factors->rank, in_dim});
    factors->b = read(b_name, {out_dim, factors->rank});
    const std::vector<int64_t> shape = {out_dim, in_dim};
    const std::string copy_name = str(kAdapterPrefix, module, ".base_layer.weight");
    factors->copy = files_.find(copy_name);
    if (factors->copy != nullptr) {
        check_entry(*factors->copy, shape);
        used_.insert(copy_name);
    }
    return factors;
}

void LoraAdapter::check_entry(const TensorEntry& entry, const std::vector<int64_t>& shape) const {
    const std::string place = place_of(entry);
    REFRAG_CHECK(entry.shape == shape, Status::bad_input, place, ": expected shape ", shape_text(shape),
                 ", found ", entry.shape_text());
    REFRAG_CHECK(entry.dtype && *entry.dtype != DType::i32, Status::bad_input, place,
                 ": expected dtype F32, F16 or BF16, found ", entry.dtype_name);
}

std::string LoraAdapter::place_of(const TensorEntry& entry) const {
    return str(printable(files_.name()), ": tensor \"", printable(entry.name), "\"");
}

void LoraAdapter::check_copy(const TensorEntry& copy, int64_t row, int64_t n, const float* w) const {
    const auto in_dim = static_cast<size_t>(copy.shape[1]);
    const size_t value_bytes = dtype_bytes(*copy.dtype);
    std::vector<std::byte> values(in_dim * value_bytes);
    for (int64_t i = row; i < row + n; ++i, w += in_dim) {
        files_.read_part(copy, static_cast<uint64_t>(i) * values.size(), values.data(), values.size());
        for (size_t j = 0; j < in_dim; ++j) {
            const float found = value_at(*copy.dtype, values.data(), j);
            if (found != w[j])
                refuse_value(place_of(copy), copy.shape, str("the decoder's own weight ", w[j]).c_str(),
                             str(found), i * copy.shape[1] + static_cast<int64_t>(j));
        }
    }
}

std::vector<float> LoraAdapter::read(const std::string& name, const std::vector<int64_t>& shape) {
    const TensorEntry* const entry = files_.find(name);
    const std::string place = str(printable(files_.name()), ": tensor \"", name, "\"");
    REFRAG_CHECK(entry != nullptr, Status::bad_input, place, " is missing, expected shape ",
                 shape_text(shape));
    check_entry(*entry, shape);
    used_.insert(name);
    std::vector<float> values = files_.read_f32(*entry);
    check_finite(place, shape, DType::f32, values.data(), 0, static_cast<int64_t>(values.size()));
    return values;
}

void LoraAdapter::finish() const {
    for (const std::string& name : targets_) {
        REFRAG_CHECK(matched_.contains(name), Status::bad_input, printable(config_path_),
                     ": key \"target_modules\": expected names of the network's matrices, found \"",
                     printable(name, 80), "\"");
    }
    for (const TensorEntry& entry : files_.tensors()) {
        REFRAG_CHECK(used_.contains(entry.name), Status::bad_input, printable(files_.name()), ": tensor \"",
                     printable(entry.name), "\" of shape ", entry.shape_text(),
                     " has no place in this network");
    }
}

}  // namespace refrag
