// Loading the networks' weights is strict: each tensor in turn missing, misshapen or of another type is
// refused with place, name, expected and found; an extra one too; what is known to be unused is listed.
#include <algorithm>
#include <cstring>

#include "base/finite.h"
#include "golden.h"
#include "models/policy.h"
#include "models/projector.h"
#include "models/refrag_config.h"
#include "models/roberta.h"
#include "safetensors_edit.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Tensors = std::vector<TestTensor>;

// A network's directory whose tensors (and config, where given) can be put in place of the golden's.
class Workshop {
  public:
    explicit Workshop(const std::string& source)
        : original(read_tensors(source)), config_(read_file(source + "/config.json", 1 << 20)) {
        dir_.write("config.json", config_);
    }
    // The message of loading a Network from `tensors`.
    template <typename Load>
    std::string load(const Tensors& tensors, Load&& load) {
        write_tensors(dir_.file("model.safetensors"), tensors);
        return error_of([&] { load(dir_.path()); });
    }
    std::string without(const std::string& name, auto&& load_network) {
        Tensors tensors = original;
        std::erase_if(tensors, [&](const TestTensor& t) { return t.name == name; });
        return load(tensors, load_network);
    }
    void replace_config(const std::string& from, const std::string& to) {
        const size_t at = config_.find(from);
        REQUIRE(at != std::string::npos);
        std::string changed = config_;
        dir_.write("config.json", changed.replace(at, from.size(), to));
    }
    const std::string& path() const { return dir_.path(); }

    const Tensors original;

  private:
    TempDir dir_;
    std::string config_;
};

void load_llama(const std::string& dir) {
    Llama(cpu().device(), dir);
}
void load_encoder(const std::string& dir) {
    Roberta(cpu().device(), dir, ChunkPooling::cls, false);
}
void load_pooled_encoder(const std::string& dir) {
    Roberta(cpu().device(), dir, ChunkPooling::pooler, false);
}

// Spoils every tensor that is not listed as unused, one at a time and in every way; `prefix` is what names
// may carry.
template <typename Load>
void spoil_each(Workshop& shop, const std::vector<std::string>& unused, const std::string& prefix,
                Load&& load) {
    REQUIRE(shop.load(shop.original, load) == "(no error)");
    size_t spoiled = 0;
    for (const TestTensor& tensor : shop.original) {
        if (std::find(unused.begin(), unused.end(), tensor.name) != unused.end()) continue;
        CAPTURE(tensor.name);
        ++spoiled;
        const std::string found = shape_text(tensor.shape);
        const std::string bare = tensor.name.substr(tensor.name.starts_with(prefix) ? prefix.size() : 0);
        CHECK(shop.without(tensor.name, load) ==
              str(shop.path(), ": tensor \"", bare, "\" is missing, expected shape ", found));

        Tensors tensors = shop.original;
        tensor_named(tensors, tensor.name).shape.push_back(1);
        CHECK(shop.load(tensors, load) == str(shop.path(), ": tensor \"", tensor.name, "\": expected shape ",
                                              found, ", found ",
                                              shape_text(tensor_named(tensors, tensor.name).shape)));

        // As many values of a type that cannot be computed with.
        tensors = shop.original;
        TestTensor& other = tensor_named(tensors, tensor.name);
        other.dtype = tensor.dtype == "F32" ? "I32" : "I16";
        CHECK(shop.load(tensors, load) ==
              str(shop.path(), ": tensor \"", tensor.name, "\": expected dtype ",
                  tensor.shape.size() == 2 ? "F32, F16, BF16 or I8" : "F32, F16 or BF16", ", found ",
                  other.dtype));
    }
    CHECK(spoiled > 10);
}

}  // namespace

TEST_CASE("weights: each of the decoder's tensors is needed, with its shape and a float type") {
    const std::vector<std::string> tables = {"model.layers.0.self_attn.rotary_emb.inv_freq",
                                             "model.layers.1.self_attn.rotary_emb.inv_freq"};
    CHECK(Llama(cpu().device(), network_path("llama2")).unused_tensors() == tables);
    Workshop shop(network_path("llama2"));
    spoil_each(shop, tables, "model.", load_llama);
    Workshop biased(network_path("llama-bias"));
    spoil_each(biased, {}, "model.", load_llama);
}

TEST_CASE("weights: each of the encoder's tensors is needed, with its shape and a float type") {
    const std::vector<std::string> unused = {"lm_head.bias",
                                             "lm_head.decoder.bias",
                                             "lm_head.dense.bias",
                                             "lm_head.dense.weight",
                                             "lm_head.layer_norm.bias",
                                             "lm_head.layer_norm.weight",
                                             "roberta.embeddings.position_ids"};
    CHECK(Roberta(cpu().device(), network_path("roberta-mlm"), ChunkPooling::cls, false).unused_tensors() ==
          unused);
    Workshop shop(network_path("roberta-mlm"));
    spoil_each(shop, unused, "roberta.", load_encoder);

    const Roberta pooled(cpu().device(), network_path("roberta-pooler"), ChunkPooling::pooler, false);
    CHECK(pooled.unused_tensors().empty());
    const Roberta mean(cpu().device(), network_path("roberta-pooler"), ChunkPooling::mean, false);
    CHECK(mean.unused_tensors() == std::vector<std::string>{"pooler.dense.bias", "pooler.dense.weight"});
    Workshop pooler_shop(network_path("roberta-pooler"));
    spoil_each(pooler_shop, {}, "roberta.", load_pooled_encoder);
}

TEST_CASE("weights: an encoder without a pooler cannot pool by it") {
    CHECK(contains(error_of([] { load_pooled_encoder(network_path("roberta-mlm")); }),
                   "tensor \"pooler.dense.weight\" is missing, expected shape [48, 48]"));
}

TEST_CASE("weights: I64 is refused for what is used and accepted for what is not") {
    Workshop shop(network_path("llama2"));
    Tensors tensors = shop.original;
    TestTensor& norm = tensor_named(tensors, "model.norm.weight");
    norm.dtype = "I64";
    norm.bytes.resize(norm.bytes.size() * 2);
    CHECK(contains(shop.load(tensors, load_llama),
                   "\"model.norm.weight\": expected dtype F32, F16 or BF16, found I64"));
    tensors = shop.original;
    TestTensor& table = tensor_named(tensors, "model.layers.0.self_attn.rotary_emb.inv_freq");
    table.dtype = "I64";
    table.bytes.resize(table.bytes.size() * 2);
    CHECK(contains(shop.load(tensors, load_llama), "expected the frequencies that config.json gives"));
    Workshop encoder(network_path("roberta-mlm"));
    tensors = encoder.original;
    TestTensor& head = tensor_named(tensors, "lm_head.dense.bias");
    head.dtype = "I64";
    head.bytes.resize(head.bytes.size() * 2);
    CHECK(encoder.load(tensors, load_encoder) == "(no error)");
}

TEST_CASE("weights: a table of RoPE must be the one that config.json gives, in any float type") {
    Workshop shop(network_path("llama2"));
    const char* name = "model.layers.1.self_attn.rotary_emb.inv_freq";
    Tensors tensors = shop.original;
    TestTensor& table = tensor_named(tensors, name);
    REQUIRE(table.dtype == "F32");
    const std::string whole = table.bytes;
    std::string halves;  // BF16: the upper halves
    for (size_t i = 0; i < whole.size(); i += 4) halves += whole.substr(i + 2, 2);
    table.dtype = "BF16";
    table.bytes = halves;
    CHECK(shop.load(tensors, load_llama) == "(no error)");
    // As transformers 4 stored it: without linear scaling.
    shop.replace_config("\"rope_scaling\":null", R"("rope_scaling":{"type":"linear","factor":2.0})");
    const std::string scaled = shop.load(shop.original, load_llama);
    CHECK_MESSAGE(scaled == "(no error)", scaled);
    Workshop other(network_path("llama2"));
    tensors = other.original;
    TestTensor& changed = tensor_named(tensors, name);
    float last;
    std::memcpy(&last, changed.bytes.data() + changed.bytes.size() - 4, 4);
    last *= 1.01f;
    std::memcpy(changed.bytes.data() + changed.bytes.size() - 4, &last, 4);
    CHECK(other.load(tensors, load_llama) ==
          str(other.path(), ": tensor \"", name, "\" of shape ", shape_text(changed.shape),
              ": expected the frequencies that config.json gives, found other values"));
}

TEST_CASE("weights: position ids must count up, and LayerNorm's older names load") {
    Workshop shop(network_path("roberta-mlm"));
    const auto with_ids = [&](int64_t third) {
        Tensors tensors = shop.original;
        std::erase_if(tensors, [](const TestTensor& t) { return t.name.ends_with("position_ids"); });
        const int64_t ids[] = {0, 1, third};
        tensors.push_back({"roberta.embeddings.position_ids",
                           "I64",
                           {1, 3},
                           std::string(reinterpret_cast<const char*>(ids), sizeof ids)});
        return shop.load(tensors, load_encoder);
    };
    CHECK(with_ids(2) == "(no error)");
    CHECK(contains(with_ids(3), "position_ids\" of shape [1, 3]: expected 0, 1, 2, ..., found other values"));

    Tensors older = shop.original;
    size_t renamed = 0;
    for (TestTensor& tensor : older) {
        for (const auto& [now, before] :
             {std::pair<std::string, std::string>{"LayerNorm.weight", "LayerNorm.gamma"},
              {"LayerNorm.bias", "LayerNorm.beta"},
              {"layer_norm.weight", "layer_norm.gamma"},
              {"layer_norm.bias", "layer_norm.beta"}}) {
            if (!tensor.name.ends_with(now)) continue;
            tensor.name.replace(tensor.name.size() - now.size(), now.size(), before);
            ++renamed;
        }
    }
    CHECK(renamed >= 2 * (1 + 2 * 2));
    CHECK(shop.load(older, load_encoder) == "(no error)");
    TestTensor copy = tensor_named(older, "roberta.embeddings.LayerNorm.gamma");
    copy.name = "roberta.embeddings.LayerNorm.weight";
    older.push_back(copy);
    CHECK(contains(shop.load(older, load_encoder), "are the same parameter: expected one of them"));
}

TEST_CASE("weights: a tensor that has no place is refused by name and shape") {
    Workshop shop(network_path("llama2"));
    for (const char* name : {"model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
                             "model.layers.0.mlp.down_proj.bias", "model.layers.0.self_attn.q_norm.weight",
                             "extra", "model.lm_head.bias", "inv_freq"}) {
        Tensors tensors = shop.original;
        tensors.push_back({name, "F32", {3}, std::string(12, '\0')});
        CHECK(shop.load(tensors, load_llama) ==
              str(shop.path(), ": tensor \"", name, "\" of shape [3] has no place in this network"));
    }
    Workshop encoder(network_path("roberta-mlm"));
    Tensors tensors = encoder.original;
    tensors.push_back({"classifier.dense.weight", "F32", {3}, std::string(12, '\0')});
    CHECK(contains(encoder.load(tensors, load_encoder),
                   "\"classifier.dense.weight\" of shape [3] has no place"));
}

TEST_CASE("weights: names come with the prefix or without, not both") {
    Workshop shop(network_path("llama2"));
    Tensors bare = shop.original;
    for (TestTensor& tensor : bare) {
        if (tensor.name.starts_with("model.")) tensor.name.erase(0, 6);
    }
    CHECK(shop.load(bare, load_llama) == "(no error)");
    Tensors twice = shop.original;
    TestTensor copy = tensor_named(twice, "model.norm.weight");
    copy.name = "norm.weight";
    twice.push_back(copy);
    CHECK(contains(shop.load(twice, load_llama),
                   "tensor \"model.norm.weight\" is there twice, with and without the prefix \"model.\""));
}

TEST_CASE("weights: a tied head may be written out, an untied one must be") {
    Workshop shop(network_path("llama2"));
    CHECK(contains(shop.without("lm_head.weight", load_llama),
                   "tensor \"lm_head.weight\" is missing, expected shape [96, 32]"));
    shop.replace_config("\"tie_word_embeddings\":false", "\"tie_word_embeddings\":true");
    CHECK(shop.without("lm_head.weight", load_llama) == "(no error)");
    // A head of its own is used, and said.
    REQUIRE(shop.load(shop.original, load_llama) == "(no error)");
    {
        const Llama own(cpu().device(), shop.path());
        CHECK_FALSE(own.config().tied_embeddings);
        REQUIRE(own.warnings().size() == 1);
        CHECK(contains(own.warnings()[0], "lm_head.weight is not the embedding"));
        CHECK(own.parameters() == Llama(cpu().device(), network_path("llama2")).parameters());
    }
    // A copy of the embedding is none.
    Tensors tensors = shop.original;
    tensor_named(tensors, "lm_head.weight").bytes = tensor_named(tensors, "model.embed_tokens.weight").bytes;
    REQUIRE(shop.load(tensors, load_llama) == "(no error)");
    const Llama tied(cpu().device(), shop.path());
    CHECK(tied.config().tied_embeddings);
    CHECK(tied.warnings().empty());
    CHECK(tied.unused_tensors().front() == "lm_head.weight");
    // One bit more or less is.
    tensor_named(tensors, "lm_head.weight").bytes.back() ^= 1;
    REQUIRE(shop.load(tensors, load_llama) == "(no error)");
    CHECK(Llama(cpu().device(), shop.path()).warnings().size() == 1);
}

TEST_CASE("weights: config and tensors must agree") {
    Workshop shop(network_path("llama2"));
    const auto changed = [&](const std::string& from, const std::string& to) {
        shop.replace_config(from, to);
        return shop.load(shop.original, load_llama);
    };
    CHECK(contains(changed("\"vocab_size\":96", "\"vocab_size\":97"),
                   "embed_tokens.weight\": expected shape [97, 32], found [96, 32]"));
    CHECK(contains(changed("\"num_key_value_heads\":2", "\"num_key_value_heads\":1"),
                   "k_proj.weight\": expected shape [16, 32], found [32, 32]"));
    CHECK(contains(changed("\"num_hidden_layers\":2", "\"num_hidden_layers\":3"),
                   "\"layers.2.input_layernorm.weight\" is missing"));
    CHECK(contains(changed("\"num_hidden_layers\":2", "\"num_hidden_layers\":1"), "has no place"));
    CHECK(contains(changed("\"attention_bias\":false", "\"attention_bias\":true"),
                   "\"layers.0.self_attn.q_proj.bias\" is missing, expected shape [32]"));
    CHECK(contains(changed("\"mlp_bias\":false", "\"mlp_bias\":true"),
                   "\"layers.0.mlp.gate_proj.bias\" is missing, expected shape [56]"));
}

TEST_CASE("weights: parameters are counted once each, unused ones not at all") {
    // Per layer 4 projections of 32 x 32, 3 matrices of 56 x 32, two norms; embedding, head and the last
    // norm.
    const uint64_t layer = 4 * 32 * 32 + 3 * 56 * 32 + 2 * 32;
    CHECK(Llama(cpu().device(), network_path("llama2")).parameters() == 2 * layer + 2 * 96 * 32 + 32);
    const uint64_t encoder_layer = 4 * (48 * 48 + 48) + 2 * 48 * 80 + 80 + 48 + 4 * 48;
    CHECK(Roberta(cpu().device(), network_path("roberta-mlm"), ChunkPooling::cls, false).parameters() ==
          2 * encoder_layer + (100 + 40 + 1 + 2) * 48);
}

// ---- the heads ----------------------------------------------------------------------------------

TEST_CASE("weights: the projector's shapes follow both networks") {
    const std::string dir = tiny_refrag_path();
    CHECK(Projector(cpu().device(), dir, 32, 40).parameters() == 40 * 32 + 40 + 40 * 40 + 40);
    const auto load = [&](int32_t d_enc, int32_t d_dec) {
        return error_of([&] { Projector(cpu().device(), dir, d_enc, d_dec); });
    };
    CHECK(load(33, 40) ==
          dir + "/projector.safetensors: tensor \"fc1.weight\": expected shape [40, 33], found [40, 32]");
    CHECK(contains(load(32, 41), "\"fc1.weight\": expected shape [41, 32], found [40, 32]"));
    TempDir temp;
    const auto spoiled = [&](const Tensors& tensors) {
        write_tensors(temp.file("projector.safetensors"), tensors);
        return error_of([&] { Projector(cpu().device(), temp.path(), 32, 40); });
    };
    const Tensors original = read_tensors(dir + "/projector.safetensors");
    for (const TestTensor& tensor : original) {
        Tensors tensors = original;
        std::erase_if(tensors, [&](const TestTensor& t) { return t.name == tensor.name; });
        CHECK(contains(spoiled(tensors), "tensor \"" + tensor.name + "\" is missing"));
    }
    Tensors tensors = original;
    tensors.push_back({"fc3.bias", "F32", {1}, std::string(4, '\0')});
    CHECK(contains(spoiled(tensors), "tensor \"fc3.bias\" of shape [1] has no place"));
}

TEST_CASE("weights: the policy's tensors follow its configuration") {
    const std::string dir = tiny_refrag_path();
    const PolicyConfig config = load_refrag_config(dir).policy;
    const auto load = [](const std::string& from, const PolicyConfig& c) {
        return error_of([&] { Policy(cpu().device(), from, c, 32); });
    };
    CHECK(load(dir, config) == "(no error)");
    PolicyConfig other = config;
    other.sees_question = false;
    CHECK(contains(load(dir, other), "tensor \"question_type\" of shape [24] has no place"));
    other = config;
    other.n_layers = 3;
    CHECK(contains(load(dir, other), "tensor \"layers.2.norm1.weight\" is missing"));
    other.n_layers = 1;
    CHECK(contains(load(dir, other), "\"layers.1."));
    other = config;
    other.hidden_dim = 41;
    CHECK(contains(load(dir, other), "\"layers.0.fc1.weight\": expected shape [41, 24], found [40, 24]"));
    other = load_refrag_config(network_path("policy-plain")).policy;
    other.sees_question = true;
    CHECK(contains(load(network_path("policy-plain"), other),
                   "tensor \"question_type\" is missing, expected shape [24]"));

    TempDir temp;
    const Tensors original = read_tensors(dir + "/policy.safetensors");
    for (const TestTensor& tensor : original) {
        Tensors tensors = original;
        std::erase_if(tensors, [&](const TestTensor& t) { return t.name == tensor.name; });
        write_tensors(temp.file("policy.safetensors"), tensors);
        CHECK(contains(load(temp.path(), config), "tensor \"" + tensor.name + "\" is missing"));
    }
}

// ---- NaN and infinities -------------------------------------------------------------------------

namespace {

struct NonFinite {
    const char* dtype;
    uint32_t bits;
    const char* name;
};
// Every kind, in every type that can be computed with: infinities, a quiet NaN, the NaN with the smallest
// payload.
constexpr NonFinite non_finites[] = {
    {"F32", 0x7f800000, "Infinity"}, {"F32", 0xff800000, "-Infinity"}, {"F32", 0x7fc00000, "NaN"},
    {"F32", 0xff800001, "NaN"},      {"F16", 0x7c00, "Infinity"},      {"F16", 0xfc00, "-Infinity"},
    {"F16", 0x7e00, "NaN"},          {"F16", 0xfc01, "NaN"},           {"BF16", 0x7f80, "Infinity"},
    {"BF16", 0xff80, "-Infinity"},   {"BF16", 0x7fc0, "NaN"},          {"BF16", 0xff81, "NaN"},
};
// The largest finite values, one bit away from an infinity, and the smallest.
constexpr NonFinite finites[] = {{"F32", 0x7f7fffff, ""}, {"F32", 0xff7fffff, ""}, {"F32", 0x00000001, ""},
                                 {"F16", 0x7bff, ""},     {"F16", 0xfbff, ""},     {"F16", 0x8001, ""},
                                 {"BF16", 0x7f7f, ""},    {"BF16", 0xff7f, ""},    {"BF16", 0x8001, ""}};

// Makes a tensor of zeros in the value's type with the value at one element.
void poison(TestTensor& tensor, const NonFinite& value, size_t element) {
    size_t n = 1;
    for (const int64_t extent : tensor.shape) n *= static_cast<size_t>(extent);
    const size_t size = value.dtype == std::string("F32") ? 4 : 2;
    tensor.dtype = value.dtype;
    tensor.bytes.assign(n * size, '\0');
    std::memcpy(tensor.bytes.data() + element * size, &value.bits, size);
}

// Every tensor but those listed as unused, in turn, with one bad element: the first, the last or one between.
void poison_each(const Tensors& original, const std::vector<std::string>& unused, const std::string& file,
                 auto&& load) {
    size_t turn = 0;
    for (const TestTensor& tensor : original) {
        if (std::find(unused.begin(), unused.end(), tensor.name) != unused.end()) continue;
        const int64_t columns = tensor.shape.back();
        const int64_t rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
        const int64_t element = turn % 3 == 0 ? 0 : turn % 3 == 1 ? rows * columns - 1 : rows * columns / 2;
        const NonFinite& value = non_finites[turn++ % std::size(non_finites)];
        Tensors tensors = original;
        poison(tensor_named(tensors, tensor.name), value, static_cast<size_t>(element));
        const std::string place = tensor.shape.size() == 2
                                      ? str("[", element / columns, ", ", element % columns, "]")
                                      : str("[", element, "]");
        CHECK(load(tensors) == str(file, ": tensor \"", tensor.name, "\": expected finite values, found ",
                                   value.name, " at element ", place));
    }
    CHECK(turn >= 4);
}

}  // namespace

TEST_CASE("weights: NaN and infinities are found wherever they lie in a block") {
    for (const auto& value : non_finites) {
        const DType dtype = value.dtype == std::string("F32")   ? DType::f32
                            : value.dtype == std::string("F16") ? DType::f16
                                                                : DType::bf16;
        for (const size_t n : {size_t{1}, size_t{31}, size_t{64}, size_t{200}}) {
            for (size_t at = 0; at < n; ++at) {
                TestTensor tensor{"x", "", {static_cast<int64_t>(n)}, ""};
                poison(tensor, value, at);
                REQUIRE(first_non_finite(dtype, tensor.bytes.data(), n) == at);
                // Not aligned, and the value behind the last one is not looked at.
                const std::string shifted = "?" + tensor.bytes;
                REQUIRE(first_non_finite(dtype, shifted.data() + 1, n) == at);
                REQUIRE(first_non_finite(dtype, tensor.bytes.data(), at) == at);
            }
        }
    }
    for (const auto& value : finites) {
        TestTensor tensor{"x", "", {100}, ""};
        poison(tensor, value, 0);
        const size_t size = tensor.bytes.size() / 100;
        std::string all;
        for (size_t i = 0; i < 100; ++i) all += tensor.bytes.substr(0, size);
        const DType dtype = size == 4                           ? DType::f32
                            : value.dtype == std::string("F16") ? DType::f16
                                                                : DType::bf16;
        CHECK(first_non_finite(dtype, all.data(), 100) == 100);
    }
    CHECK(first_non_finite(DType::f32, nullptr, 0) == 0);
}

TEST_CASE("weights: every 16-bit pattern is told finite or not as its value is") {
    for (const DType dtype : {DType::f16, DType::bf16}) {
        size_t wrong = 0;
        for (uint32_t bits = 0; bits < 65536; ++bits) {
            const auto half = static_cast<uint16_t>(bits);
            const float value = dtype == DType::f16 ? f16_to_f32(half) : bf16_to_f32(half);
            wrong += (first_non_finite(dtype, &half, 1) == 1) == std::isfinite(value) ? 0 : 1;
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("weights: a NaN or an infinity in any tensor of any network is refused with its place") {
    Workshop decoder(network_path("llama-bias"));
    poison_each(decoder.original, {}, decoder.path() + "/model.safetensors",
                [&](const Tensors& tensors) { return decoder.load(tensors, load_llama); });
    Workshop encoder(network_path("roberta-pooler"));
    poison_each(encoder.original, {}, encoder.path() + "/model.safetensors",
                [&](const Tensors& tensors) { return encoder.load(tensors, load_pooled_encoder); });

    const std::string dir = tiny_refrag_path();
    const TempDir temp;
    poison_each(read_tensors(dir + "/projector.safetensors"), {}, temp.file("projector.safetensors"),
                [&](const Tensors& tensors) {
                    write_tensors(temp.file("projector.safetensors"), tensors);
                    return error_of([&] { Projector(cpu().device(), temp.path(), 32, 40); });
                });
    const PolicyConfig config = load_refrag_config(dir).policy;
    poison_each(read_tensors(dir + "/policy.safetensors"), {}, temp.file("policy.safetensors"),
                [&](const Tensors& tensors) {
                    write_tensors(temp.file("policy.safetensors"), tensors);
                    return error_of([&] { Policy(cpu().device(), temp.path(), config, 32); });
                });
}

TEST_CASE("weights: a NaN in a shard names the shard; in an unused tensor it does not matter") {
    const TempDir temp;
    std::filesystem::copy(network_path("llama3"), temp.path());
    const std::string shard = temp.file("model-00002-of-00002.safetensors");
    Tensors tensors = read_tensors(shard);
    poison(tensors.at(0), non_finites[2], 1);
    write_tensors(shard, tensors);
    const std::string message = error_of([&] { load_llama(temp.path()); });
    CHECK(message.starts_with(shard + ": tensor \"" + tensors[0].name + "\": expected finite values"));

    Workshop shop(network_path("roberta-mlm"));
    tensors = shop.original;
    poison(tensor_named(tensors, "lm_head.dense.bias"), non_finites[0], 0);
    CHECK(shop.load(tensors, load_encoder) == "(no error)");
}

TEST_CASE("weights: a directory's name is escaped in messages") {
    const TempDir temp;
    const std::string dir = temp.file("a\n\x1b[31mb");
    std::filesystem::copy(network_path("llama2"), dir);
    Tensors tensors = read_tensors(dir);
    std::erase_if(tensors, [](const TestTensor& t) { return t.name == "lm_head.weight"; });
    write_tensors(dir + "/model.safetensors", tensors);
    CHECK(error_of([&] { load_llama(dir); }) ==
          temp.path() + "/a\\x0a\\x1b[31mb: tensor \"lm_head.weight\" is missing, expected shape [96, 32]");
    tensors = read_tensors(network_path("llama2"));
    poison(tensors[0], non_finites[0], 0);
    write_tensors(dir + "/model.safetensors", tensors);
    CHECK(error_of([&] { load_llama(dir); }).find('\n') == std::string::npos);
}
