// PEFT adapters: the logits of peft's own network with the adapter beside its weights (tests/golden/lora/,
// written by weights_tools/make_golden_lora.py), on safetensors and GGUF, alone and on top of one another;
// and a refusal for each thing that an adapter may be and this runtime does not do.
#include <doctest/doctest.h>

#include <filesystem>

#include "cli_test.h"
#include "gguf_model.h"
#include "golden.h"
#include "models/gguf_config.h"
#include "models/lora_weights.h"
#include "models/weights.h"
#include "refrag/model.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// As for the networks themselves (test_networks.cpp). Wrong factors, scales or places move logits by 1 and
// more.
constexpr double kBound = 1e-4;

std::string adapter_path(const std::string& name) {
    return repo_path("tests/golden/lora/" + name);
}

std::vector<float> golden_logits(const std::string& name) {
    return WeightFiles::open(repo_path("tests/golden/lora/logits.safetensors")).read_f32(name);
}

// llama2 with adapters, from its directory or as a GGUF file.
std::unique_ptr<Llama> adapted(const std::vector<std::string>& adapters, bool from_gguf = false,
                               WeightFormat format = WeightFormat::as_stored, std::string* digest = nullptr) {
    const TempDir dir;
    Device& device = cpu().device();
    DecoderConfig config = load_decoder_config(network_path("llama2"));
    std::unique_ptr<StoredWeights> weights;
    if (from_gguf) {
        const auto file = std::make_shared<const GgufFile>(
            dir.write("x.gguf", gguf_of_directory(network_path("llama2")).bytes()));
        config = read_gguf_config(*file);
        weights = std::make_unique<GgufWeights>(device, file, config);
    } else {
        weights = std::make_unique<WeightLoader>(device, network_path("llama2"), "model.");
    }
    for (const std::string& adapter : adapters)
        weights = std::make_unique<LoraWeights>(device, std::move(weights), LoraAdapter(adapter), format);
    weights->begin_digest();
    auto llama = std::make_unique<Llama>(device, config, *weights);
    if (digest != nullptr) *digest = weights->take_digest().hex();
    return llama;
}

std::vector<float> logits_of(const Llama& model) {
    return refrag_test::logits_of(model, Golden("llama2").ids("ids"));
}

// A golden adapter in a directory of its own, to be edited.
struct AdapterDir {
    explicit AdapterDir(const std::string& name = "attention") {
        std::filesystem::copy(adapter_path(name), path, std::filesystem::copy_options::recursive);
    }
    // Puts `value` (JSON) in the place of the key's, or adds the key.
    void set(const std::string& key, const std::string& value) const {
        const std::string file = path + "/adapter_config.json";
        const std::string text = read_file(file, 1 << 20);
        const Json json = Json::parse(text, file);
        std::string out = "{" + json_quote(key) + ": " + value;
        // Every line of the golden is a key of its own, but for lists, which are rewritten.
        for (size_t i = 0; i < json.size(); ++i) {
            if (json.key_at(i) == key) continue;
            out += ",\n" + json_quote(json.key_at(i)) + ": " + json_text(json.at(i));
        }
        dir.write("a/adapter_config.json", out + "}");
    }
    std::vector<TestTensor> tensors() const { return read_tensors(path + "/adapter_model.safetensors"); }
    void write(const std::vector<TestTensor>& changed) const {
        write_tensors(path + "/adapter_model.safetensors", changed);
    }
    std::string refusal() const {
        const std::string message = error_of([&] { adapted({path}); });
        if (message == "(no error)") return message;
        CHECK(message.starts_with(path + "/adapter_"));
        CHECK(printable(message, 1000) == message);
        return message.substr(path.size() + 1);
    }
    std::string refusal_with(const std::string& key, const std::string& value) const {
        const std::string file = path + "/adapter_config.json";
        const std::string before = read_file(file, 1 << 20);
        set(key, value);
        std::string said = refusal();
        dir.write("a/adapter_config.json", before);
        return said;
    }

    TempDir dir;
    std::string path = dir.file("a");

  private:
    static std::string json_text(const Json& value) {
        if (value.is_null()) return "null";
        if (value.is_bool()) return value.as_bool() ? "true" : "false";
        if (value.is_string()) return json_quote(value.as_string());
        if (value.is_number()) return str(value.as_number());
        std::string out;
        for (size_t i = 0; i < value.size(); ++i)
            out += (i == 0 ? "" : ", ") + (value.is_object() ? json_quote(value.key_at(i)) + ": " : "") +
                   json_text(value.at(i));
        return value.is_object() ? "{" + out + "}" : "[" + out + "]";
    }
};

const std::string kQ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

}  // namespace

TEST_CASE("lora: peft's logits, merged into safetensors and into a GGUF file") {
    const std::vector<float> plain = Golden("llama2").values("logits");
    for (const char* name : {"attention", "everything", "expression", "one-layer"}) {
        CAPTURE(name);
        const std::vector<float> expected = golden_logits(name);
        CHECK(max_difference(plain, expected) > 1.0);
        const std::vector<float> merged = logits_of(*adapted({adapter_path(name)}));
        CHECK(max_difference(merged, expected) <= kBound);
        CHECK(logits_of(*adapted({adapter_path(name)}, true)) == merged);
    }
}

TEST_CASE(
    "lora: adapters on top of one another are not rounded between, and order makes no great difference") {
    const std::vector<std::string> both = {adapter_path("attention"), adapter_path("everything")};
    const std::vector<std::string> reversed = {both[1], both[0]};
    const std::vector<float> expected = golden_logits("two");
    CHECK(max_difference(logits_of(*adapted(both)), expected) <= kBound);
    CHECK(max_difference(logits_of(*adapted(reversed)), expected) <= kBound);
}

TEST_CASE("lora: the digest of the weights is the merged ones', and 8 bits are made of those") {
    std::string plain, one, again, other;
    adapted({}, false, WeightFormat::as_stored, &plain);
    adapted({adapter_path("attention")}, false, WeightFormat::as_stored, &one);
    adapted({adapter_path("attention")}, false, WeightFormat::as_stored, &again);
    AdapterDir dir;
    dir.set("lora_alpha", "9");
    adapted({dir.path}, false, WeightFormat::as_stored, &other);
    CHECK(one == again);
    CHECK(one != plain);
    CHECK(one != other);
    // 8 bits are made of the merged floats: those of a directory that holds the sums.
    LoraWeights merged(cpu().device(),
                       std::make_unique<WeightLoader>(cpu().device(), network_path("llama2"), "model."),
                       LoraAdapter(adapter_path("attention")));
    std::vector<TestTensor> tensors = read_tensors(network_path("llama2"));
    size_t n_changed = 0;
    for (TestTensor& tensor : tensors) {
        const std::string name = tensor.name.substr(tensor.name.starts_with("model.") ? 6 : 0);
        if (!contains(name, "_proj.")) continue;
        std::string sums(tensor.bytes.size(), '\0');
        merged.open_matrix(name, tensor.shape[0], tensor.shape[1])
            .read(DType::f32, 0, tensor.shape[0], sums.data());
        n_changed += sums != tensor.bytes ? 1 : 0;
        tensor.bytes = sums;
    }
    CHECK(n_changed == 4);  // q and v of two layers
    const TempDir sums;
    sums.write("config.json", read_file(network_path("llama2") + "/config.json", 1 << 20));
    write_tensors(sums.file("model.safetensors"), tensors);
    const Llama expected(cpu().device(), sums.path(), {}, WeightFormat::int8);
    const std::vector<float> eight =
        logits_of(*adapted({adapter_path("attention")}, false, WeightFormat::int8));
    CHECK(eight == logits_of(expected));
    CHECK(eight != logits_of(*adapted({adapter_path("attention")})));
}

TEST_CASE("lora: what the configuration may say and is not done is refused by name") {
    const AdapterDir dir;
    CHECK(dir.refusal() == "(no error)");
    const std::string key = "adapter_config.json: key \"";
    CHECK(dir.refusal_with("peft_type", "\"IA3\"") == key + "peft_type\": expected \"LORA\", found \"IA3\"");
    CHECK(contains(dir.refusal_with("bias", "\"all\""), key + "bias\": expected \"none\", found \"all\""));
    CHECK(contains(dir.refusal_with("fan_in_fan_out", "true"), key + "fan_in_fan_out\": expected false"));
    for (const char* name : {"use_dora", "lora_bias", "use_qalora"}) {
        CHECK(contains(dir.refusal_with(name, "true"),
                       key + name + "\": expected this key to be absent or empty (it is not supported)"));
        CHECK(dir.refusal_with(name, "false") == "(no error)");
    }
    for (const char* name : {"modules_to_save", "trainable_token_indices", "layer_replication",
                             "target_parameters", "alora_invocation_tokens"}) {
        CHECK(contains(dir.refusal_with(name, "[1]"),
                       key + name + "\": expected this key to be absent or empty"));
        CHECK(dir.refusal_with(name, "[]") == "(no error)");
    }
    CHECK(contains(dir.refusal_with("swing", "true"), "(it may change the adapter, and is not known)"));
    CHECK(dir.refusal_with("swing", "null") == "(no error)");
    CHECK(
        contains(dir.refusal_with("init_lora_weights", "\"pissa\""), key + "init_lora_weights\": expected"));
    CHECK(dir.refusal_with("init_lora_weights", "\"gaussian\"") == "(no error)");
    CHECK(contains(dir.refusal_with("r", "0"), key + "r\": expected"));
    CHECK(contains(dir.refusal_with("lora_alpha", "-1"), key + "lora_alpha\": expected"));
    CHECK(contains(dir.refusal_with("target_modules", "[]"), "expected at least one module"));
    CHECK(contains(dir.refusal_with("exclude_modules", "\".*\""), "expected a list of modules"));
    CHECK(contains(dir.refusal_with("rank_pattern", "{\".*q\": 4}"), "an expression is not supported"));
    CHECK(contains(dir.refusal_with("layers_pattern", "\"h\""), "expected \"layers\""));
    dir.set("target_modules", "\".*\"");
    CHECK(contains(dir.refusal_with("layers_to_transform", "[0]"),
                   "expected null, where target_modules is no list"));
    std::filesystem::remove(dir.path + "/adapter_config.json");
    CHECK(contains(dir.refusal(), "adapter_config.json: "));
}

TEST_CASE("lora: configuration, tensors and network must agree") {
    const AdapterDir dir;
    const std::string named = "adapter_model.safetensors: tensor \"" + kQ + "\"";
    // A rank that is not the tensors'.
    CHECK(dir.refusal_with("r", "5") == named + ": expected shape [5, 32], found [4, 32]");
    CHECK(dir.refusal_with("rank_pattern", "{\"layers.0.self_attn.q_proj\": 2}") ==
          named + ": expected shape [2, 32], found [4, 32]");
    CHECK(dir.refusal_with("rank_pattern", "{\"^self_attn.q_proj\": 2}") == "(no error)");
    // Modules without tensors, tensors without modules, names that are no modules.
    CHECK(contains(dir.refusal_with("target_modules", "[\"q_proj\", \"v_proj\", \"o_proj\"]"),
                   "layers.0.self_attn.o_proj.lora_A.weight\" is missing, expected shape [4, 32]"));
    CHECK(contains(
        dir.refusal_with("target_modules", "[\"q_proj\"]"),
        "v_proj.lora_A.weight\": expected none, as target_modules of adapter_config.json does not name "
        "model.layers.0.self_attn.v_proj"));
    CHECK(dir.refusal_with("target_modules", "[\"q_proj\", \"v_proj\", \"c_attn\"]") ==
          "adapter_config.json: key \"target_modules\": expected names of the network's matrices, found "
          "\"c_attn\"");
    CHECK(contains(dir.refusal_with("target_modules", "[\"q_proj\", \"v_proj\", \"embed_tokens\"]"),
                   "expected linear layers, found embed_tokens"));
    CHECK(contains(dir.refusal_with("layers_to_transform", "[1]"), "layers.0.self_attn.q_proj.lora_A"));
    CHECK(contains(dir.refusal_with("exclude_modules", "[\"layers.0.self_attn.q_proj\"]"), "expected none"));
    CHECK(
        contains(dir.refusal_with("target_modules", "\"all-linear\""), "k_proj.lora_A.weight\" is missing"));
    CHECK(dir.refusal_with("target_modules", "\".*proj\"") == "(no error)");

    const std::vector<TestTensor> original = dir.tensors();
    const auto changed = [&](const auto& change) {
        std::vector<TestTensor> tensors = original;
        change(tensors);
        dir.write(tensors);
        return dir.refusal();
    };
    for (const TestTensor& tensor : original) {
        CAPTURE(tensor.name);
        const std::string place = "adapter_model.safetensors: tensor \"" + tensor.name + "\"";
        CHECK(contains(changed([&](auto& tensors) {
                           std::erase_if(tensors, [&](const TestTensor& t) { return t.name == tensor.name; });
                       }),
                       place + " is missing, expected shape ["));
        CHECK(contains(changed([&](auto& tensors) {
                           TestTensor& t = tensor_named(tensors, tensor.name);
                           t.bytes.resize(t.bytes.size() / static_cast<size_t>(t.shape[1]) *
                                          static_cast<size_t>(t.shape[1] - 1));
                           --t.shape[1];
                       }),
                       place + ": expected shape ["));
        CHECK(contains(changed([&](auto& tensors) { tensor_named(tensors, tensor.name).dtype = "I32"; }),
                       place + ": expected dtype F32, F16 or BF16, found I32"));
        CHECK(contains(changed([&](auto& tensors) {
                           std::string& bytes = tensor_named(tensors, tensor.name).bytes;
                           bytes.replace(bytes.size() - 4, 4, little_endian(0x7f800000, 4));
                       }),
                       place + ": expected finite values, found Infinity at element ["));
    }
    for (const char* name : {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
                             "base_model.model.model.embed_tokens.weight",
                             "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"}) {
        CAPTURE(name);
        CHECK(changed([&](auto& tensors) {
                  tensors.push_back({name, "F32", {4, 32}, std::string(512, '\0')});
              }) == str("adapter_model.safetensors: tensor \"", name,
                        "\" of shape [4, 32] has no place in this network"));
    }
    std::filesystem::remove(dir.path + "/adapter_model.safetensors");
    CHECK(contains(dir.refusal(), "adapter_model.safetensors: "));
}

TEST_CASE("lora: a copy of the head that peft saved must be the decoder's") {
    const AdapterDir dir("one-layer");
    CHECK(dir.refusal() == "(no error)");
    std::vector<TestTensor> tensors = dir.tensors();
    std::string& bytes = tensor_named(tensors, "base_model.model.lm_head.base_layer.weight").bytes;
    bytes[(5 * 32 + 7) * 4 + 3] = static_cast<char>(bytes[(5 * 32 + 7) * 4 + 3] ^ 0x80);
    dir.write(tensors);
    const std::string said = dir.refusal();
    CHECK(contains(said, "lm_head.base_layer.weight\": expected the decoder's own weight "));
    CHECK(contains(said, "at element [5, 7]"));
}

TEST_CASE("lora: beside the decoder's weights and from the command line; 8 bits take none") {
    const TempDir dir;
    const std::string root = dir.file("m");
    std::filesystem::copy(tiny_refrag_path(), root, std::filesystem::copy_options::recursive);
    // An adapter on the tiny decoder's up projections, dim 40, hidden 64, two layers.
    std::vector<TestTensor> tensors;
    for (int layer = 0; layer < 2; ++layer) {
        const std::string name = str("base_model.model.model.layers.", layer, ".mlp.up_proj.lora_");
        std::string a, b;
        for (int i = 0; i < 40; ++i) a += little_endian(0x3f000000, 4);
        for (int i = 0; i < 64; ++i) b += little_endian(i % 2 == 0 ? 0x3f800000 : 0xbf800000, 4);
        tensors.push_back({name + "A.weight", "F32", {1, 40}, a});
        tensors.push_back({name + "B.weight", "F32", {64, 1}, b});
    }
    std::filesystem::create_directory(dir.file("adapter"));
    write_tensors(dir.file("adapter/adapter_model.safetensors"), tensors);
    const std::string config = R"({"peft_type":"LORA","r":1,"lora_alpha":2,"target_modules":["up_proj"]})";
    dir.write("adapter/adapter_config.json", config);

    const auto inspected = [&](const std::string& arguments) {
        const Ran ran = refrag_run(dir, "inspect " + arguments);
        CHECK(ran.code == 0);
        CAPTURE(ran.err);
        return ran.out;
    };
    const std::string line = ": LoRA of rank 1, alpha 2, merged into 2 matrices\n";
    CHECK(!contains(inspected("-m '" + root + "'"), "LoRA"));
    const std::string given = inspected("-m '" + root + "' --lora '" + dir.file("adapter") + "'");
    CHECK(contains(given, "adapter     " + dir.file("adapter") + line));
    dir.write("p.txt", "The old mill stands on a hill.\n");
    const auto answer = [&](const std::string& arguments) {
        const Ran ran = refrag_run(dir, "run --passages '" + dir.file("p.txt") +
                                            "' -q 'Where is it?' -n 8 --json " + "--logprobs 3 " + arguments);
        CHECK(ran.code == 0);
        return ran.code == 0 ? Json::parse(ran.out, "answer").get("logprobs").at(0).get_number("logprob")
                             : 0.0;
    };
    const double plain = answer("-m '" + root + "'");
    const double with = answer("-m '" + root + "' --lora '" + dir.file("adapter") + "'");
    CHECK(with != plain);
    std::filesystem::copy(dir.file("adapter"), root + "/decoder", std::filesystem::copy_options::recursive);
    CHECK(contains(inspected("-m '" + root + "'"), "adapter     " + root + "/decoder" + line));
    CHECK(answer("-m '" + root + "'") == with);
    const Json json = Json::parse(inspected("-m '" + root + "' --json"), "inspect");
    const Json adapters = json.get("decoder").get("adapters");
    CHECK(adapters.size() == 1);
    CHECK(adapters.at(0).get_int("rank") == 1);
    CHECK(adapters.at(0).get_int("n_matrices") == 2);

    const Ran missing = refrag_run(dir, "inspect -m '" + root + "' --lora '" + dir.file("none") + "'");
    CHECK(missing.code == 3);
    CHECK(line_count(missing.err) == 1);
    const Ran random = refrag_run(dir, "bench --lora '" + dir.file("adapter") + "'");
    CHECK(random.code == 2);
    CHECK(contains(random.err, "bench: --lora needs a model (-m)"));
}
