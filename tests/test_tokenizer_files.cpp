// tokenizer.json files that are broken, contradict themselves, or ask for what the runtime does not do: each
// is refused by name. Every file here is a small valid one with one thing changed.
#include <doctest/doctest.h>

#include "support.h"
#include "text/byte_level.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// The parts of a small valid tokenizer.json: 4 special tokens, 256 bytes, two merges.
struct Parts {
    std::string version = "\"1.0\"";
    std::string added = R"([{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,)"
                        R"("normalized":false,"special":true}])";
    std::string normalizer = "null";
    std::string pre_tokenizer =
        R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true})";
    std::string post_processor = "null";
    std::string decoder =
        R"({"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true})";
    std::string model_start =
        R"("type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,)"
        R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false)";
    std::string vocab_end = R"(,"th":260,"the":261)";
    std::string merges = R"([["t","h"],["th","e"]])";
    std::string extra;
    bool all_bytes = true;

    std::string json() const {
        std::string vocab = R"("<s>":0,"<pad>":1,"</s>":2,"<unk>":3)";
        for (int byte = 0; byte < 256; ++byte) {
            if (!all_bytes && byte == 200) continue;
            std::string piece;
            append_utf8(piece, byte_to_char(static_cast<uint8_t>(byte)));
            if (piece == "\"" || piece == "\\") piece = "\\" + piece;
            vocab += str(",\"", piece, "\":", byte + 4);
        }
        return str("{\"version\":", version, ",\"truncation\":null,\"padding\":null,\"added_tokens\":", added,
                   ",\"normalizer\":", normalizer, ",\"pre_tokenizer\":", pre_tokenizer,
                   ",\"post_processor\":", post_processor, ",\"decoder\":", decoder, ",\"model\":{",
                   model_start, ",\"vocab\":{", vocab, vocab_end, "},\"merges\":", merges, "}", extra, "}");
    }
};

std::string refusal(const Parts& parts) {
    return error_of([&] { Tokenizer::from_json(parts.json(), "t.json"); });
}

// The message after one part was changed.
std::string refusal(std::string Parts::*part, const std::string& value) {
    Parts parts;
    parts.*part = value;
    const std::string message = refusal(parts);
    CHECK((message == "(no error)" || message.starts_with("t.json")));
    return message;
}

std::string added_token(const std::string& id, const std::string& content, const std::string& more = "") {
    return "[{\"id\":" + id + ",\"content\":\"" + content +
           "\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":"
           "true" +
           more + "}]";
}

constexpr const char* no_error = "(no error)";

}  // namespace

TEST_CASE("tokenizer.json: the small valid file is valid") {
    CHECK(refusal(Parts()) == no_error);
    const Tokenizer tokenizer = Tokenizer::from_json(Parts().json(), "t.json");
    CHECK(tokenizer.encode_ids("the") == std::vector<int32_t>{261});
    CHECK(tokenizer.vocab_size() == 262);
    CHECK_FALSE(tokenizer.adds_bos());
}

TEST_CASE("tokenizer.json: older spellings are read") {
    CHECK(refusal(&Parts::merges, R"(["t h","th e"])") == no_error);
    CHECK(refusal(&Parts::merges, R"(["#version: 0.2","t h","th e"])") == no_error);
    CHECK(refusal(
              &Parts::model_start,
              R"("dropout":null,"unk_token":null,"continuing_subword_prefix":"","end_of_word_suffix":"")") ==
          no_error);
    CHECK(refusal(&Parts::pre_tokenizer,
                  R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true})") == no_error);
    CHECK(refusal(&Parts::normalizer, R"({"type":"Sequence","normalizers":[]})") == no_error);
}

TEST_CASE("tokenizer.json: components that are not supported are named") {
    CHECK(contains(refusal(&Parts::normalizer, R"({"type":"BertNormalizer"})"),
                   "t.json: key \"normalizer\": unsupported: expected NFC, "));
    CHECK(contains(
        refusal(&Parts::normalizer, R"({"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Nmt"}]})"),
        "key \"normalizer.normalizers[1]\": unsupported: expected NFC"));
    CHECK(contains(
        refusal(&Parts::normalizer, R"({"type":"Replace","pattern":{"Regex":" {2,}"},"content":" "})"),
        "normalizer.pattern.Regex\": expected a String pattern (this regular expression is not "
        "supported), found \" {2,}\""));
    CHECK(contains(refusal(&Parts::normalizer, R"({"type":"Replace","pattern":{"String":""},"content":" "})"),
                   "expected at least one character"));
    CHECK(contains(refusal(&Parts::pre_tokenizer, R"({"type":"Whitespace"})"),
                   "key \"pre_tokenizer\": unsupported: expected ByteLevel, Split, "));
    CHECK(contains(
        refusal(
            &Parts::pre_tokenizer,
            R"({"type":"Sequence","pretokenizers":[)"
            R"({"type":"ByteLevel","add_prefix_space":false},{"type":"Digits","individual_digits":true}]})"),
        "pretokenizers[1]\": unsupported: expected nothing after ByteLevel, found \"Digits\""));
    CHECK(contains(refusal(&Parts::decoder, R"({"type":"WordPiece"})"),
                   "key \"decoder\": unsupported: expected ByteLevel"));
    CHECK(
        contains(refusal(&Parts::model_start, R"("type":"WordPiece")"), "expected BPE, found \"WordPiece\""));
    CHECK(contains(refusal(&Parts::post_processor, R"({"type":"Other"})"), "found \"Other\""));
    CHECK(contains(refusal(&Parts::model_start, R"("type":"BPE","dropout":0.1)"),
                   "model.dropout\": expected no dropout"));
    CHECK(contains(refusal(&Parts::model_start, R"("type":"BPE","continuing_subword_prefix":"##")"),
                   "continuing_subword_prefix"));
    CHECK(contains(refusal(&Parts::model_start, R"("type":"BPE","end_of_word_suffix":"</w>")"),
                   "end_of_word_suffix"));
    CHECK(contains(refusal(&Parts::version, "\"2.0\""), "key \"version\": expected \"1.0\", found \"2.0\""));
}

TEST_CASE("tokenizer.json: a Split is understood exactly or refused") {
    const auto split = [](const std::string& pattern, const std::string& behaviour, bool invert) {
        return refusal(&Parts::pre_tokenizer,
                       str(R"({"type":"Split","pattern":)", pattern, R"(,"behavior":")", behaviour,
                           R"(","invert":)", invert ? "true}" : "false}"));
    };
    const std::string qwen =
        R"({"Regex":"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+)"
        R"([\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"})";
    CHECK(split(qwen, "Isolated", false) == no_error);
    for (
        const char* other :
        {R"('s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+)",
         R"('(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+)",
         R"('(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|)"
         R"(\\s*[\\r\\n]|\\s+(?!\\S)|\\s+)"})
        CHECK(split(str("{\"Regex\":\"", other, "\"}"), "Isolated", false) == no_error);
    CHECK(split(qwen, "Removed", true) == no_error);
    CHECK(contains(split(qwen, "Removed", false), "behavior\": expected \"Isolated\", or \"Removed\" with"));
    CHECK(
        contains(split(R"({"Regex":"\\w+"})", "Isolated", false),
                 "pre_tokenizer.pattern.Regex\": expected the pattern of GPT-2, cl100k (LLaMA 3, OLMo 2) or "
                 "Qwen 2, found the regular expression \"\\w+\""));
    for (const char* behaviour :
         {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"})
        CHECK(split(R"({"String":"-"})", behaviour, false) == no_error);
    CHECK(contains(split(R"({"String":"-"})", "Isolated", true), "invert\": expected false"));
    CHECK(contains(split(R"({"String":"-"})", "Merged", false), "behavior\": expected Isolated, Removed"));
    CHECK(contains(split(R"({"String":""})", "Isolated", false), "at least one character"));
    CHECK(contains(split(R"({"Other":"-"})", "Isolated", false), "unknown key \"Other\""));
}

TEST_CASE("tokenizer.json: a Metaspace must not contradict itself") {
    const auto metaspace = [](const std::string& more) {
        return refusal(&Parts::pre_tokenizer, "{\"type\":\"Metaspace\"" + more + "}");
    };
    CHECK(metaspace(R"(,"replacement":"_","prepend_scheme":"first","split":false)") == no_error);
    CHECK(metaspace(R"(,"replacement":"_","add_prefix_space":true,"str_rep":"_")") == no_error);
    CHECK(metaspace(R"(,"replacement":"_","add_prefix_space":false,"prepend_scheme":"never")") == no_error);
    CHECK(contains(metaspace(R"(,"replacement":"_","add_prefix_space":false)"),
                   "add_prefix_space\": expected"));
    CHECK(contains(metaspace(R"(,"replacement":"_","prepend_scheme":"last")"), "found \"last\""));
    CHECK(contains(metaspace(R"(,"replacement":"__")"), "expected one character, found \"__\""));
    CHECK(contains(metaspace(""), "expected the key \"replacement\""));
}

TEST_CASE("tokenizer.json: a decoder's steps have one order") {
    const auto decoder = [](const std::string& steps) {
        return refusal(&Parts::decoder, "{\"type\":\"Sequence\",\"decoders\":[" + steps + "]}");
    };
    const std::string replace = R"({"type":"Replace","pattern":{"String":"_"},"content":" "})";
    const std::string bytes = R"({"type":"ByteFallback"})";
    const std::string fuse = R"({"type":"Fuse"})";
    const std::string strip = R"({"type":"Strip","content":" ","start":1,"stop":0})";
    CHECK(decoder(replace + "," + replace + "," + bytes + "," + fuse + "," + strip) == no_error);
    CHECK(decoder(replace + "," + bytes) == no_error);
    CHECK(decoder(R"({"type":"ByteLevel"})") == no_error);
    CHECK(refusal(&Parts::decoder, "null") == no_error);
    CHECK(contains(decoder(bytes + "," + replace),
                   "decoders[1]\": unsupported: expected Replace, ByteFallback"));
    CHECK(contains(decoder(replace + "," + strip), "decoders[1]\": unsupported"));
    CHECK(contains(decoder(fuse + "," + fuse), "decoders[1]\": unsupported"));
    CHECK(contains(decoder(R"({"type":"CTC"})"), "found \"CTC\""));
    CHECK(contains(decoder(fuse + R"(,{"type":"Strip","content":" ","start":0,"stop":1})"),
                   "decoders[1].stop\": expected 0"));
}

TEST_CASE("tokenizer.json: unknown keys are refused wherever they stand") {
    CHECK(contains(refusal(&Parts::extra, ",\"new_stage\":{}"), "unknown key \"new_stage\""));
    CHECK(contains(refusal(&Parts::model_start, R"("type":"BPE","surprise":1)"),
                   "key \"model\": unknown key \"surprise\""));
    // The reference reads this one as a template, by its keys and not by its type.
    CHECK(contains(refusal(&Parts::post_processor, R"({"type":"ByteLevel","single":[],"special_tokens":{}})"),
                   "key \"post_processor\": unknown key \"single\""));
    CHECK(contains(refusal(&Parts::post_processor, R"({"type":"Sequence","processors":[],"x":1})"),
                   "unknown key \"x\""));
    CHECK(contains(refusal(&Parts::pre_tokenizer, R"({"type":"ByteLevel","add_prefix_space":false,"x":1})"),
                   "unknown key \"x\""));
    CHECK(contains(refusal(&Parts::added, added_token("0", "<s>", ",\"x\":1")),
                   "key \"added_tokens[0]\": unknown key \"x\""));
}

TEST_CASE("tokenizer.json: a broken vocabulary is refused") {
    CHECK(
        contains(refusal(&Parts::vocab_end, R"(,"th":260,"the":260)"), "id 260 is both \"th\" and \"the\""));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"th":260,"th":261)"), "key \"th\" occurs twice"));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"th":-1,"the":261)"),
                   "key \"model.vocab.th\": expected an integer in [0, 4194303], found -1"));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"th":4194304)"), "found 4194304"));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"th":1e3)"), "expected an integer"));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"th":"260")"), "expected an integer"));
    CHECK(contains(refusal(&Parts::vocab_end, R"(,"":262,"th":260,"the":261)"), "an empty piece"));
    Parts parts;
    parts.all_bytes = false;
    CHECK(refusal(parts) == no_error);
    parts.model_start = R"("type":"BPE","byte_fallback":true)";
    CHECK(contains(refusal(parts), "for byte 200: expected one for every byte"));
    parts.model_start = R"("type":"BPE","unk_token":"<none>")";
    CHECK(
        contains(refusal(parts), "model.unk_token\": expected a piece of the vocabulary, found \"<none>\""));
}

TEST_CASE("tokenizer.json: broken merges are refused") {
    CHECK(contains(refusal(&Parts::merges, R"([["t","q"]])"),
                   "key \"model.merges[0]\": merges need \"tq\", which is not in the vocabulary"));
    CHECK(contains(refusal(&Parts::merges, R"([["t","h"],["t","h"]])"),
                   "the merge of \"t\" and \"h\" occurs twice"));
    for (const char* merge :
         {"[\"t\"]", "[\"t\",\"h\",\"e\"]", "\"th\"", "\"t h e\"", "\"\"", "5", "null", "{}"}) {
        CAPTURE(merge);
        CHECK(contains(refusal(&Parts::merges, "[" + std::string(merge) + "]"),
                       "key \"model.merges[0]\": expected two pieces"));
    }
    CHECK(contains(refusal(&Parts::merges, "[\"t \"]"), "merges need"));
    CHECK(contains(refusal(&Parts::merges, "[[\"t\",5]]"), "expected a string, found 5"));
    CHECK(contains(refusal(&Parts::merges, "{}"), "key \"model.merges\": expected an array"));
}

TEST_CASE("tokenizer.json: added tokens must agree with the vocabulary") {
    CHECK(refusal(&Parts::added, added_token("262", "<new>")) == no_error);
    CHECK(contains(refusal(&Parts::added, added_token("5", "<s>")),
                   "added token \"<s>\": expected id 0, found 5"));
    CHECK(contains(refusal(&Parts::added, added_token("300", "<new>")),
                   "added token \"<new>\": expected id 262, found 300"));
    CHECK(contains(refusal(&Parts::added, added_token("262", "")), "an empty piece"));
    CHECK(contains(refusal(&Parts::added, added_token("-1", "<s>")), "expected an integer in [0, "));
    CHECK(contains(refusal(&Parts::added, R"([{"id":0,"content":"<s>"}])"),
                   "expected the key \"single_word\""));
    CHECK(contains(refusal(&Parts::added, added_token("262", "th")), "expected id 260, found 262"));
    std::string twice = added_token("0", "<s>");
    twice.back() = ',';
    CHECK(contains(refusal(&Parts::added, twice + added_token("0", "<s>").substr(1)), "occurs twice"));
}

TEST_CASE("tokenizer.json: templates must agree with the vocabulary") {
    CHECK(refusal(&Parts::post_processor,
                  R"({"type":"RobertaProcessing","sep":["</s>",2],"cls":["<s>",0]})") == no_error);
    CHECK(contains(
        refusal(&Parts::post_processor, R"({"type":"RobertaProcessing","sep":["</s>",3],"cls":["<s>",0]})"),
        "\"</s>\" with id 3: expected the id it has in the vocabulary, found 2"));
    CHECK(contains(
        refusal(&Parts::post_processor, R"({"type":"RobertaProcessing","sep":["[SEP]",2],"cls":["<s>",0]})"),
        "no such piece"));
    CHECK(contains(
        refusal(&Parts::post_processor, R"({"type":"RobertaProcessing","sep":["</s>"],"cls":["<s>",0]})"),
        "[piece, id]"));
    const auto with_single = [](const std::string& single) {
        return R"({"type":"TemplateProcessing","single":)" + single + R"(,"pair":[],"special_tokens":)" +
               R"({"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}})";
    };
    const std::string text = R"({"Sequence":{"id":"A","type_id":0}})";
    const std::string first = R"({"SpecialToken":{"id":"<s>","type_id":0}})";
    CHECK(refusal(&Parts::post_processor, with_single("[" + first + "," + text + "]")) == no_error);
    CHECK(
        contains(refusal(&Parts::post_processor, with_single("[" + first + "]")), "expected the text once"));
    CHECK(contains(refusal(&Parts::post_processor, with_single("[" + text + "," + text + "]")),
                   "expected the text once"));
    CHECK(contains(refusal(&Parts::post_processor, with_single(R"([{"Sequence":{"id":"B"}}])")),
                   "expected \"A\", found \"B\""));
    CHECK(contains(refusal(&Parts::post_processor, with_single(R"([{"SpecialToken":{"id":"<x>"}}])")),
                   "expected the key \"<x>\""));
    CHECK(contains(refusal(&Parts::post_processor,
                           R"({"type":"Sequence","processors":[{"type":"Sequence","processors":[]}]})"),
                   "no sequence within a sequence"));
}

TEST_CASE("tokenizer.json: not JSON, not an object, bombs, and a missing file") {
    const auto refuse = [](std::string_view json) {
        return error_of([&] { Tokenizer::from_json(json, "t.json"); });
    };
    CHECK(contains(refuse(""), "not valid JSON"));
    CHECK(contains(refuse("[]"), "expected an object"));
    CHECK(contains(refuse("{}"), "expected the key \"model\""));
    CHECK(contains(refuse(std::string(1'000'000, '[')), "at most 64 levels"));
    const std::string whole = Parts().json();
    for (size_t n = 0; n < whole.size(); n += 37) CHECK(refuse(whole.substr(0, n)) != no_error);
    const TempDir dir;
    CHECK(contains(error_of([&] { Tokenizer::from_file(dir.file("none.json")); }), dir.file("none.json")));
    CHECK(contains(error_of([&] { Tokenizer::from_file(dir.path()); }),
                   "expected tokenizer.json, or vocab.json and merges.txt; found none of them"));
}
