// Hugging Face LLaMA directories written again as GGUF files, as published converters do it: other names, q
// and k with their heads' halves interleaved, configuration and vocabulary as metadata.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "gguf_writer.h"
#include "io/json.h"
#include "models/gguf_weights.h"
#include "models/transformer_config.h"
#include "safetensors_edit.h"

namespace refrag_test {

inline std::string gguf_f32_list(std::string_view key, const std::vector<float>& values) {
    std::vector<std::string> items;
    for (const float value : values) items.push_back(little_endian(std::bit_cast<uint32_t>(value), 4));
    return gguf_list(key, 6, items);
}
inline std::string gguf_i32_list(std::string_view key, const std::vector<int32_t>& values) {
    std::vector<std::string> items;
    for (const int32_t value : values) items.push_back(little_endian(static_cast<uint32_t>(value), 4));
    return gguf_list(key, 5, items);
}
inline std::string gguf_text_list(std::string_view key, const std::vector<std::string>& values) {
    std::vector<std::string> items;
    for (const std::string& value : values) items.push_back(gguf_text(value));
    return gguf_list(key, 8, items);
}

// Puts a pair in the place of the one with its key, or behind the others; "" as pair takes the key out.
inline void set_pair(GgufTestFile& file, const std::string& key, const std::string& pair) {
    const std::string begin = gguf_text(key);
    std::erase_if(file.pairs, [&](const std::string& old) { return old.starts_with(begin); });
    if (!pair.empty()) file.pairs.push_back(pair);
}

inline GgufTestTensor& tensor_named(GgufTestFile& file, const std::string& name) {
    for (GgufTestTensor& tensor : file.tensors)
        if (tensor.name == name) return tensor;
    refrag::fail(refrag::Status::runtime, "the test's file has no tensor ", name);
}

// The rows of a projection in the order of GGUF files.
inline std::string interleaved(const std::string& bytes, size_t rows, size_t heads) {
    const size_t row_bytes = bytes.size() / rows, head_rows = rows / heads, half = head_rows / 2;
    std::string out;
    for (size_t head = 0; head < heads; ++head)
        for (size_t i = 0; i < head_rows; ++i)
            out += bytes.substr((head * head_rows + (i % 2) * half + i / 2) * row_bytes, row_bytes);
    return out;
}

// Pairs of the network's shape.
inline std::vector<std::string> gguf_shape_pairs(const refrag::DecoderConfig& c) {
    const auto u32 = [&](const std::string& name, int64_t value) {
        return gguf_u32(c.family + "." + name, static_cast<uint32_t>(value));
    };
    std::vector<std::string> pairs = {
        gguf_string("general.architecture", c.family),
        u32("block_count", c.n_layers),
        u32("context_length", c.max_seq_len),
        u32("embedding_length", c.dim),
        u32("feed_forward_length", c.hidden_dim),
        u32("attention.head_count", c.n_heads),
        u32("attention.head_count_kv", c.n_kv_heads),
        u32("attention.key_length", c.head_dim),
        u32("attention.value_length", c.head_dim),
        u32("rope.dimension_count", c.head_dim),
        u32("vocab_size", c.vocab_size),
        gguf_f32(c.family + ".attention.layer_norm_rms_epsilon", c.norm_eps),
        gguf_f32(c.family + ".rope.freq_base", static_cast<float>(c.rope_theta))};
    if (c.rope_linear_factor != 1.0) {
        pairs.push_back(gguf_string(c.family + ".rope.scaling.type", "linear"));
        pairs.push_back(
            gguf_f32(c.family + ".rope.scaling.factor", static_cast<float>(c.rope_linear_factor)));
    }
    if (c.rope_yarn) {
        pairs.push_back(gguf_string(c.family + ".rope.scaling.type", "yarn"));
        pairs.push_back(gguf_f32(c.family + ".rope.scaling.factor", static_cast<float>(c.rope_yarn->factor)));
        pairs.push_back(u32("rope.scaling.original_context_length", c.rope_yarn->original_max_seq_len));
    }
    if (!c.windows.empty()) pairs.push_back(u32("attention.sliding_window", c.windows[0]));
    if (c.bos_id) pairs.push_back(gguf_u32("tokenizer.ggml.bos_token_id", static_cast<uint32_t>(*c.bos_id)));
    if (!c.eos_ids.empty())
        pairs.push_back(gguf_u32("tokenizer.ggml.eos_token_id", static_cast<uint32_t>(c.eos_ids[0])));
    return pairs;
}

// Of a byte-level tokenizer.json: its pieces in order, types and merges.
inline std::vector<std::string> gguf_vocabulary_pairs(const refrag::Json& json, std::string_view pre) {
    const refrag::Json vocab = json.get("model").get("vocab");
    const refrag::Json added = json.get("added_tokens");
    std::vector<std::string> tokens(vocab.size());
    const auto place = [&](std::string_view piece, size_t id) {
        if (id >= tokens.size()) tokens.resize(id + 1);
        tokens[id] = piece;
    };
    for (size_t i = 0; i < vocab.size(); ++i)
        place(vocab.key_at(i), static_cast<size_t>(vocab.at(i).as_int()));
    for (size_t i = 0; i < added.size(); ++i)
        place(added.at(i).get_string("content"), static_cast<size_t>(added.at(i).get_int("id")));
    std::vector<int32_t> types(tokens.size(), 1);
    for (size_t i = 0; i < added.size(); ++i)
        types[static_cast<size_t>(added.at(i).get_int("id"))] = added.at(i).get_bool("special") ? 3 : 4;
    std::vector<std::string> merges;
    const refrag::Json pairs = json.get("model").get("merges");
    for (size_t i = 0; i < pairs.size(); ++i) {
        const refrag::Json pair = pairs.at(i);
        merges.push_back(pair.is_string() ? std::string(pair.as_string())
                                          : std::string(pair.at(0).as_string()) + " " +
                                                std::string(pair.at(1).as_string()));
    }
    return {gguf_string("tokenizer.ggml.model", "gpt2"), gguf_string("tokenizer.ggml.pre", pre),
            gguf_text_list("tokenizer.ggml.tokens", tokens),
            gguf_i32_list("tokenizer.ggml.token_type", types),
            gguf_text_list("tokenizer.ggml.merges", merges)};
}

// The weights and the shape of a directory; no vocabulary. LLaMA 3.1's frequencies become the table of
// factors that converters write.
inline GgufTestFile gguf_of_directory(const std::string& dir) {
    const refrag::DecoderConfig c = refrag::load_decoder_config(dir);
    GgufTestFile file;
    file.pairs = gguf_shape_pairs(c);
    for (TestTensor& tensor : read_tensors(dir)) {
        std::string_view name = tensor.name;
        if (name.starts_with("model.")) name.remove_prefix(6);
        if (refrag::gguf_name(name).empty()) continue;  // tables of older checkpoints
        const auto rows = static_cast<size_t>(tensor.shape[0]);
        const bool is_interleaved = c.family == "llama";
        if (is_interleaved && name.find("q_proj") != std::string_view::npos)
            tensor.bytes = interleaved(tensor.bytes, rows, static_cast<size_t>(c.n_heads));
        if (is_interleaved && name.find("k_proj") != std::string_view::npos)
            tensor.bytes = interleaved(tensor.bytes, rows, static_cast<size_t>(c.n_kv_heads));
        std::vector<uint64_t> extents;
        for (size_t axis = tensor.shape.size(); axis-- > 0;)
            extents.push_back(static_cast<uint64_t>(tensor.shape[axis]));
        const uint32_t type = tensor.dtype == "F32" ? 0 : tensor.dtype == "F16" ? 1 : 30;
        file.tensors.push_back({refrag::gguf_name(name), type, extents, tensor.bytes});
    }
    if (c.rope_llama3) {
        refrag::DecoderConfig plain = c;
        plain.rope_llama3.reset();
        const std::vector<float> scaled = c.inverse_frequencies(), unscaled = plain.inverse_frequencies();
        std::string bytes;
        for (size_t i = 0; i < scaled.size(); ++i)
            bytes += little_endian(std::bit_cast<uint32_t>(unscaled[i] / scaled[i]), 4);
        file.tensors.push_back({"rope_freqs.weight", 0, {scaled.size()}, bytes});
    }
    return file;
}

}  // namespace refrag_test
