// See refrag_config.h.
#include "models/refrag_config.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "io/file.h"
#include "io/json.h"

namespace refrag {
namespace {

constexpr int32_t kMaxChunkLen = 4096;

// The index of a string value among the allowed ones.
size_t choice(const Json& json, std::string_view key, std::initializer_list<std::string_view> allowed) {
    const std::string found = json.get_string(key);
    std::string expected;
    size_t index = 0;
    for (const std::string_view a : allowed) {
        if (a == found) return index;
        expected += str(index == 0 ? "\"" : " or \"", a, "\"");
        ++index;
    }
    json.get(key).refuse(expected);
}

PromptTemplate read_template(const Json& json) {
    json.check_keys({"before", "passage_prefix", "passage_suffix", "question_prefix", "question_suffix"});
    PromptTemplate t;
    t.before = json.get_string_or("before", "");
    t.passage_prefix = json.get_string_or("passage_prefix", "");
    t.passage_suffix = json.get_string_or("passage_suffix", "");
    t.question_prefix = json.get_string_or("question_prefix", "");
    t.question_suffix = json.get_string_or("question_suffix", "");
    return t;
}

PolicyConfig read_policy(const Json& json) {
    json.check_keys({"n_layers", "n_heads", "dim", "hidden_dim", "norm_eps", "sees_question"});
    PolicyConfig p;
    p.n_layers = static_cast<int32_t>(json.get_int("n_layers", 1, 1024));
    p.n_heads = static_cast<int32_t>(json.get_int("n_heads", 1, 1024));
    p.dim = static_cast<int32_t>(json.get_int("dim", 1, 1 << 20));
    p.hidden_dim = static_cast<int32_t>(json.get_int("hidden_dim", 1, 1 << 20));
    p.norm_eps = static_cast<float>(json.get_number_or("norm_eps", 1e-5, 0.0, 1.0));
    p.sees_question = json.get_bool("sees_question");
    if (p.dim % p.n_heads != 0) json.get("dim").refuse(str("a multiple of n_heads = ", p.n_heads));
    if (p.dim % 2 != 0) json.get("dim").refuse("an even number (sine and cosine positions come in pairs)");
    return p;
}

void read_encoder(const Json& json, RefragConfig& c) {
    json.check_keys({"vocabulary", "special_tokens", "pooling", "normalize"});
    c.shared_vocabulary = choice(json, "vocabulary", {"own", "shared"}) == 1;
    c.encoder_special_tokens = json.get_bool_or("special_tokens", true);
    static constexpr std::array kPooling = {ChunkPooling::cls, ChunkPooling::mean, ChunkPooling::pooler};
    c.pooling = kPooling.at(choice(json, "pooling", {"cls", "mean", "pooler"}));
    c.normalize = json.get_bool_or("normalize", false);
}

SegmentOrder read_order(const Json& json) {
    const Json order = json.get_array("segment_order");
    if (order.size() == 2) {
        const std::string_view first = order.at(0).as_string();
        const std::string_view second = order.at(1).as_string();
        if (first == "passages" && second == "question") return SegmentOrder::passages_first;
        if (first == "question" && second == "passages") return SegmentOrder::question_first;
    }
    order.refuse("[\"passages\", \"question\"] or [\"question\", \"passages\"]");
}

}  // namespace

RefragConfig plain_decoder_config() {
    RefragConfig c;
    c.has_encoder = false;
    c.chunk_len = 16;
    c.chunk_lens = {16};
    c.expand_fraction = 0.25;
    c.prompt.passage_suffix = "\n";
    c.prompt.question_prefix = "Question: ";
    c.prompt.question_suffix = "\nAnswer:";
    return c;
}

RefragConfig load_refrag_config(const std::string& dir) {
    const std::string path = path_join(dir, "refrag.json");
    const Json json = Json::parse_file(path, 1u << 20);
    json.as_object().check_keys({"format", "chunk_len", "chunk_lens", "chunk_unit", "encoder", "projector",
                                 "policy", "expand_fraction", "template", "segment_order"});
    RefragConfig c;
    if (json.get_int("format") != 1) json.get("format").refuse("1 (the only format this version reads)");
    choice(json, "chunk_unit", {"decoder_tokens"});
    c.chunk_len = static_cast<int32_t>(json.get_int("chunk_len", 1, kMaxChunkLen));
    if (const auto lens = json.find("chunk_lens")) {
        for (size_t i = 0; i < lens->as_array().size(); ++i) {
            c.chunk_lens.push_back(static_cast<int32_t>(lens->at(i).as_int(1, kMaxChunkLen)));
        }
        if (std::find(c.chunk_lens.begin(), c.chunk_lens.end(), c.chunk_len) == c.chunk_lens.end()) {
            lens->refuse(str("a list that holds chunk_len = ", c.chunk_len));
        }
    } else {
        c.chunk_lens = {c.chunk_len};
    }
    c.has_encoder = json.find("encoder") || json.find("projector") || json.find("policy");
    if (c.has_encoder) {
        read_encoder(json.get_object("encoder"), c);
        const Json projector = json.get_object("projector");
        projector.check_keys({"activation"});
        choice(projector, "activation", {"gelu"});
        c.policy = read_policy(json.get_object("policy"));
    }
    c.expand_fraction = json.get_number("expand_fraction", 0.0, 1.0);
    c.prompt = read_template(json.get_object("template"));
    c.order = read_order(json);
    return c;
}

}  // namespace refrag
