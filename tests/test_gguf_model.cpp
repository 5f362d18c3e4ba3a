// GGUF files as models: the same network as the Hugging Face directory it was made from, to the bit where the
// types allow it; every type of tensor; what a directory's own files overrule; and a refusal for each thing
// that such a file may say and this runtime does not do.
#include <doctest/doctest.h>

#include <filesystem>

#include "base/int8.h"
#include "base/round.h"
#include "cli_test.h"
#include "gguf_model.h"
#include "golden.h"
#include "models/gguf_config.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kTiny = "tests/golden/tiny-refrag/decoder";

std::shared_ptr<const GgufFile> open_gguf(const TempDir& dir, const GgufTestFile& file) {
    return std::make_shared<const GgufFile>(dir.write("model.gguf", file.bytes()));
}

Llama load(const TempDir& dir, const GgufTestFile& file, WeightFormat format = WeightFormat::as_stored) {
    const auto gguf = open_gguf(dir, file);
    const DecoderConfig config = read_gguf_config(*gguf);
    GgufWeights weights(cpu().device(), gguf, config, {}, format);
    return Llama(cpu().device(), config, weights);
}

// The tiny decoder with its vocabulary.
GgufTestFile tiny() {
    GgufTestFile file = gguf_of_directory(repo_path(kTiny));
    const Json json = Json::parse_file(repo_path(kTiny + "/tokenizer.json"));
    for (const std::string& pair : gguf_vocabulary_pairs(json, "gpt-2")) file.pairs.push_back(pair);
    return file;
}

// The message of loading a changed tiny decoder, without its path.
std::string refusal(const GgufTestFile& file) {
    const TempDir dir;
    const std::string path = dir.write("x.gguf", file.bytes());
    const std::string message = error_of([&] { Model(cpu().device(), path); });
    if (message == "(no error)") return message;
    CHECK(message.starts_with(path + ": "));
    CHECK(printable(message, 1000) == message);
    return message.substr(path.size() + 2);
}
std::string refusal_with(const std::string& key, const std::string& pair) {
    GgufTestFile file = tiny();
    set_pair(file, key, pair);
    return refusal(file);
}

}  // namespace

TEST_CASE("gguf model: the logits of the directory it was made from, bit for bit, and transformers'") {
    for (const std::string name : {"llama2", "llama-bias", "llama3", "llama-yarn", "qwen2", "qwen3"}) {
        CAPTURE(name);
        const Golden golden(name);
        const std::vector<int32_t> ids = golden.ids("ids");
        const TempDir dir;
        const Llama ours = load(dir, gguf_of_directory(network_path(name)));
        const std::vector<float> logits = logits_of(ours, ids);
        const Llama directory(cpu().device(), network_path(name));
        // LLaMA 3.1's frequencies pass through a table of F32 factors, which rounds them once more.
        if (name == "llama3" || name == "llama-yarn") {
            CHECK(max_difference(logits, golden.values("logits")) <= 1e-4);
        } else {
            CHECK(logits == logits_of(directory, ids));
        }
        CHECK(ours.parameters() == directory.parameters());
        CHECK(ours.weight_bytes() == directory.weight_bytes());
        CHECK(ours.unused_tensors().empty());
    }
}

TEST_CASE("gguf model: tensors of every type, as they are, as BF16 and put in order") {
    const WeightFiles blocks = WeightFiles::open(repo_path("tests/golden/gguf.safetensors"));
    for (const char* name : {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}) {
        CAPTURE(name);
        const TensorEntry& entry = blocks.get(std::string(name) + ".blocks");
        const std::vector<float> values = blocks.read_f32(std::string(name) + ".values");
        const size_t rows = static_cast<size_t>(entry.shape[0]), columns = values.size() / rows;
        std::string bytes(entry.bytes, '\0');
        blocks.read(entry, bytes.data(), bytes.size());
        uint32_t id = 0;
        while (find_gguf_type(id) == nullptr || find_gguf_type(id)->name != std::string(name)) ++id;
        GgufTestFile file;
        const std::vector<uint64_t> extents = {columns, rows};
        file.tensors = {{"blk.0.attn_output.weight", id, extents, bytes},
                        {"blk.0.attn_k.weight", id, extents, interleaved(bytes, rows, 1)}};
        const TempDir dir;
        DecoderConfig config;
        config.n_heads = config.n_kv_heads = 1;
        GgufWeights weights(cpu().device(), open_gguf(dir, file), config);
        for (const char* part : {"layers.0.self_attn.o_proj.weight", "layers.0.self_attn.k_proj.weight"}) {
            CAPTURE(part);
            const auto out = static_cast<int64_t>(rows), in = static_cast<int64_t>(columns);
            const StoredMatrix stored = weights.open_matrix(part, out, in);
            CHECK(stored.kept == DType::bf16);
            CHECK(stored.exact == DType::f32);
            std::vector<float> exact(values.size());
            stored.read(DType::f32, 0, out, exact.data());
            CHECK(exact == values);
            std::vector<uint16_t> kept(values.size()), expected(values.size());
            stored.read(DType::bf16, 0, 2, kept.data());  // in two parts
            stored.read(DType::bf16, 2, out - 2, kept.data() + 2 * columns);
            round_values(DType::bf16, values.data(), values.size(), expected.data());
            CHECK(kept == expected);
        }
        CHECK(weights.finish({}).empty());
    }
}

TEST_CASE("gguf model: floats are rounded to F16 as the standard says") {
    // Every F16 number comes back; between two neighbours the nearer, of equals the even one.
    for (uint32_t half = 0; half < 0x7c00; ++half) {
        const float value = f16_to_f32(static_cast<uint16_t>(half));
        CHECK(f32_to_f16(value) == half);
        CHECK(f32_to_f16(-value) == (half | 0x8000u));
        if (half + 1 == 0x7c00) break;
        const float next = f16_to_f32(static_cast<uint16_t>(half + 1));
        const float middle = value + (next - value) / 2;
        CHECK(f32_to_f16(middle) == half + half % 2);
        CHECK(f32_to_f16(std::nextafter(middle, 0.0f)) == half);
        CHECK(f32_to_f16(std::nextafter(middle, 1e9f)) == half + 1);
    }
    CHECK(f32_to_f16(65519.996f) == 0x7bff);
    CHECK(f32_to_f16(65520.0f) == 0x7c00);
    CHECK(f32_to_f16(-INFINITY) == 0xfc00);
    CHECK(std::isnan(f16_to_f32(f32_to_f16(NAN))));
}

TEST_CASE("gguf model: Q8_0 in 8 bits is what the floats it was made from give in 8 bits") {
    // llama2's rows of 32 and 56 values: those that fill blocks become Q8_0.
    GgufTestFile file = gguf_of_directory(network_path("llama2"));
    size_t n_made = 0;
    for (GgufTestTensor& tensor : file.tensors) {
        const auto columns = static_cast<size_t>(tensor.extents[0]);
        if (tensor.extents.size() != 2 || columns % 32 != 0 || tensor.name.starts_with("token_embd"))
            continue;
        std::string bytes;
        std::vector<std::byte> row(int8_row_bytes(static_cast<int64_t>(columns)));
        for (uint64_t r = 0; r < tensor.extents[1]; ++r) {
            const auto n = static_cast<int64_t>(columns);
            REQUIRE(quantize_int8_row(row.data(), DType::f32, tensor.bytes.data() + r * columns * 4, n) == n);
            for (size_t group = 0; group < columns / 32; ++group) {
                bytes.append(reinterpret_cast<const char*>(row.data()) + group * 2, 2);
                bytes.append(reinterpret_cast<const char*>(int8_row_values(row.data(), n)) + group * 32, 32);
            }
        }
        tensor.type = 8;
        tensor.bytes = bytes;
        ++n_made;
    }
    CHECK(n_made == 13);  // q, k, v, o, gate, up of two layers, and the head
    const std::vector<int32_t> ids = Golden("llama2").ids("ids");
    const TempDir dir, other;
    const std::vector<float> eight = logits_of(load(dir, file, WeightFormat::int8), ids);
    const Llama floats = load(other, gguf_of_directory(network_path("llama2")), WeightFormat::int8);
    CHECK(eight == logits_of(floats, ids));
    CHECK(max_difference(eight, Golden("llama2").values("logits")) > 0.0);
}

TEST_CASE(
    "gguf model: a file alone is a plain decoder, with its own vocabulary, chat template and end tokens") {
    GgufTestFile file = tiny();
    file.pairs.push_back(gguf_u32("tokenizer.ggml.eot_token_id", 3));
    file.pairs.push_back(gguf_bool("tokenizer.ggml.add_bos_token", true));
    const TempDir dir;
    const std::string path = dir.write("any name.gguf", file.bytes());
    dir.write("tokenizer.json", "not read");  // a stranger beside the file
    const Model model(cpu().device(), path);
    CHECK(!model.has_encoder());
    CHECK(model.default_policy() == SelectPolicy::bm25);
    CHECK(model.bos_id() == 0);
    CHECK(model.end_ids() == std::vector<int32_t>{2, 3});
    CHECK(model.chat_format() == ChatFormat::plain);
    CHECK(model.chat_source() == ChatSource::none);
    const Model directory(cpu().device(), repo_path(kTiny));
    CHECK(model.parameters() == directory.parameters());
    const std::vector<int32_t> ids = {5, 70, 71, 300, 9};
    CHECK(logits_of(model.decoder(), ids) == logits_of(directory.decoder(), ids));
    const Json strings = Json::parse_file(repo_path("tests/golden/tokenizers/strings.json"));
    CHECK(strings.size() > 0);
    for (const char* text :
         {"", " ", "Hello, World's  end\n\n", "a1b22 333 4444", "<s>x</s>", "naïve 中文 \xF0\x9F\x98\x80",
          "tab\tand\r\nlines\n \n", "\xff\xc3(", "   leading"}) {
        CAPTURE(text);
        for (const bool special : {false, true})
            CHECK(model.tokenizer().encode(text, special) == directory.tokenizer().encode(text, special));
    }

    file.pairs.push_back(gguf_string("tokenizer.chat_template", "{{ '[INST] ' }}{{ '[/INST]' }}"));
    const Model chat(cpu().device(), dir.write("chat.gguf", file.bytes()));
    CHECK(chat.chat_format() == ChatFormat::mistral);
    CHECK(chat.chat_source() == ChatSource::recognized);
    CHECK(chat.passage_maker(16) != model.passage_maker(16));
    CHECK(Model(cpu().device(), path).passage_maker(16) == model.passage_maker(16));
}

TEST_CASE("gguf model: in a model directory it stands for the decoder, and files beside it go first") {
    const TempDir dir;
    const std::string root = dir.file("m");
    std::filesystem::copy(tiny_refrag_path(), root, std::filesystem::copy_options::recursive);
    const Model original(cpu().device(), root);
    const std::string decoder = root + "/decoder/";
    dir.write("m/decoder/model.gguf", tiny().bytes());
    CHECK(contains(error_of([&] { Model(cpu().device(), root); }),
                   "m/decoder: expected one file of weights, found model.gguf and model.safetensors"));
    for (const char* name : {"model.safetensors", "config.json", "generation_config.json"})
        std::filesystem::remove(decoder + name);
    const Model model(cpu().device(), root);
    CHECK(model.has_encoder());
    const std::vector<int32_t> ids = {5, 70, 71, 300, 9};
    CHECK(logits_of(model.decoder(), ids) == logits_of(original.decoder(), ids));
    CHECK(model.end_ids() == original.end_ids());

    dir.write("m/decoder/generation_config.json", "{\"eos_token_id\": [7, 2]}");
    CHECK(Model(cpu().device(), root).end_ids() == std::vector<int32_t>{7, 2});
    // A tokenizer.json of its own: other ids than the file's vocabulary gives.
    Json json = Json::parse_file(decoder + "tokenizer.json");
    GgufTestFile unmerged = tiny();
    set_pair(unmerged, "tokenizer.ggml.merges", gguf_text_list("tokenizer.ggml.merges", {}));
    dir.write("m/decoder/model.gguf", unmerged.bytes());
    const Model with_json(cpu().device(), root);
    CHECK(with_json.tokenizer().encode("the mill") == original.tokenizer().encode("the mill"));
    const Model alone(cpu().device(), decoder + "model.gguf");
    CHECK(alone.tokenizer().encode("the mill").size() == 8);
}

TEST_CASE("gguf model: what would change the maths is refused by name") {
    const auto llama_u32 = [](const std::string& name, uint32_t value) {
        return refusal_with("llama." + name, gguf_u32("llama." + name, value));
    };
    const auto llama_f32 = [](const std::string& name, float value) {
        return refusal_with("llama." + name, gguf_f32("llama." + name, value));
    };
    CHECK(refusal(tiny()) == "(no error)");
    CHECK(refusal_with("general.architecture", gguf_string("general.architecture", "gemma")) ==
          "key \"general.architecture\": expected \"llama\" (LLaMA 1 to 3, TinyLlama, SmolLM, Mistral), "
          "\"qwen2\" or \"qwen3\", found \"gemma\"");
    CHECK(refusal_with("general.type", gguf_string("general.type", "adapter")) ==
          "key \"general.type\": expected \"model\", found \"adapter\"");
    CHECK(
        contains(refusal_with("split.count", gguf_u32("split.count", 3)), "key \"split.count\": expected 1"));
    CHECK(contains(refusal_with("general.quantization_version", gguf_u32("general.quantization_version", 1)),
                   "expected 2, found 1"));
    CHECK(llama_u32("expert_count", 8) ==
          "key \"llama.expert_count\": expected 0 (a mixture of experts is not supported), found 8");
    CHECK(llama_u32("expert_count", 0) == "(no error)");
    CHECK(llama_u32("attention.sliding_window", 100) == "(no error)");
    CHECK(llama_u32("attention.sliding_window", 512) == "(no error)");
    CHECK(llama_u32("rope.dimension_count", 8) ==
          "key \"llama.rope.dimension_count\": expected 16, a head's width (rotating a part of it is not "
          "supported), found 8");
    CHECK(llama_u32("attention.value_length", 8) ==
          "key \"llama.attention.value_length\": expected 16, as wide as a key, found 8");
    CHECK(llama_u32("attention.head_count_kv", 3) ==
          "key \"llama.attention.head_count_kv\": expected a divisor of llama.attention.head_count = 4, "
          "found 3");
    CHECK(llama_u32("vocab_size", 321) ==
          "key \"llama.vocab_size\": expected 320, the rows of token_embd.weight, found 321");
    CHECK(refusal_with("llama.rope.scaling.type", gguf_string("llama.rope.scaling.type", "longrope")) ==
          "key \"llama.rope.scaling.type\": expected \"none\", \"linear\" or \"yarn\", found \"longrope\"");
    CHECK(refusal_with("llama.rope.scaling.type", gguf_string("llama.rope.scaling.type", "yarn")) ==
          "key \"llama.rope.scaling.type\": expected a llama.rope.scaling.factor beside it, found \"yarn\"");
    CHECK(llama_f32("rope.scaling.factor", 0.5f) ==
          "key \"llama.rope.scaling.factor\": expected a number of 1 to 1e6, found 0.5");
    for (const char* name :
         {"rope.scaling.attn_factor", "logit_scale", "embedding_scale", "residual_scale"}) {
        CHECK(contains(llama_f32(name, 2.0f), "expected 1 (any other value changes the network"));
        CHECK(llama_f32(name, 1.0f) == "(no error)");
    }
    for (const char* name : {"attention.clamp_kqv", "attention.max_alibi_bias"})
        CHECK(contains(llama_f32(name, 8.0f), "expected 0 (any other value changes the network"));
    CHECK(contains(llama_f32("attention.scale", 1.0f), "expected 0.25 (any other value"));
    CHECK(llama_f32("attention.scale", 0.25f) == "(no error)");
    CHECK(contains(refusal_with("llama.attention.causal", gguf_bool("llama.attention.causal", false)),
                   "expected true, found false"));
    CHECK(
        contains(refusal_with("llama.use_parallel_residual", gguf_bool("llama.use_parallel_residual", true)),
                 "expected false, found true"));
    CHECK(llama_f32("swing", 1.0f) ==
          "key \"llama.swing\": expected this key to be absent (it may change the network, and is not "
          "supported), found 1");
    for (const char* key : {"block_count", "context_length", "embedding_length", "feed_forward_length",
                            "attention.head_count", "attention.layer_norm_rms_epsilon"})
        CHECK(contains(refusal_with(std::string("llama.") + key, ""), "found none"));
    CHECK(contains(
        refusal_with("llama.feed_forward_length", gguf_i32_list("llama.feed_forward_length", {64, 64})),
        "expected an integer of 1 to 1048576, found a list of integers with 2 items"));
    CHECK(refusal_with("tokenizer.ggml.eos_token_id", "") == "tokenizer.ggml.eos_token_id is missing");
}

TEST_CASE("gguf model: every tensor is accounted for: missing, extra, misshapen, NaN") {
    const size_t n_tensors = tiny().tensors.size();
    for (size_t i = 0; i < n_tensors; ++i) {
        GgufTestFile file = tiny();
        const GgufTestTensor tensor = file.tensors[i];
        CAPTURE(tensor.name);
        const std::string named = "tensor \"" + tensor.name + "\"";
        const bool is_embedding = tensor.name == "token_embd.weight";
        if (tensor.name != "output.weight") {  // without it the head is tied
            file.tensors.erase(file.tensors.begin() + static_cast<std::ptrdiff_t>(i));
            CHECK(contains(refusal(file), is_embedding ? named + ": expected a matrix, found none"
                                                       : named + " is missing, expected shape ["));
        }
        file = tiny();
        // One row or value fewer.
        GgufTestTensor& shorter = file.tensors[i];
        shorter.bytes.resize(shorter.bytes.size() / shorter.extents.back() * (shorter.extents.back() - 1));
        --shorter.extents.back();
        CHECK(contains(refusal(file), is_embedding ? "key \"llama.vocab_size\": expected 319"
                                                   : named + ": expected shape ["));
        file = tiny();
        std::string& bytes = file.tensors[i].bytes;
        bytes.replace(bytes.size() - 4, 4, little_endian(0x7fc00000, 4));
        const std::string said = refusal(file);
        CHECK(contains(said, named + ": expected finite values, found NaN at element ["));
        CHECK(contains(said, str(tensor.extents[0] - 1, "]")));
    }
    GgufTestFile file = tiny();
    file.tensors.push_back({"blk.2.attn_q.weight", 0, {40, 64}, std::string(40 * 64 * 4, '\0')});
    CHECK(refusal(file) == "tensor \"blk.2.attn_q.weight\" of shape [64, 40] has no place in this network");
    file = tiny();
    file.tensors.push_back({"rope_freqs.weight", 0, {7}, std::string(28, '\0')});
    CHECK(refusal(file) == "tensor \"rope_freqs.weight\": expected shape [8], found [7]");
    file = tiny();
    file.tensors.push_back({"rope_freqs.weight", 0, {8}, std::string(32, '\0')});
    CHECK(refusal(file) ==
          "tensor \"rope_freqs.weight\": expected factors of 1e-6 to 1e6, found 0 at element [0]");
    // Without a head of its own the embedding is it.
    file = tiny();
    std::erase_if(file.tensors, [](const GgufTestTensor& tensor) { return tensor.name == "output.weight"; });
    const TempDir dir;
    CHECK(load(dir, file).config().tied_embeddings);
}

TEST_CASE("gguf model: the binary answers from a file alone, and inspects it") {
    const TempDir dir;
    GgufTestFile file = tiny();
    file.pairs.push_back(gguf_bool("tokenizer.ggml.add_bos_token", true));
    const std::string path = dir.write("m.gguf", file.bytes());
    dir.write("p.txt", "The old mill stands on a hill.\n");
    const Ran ran = refrag_run(
        dir, "run -m '" + path + "' --policy all --passages '" + dir.file("p.txt") + "' -q 'Where?' -n 4");
    CHECK(ran.code == 0);
    const Ran plain = refrag_run(dir, "run -m " + repo_path(kTiny) + " --policy all --passages '" +
                                          dir.file("p.txt") + "' -q 'Where?' -n 4");
    CHECK(ran.out == plain.out);
    CHECK(refrag_run(dir, "inspect -m '" + path + "'").code == 0);
    const Ran tokens = refrag_run(dir, "tokenize -m '" + path + "' 'the mill'");
    CHECK(tokens.out == refrag_run(dir, "tokenize --tokenizer '" + path + "' 'the mill'").out);
    CHECK(tokens.out == refrag_run(dir, "tokenize -m " + repo_path(kTiny) + " 'the mill'").out);
    for (const char* place : {"none", "none.gguf"}) {
        const Ran none = refrag_run(dir, "run -m '" + dir.file(place) + "' -q x");
        CHECK(none.code == 3);
        CHECK(none.err == "refrag: " + dir.file(place) +
                              ": expected a model directory or a GGUF file, found nothing of that name\n");
    }
    std::filesystem::create_directory(dir.file("empty"));
    CHECK(
        refrag_run(dir, "run -m '" + dir.file("empty") + "' -q x").err ==
        "refrag: " + dir.file("empty") +
            ": expected refrag.json, or of a plain decoder config.json or model.gguf; found none of them\n");
    const Ran bad = refrag_run(dir, "run -m '" + dir.write("bad.gguf", "GGUF?") + "' -q x");
    CHECK(bad.code == 3);
    CHECK(line_count(bad.err) == 1);
}
