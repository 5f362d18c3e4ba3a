// Every integer of refrag.json and of both networks' config.json at the ends of what integers can be: one
// outside of its range at either side, values that would pass after being cut to 32 bits, the ends of 64
// bits and beyond, fractions and exponents. And files nested a million levels deep. What each field means,
// and its range from inside, is in test_config.cpp and test_refrag_config.cpp.
#include <doctest/doctest.h>

#include "config_edit.h"
#include "models/refrag_config.h"
#include "models/transformer_config.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Field {
    const char* file;  // the network's "llama" and "roberta", or "refrag"
    const char* text;  // the file's, with @ in the field's place
    const char* key;   // how messages call it
    int64_t min;
    int64_t max;
};

// One line of JSON for each file; the field under test is put in the place of its key's value.
constexpr const char* llama_text =
    R"({"hidden_size": 4096, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, )"
    R"("num_key_value_heads": 2, "head_dim": 2, "vocab_size": 32, "max_position_embeddings": 64, "bos_token_id": 1, )"
    R"("eos_token_id": 2, "sliding_window": 64})";
constexpr const char* llama_list_text =
    R"({"hidden_size": 4096, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, )"
    R"("head_dim": 2, "vocab_size": 32, "eos_token_id": [2, 3], "rope_scaling": {"rope_type": "llama3", "factor": 8, )"
    R"("low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}})";
constexpr const char* roberta_text =
    R"({"hidden_size": 4096, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, )"
    R"("vocab_size": 32, "max_position_embeddings": 40, "type_vocab_size": 1, "bos_token_id": 0, "pad_token_id": 1, )"
    R"("eos_token_id": 2})";
constexpr const char* refrag_text =
    R"({"format": 1, "chunk_len": 16, "chunk_lens": [16, 8], "chunk_unit": "decoder_tokens", )"
    R"("encoder": {"vocabulary": "own", "pooling": "cls"}, "projector": {"activation": "gelu"}, )"
    R"("policy": {"n_layers": 2, "n_heads": 4, "dim": 4096, "hidden_dim": 128, "sees_question": true}, )"
    R"("expand_fraction": 0.1, "template": {}, "segment_order": ["passages", "question"]})";

constexpr int64_t dim = 1 << 20;
constexpr Field fields[] = {
    {"llama", llama_text, "hidden_size", 1, dim},
    {"llama", llama_text, "intermediate_size", 1, dim},
    {"llama", llama_text, "num_hidden_layers", 1, 4096},
    {"llama", llama_text, "num_attention_heads", 1, 4096},
    {"llama", llama_text, "num_key_value_heads", 1, 4},
    {"llama", llama_text, "head_dim", 1, 65536},
    {"llama", llama_text, "vocab_size", 1, 1 << 24},
    {"llama", llama_text, "max_position_embeddings", 1, 1 << 28},
    {"llama", llama_text, "bos_token_id", 0, 31},
    {"llama", llama_text, "eos_token_id", 0, 31},
    {"llama", llama_text, "sliding_window", 0, INT64_MAX},
    {"llama", llama_list_text, "eos_token_id[0]", 0, 31},
    {"llama", llama_list_text, "rope_scaling.original_max_position_embeddings", 1, dim * 64},
    {"roberta", roberta_text, "hidden_size", 1, dim},
    {"roberta", roberta_text, "intermediate_size", 1, dim},
    {"roberta", roberta_text, "num_hidden_layers", 1, 4096},
    {"roberta", roberta_text, "num_attention_heads", 1, 4096},
    {"roberta", roberta_text, "vocab_size", 1, 1 << 24},
    {"roberta", roberta_text, "max_position_embeddings", 1, 1 << 24},
    {"roberta", roberta_text, "type_vocab_size", 1, 1024},
    {"roberta", roberta_text, "bos_token_id", 0, 31},
    {"roberta", roberta_text, "pad_token_id", 0, 31},
    {"roberta", roberta_text, "eos_token_id", 0, 31},
    {"refrag", refrag_text, "format", 1, 1},
    {"refrag", refrag_text, "chunk_len", 1, 4096},
    {"refrag", refrag_text, "chunk_lens[0]", 1, 4096},
    {"refrag", refrag_text, "policy.n_layers", 1, 1024},
    {"refrag", refrag_text, "policy.n_heads", 1, 1024},
    {"refrag", refrag_text, "policy.dim", 1, dim},
    {"refrag", refrag_text, "policy.hidden_dim", 1, dim},
};

// The field's file with `value` in its place. The last part of the key is looked for; an index names the
// first element of a list.
std::string with_value(const Field& field, const std::string& value) {
    std::string key = field.key;
    key = key.substr(key.rfind('.') + 1);
    const bool in_list = key.ends_with("[0]");
    if (in_list) key.resize(key.size() - 3);
    std::string text = field.text;
    const size_t at = text.find("\"" + key + "\": ");
    REQUIRE(at != std::string::npos);
    const size_t begin = at + key.size() + 4 + (in_list ? 1 : 0);
    return text.replace(begin, text.find_first_of(",}]", begin) - begin, value);
}

// The message of the loader for this text, without the file's path.
std::string message_of(const Field& field, const std::string& text) {
    static const TempDir dir;
    const std::string kind = field.file;
    const std::string name = kind == "refrag" ? "refrag.json" : "config.json";
    const std::string path = dir.write(name, text);
    const std::string message = error_of([&] {
        if (kind == "llama") load_decoder_config(dir.path());
        if (kind == "roberta") load_roberta_config(dir.path());
        if (kind == "refrag") load_refrag_config(dir.path());
    });
    return message.starts_with(path + ": ") ? message.substr(path.size() + 2) : message;
}

}  // namespace

TEST_CASE("config ranges: every integer field, as it stands, is read") {
    for (const Field& field : fields) CHECK(message_of(field, field.text) == "(no error)");
}

TEST_CASE("config ranges: one outside either end, and numbers that are none of 32 bits, are refused by key") {
    for (const Field& field : fields) {
        std::vector<std::string> values = {std::to_string(INT64_MIN),
                                           "-9223372036854775809",
                                           "9223372036854775808",
                                           "18446744073709551616",
                                           "-1",
                                           "1.5",
                                           "1e0",
                                           "1.0",
                                           "\"1\"",
                                           "true",
                                           "[]"};
        if (std::string(field.file) != "refrag" || field.min > INT64_MIN)
            values.push_back(std::to_string(field.min - 1));
        if (field.max < INT64_MAX) {
            values.push_back(std::to_string(field.max + 1));
            // What is left of these in 32 bits lies within the range.
            values.push_back(std::to_string((int64_t{1} << 32) + field.max));
            values.push_back(std::to_string((int64_t{1} << 32) + field.min));
            values.push_back(std::to_string(INT64_MAX));
        }
        for (const std::string& value : values) {
            // A list of end tokens is a list.
            if (value == "[]" && std::string(field.key).starts_with("eos_token_id")) continue;
            const std::string message = message_of(field, with_value(field, value));
            const bool named = message.starts_with(str("key \"", field.key, "\": expected ")) &&
                               contains(message, ", found ");
            CHECK_MESSAGE(named, str(field.file, " ", field.key, " = ", value, ": ", message));
        }
    }
}

TEST_CASE("config ranges: both ends are within") {
    for (const Field& field : fields) {
        for (const int64_t value : {field.min, field.max}) {
            const std::string message = message_of(field, with_value(field, std::to_string(value)));
            // It may still not go together with the others (heads that do not divide): never for its range.
            const bool in_range = !message.starts_with(str("key \"", field.key, "\": expected an integer"));
            CHECK_MESSAGE(in_range, str(field.file, " ", field.key, " = ", value, ": ", message));
        }
    }
}

TEST_CASE("config ranges: a million levels of nesting are refused in every file, whatever the key") {
    for (const Field& field : {fields[0], fields[13], fields[23]}) {
        for (const char* key : {"unknown", "hidden_size", "policy", "rope_scaling"}) {
            for (const char* open : {"[", "{\"a\":"}) {
                // refrag.json may be 1 MiB long: a million brackets fit, objects do not.
                if (std::string(field.file) == "refrag" && open[0] == '{') continue;
                std::string text = str("{\"", key, "\": ");
                for (int i = 0; i < 1'000'000; ++i) text += open;
                CHECK(message_of(field, text) == "expected at most 64 levels of nesting, found more");
            }
        }
    }
    const TempDir dir;
    dir.write("config.json", llama_text);
    dir.write("generation_config.json", std::string(1'000'000, '['));
    CHECK(contains(error_of([&] { load_decoder_config(dir.path()); }),
                   "generation_config.json: expected at most 64 levels"));
}
