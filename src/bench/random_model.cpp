// See random_model.h.
#include "bench/random_model.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "base/utf8.h"
#include "bench/cost.h"
#include "models/random_weights.h"
#include "refrag/random.h"
#include "text/byte_level.h"

namespace refrag {
namespace {

constexpr int32_t kOpenWindow = 1 << 20;
constexpr int32_t kBos = 0, kEos = 2;  // of the syllable vocabulary

struct DecoderShape {
    const char* name;
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size;
    float norm_eps;
    bool tied;
    double rope_theta;
    double rope_factor;  // of llama3 scaling; 0: none
};
constexpr DecoderShape kDecoders[] = {
    {"llama-160m", 768, 2048, 12, 12, 12, 32000, 1e-6f, false, 10000.0, 0.0},
    {"tinyllama-1.1b", 2048, 5632, 22, 32, 4, 32000, 1e-5f, false, 10000.0, 0.0},
    {"llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256, 1e-5f, true, 500000.0, 32.0},
    {"llama-2-7b", 4096, 11008, 32, 32, 32, 32000, 1e-5f, false, 10000.0, 0.0},
    {"llama-3.1-8b", 4096, 14336, 32, 32, 8, 128256, 1e-5f, false, 500000.0, 8.0},
};

struct EncoderShape {
    const char* name;
    int32_t dim, hidden_dim, n_layers, n_heads;
    float norm_eps;
};
constexpr EncoderShape kEncoders[] = {
    {"roberta-base", 768, 3072, 12, 12, 1e-5f},
    {"roberta-large", 1024, 4096, 24, 16, 1e-5f},
};

template <typename Shapes>
std::string names_of(const Shapes& shapes) {
    std::string names;
    for (const auto& shape : shapes) names += str(names.empty() ? "" : "|", shape.name);
    return names;
}

template <typename Shapes>
const auto& shape_named(const Shapes& shapes, const std::string& name, const char* option) {
    for (const auto& shape : shapes) {
        if (name == shape.name) return shape;
    }
    fail(Status::usage, option, ": expected ", names_of(shapes), "; found \"", printable(name), "\"");
}

// "b", "a" -> "ba" and so on, in the order of their ids.
std::vector<std::string> syllables() {
    std::vector<std::string> all;
    for (const char consonant : std::string_view("bcdfghjklmnpqrstvwxz")) {
        for (const char vowel : std::string_view("aeiou")) all.push_back({consonant, vowel});
    }
    return all;
}

std::string spelled(std::string_view bytes) {
    std::string out;
    for (const char c : bytes) append_utf8(out, byte_to_char(static_cast<uint8_t>(c)));
    return out;
}

// What both kinds of networks have.
template <typename Config, typename Shape>
Config config_of(const Shape& shape) {
    Config config;
    config.dim = shape.dim;
    config.hidden_dim = shape.hidden_dim;
    config.n_layers = shape.n_layers;
    config.n_heads = shape.n_heads;
    config.norm_eps = shape.norm_eps;
    return config;
}

}  // namespace

std::string decoder_shape_names() {
    return names_of(kDecoders);
}
std::string encoder_shape_names() {
    return names_of(kEncoders);
}

DecoderConfig decoder_shape(const std::string& name) {
    const DecoderShape& s = shape_named(kDecoders, name, "--shape");
    auto c = config_of<DecoderConfig>(s);
    c.n_kv_heads = s.n_kv_heads;
    c.head_dim = s.dim / s.n_heads;
    c.vocab_size = s.vocab_size;
    c.max_seq_len = kOpenWindow;
    c.rope_theta = s.rope_theta;
    if (s.rope_factor > 0.0) {
        c.rope_llama3 = Llama3RopeScaling{};
        c.rope_llama3->factor = s.rope_factor;
    }
    c.tied_embeddings = s.tied;
    c.bos_id = kBos;
    c.eos_ids = {kEos};
    return c;
}

RobertaConfig encoder_shape(const std::string& name) {
    const EncoderShape& s = shape_named(kEncoders, name, "--encoder-shape");
    auto c = config_of<RobertaConfig>(s);
    c.vocab_size = 50265;
    c.max_positions = 514;
    return c;
}

Tokenizer syllable_tokenizer() {
    const std::vector<std::string> parts = syllables();
    const std::string space = spelled(" ");
    std::vector<std::string> pieces = {"<s>", "<pad>", "</s>", "<unk>"};
    const size_t n_special = pieces.size();
    for (int byte = 0; byte < 256; ++byte) pieces.push_back(spelled(std::string(1, static_cast<char>(byte))));
    pieces.insert(pieces.end(), parts.begin(), parts.end());
    for (const std::string& syllable : parts) pieces.push_back(space + syllable);
    for (const std::string& first : parts) {
        for (const std::string& second : parts) pieces.push_back(str(space, first, second));
    }
    // First letters join to syllables, then the space to the first of them, then the word closes.
    std::vector<std::pair<std::string, std::string>> merges;
    merges.reserve(parts.size() * (parts.size() + 2));
    for (const std::string& syllable : parts) merges.emplace_back(syllable.substr(0, 1), syllable.substr(1));
    for (const std::string& syllable : parts) merges.emplace_back(space, syllable);
    for (const std::string& first : parts) {
        for (const std::string& second : parts) merges.emplace_back(space + first, second);
    }
    return Tokenizer::from_pieces(pieces, n_special, merges);
}

ModelParts random_model_parts(DecoderConfig decoder, RobertaConfig encoder) {
    RefragConfig config;
    config.chunk_len = 16;
    config.chunk_lens = {8, 16, 32};
    config.pooling = ChunkPooling::mean;
    config.policy.n_heads = encoder.n_heads;
    config.policy.dim = encoder.dim;
    config.policy.hidden_dim = 4 * encoder.dim;
    config.policy.sees_question = true;
    const Tokenizer tokenizer = syllable_tokenizer();
    for (const int32_t vocab_size : {decoder.vocab_size, encoder.vocab_size}) {
        REFRAG_CHECK(tokenizer.vocab_size() <= vocab_size, Status::usage,
                     "random weights: expected a vocabulary of at least ", tokenizer.vocab_size(), ", found ",
                     vocab_size);
    }
    return {std::move(config), std::move(decoder), encoder, tokenizer, tokenizer, kBos};
}

uint64_t random_weight_bytes(const ModelParts& parts, WeightFormat format) {
    const WeightCount n = count_weights(parts);
    const uint64_t floats = n.matrix * sizeof(uint16_t) + n.vector * sizeof(float);
    // A byte each, and an F16 scale for 32 of them, instead of two bytes.
    return format == WeightFormat::as_stored ? floats : floats - n.layer_matrix + n.layer_matrix / 16;
}

std::unique_ptr<Model> make_random_model(Device& device, ModelParts parts, uint64_t seed,
                                         const LoadProgress& progress, WeightFormat format) {
    const uint64_t total = count_weights(parts).matrix * sizeof(uint16_t);
    uint64_t done = 0;
    LoadedBytes loaded;
    if (progress) {
        loaded = [&](uint64_t bytes) {
            done += bytes;
            progress(done, total);
        };
    }
    RandomWeights weights(device, seed, loaded, format);
    return std::make_unique<Model>(device, std::move(parts), weights);
}

WordTexts::WordTexts(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
    for (int64_t id = 0; id < tokenizer.vocab_size(); ++id) {
        const std::string word(tokenizer.token_bytes(static_cast<int32_t>(id)));
        const bool letters =
            word.size() >= 2 && word[0] == ' ' &&
            std::all_of(word.begin() + 1, word.end(), [](char c) { return c >= 'a' && c <= 'z'; });
        // One token in a row of them; what the first of a text becomes is text()'s business.
        if (!letters) continue;
        const std::string twice = str(word, word), thrice = str(twice, word);
        if (tokenizer.encode_ids(thrice).size() == tokenizer.encode_ids(twice).size() + 1) {
            words_.push_back(word);
        }
    }
    REFRAG_CHECK(!words_.empty(), Status::runtime,
                 "the tokenizer's vocabulary has no token that is a space and small letters: no text to "
                 "measure with can be made");
}

std::string WordTexts::text(int64_t n_tokens, uint64_t seed) const {
    Random random(seed);
    std::vector<const std::string*> drawn;
    // Where neighbours join, or the text's beginning takes a token of its own, a word too many or too few is
    // seen here and mended.
    constexpr int kTries = 64;
    for (int i = 0; i < kTries; ++i) {
        std::string text;
        for (const std::string* word : drawn) text += *word;
        const int64_t missing = n_tokens - std::ssize(tokenizer_.encode_ids(text));
        if (missing == 0) return text;
        if (missing < 0) {
            drawn.resize(drawn.size() - std::min(drawn.size(), static_cast<size_t>(-missing)));
        } else {
            for (int64_t j = 0; j < missing; ++j) drawn.push_back(&words_[random.below(words_.size())]);
        }
    }
    fail(Status::runtime, "cannot make a text of exactly ", n_tokens, " tokens from words of the vocabulary");
}

}  // namespace refrag
