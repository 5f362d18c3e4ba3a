// See decoder_files.h.
#include "refrag/decoder_files.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "models/gguf_config.h"
#include "models/gguf_weights.h"
#include "models/lora.h"
#include "models/weights.h"
#include "text/chat_template.h"

namespace refrag {
namespace {

constexpr const char* kGgufName = "model.gguf";

// The id of tokenizer_config.json's "bos_token" or the like: a string, or an object with "content".
std::optional<int32_t> configured_token(const Json& config, const char* key, const Tokenizer& tokenizer) {
    const std::optional<Json> token = config.find(key);
    if (!token) return std::nullopt;
    const std::string text(token->is_object() ? token->get_string("content")
                                              : std::string(token->as_string()));
    const std::optional<int32_t> id = tokenizer.id_of(text);
    if (!id) token->refuse("a token of tokenizer.json");
    return id;
}

bool is_plain_decoder(const std::string& model) {
    if (!is_directory(model)) return is_file(model);
    if (is_file(path_join(model, "refrag.json"))) return false;
    return is_file(path_join(model, "config.json")) || is_file(path_join(model, kGgufName));
}

}  // namespace

std::string decoder_path_of(const std::string& model) {
    return is_plain_decoder(model) ? model : path_join(model, "decoder");
}

void add_text_files(Sha256& hash, const std::string& dir) {
    constexpr uint64_t kMaxBytes = 256u << 20;
    for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                             "merges.txt", "special_tokens_map.json", "added_tokens.json"}) {
        const std::string path = path_join(dir, name);
        hash.add_field(is_file(path) ? name : "").add_field(is_file(path) ? read_file(path, kMaxBytes) : "");
    }
}

DecoderFiles::DecoderFiles(const std::string& model)
    : is_plain_(is_plain_decoder(model)), path_(decoder_path_of(model)) {
    if (is_plain_ && is_file(model)) {
        gguf_ = std::make_shared<const GgufFile>(model);
        return;
    }
    directory_ = path_;
    const std::string file = path_join(directory_, kGgufName);
    if (!is_file(file)) return;
    for (const char* other : {"model.safetensors", "model.safetensors.index.json"}) {
        REFRAG_CHECK(!is_file(path_join(directory_, other)), Status::bad_input, printable(directory_),
                     ": expected one file of weights, found ", kGgufName, " and ", other);
    }
    gguf_ = std::make_shared<const GgufFile>(file);
}

void DecoderFiles::check_model(const std::string& model) {
    if (is_plain_decoder(model)) return;
    REFRAG_CHECK(is_directory(model), Status::bad_input, printable(model),
                 ": expected a model directory or a GGUF file, found nothing of that name");
    REFRAG_CHECK(is_file(path_join(model, "refrag.json")), Status::bad_input, printable(model),
                 ": expected refrag.json, or of a plain decoder config.json or ", kGgufName,
                 "; found none of them");
}

bool DecoderFiles::has_own_tokenizer() const {
    if (directory_.empty()) return false;
    for (const char* name : {"tokenizer.json", "vocab.json", "merges.txt"})
        if (is_file(path_join(directory_, name))) return true;
    return false;
}

Tokenizer DecoderFiles::tokenizer() const {
    if (gguf_ && !has_own_tokenizer()) return Tokenizer::from_gguf(*gguf_);
    return Tokenizer::from_file(directory_);
}

DecoderConfig DecoderFiles::config(const Tokenizer& tokenizer) const {
    DecoderConfig config;
    if (gguf_) {
        config = read_gguf_config(*gguf_);
        if (!directory_.empty()) read_generation_config(directory_, config);
    } else {
        config = load_decoder_config(directory_);
    }
    const std::string path = path_join(directory_, "tokenizer_config.json");
    if (config.eos_ids.empty() && !directory_.empty() && is_file(path)) {
        const std::optional<int32_t> id = configured_token(Json::parse_file(path), "eos_token", tokenizer);
        if (id) config.eos_ids = {*id};
    }
    const bool from_gguf = gguf_ && !has_own_tokenizer();
    REFRAG_CHECK(tokenizer.vocab_size() <= config.vocab_size, Status::bad_input, printable(path_), ": ",
                 from_gguf ? "tokenizer.ggml.tokens" : "tokenizer.json", " has ids up to ",
                 tokenizer.vocab_size() - 1, ", expected at most ", config.vocab_size - 1,
                 gguf_ ? " (the last row of token_embd.weight)" : " (config.json's vocab_size - 1)");
    return config;
}

// Whether and which: tokenizer_config.json's add_bos_token decides; where the key is absent, the
// post-processor does, which GGUF's metadata make as well.
std::optional<int32_t> DecoderFiles::bos_id(const Tokenizer& tokenizer, const DecoderConfig& config) const {
    const std::string path = path_join(directory_, "tokenizer_config.json");
    std::optional<bool> add;
    std::optional<int32_t> id;
    if (!directory_.empty() && is_file(path)) {
        const Json json = Json::parse_file(path);
        if (json.find("add_bos_token")) add = json.get_bool("add_bos_token");
        id = configured_token(json, "bos_token", tokenizer);
    }
    if (!add.value_or(tokenizer.adds_bos())) return std::nullopt;
    if (tokenizer.adds_bos()) return tokenizer.template_prefix()[0];
    if (!id) id = config.bos_id;
    REFRAG_CHECK(id.has_value(), Status::bad_input, printable(path),
                 ": add_bos_token is true, but neither bos_token nor config.json's bos_token_id says which "
                 "token it is");
    return id;
}

std::optional<std::string> DecoderFiles::chat_template() const {
    std::optional<std::string> found;
    if (!directory_.empty()) found = read_chat_template(directory_);
    constexpr const char* key = "tokenizer.chat_template";
    if (!found && gguf_ && gguf_->has(key)) found = gguf_->text(key);
    return found;
}

std::string DecoderFiles::end_token_places() const {
    if (directory_.empty()) return "tokenizer.ggml.eos_token_id is missing";
    return str("neither generation_config.json nor ",
               gguf_ ? "tokenizer.ggml.eos_token_id of model.gguf names an end token"
                     : "config.json has eos_token_id",
               ", and tokenizer_config.json has no eos_token");
}

std::unique_ptr<StoredWeights> DecoderFiles::weights(Device& device, const DecoderConfig& config,
                                                     LoadedBytes loaded, WeightFormat format) const {
    if (gguf_) return std::make_unique<GgufWeights>(device, gguf_, config, std::move(loaded), format);
    return std::make_unique<WeightLoader>(device, directory_, "model.", std::move(loaded), format);
}

std::string DecoderFiles::gguf_types() const {
    if (!gguf_) return "";
    std::map<std::string, int64_t> counts;
    for (const GgufTensor& tensor : gguf_->tensors()) ++counts[gguf_type_info(tensor.type).name];
    std::vector<std::pair<std::string, int64_t>> types(counts.begin(), counts.end());
    std::stable_sort(types.begin(), types.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    std::string text;
    for (const auto& [name, n] : types) text += str(text.empty() ? "" : ", ", n, " ", name);
    return text;
}

std::string DecoderFiles::adapter_dir() const {
    return !directory_.empty() && is_lora_directory(directory_) ? directory_ : "";
}

uint64_t DecoderFiles::weight_file_bytes() const {
    std::error_code ignored;  // what cannot be seen is refused by who reads it
    uint64_t sum = 0;
    const auto add = [&](const std::filesystem::path& path) {
        const uintmax_t bytes = std::filesystem::file_size(path, ignored);
        if (!ignored) sum += bytes;
    };
    if (gguf_) {
        add(gguf_->path());
        return sum;
    }
    for (const auto& entry : std::filesystem::directory_iterator(directory_, ignored))
        if (entry.path().extension() == ".safetensors") add(entry.path());
    return sum;
}

void DecoderFiles::add_text_identity(Sha256& hash) const {
    if (!directory_.empty()) add_text_files(hash, directory_);
    if (gguf_) hash.add_field(gguf_->header_digest().view());
}

}  // namespace refrag
