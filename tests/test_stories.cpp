// A real model with a known text: stories260K (llama2.c's smallest, grouped queries, trained on TinyStories),
// brought from llama2.c's format into a decoder directory of ours here in the test. Its author documents what
// it says at temperature 0 from the empty prompt (llama2.c, doc/stories260K.md, MIT licence; 256 tokens, the
// program's default); an independent forward in double gives the same, with at least .004 between the two
// largest logits at every token, far above what fp32 can be off by.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>

#include "golden.h"
#include "refrag/generator.h"
#include "refrag/sampler.h"
#include "refrag/session.h"
#include "safetensors_writer.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* kDocumented =
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I "
    "want to play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" Her mom "
    "said, \"Don't worry, Lily. We can help you.\n";
constexpr size_t kDocumentedTokens = 256;
constexpr int32_t kBos = 1;

// Bytes one after another.
class Cursor {
  public:
    explicit Cursor(std::string bytes) : bytes_(std::move(bytes)) {}
    std::string take(size_t n) {
        REQUIRE(at_ + n <= bytes_.size());
        at_ += n;
        return bytes_.substr(at_ - n, n);
    }
    template <typename T>
    T value() {
        T result;
        std::memcpy(&result, take(sizeof(T)).data(), sizeof(T));
        return result;
    }
    size_t left() const { return bytes_.size() - at_; }

  private:
    std::string bytes_;
    size_t at_ = 0;
};

// llama2.c rotates neighbours (2i, 2i + 1) of a head, Hugging Face's LLaMA (i, i + head_dim / 2): the rows of
// q and k are put in that order.
std::string half_split(const std::string& rows, int64_t n_heads, int64_t head_dim, size_t row_bytes) {
    std::string out;
    for (int64_t head = 0; head < n_heads; ++head) {
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t i = 0; i < head_dim / 2; ++i) {
                const auto row = static_cast<size_t>(head * head_dim + 2 * i + half);
                out += rows.substr(row * row_bytes, row_bytes);
            }
        }
    }
    return out;
}

// Writes config.json and model.safetensors from llama2.c's file: a header of seven int32, then all layers'
// tensors of a kind one after another.
void write_decoder(const TempDir& dir, const std::string& file, const std::string& to = "") {
    Cursor cursor(read_file(file, 64 << 20));
    const auto dim = cursor.value<int32_t>();
    const auto hidden_dim = cursor.value<int32_t>();
    const auto n_layers = cursor.value<int32_t>();
    const auto n_heads = cursor.value<int32_t>();
    const auto n_kv_heads = cursor.value<int32_t>();
    const auto vocab_size = cursor.value<int32_t>();  // above 0: the head is the embedding
    const auto max_seq_len = cursor.value<int32_t>();
    REQUIRE(vocab_size > 0);
    const int32_t head_dim = dim / n_heads;
    const int32_t kv_dim = head_dim * n_kv_heads;

    std::vector<TestTensor> tensors;
    const auto add = [&](const std::string& name, std::vector<int64_t> shape) -> TestTensor& {
        size_t bytes = sizeof(float);
        for (const int64_t extent : shape) bytes *= static_cast<size_t>(extent);
        tensors.push_back({name, "F32", std::move(shape), cursor.take(bytes)});
        return tensors.back();
    };
    const auto add_layers = [&](const std::string& name, const std::vector<int64_t>& shape,
                                int32_t rope_heads) {
        for (int32_t i = 0; i < n_layers; ++i) {
            TestTensor& tensor = add(str("model.layers.", i, ".", name, ".weight"), shape);
            if (rope_heads > 0)
                tensor.bytes =
                    half_split(tensor.bytes, rope_heads, head_dim, static_cast<size_t>(dim) * sizeof(float));
        }
    };
    add("model.embed_tokens.weight", {vocab_size, dim});
    add_layers("input_layernorm", {dim}, 0);
    add_layers("self_attn.q_proj", {dim, dim}, n_heads);
    add_layers("self_attn.k_proj", {kv_dim, dim}, n_kv_heads);
    add_layers("self_attn.v_proj", {kv_dim, dim}, 0);
    add_layers("self_attn.o_proj", {dim, dim}, 0);
    add_layers("post_attention_layernorm", {dim}, 0);
    add_layers("mlp.gate_proj", {hidden_dim, dim}, 0);
    add_layers("mlp.down_proj", {dim, hidden_dim}, 0);
    add_layers("mlp.up_proj", {hidden_dim, dim}, 0);
    add("model.norm.weight", {dim});
    // What is left is RoPE's table of cosines and sines.
    REQUIRE(cursor.left() ==
            static_cast<size_t>(max_seq_len) * static_cast<size_t>(head_dim) * sizeof(float));
    write_safetensors(dir.file(to + "model.safetensors"), tensors);

    JsonWriter json;
    json.begin_object();
    json.key("model_type").string("llama").key("hidden_act").string("silu");
    json.key("hidden_size").integer(dim).key("intermediate_size").integer(hidden_dim);
    json.key("num_hidden_layers").integer(n_layers).key("num_attention_heads").integer(n_heads);
    json.key("num_key_value_heads").integer(n_kv_heads).key("head_dim").integer(head_dim);
    json.key("vocab_size").integer(vocab_size).key("max_position_embeddings").integer(max_seq_len);
    json.key("rms_norm_eps").number(1e-5).key("rope_theta").number(10000.0);
    json.key("tie_word_embeddings").boolean(true);
    json.key("bos_token_id").integer(kBos).key("eos_token_id").integer(2);
    json.end_object();
    dir.write(to + "config.json", json.text());
}

// The pieces of llama2.c's tokenizer file: the longest one's length, then for each its score, length, bytes.
std::vector<std::string> read_pieces(const std::string& file, int32_t vocab_size) {
    Cursor cursor(read_file(file, 1 << 20));
    cursor.value<int32_t>();
    std::vector<std::string> pieces;
    for (int32_t i = 0; i < vocab_size; ++i) {
        cursor.value<float>();
        const auto n = cursor.value<int32_t>();
        REQUIRE(n >= 0);
        pieces.push_back(cursor.take(static_cast<size_t>(n)));
    }
    return pieces;
}

// A piece's bytes: "<0x0A>" is one byte.
std::string bytes_of(const std::string& piece) {
    if (piece.size() == 6 && piece.starts_with("<0x"))
        return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    return piece;
}

// The same vocabulary as a tokenizer.json in LLaMA's manner: the words' spaces are U+2581 and put before the
// text, what no piece has is bytes, and two pieces join if their union is a piece, the best score first.
std::string tokenizer_json(const std::string& file, int32_t vocab_size) {
    Cursor cursor(read_file(file, 1 << 20));
    cursor.value<int32_t>();
    std::vector<std::pair<float, std::string>> scored;
    std::map<std::string, int32_t> ids;
    for (int32_t i = 0; i < vocab_size; ++i) {
        const auto score = cursor.value<float>();
        std::string piece = cursor.take(static_cast<size_t>(cursor.value<int32_t>()));
        if (i == 0) piece = "<unk>";
        if (i == kBos) piece = "<s>";  // the file has line ends around these two
        if (i == 2) piece = "</s>";
        std::string spelled;
        for (const char c : piece) spelled += c == ' ' ? "\xe2\x96\x81" : std::string(1, c);
        scored.emplace_back(score, spelled);
        ids[spelled] = i;
    }
    struct Merge {
        float score;
        int32_t id;
        std::string left, right;
    };
    std::vector<Merge> merges;
    for (int32_t i = 259; i < vocab_size; ++i) {
        const auto& [score, piece] = scored[static_cast<size_t>(i)];
        for (size_t cut = 1; cut < piece.size(); ++cut) {
            const std::string left = piece.substr(0, cut);
            const std::string right = piece.substr(cut);
            if (ids.contains(left) && ids.contains(right)) merges.push_back({score, i, left, right});
        }
    }
    std::stable_sort(merges.begin(), merges.end(),
                     [](const Merge& a, const Merge& b) { return a.score > b.score; });

    JsonWriter json;
    const auto special = [&](int32_t id, const char* content) {
        json.begin_object().key("id").integer(id).key("content").string(content);
        for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized"})
            json.key(flag).boolean(false);
        json.key("special").boolean(true).end_object();
    };
    json.begin_object().key("version").string("1.0");
    json.key("added_tokens").begin_array();
    special(0, "<unk>");
    special(kBos, "<s>");
    special(2, "</s>");
    json.end_array();
    const auto replace = [&](const char* from, const char* to) {
        json.begin_object().key("type").string("Replace");
        json.key("pattern").begin_object().key("String").string(from).end_object();
        json.key("content").string(to).end_object();
    };
    json.key("normalizer").begin_object().key("type").string("Sequence").key("normalizers").begin_array();
    json.begin_object().key("type").string("Prepend").key("prepend").string("\xe2\x96\x81").end_object();
    replace(" ", "\xe2\x96\x81");
    json.end_array().end_object();
    json.key("pre_tokenizer").null().key("post_processor").null();
    json.key("decoder").begin_object().key("type").string("Sequence").key("decoders").begin_array();
    replace("\xe2\x96\x81", " ");
    json.begin_object().key("type").string("ByteFallback").end_object();
    json.begin_object().key("type").string("Fuse").end_object();
    json.begin_object().key("type").string("Strip").key("content").string(" ");
    json.key("start").integer(1).key("stop").integer(0).end_object();
    json.end_array().end_object();
    json.key("model").begin_object().key("type").string("BPE").key("unk_token").string("<unk>");
    json.key("fuse_unk").boolean(true).key("byte_fallback").boolean(true);
    json.key("vocab").begin_object();
    for (int32_t i = 0; i < vocab_size; ++i) json.key(scored[static_cast<size_t>(i)].second).integer(i);
    json.end_object().key("merges").begin_array();
    for (const Merge& merge : merges) json.begin_array().string(merge.left).string(merge.right).end_array();
    json.end_array().end_object().end_object();
    return json.text();
}

// n tokens after BOS through the generation loop, `parallel` copies of the same at once; the ids of the last.
std::vector<int32_t> generate(Backend& backend, const Llama& decoder, size_t n, int32_t parallel,
                              const SamplerOptions& options) {
    Generator generator(backend, decoder, parallel, decoder.config().max_seq_len);
    std::vector<std::vector<int32_t>> ids(static_cast<size_t>(parallel));
    std::vector<Sampler> samplers(ids.size(), Sampler(options));
    for (size_t s = 0; s < ids.size(); ++s) {
        generator.start({kBos}, Buffer{}, [&, s](const Logits& logits, double) {
            std::optional<int32_t> id = samplers[s].sample(logits);
            ids[s].push_back(*id);
            if (ids[s].size() == n) id.reset();
            return id;
        });
        // So that they run at different places of the story.
        for (const Generator::Ended& ended : generator.step()) CHECK(!ended.error);
    }
    while (generator.n_running() > 0) {
        for (const Generator::Ended& ended : generator.step()) {
            CHECK(!ended.error);
            CHECK(!ended.context_full);
        }
    }
    for (const std::vector<int32_t>& each : ids) CHECK(each == ids.back());
    return ids.back();
}

}  // namespace

TEST_CASE("stories260K tells the story that its author documents, alone and in a batch") {
    const std::string data = test_data_dir();
    if (data.empty() && skip("REFRAG_TEST_DATA is not set")) return;
    const TempDir dir;
    write_decoder(dir, data + "/weights/stories260K.bin");
    for (const auto& backend : cpu_levels()) {
        CAPTURE(backend->device().description());
        const Llama decoder(backend->device(), dir.path());
        const std::vector<std::string> pieces =
            read_pieces(data + "/weights/tok512.bin", decoder.config().vocab_size);
        for (const int32_t parallel : {1, 3}) {
            std::string text;
            for (const int32_t id : generate(*backend, decoder, kDocumentedTokens, parallel, {})) {
                REQUIRE(id != kBos);
                text += bytes_of(pieces[static_cast<size_t>(id)]);
            }
            // The first piece's leading space is the tokenizer's, and the program ends its output with a line
            // end.
            CHECK(text.substr(text.starts_with(' ') ? 1 : 0) + "\n" == kDocumented);
        }
        // Drawn with a seed it is another story, the same again with the same seed.
        SamplerOptions sampled;
        sampled.temperature = 1.0f;
        sampled.top_p = 0.9f;
        sampled.seed = 1;
        const std::vector<int32_t> one = generate(*backend, decoder, 60, 1, sampled);
        CHECK(one == generate(*backend, decoder, 60, 2, sampled));
        CHECK(one != generate(*backend, decoder, 60, 1, {}));
    }
}

TEST_CASE("stories260K as the decoder of a whole model directory tells the same story through a Session") {
    const std::string data = test_data_dir();
    if (data.empty() && skip("REFRAG_TEST_DATA is not set")) return;
    const TempDir dir;
    std::filesystem::copy(tiny_refrag_path() + "/encoder", dir.file("encoder"));
    std::filesystem::copy(tiny_refrag_path() + "/policy.safetensors", dir.file("policy.safetensors"));
    std::filesystem::create_directory(dir.file("decoder"));
    write_decoder(dir, data + "/weights/stories260K.bin", "decoder/");
    dir.write("decoder/tokenizer.json", tokenizer_json(data + "/weights/tok512.bin", 512));
    dir.write("decoder/tokenizer_config.json", "{\"add_bos_token\": true, \"bos_token\": \"<s>\"}");
    // A projector of the right shape; nothing is compressed here.
    const auto zeros = [](const char* name, const std::vector<int64_t>& shape) {
        size_t bytes = sizeof(float);
        for (const int64_t extent : shape) bytes *= static_cast<size_t>(extent);
        return TestTensor{name, "F32", shape, std::string(bytes, '\0')};
    };
    const int64_t d_enc = Json::parse_file(dir.file("encoder/config.json")).get_int("hidden_size");
    write_safetensors(dir.file("projector.safetensors"),
                      {zeros("fc1.weight", {64, d_enc}), zeros("fc1.bias", {64}),
                       zeros("fc2.weight", {64, 64}), zeros("fc2.bias", {64})});
    std::string config = read_file(tiny_refrag_path() + "/refrag.json", 1 << 20);
    const size_t at = config.find("\"shared\"");
    REQUIRE(at != std::string::npos);
    config.replace(at, 8, "\"own\"");
    const size_t begin = config.find("\"template\":");
    config.replace(begin, config.find('}', begin) + 1 - begin, "\"template\":{}");
    dir.write("refrag.json", config);

    const Model model(cpu().device(), dir.path());
    Session session(model);
    AnswerOptions options;
    options.max_new_tokens = kDocumentedTokens;
    std::string streamed;
    const Answer answer = session.answer({}, "", options, [&](std::string_view piece) {
        streamed += piece;
        return true;
    });
    CHECK(answer.positions == 1);  // BOS alone
    CHECK(answer.text + "\n" == kDocumented);
    CHECK(streamed == answer.text);
    CHECK(answer.finish == FinishReason::max_tokens);
    // What it says, read again, are the tokens that it said.
    CHECK(model.tokenizer().encode_ids(answer.text) == answer.ids);
    // A stop string across tokens, and more of them than one.
    options.stop = {"big, red", "Lily's mom"};
    CHECK(session.answer({}, "", options).text ==
          std::string(kDocumented).substr(0, std::string(kDocumented).find("big, red")));
}
