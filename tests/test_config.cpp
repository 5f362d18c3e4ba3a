// config.json of LLaMA and RoBERTa, in the spellings of transformers 4 and 5: every number at both ends of
// its range and one beyond, defaults, and every key that would change the maths refused by name. refrag.json
// is in test_refrag_config.cpp.
#include <cmath>

#include "config_edit.h"
#include "models/transformer_config.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const Fields kLlama = {
    {"model_type", "\"llama\""},       {"hidden_act", "\"silu\""}, {"hidden_size", "8"},
    {"intermediate_size", "16"},       {"num_hidden_layers", "1"}, {"num_attention_heads", "4"},
    {"num_key_value_heads", "2"},      {"head_dim", "4"},          {"vocab_size", "32"},
    {"max_position_embeddings", "64"}, {"rms_norm_eps", "1e-5"},   {"rope_theta", "10000.0"}};

const Fields kRoberta = {{"model_type", "\"roberta\""}, {"hidden_act", "\"gelu\""},
                         {"hidden_size", "8"},          {"intermediate_size", "16"},
                         {"num_hidden_layers", "1"},    {"num_attention_heads", "2"},
                         {"vocab_size", "32"},          {"max_position_embeddings", "20"},
                         {"type_vocab_size", "1"},      {"layer_norm_eps", "1e-5"},
                         {"bos_token_id", "0"},         {"pad_token_id", "1"},
                         {"eos_token_id", "2"}};

const ConfigFile& file() {
    static const ConfigFile config("config.json");
    return config;
}
DecoderConfig llama(const Fields& changes) {
    file().write(with(kLlama, changes));
    return load_decoder_config(file().dir());
}
RobertaConfig roberta(const Fields& changes) {
    file().write(with(kRoberta, changes));
    return load_roberta_config(file().dir());
}
std::string llama_error(const Fields& changes) {
    return error_of([&] { llama(changes); });
}
std::string roberta_error(const Fields& changes) {
    return error_of([&] { roberta(changes); });
}

}  // namespace

TEST_CASE("llama config: what is read") {
    const DecoderConfig c = llama({{"tie_word_embeddings", "true"},
                                   {"attention_bias", "true"},
                                   {"mlp_bias", "true"},
                                   {"bos_token_id", "1"},
                                   {"eos_token_id", "2"},
                                   {"an_unknown_key", "{\"of\": [\"no\", \"consequence\"]}"}});
    CHECK(c.dim == 8);
    CHECK(c.hidden_dim == 16);
    CHECK(c.n_layers == 1);
    CHECK(c.n_heads == 4);
    CHECK(c.n_kv_heads == 2);
    CHECK(c.head_dim == 4);
    CHECK(c.vocab_size == 32);
    CHECK(c.max_seq_len == 64);
    CHECK(c.norm_eps == 1e-5f);
    CHECK(c.rope_theta == 10000.0);
    CHECK(c.tied_embeddings);
    CHECK(c.qkv_bias);
    CHECK(c.o_bias);
    CHECK(c.mlp_bias);
    CHECK(c.bos_id == 1);
    CHECK(c.eos_ids == std::vector<int32_t>{2});
}

TEST_CASE("llama config: defaults of absent and of null keys") {
    for (const char* value : {"", "null"}) {
        const DecoderConfig c = llama({{"num_key_value_heads", value},
                                       {"head_dim", value},
                                       {"max_position_embeddings", value},
                                       {"rms_norm_eps", value},
                                       {"rope_theta", value},
                                       {"rope_scaling", value},
                                       {"bos_token_id", value},
                                       {"eos_token_id", value},
                                       {"sliding_window", value}});
        CHECK(c.n_kv_heads == 4);
        CHECK(c.head_dim == 2);
        CHECK(c.max_seq_len == 2048);
        CHECK(c.norm_eps == 1e-6f);
        CHECK(c.rope_theta == 10000.0);
        CHECK(c.rope_linear_factor == 1.0);
        CHECK_FALSE(c.rope_llama3.has_value());
        CHECK_FALSE(c.tied_embeddings);
        CHECK_FALSE(c.bos_id.has_value());
        CHECK(c.eos_ids.empty());
    }
}

TEST_CASE("llama config: every number at the ends of its range and beyond") {
    const auto error = [](const Fields& changes) { return llama_error(changes); };
    check_integer_range(file(), "hidden_size", 1, 1 << 20, error);
    check_integer_range(file(), "intermediate_size", 1, 1 << 20, error);
    check_integer_range(file(), "num_hidden_layers", 1, 4096, error);
    check_integer_range(file(), "num_attention_heads", 1, 4096, error, {{"num_key_value_heads", ""}});
    check_integer_range(file(), "num_key_value_heads", 1, 4, error);
    check_integer_range(file(), "vocab_size", 1, 1 << 24, error);
    check_integer_range(file(), "max_position_embeddings", 1, 1 << 28, error);
    check_integer_range(file(), "bos_token_id", 0, 31, error);
    check_integer_range(file(), "eos_token_id", 0, 31, error);
    CHECK(contains(llama_error({{"head_dim", "0"}}), file().key("head_dim")));
    CHECK(llama({{"head_dim", "2"}}).head_dim == 2);
    CHECK(llama({{"head_dim", "65536"}}).head_dim == 65536);
    CHECK(contains(llama_error({{"head_dim", "65537"}}), file().key("head_dim")));
    check_number_range(file(), "rms_norm_eps", {"-1e-9", "0", "1", "1.0000001"}, error);
    check_number_range(file(), "rope_theta", {"0.999", "1", "1e12", "1.001e12"}, error);
}

TEST_CASE("llama config: numbers that do not go together") {
    CHECK(llama_error({{"num_key_value_heads", "3"}}) ==
          file().key("num_key_value_heads") + ": expected a divisor of num_attention_heads = 4, found 3");
    CHECK(llama_error({{"head_dim", ""}, {"hidden_size", "10"}}) ==
          file().key("hidden_size") + ": expected a multiple of num_attention_heads = 4, found 10");
    CHECK(contains(llama_error({{"head_dim", "5"}}), "expected an even head_dim, found 5"));
    CHECK(contains(llama_error({{"head_dim", ""}, {"hidden_size", "12"}}),
                   "expected an even head_dim, found 3"));
    for (const char* key :
         {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
        CHECK(llama_error({{key, ""}}) == str(file().path(), ": expected the key \"", key, "\", found none"));
    }
}

TEST_CASE("config: a value of another type is refused with its key") {
    for (const char* key : {"hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "head_dim",
                            "tie_word_embeddings", "attention_bias", "mlp_bias", "model_type", "hidden_act",
                            "bos_token_id", "rope_theta", "rope_scaling", "rope_parameters"}) {
        CHECK(contains(llama_error({{key, "[]"}}), file().key(key) + ": expected"));
    }
    CHECK(contains(llama_error({{"hidden_size", "8.5"}}), "found 8.5"));
    CHECK(contains(llama_error({{"tie_word_embeddings", "1"}}), "expected true or false, found 1"));
    for (const char* key :
         {"hidden_size", "layer_norm_eps", "type_vocab_size", "pad_token_id", "hidden_act"}) {
        CHECK(contains(roberta_error({{key, "{}"}}), file().key(key) + ": expected"));
    }
}

TEST_CASE("llama config: end tokens, and generation_config.json before config.json") {
    CHECK(llama({{"eos_token_id", "[2, 3]"}}).eos_ids == std::vector<int32_t>{2, 3});
    CHECK(contains(llama_error({{"eos_token_id", "[2, 32]"}}), file().key("eos_token_id[1]")));
    const TempDir temp;
    temp.write("config.json", json_of(with(kLlama, {{"eos_token_id", "2"}})));
    const auto with_generation = [&](const char* text) {
        temp.write("generation_config.json", text);
        return load_decoder_config(temp.path()).eos_ids;
    };
    CHECK(with_generation("{\"eos_token_id\": [5, 6]}") == std::vector<int32_t>{5, 6});
    CHECK(with_generation("{\"temperature\": 0.5}") == std::vector<int32_t>{2});
    CHECK(contains(error_of([&] { with_generation("{\"eos_token_id\": 32}"); }),
                   temp.file("generation_config.json") + ": key \"eos_token_id\": expected"));
}

TEST_CASE("llama config: RoPE in both spellings") {
    const auto frequencies = [](const Fields& changes) { return llama(changes).inverse_frequencies(); };
    const Fields wide = {{"head_dim", "16"}, {"rope_theta", "500000.0"}};
    const auto wide_with = [&](const Fields& changes) { return frequencies(with(wide, changes)); };

    // f[m] = theta^(-2m / head_dim).
    const std::vector<float> plain = wide_with({});
    REQUIRE(plain.size() == 8);
    for (size_t m = 0; m < 8; ++m) {
        CHECK(plain[m] == static_cast<float>(std::pow(500000.0, -static_cast<double>(m) / 8.0)));
    }
    CHECK(wide_with({{"rope_scaling", "null"}}) == plain);
    CHECK(wide_with({{"rope_scaling", "{\"rope_type\": \"default\"}"}}) == plain);
    CHECK(frequencies({{"head_dim", "16"},
                       {"rope_theta", ""},
                       {"rope_parameters", "{\"rope_theta\": 500000.0, \"rope_type\": \"default\"}"}}) ==
          plain);
    CHECK(frequencies({{"head_dim", "16"}, {"rope_parameters", "{\"rope_theta\": 500000.0}"}}) == plain);

    // Linear: every frequency divided.
    const std::vector<float> halved =
        wide_with({{"rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}"}});
    for (size_t m = 0; m < 8; ++m) CHECK(halved[m] == plain[m] / 2);
    CHECK(frequencies({{"head_dim", "16"},
                       {"rope_parameters",
                        "{\"rope_theta\": 5e5, \"rope_type\": \"linear\", \"factor\": 2}"}}) == halved);

    // LLaMA 3 with an original length of 64: wavelengths of 6.3 (kept), 32 (blended), 167 and more (slowed
    // down eightfold). The numbers are those of transformers.
    const std::string bands =
        "\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
        "\"original_max_position_embeddings\": 64}";
    const std::vector<float> old_spelling =
        wide_with({{"rope_scaling", "{\"rope_type\": \"llama3\", " + bands}});
    const float expected[] = {1.0f,
                              0.079403013f,
                              0.00470075384f,
                              0.000911583134f,
                              0.000176776681f,
                              3.42810235e-05f,
                              6.64786967e-06f,
                              1.28917316e-06f};
    for (size_t m = 0; m < 8; ++m) CHECK(old_spelling[m] == doctest::Approx(expected[m]).epsilon(2e-7));
    CHECK(wide_with({{"rope_scaling", "{\"type\": \"llama3\", " + bands}}) == old_spelling);
    CHECK(frequencies({{"head_dim", "16"},
                       {"rope_theta", ""},
                       {"rope_parameters",
                        "{\"rope_theta\": 500000.0, \"rope_type\": \"llama3\", " + bands}}) == old_spelling);
}

TEST_CASE("llama config: RoPE that cannot be, or is not supported") {
    const auto scaling = [](const std::string& text) { return llama_error({{"rope_scaling", text}}); };
    for (const char* type : {"longrope", "proportional", ""}) {
        CHECK(scaling(str("{\"rope_type\": \"", type, "\", \"factor\": 2.0}")) ==
              str(file().key("rope_scaling.rope_type"),
                  ": expected \"default\", \"linear\", \"dynamic\", \"yarn\" or \"llama3\", found \"", type,
                  "\""));
    }
    CHECK(contains(scaling("{\"factor\": 2.0}"),
                   file().key("rope_scaling.factor") + ": expected a rope_type beside it"));
    CHECK(contains(scaling("{\"type\": \"linear\"}"), "expected the key \"factor\""));
    CHECK(contains(scaling("{\"type\": \"linear\", \"factor\": 0.5}"), file().key("rope_scaling.factor")));
    CHECK(scaling("{\"type\": \"linear\", \"factor\": 1000000}") == "(no error)");
    CHECK(contains(scaling("{\"type\": \"linear\", \"factor\": 1000001}"), "found 1000001"));
    CHECK(contains(scaling("{\"type\": \"default\", \"partial_rotary_factor\": 0.5}"),
                   file().key("rope_scaling.partial_rotary_factor")));
    CHECK(contains(llama_error({{"rope_parameters", "{\"rope_theta\": 0.5}"}}),
                   file().key("rope_parameters.rope_theta")));
    const auto llama3 = [&](const std::string& low, const std::string& high, const std::string& original) {
        return scaling("{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": " + low +
                       ", \"high_freq_factor\": " + high +
                       ", \"original_max_position_embeddings\": " + original + "}");
    };
    CHECK(llama3("1", "4", "64") == "(no error)");
    CHECK(llama3("4", "4", "64") ==
          file().key("rope_scaling.high_freq_factor") + ": expected a number above low_freq_factor, found 4");
    CHECK(contains(llama3("0", "4", "64"), file().key("rope_scaling.low_freq_factor")));
    CHECK(contains(llama3("1", "4", "0"), file().key("rope_scaling.original_max_position_embeddings")));
}

TEST_CASE("llama config: RoPE as other writers leave it") {
    const std::string bands =
        "\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4";
    // Without its own length the scaling starts from max_position_embeddings.
    const DecoderConfig c = llama({{"rope_scaling", "{" + bands + "}"}});
    REQUIRE(c.rope_llama3.has_value());
    CHECK(c.rope_llama3->original_max_seq_len == 64);
    // By layer type.
    CHECK(llama({{"rope_parameters",
                  "{\"full_attention\": {\"rope_type\": \"default\", \"rope_theta\": 5000.0}}"}})
              .rope_theta == 5000.0);
    CHECK(contains(llama_error({{"rope_parameters",
                                 "{\"full_attention\": {\"rope_theta\": 5000.0}, "
                                 "\"sliding_attention\": {\"rope_theta\": 1.0}}"}}),
                   "no parameters for layers other than full_attention"));
    CHECK(roberta({{"eos_token_id", "[2]"}}).eos_id == 2);
}

TEST_CASE("config: a number is shown as the file writes it") {
    CHECK(contains(llama_error({{"hidden_size", "512.0"}}),
                   "expected an integer in [1, 1048576], found 512.0"));
}

TEST_CASE("config: keys that would change the maths are refused by name") {
    const Fields foreign = {{"quantization_config", "{\"bits\": 4}"},
                            {"final_logit_softcapping", "30.0"},
                            {"attn_logit_softcapping", "50.0"},
                            {"query_pre_attn_scalar", "256"},
                            {"clip_qkv", "8.0"},
                            {"num_local_experts", "8"},
                            {"num_experts", "8"},
                            {"attn_temperature_tuning", "4"},
                            {"use_qk_norm", "true"},
                            {"qk_layernorm", "true"},
                            {"attention_chunk_size", "8192"},
                            {"pe_config", "{}"},
                            {"parallel_attn", "true"},
                            {"alibi", "true"},
                            {"partial_rotary_factor", "0.5"},
                            {"attention_multiplier", "0.5"},
                            {"residual_multiplier", "0.22"},
                            {"embedding_multiplier", "12.0"},
                            {"logits_scaling", "8.0"},
                            {"logit_scale", "0.0625"}};
    for (const auto& field : foreign) {
        const std::string& key = field.first;
        const std::string& value = field.second;
        CAPTURE(key);
        for (const std::string& message : {llama_error({{key, value}}), roberta_error({{key, value}})}) {
            CHECK(contains(message, file().key(key) + ": expected"));
            CHECK(contains(message, "not supported"));
        }
        CHECK(llama_error({{key, "null"}}) == "(no error)");
    }
    // The values that change nothing.
    CHECK(llama_error({{"layer_types", "[\"full_attention\"]"},
                       {"use_qk_norm", "false"},
                       {"alibi", "false"},
                       {"logits_scaling", "1"},
                       {"residual_multiplier", "1.0"},
                       {"partial_rotary_factor", "1.0"}}) == "(no error)");
}

TEST_CASE("config: another architecture or activation is refused") {
    CHECK(llama_error({{"model_type", "\"gemma\""}}) ==
          file().key("model_type") +
              ": expected one of \"llama\", \"mistral\", \"qwen2\", \"qwen3\", \"olmo2\", \"smollm3\", found "
              "\"gemma\"");
    CHECK(contains(llama_error({{"hidden_act", "\"gelu\""}}),
                   "expected \"silu\" or \"swish\", found \"gelu\""));
    CHECK(llama_error({{"sliding_window", "64"}}) == "(no error)");
    CHECK(llama_error({{"sliding_window", "63"}}) ==
          file().key("sliding_window") +
              ": expected null, or at least max_position_embeddings = 64 (a llama has no window), found 63");
    for (const char* key : {"layer_types", "no_rope_layers"})
        CHECK(contains(roberta_error({{key, "[1]"}}), file().key(key) + ": expected this key to be absent"));
    CHECK(contains(roberta_error({{"model_type", "\"electra\""}}),
                   "\"roberta\" or \"xlm-roberta\" or \"bert\", found \"electra\""));
    const RobertaConfig bert = roberta({{"model_type", "\"bert\""}, {"pad_token_id", ""}});
    CHECK(bert.is_bert);
    CHECK(bert.pad_id == 0);
    CHECK(bert.first_position == 0);
    CHECK(bert.max_seq_len() == 20);
    CHECK(bert.bos_id == -1);
    CHECK(contains(roberta_error({{"hidden_act", "\"gelu_new\""}}), "expected \"gelu\", found \"gelu_new\""));
    CHECK(contains(roberta_error({{"position_embedding_type", "\"relative_key\""}}),
                   file().key("position_embedding_type")));
    for (const char* key : {"is_decoder", "add_cross_attention"}) {
        CHECK(contains(roberta_error({{key, "true"}}), file().key(key) + ": expected false"));
        CHECK(roberta_error({{key, "false"}}) == "(no error)");
    }
}

TEST_CASE("decoder config: families, and what they are where the file does not say") {
    const auto of = [](const std::string& type, Fields changes = {}) {
        for (const char* key :
             {"head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"})
            changes.insert(changes.begin(), {key, ""});
        changes.insert(changes.begin(), {"model_type", "\"" + type + "\""});
        return llama(changes);
    };
    const DecoderConfig mistral = of("mistral");
    CHECK(mistral.max_seq_len == 131072);
    CHECK(mistral.n_kv_heads == 4);  // 8, of which there are no more than heads
    CHECK(mistral.windows == std::vector<int32_t>{4096});
    CHECK(of("mistral", {{"sliding_window", "null"}}).windows.empty());
    CHECK(of("mistral", {{"sliding_window", "131072"}}).windows.empty());
    CHECK(of("mistral", {{"sliding_window", "7"}}).window(0) == 7);

    const DecoderConfig qwen2 = of("qwen2");
    CHECK(qwen2.family == "qwen2");
    CHECK(qwen2.qkv_bias);
    CHECK_FALSE(qwen2.o_bias);
    CHECK(qwen2.max_seq_len == 32768);
    CHECK(qwen2.windows.empty());
    CHECK(of("qwen2", {{"sliding_window", "7"}}).windows.empty());
    const Fields window = {
        {"use_sliding_window", "true"}, {"sliding_window", "7"}, {"num_hidden_layers", "3"}};
    Fields from_1 = window;
    from_1.emplace("max_window_layers", "1");
    CHECK(of("qwen2", from_1).windows == std::vector<int32_t>{0, 7, 7});
    Fields by_types = window;
    by_types.emplace("layer_types", "[\"sliding_attention\", \"full_attention\", \"sliding_attention\"]");
    CHECK(of("qwen2", by_types).windows == std::vector<int32_t>{7, 0, 7});

    const DecoderConfig qwen3 = of("qwen3");
    CHECK(qwen3.head_dim == 128);
    CHECK(qwen3.qk_norm == QkNorm::per_head);
    CHECK_FALSE(qwen3.qkv_bias);
    CHECK(of("qwen3", {{"attention_bias", "true"}}).o_bias);

    const DecoderConfig olmo2 = of("olmo2");
    CHECK(olmo2.norm_eps == 1e-5f);
    CHECK(olmo2.qk_norm == QkNorm::full_width);
    CHECK(olmo2.norm_place == NormPlace::after);

    const DecoderConfig smollm3 = of("smollm3", {{"num_hidden_layers", "8"}});
    CHECK(smollm3.tied_embeddings);
    CHECK(smollm3.rope_theta == 2000000.0);
    CHECK(smollm3.rotates == std::vector<bool>{true, true, true, false, true, true, true, false});
    Fields sliding = window;
    sliding.emplace("no_rope_layers", "[0, 1, 0]");
    CHECK(of("smollm3", sliding).windows == std::vector<int32_t>{7, 0, 7});

    const auto error = [&](const std::string& type, const Fields& changes) {
        return error_of([&] { of(type, changes); });
    };
    CHECK(contains(error("llama", {{"layer_types", "[\"sliding_attention\"]"}}),
                   file().key("layer_types") + ": expected layers of one kind, as a llama has them"));
    CHECK(contains(error("llama", {{"layer_types", "[\"chunked_attention\"]"}}),
                   file().key("layer_types[0]") + ": expected \"full_attention\" or \"sliding_attention\""));
    CHECK(contains(error("qwen2", {{"layer_types", "[]"}}), "expected one for each of 1 layers"));
    CHECK(contains(error("qwen2", {{"attention_bias", "true"}}), file().key("attention_bias")));
    CHECK(contains(error("smollm3", {{"no_rope_layers", "[1, 0]"}}), "expected one for each of 1 layers"));
    CHECK(contains(error("smollm3", {{"no_rope_layers", "[2]"}}), file().key("no_rope_layers[0]")));
    CHECK(contains(error("llama", {{"no_rope_layers", "[1]"}}), "expected this key to be absent"));
}

TEST_CASE("decoder config: YaRN and dynamic scaling") {
    const auto scaled = [](const std::string& more) {
        return llama({{"rope_scaling", "{\"rope_type\": \"yarn\"" + more + "}"}});
    };
    // Without lengths of its own the scaling is one of 1.
    CHECK(scaled("").rope_yarn->factor == 1.0);
    CHECK(scaled(", \"original_max_position_embeddings\": 16").rope_yarn->factor == 4.0);
    const DecoderConfig c = scaled(", \"factor\": 4.0");
    CHECK(c.rope_yarn->original_max_seq_len == 64);
    CHECK(c.rope_yarn->attention_factor == doctest::Approx(0.1 * std::log(4.0) + 1.0));
    const double f = c.rope_yarn->attention_factor;
    CHECK(static_cast<double>(c.attention_scale()) == doctest::Approx(f * f / 2.0));
    CHECK(scaled(", \"factor\": 4.0, \"attention_factor\": 1.5").rope_yarn->attention_factor == 1.5);
    CHECK(scaled(", \"factor\": 4.0, \"mscale\": 1.0, \"mscale_all_dim\": 1.0").rope_yarn->attention_factor ==
          1.0);
    CHECK(contains(llama_error({{"rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 0.5}"}}),
                   file().key("rope_scaling.factor")));
    // Within the window dynamic scaling changes nothing.
    CHECK(llama({{"rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 4.0}"}}).inverse_frequencies() ==
          llama({}).inverse_frequencies());
    CHECK(contains(llama_error({{"rope_scaling", "{\"rope_type\": \"dynamic\"}"}}), "factor"));
}

TEST_CASE("roberta config: what is read, defaults and ranges") {
    RobertaConfig c = roberta({});
    CHECK(c.dim == 8);
    CHECK(c.hidden_dim == 16);
    CHECK(c.n_layers == 1);
    CHECK(c.n_heads == 2);
    CHECK(c.vocab_size == 32);
    CHECK(c.max_positions == 20);
    CHECK(c.max_seq_len() == 18);
    CHECK(c.type_vocab_size == 1);
    CHECK(c.norm_eps == 1e-5f);
    c = roberta({{"type_vocab_size", ""},
                 {"layer_norm_eps", ""},
                 {"bos_token_id", ""},
                 {"pad_token_id", ""},
                 {"eos_token_id", ""}});
    CHECK(c.type_vocab_size == 2);
    CHECK(c.norm_eps == 1e-12f);
    CHECK(c.bos_id == 0);
    CHECK(c.pad_id == 1);
    CHECK(c.eos_id == 2);

    const auto error = [](const Fields& changes) { return roberta_error(changes); };
    check_integer_range(file(), "hidden_size", 1, 1 << 20, error, {{"num_attention_heads", "1"}});
    check_integer_range(file(), "intermediate_size", 1, 1 << 20, error);
    check_integer_range(file(), "num_hidden_layers", 1, 4096, error);
    check_integer_range(file(), "num_attention_heads", 1, 4096, error, {{"hidden_size", "4096"}});
    check_integer_range(file(), "vocab_size", 1, 1 << 24, error,
                        {{"pad_token_id", "0"}, {"eos_token_id", "0"}});
    check_integer_range(file(), "max_position_embeddings", 3, 1 << 24, error);
    check_integer_range(file(), "type_vocab_size", 1, 1024, error);
    CHECK(roberta({{"pad_token_id", "18"}}).max_seq_len() == 1);
    CHECK(contains(roberta_error({{"pad_token_id", "19"}}), "more than pad_token_id + 1 = 20, found 20"));
    CHECK(contains(roberta_error({{"pad_token_id", "-1"}}), file().key("pad_token_id")));
    // An id that is there by default only is still an id of the vocabulary.
    CHECK(contains(roberta_error({{"eos_token_id", ""}, {"vocab_size", "2"}}),
                   "expected a vocab_size above eos_token_id = 2 (its default), found 2"));
    check_integer_range(file(), "bos_token_id", 0, 31, error);
    check_integer_range(file(), "eos_token_id", 0, 31, error);
    check_number_range(file(), "layer_norm_eps", {"-1e-9", "0", "1", "1.0000001"}, error);
    CHECK(contains(roberta_error({{"hidden_size", "9"}}), "a multiple of num_attention_heads = 2, found 9"));
    CHECK(contains(roberta_error({{"max_position_embeddings", "2"}}),
                   "more than pad_token_id + 1 = 2, found 2"));
    for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                            "vocab_size", "max_position_embeddings"}) {
        CHECK(roberta_error({{key, ""}}) ==
              str(file().path(), ": expected the key \"", key, "\", found none"));
    }
}

TEST_CASE("config: a file that is missing or not JSON is named") {
    const TempDir temp;
    CHECK(contains(error_of([&] { load_decoder_config(temp.path()); }), temp.file("config.json")));
    temp.write("config.json", "{\"hidden_size\": ");
    CHECK(contains(error_of([&] { load_roberta_config(temp.path()); }), "config.json: not valid JSON"));
    temp.write("config.json", "[1]");
    CHECK(
        contains(error_of([&] { load_decoder_config(temp.path()); }), "expected an object, found an array"));
}
