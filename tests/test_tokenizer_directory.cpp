// Directories with vocab.json and merges.txt: what `transformers` 5 builds from them, and what is refused.
// The expected tokens, flags and templates were read off its tokenizers for the same files.
#include <doctest/doctest.h>

#include "io/json.h"
#include "support.h"
#include "text/byte_level.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// A directory with a vocabulary of 256 bytes, "th" (256), "the" (257) and more pieces from 258 on.
class Directory {
  public:
    explicit Directory(const std::vector<std::string>& more = {"<|endoftext|>"}) {
        std::string vocab = "{";
        for (int byte = 0; byte < 256; ++byte) {
            std::string piece;
            append_utf8(piece, byte_to_char(static_cast<uint8_t>(byte)));
            vocab += str(json_quote(piece), ":", byte, ",");
        }
        vocab += R"("th":256,"the":257)";
        for (size_t i = 0; i < more.size(); ++i) vocab += str(",", json_quote(more[i]), ":", 258 + i);
        write("vocab.json", vocab + "}");
        write("merges.txt", "#version: 0.2\nt h\nth e\n");
    }
    void write(const std::string& name, const std::string& text) { dir_.write(name, text); }
    const std::string& path() const { return dir_.path(); }
    Tokenizer load() const { return Tokenizer::from_file(dir_.path()); }
    std::string refusal() const {
        return error_of([&] { load(); });
    }

  private:
    TempDir dir_;
};

using Ids = std::vector<int32_t>;

Ids with_special(const Tokenizer& tokenizer, std::string_view text) {
    Ids ids;
    for (const Token& token : tokenizer.encode_with_special_tokens(text)) ids.push_back(token.id);
    return ids;
}

}  // namespace

TEST_CASE("tokenizer directory: GPT-2") {
    const Directory dir;
    const Tokenizer tokenizer = dir.load();
    CHECK(tokenizer.vocab_size() == 259);
    CHECK(tokenizer.encode_ids("the") == Ids{257});
    CHECK(with_special(tokenizer, "the<|endoftext|>the") == Ids{257, 258, 257});
    CHECK(tokenizer.is_special(258));
    CHECK_FALSE(tokenizer.adds_bos());
    CHECK(tokenizer.decode(Ids{257, 258}, true) == "the");
}

TEST_CASE("tokenizer directory: RoBERTa, by class, by network type, by vocabulary") {
    Directory dir({"<s>", "<pad>", "</s>", "<unk>", "<mask>"});
    CHECK(with_special(dir.load(), "the<mask>") == Ids{258, 257, 262, 260});
    // transformers 5 gives <mask> no lstrip here, unlike the published tokenizer.json
    CHECK(with_special(dir.load(), " <mask>") == Ids{258, ' ', 262, 260});
    dir.write("config.json", R"({"model_type":"gpt2"})");
    CHECK(with_special(dir.load(), "the") == Ids{257});
    dir.write("tokenizer_config.json", R"({"tokenizer_class":"RobertaTokenizerFast"})");
    CHECK(with_special(dir.load(), "the") == Ids{258, 257, 260});
    CHECK(dir.load().vocab_size() == 263);
}

TEST_CASE("tokenizer directory: Qwen 2 normalises and cuts single digits") {
    Directory dir;
    dir.write("config.json", R"({"model_type":"qwen2"})");
    const Tokenizer tokenizer = dir.load();
    CHECK(tokenizer.encode_ids("e\xCC\x81") == Ids{0xC3, 0xA9});
    CHECK(tokenizer.encode_ids("the") == Ids{257});
    CHECK(Directory().load().encode_ids("e\xCC\x81") == Ids{'e', 0xCC, 0x81});
}

TEST_CASE("tokenizer directory: special tokens by role, with flags, in their order") {
    Directory dir;
    dir.write("special_tokens_map.json",
              R"({"mask_token":{"content":"<mask>","lstrip":true,"rstrip":false,"normalized":true,)"
              R"("single_word":false},"pad_token":"<pad2>","additional_special_tokens":["<x>"]})");
    dir.write("tokenizer_config.json",
              R"({"tokenizer_class":"GPT2Tokenizer","sep_token":{"content":"<sep>","lstrip":false,)"
              R"("rstrip":true,"normalized":false,"single_word":true},"bos_token":"<|bos|>",)"
              R"("add_bos_token":true,"add_eos_token":true,"add_prefix_space":true})");
    const Tokenizer tokenizer = dir.load();
    const char* expected[] = {"<|endoftext|>", "<|bos|>", "<sep>", "<pad2>", "<mask>", "<x>"};
    for (int32_t i = 0; i < 6; ++i) {
        CHECK(tokenizer.piece(258 + i) == expected[i]);
        CHECK(tokenizer.is_special(258 + i));
    }
    CHECK(tokenizer.vocab_size() == 264);
    CHECK(tokenizer.adds_bos());
    CHECK(with_special(tokenizer, "the") == Ids{259, ' ', 257, 258});
    CHECK(with_special(tokenizer, "  <mask>") == Ids{259, 262, 258});              // lstrip
    CHECK(with_special(tokenizer, "<sep>  the") == Ids{259, 260, ' ', 257, 258});  // rstrip, then the prefix
    CHECK(with_special(tokenizer, "a<sep>").size() == 2 + 1 + 1 + 5);  // single_word: plain text here
}

TEST_CASE("tokenizer directory: special tokens as transformers 4 and 5 write them") {
    Directory dir;
    const auto pieces = [&](const std::string& config) {
        dir.write("tokenizer_config.json", R"({"tokenizer_class":"Qwen2Tokenizer",)" + config + "}");
        const Tokenizer tokenizer = dir.load();
        std::string all;
        for (int32_t id = 259; id < tokenizer.vocab_size(); ++id) {
            CHECK(tokenizer.is_special(id));
            all.append(tokenizer.piece(id)).append(" ");
        }
        return all;
    };
    CHECK(pieces(R"("extra_special_tokens":{})").empty());
    CHECK(pieces(R"("extra_special_tokens":[])").empty());
    CHECK(pieces(R"("extra_special_tokens":null)").empty());
    CHECK(pieces(R"("extra_special_tokens":["<a>","<b>"])") == "<a> <b> ");
    CHECK(pieces(R"("extra_special_tokens":{"image_token":"<a>","x":{"content":"<b>"}})") == "<a> <b> ");
    CHECK(pieces(R"("additional_special_tokens":[{"content":"<a>","lstrip":true},"<b>"])") == "<a> <b> ");
    CHECK(pieces(R"("extra_special_tokens":["<a>"],"model_specific_special_tokens":{"x":"<b>"})") ==
          "<a> <b> ");
    dir.write("tokenizer_config.json", R"({"extra_special_tokens":"<a>"})");
    CHECK(contains(dir.refusal(), "expected a list of tokens, or an object of them by name, found \"<a>\""));
    for (const char* any : {"TokenizersBackend", "PreTrainedTokenizerFast"}) {
        dir.write("tokenizer_config.json", str("{\"tokenizer_class\":\"", any, "\"}"));
        CHECK(dir.load().encode_ids("the") == Ids{257});
    }
}

TEST_CASE("tokenizer directory: added tokens with ids") {
    Directory dir;
    dir.write("added_tokens.json", R"({"<mask>":260,"<new>":259})");
    CHECK_FALSE(dir.load().is_special(259));
    CHECK_FALSE(dir.load().is_special(260));
    CHECK(dir.load().encode_ids("the<new>") == Ids{257, 259});
    dir.write("special_tokens_map.json", R"({"mask_token":"<mask>"})");
    CHECK(dir.load().is_special(260));
    // tokenizer_config.json's own list makes the older files irrelevant
    dir.write("tokenizer_config.json",
              R"({"added_tokens_decoder":{"259":{"content":"<other>","lstrip":true,"rstrip":false,)"
              R"("normalized":false,"single_word":false,"special":false}}})");
    const Tokenizer tokenizer = dir.load();
    CHECK(tokenizer.vocab_size() == 260);
    CHECK(tokenizer.encode_ids("the <other><mask>").size() == 2 + 6);
    dir.write("tokenizer_config.json", R"({"added_tokens_decoder":{"270":{"content":"<other>"}}})");
    CHECK(contains(dir.refusal(), "added token \"<other>\": expected id 259, found 270"));
    dir.write("tokenizer_config.json", R"({"added_tokens_decoder":{"x":{"content":"<other>"}}})");
    CHECK(contains(dir.refusal(), "expected an id as key"));
}

TEST_CASE("tokenizer directory: what is missing or not understood is named") {
    Directory dir;
    dir.write("merges.txt", "#version: 0.2\nt h\nthe\n");
    CHECK(dir.refusal() ==
          dir.path() + "/merges.txt:3: expected two pieces with a space between, found \"the\"");
    dir.write("merges.txt", "t h\r\nt q\n");
    CHECK(contains(dir.refusal(), "merges.txt:2: merges need \"tq\", which is not in the vocabulary"));
    dir.write("merges.txt", "t h\nth e\n\nte\n");
    CHECK(contains(dir.refusal(), "merges.txt:4: expected two pieces"));
    dir.write("merges.txt", "");
    CHECK(dir.load().encode_ids("th") == Ids{'t', 'h'});
    dir.write("tokenizer_config.json", R"({"tokenizer_class":"LlamaTokenizer"})");
    CHECK(contains(dir.refusal(),
                   "tokenizer_config.json: key \"tokenizer_class\": expected GPT2Tokenizer, "
                   "RobertaTokenizer or Qwen2Tokenizer, found \"LlamaTokenizer\""));
    const TempDir empty;
    CHECK(contains(error_of([&] { Tokenizer::from_file(empty.path()); }), "found none of them"));
    empty.write("vocab.json", "{}");
    CHECK(contains(error_of([&] { Tokenizer::from_file(empty.path()); }), "found vocab.json alone"));
}

TEST_CASE("tokenizer directory: RoBERTa's published files give the ids of its tokenizer.json") {
    const std::string data = test_data_dir() + "/tokenizers/roberta-base/";
    if (test_data_dir().empty() && skip("REFRAG_TEST_DATA is unset or missing")) return;
    const Tokenizer json = Tokenizer::from_file(data + "tokenizer.json");
    const TempDir dir;
    for (const char* name : {"vocab.json", "merges.txt", "tokenizer_config.json"})
        dir.write(name, read_file(data + name, 64u << 20));
    const Tokenizer files = Tokenizer::from_file(dir.path());
    CHECK(files.vocab_size() == json.vocab_size());
    CHECK(files.template_prefix()[0] == json.template_prefix()[0]);
    CHECK(files.template_suffix()[0] == json.template_suffix()[0]);
    const std::string text = read_file("README.md", 1u << 20);
    CHECK(files.encode(text) == json.encode(text));
    for (int32_t id = 0; id < json.vocab_size(); ++id)
        if (files.piece(id) != json.piece(id) || files.is_special(id) != json.is_special(id)) {
            CHECK(id == -1);
            break;
        }
}
