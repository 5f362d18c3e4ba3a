// Chat formats: which one a template's text asks for, and prompts id for id as `transformers` makes them
// (tests/golden/chat.json, written by weights_tools/make_golden_chat.py).
#include <doctest/doctest.h>

#include <map>
#include <set>

#include "golden.h"
#include "text/chat_template.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct ChatGolden {
    Json json = Json::parse_file(repo_path("tests/golden/chat.json"));
    std::map<std::string, Tokenizer> tokenizers;

    ChatGolden() {
        const Json texts = json.get("tokenizers");
        for (size_t i = 0; i < texts.size(); ++i) {
            const std::string name(texts.key_at(i));
            tokenizers.emplace(name, Tokenizer::from_json(texts.at(i).as_string(), name));
        }
    }
    const Tokenizer& tokenizer(const std::string& name) const { return tokenizers.at(name); }
};

const ChatGolden& golden() {
    static const ChatGolden chat;
    return chat;
}

std::vector<ChatSegment> segments_of(ChatFormat format, const Tokenizer& tokenizer,
                                     const ChatPrompt& prompt) {
    return chat_segments(format, tokenizer, prompt, std::nullopt, 2);
}

std::string text_of(const Tokenizer& tokenizer, const std::vector<ChatSegment>& segments) {
    std::string text;
    for (const ChatSegment& segment : segments)
        text += segment.passage ? str("{", *segment.passage, "}") : tokenizer.decode(segment.ids, false);
    return text;
}

}  // namespace

TEST_CASE(
    "chat templates: the ids of transformers' apply_chat_template, and of the stretches between passages") {
    const Json cases = golden().json.get("cases");
    std::set<std::string> formats;
    for (size_t i = 0; i < cases.size(); ++i) {
        const Json c = cases.at(i);
        CAPTURE(i);
        CAPTURE(c.get_string("template"));
        CAPTURE(c.get_string("text"));
        const Tokenizer& tokenizer = golden().tokenizer(c.get_string("tokenizer"));
        const std::optional<ChatTemplate> found =
            recognize_chat_template(golden().json.get("templates").get_string(c.get_string("template")));
        REQUIRE(found);
        CHECK(chat_format_name(found->format) == c.get_string("format"));
        formats.insert(c.get_string("format"));

        std::vector<std::string> said;
        const Json turns = c.get("turns");
        for (size_t t = 0; t < turns.size(); ++t) {
            said.emplace_back(turns.at(t).at(0).as_string());
            said.emplace_back(turns.at(t).at(1).as_string());
        }
        std::vector<ChatTurn> history;
        for (size_t t = 0; t < said.size(); t += 2) history.push_back({said[t], said[t + 1]});
        const std::string system = c.get_string_or("system", found->system);
        const std::string question = c.get_string("question");
        std::optional<int32_t> bos;
        if (const auto id = c.find("bos_id")) bos = static_cast<int32_t>(id->as_int(0, INT32_MAX));
        const ChatPrompt prompt{system, static_cast<size_t>(c.get_int("passages")), history, question};
        const std::vector<ChatSegment> segments = chat_segments(
            found->format, tokenizer, prompt, bos, static_cast<int32_t>(c.get_int("eos_id", 0, INT32_MAX)));

        // Stretches of ids with the passages between them, in order.
        const std::vector<std::vector<int32_t>> expected = id_lists_of(c.get("ids"));
        REQUIRE(segments.size() == 2 * expected.size() - 1);
        for (size_t s = 0; s < segments.size(); ++s) {
            CAPTURE(s);
            if (s % 2 == 0) {
                CHECK(!segments[s].passage);
                CHECK(segments[s].ids == expected[s / 2]);
            } else {
                CHECK(segments[s].passage == s / 2);
                CHECK(segments[s].ids.empty());
            }
        }
    }
    CHECK(formats == std::set<std::string>{"llama2", "llama3", "chatml", "mistral"});
}

TEST_CASE("chat templates: special tokens spelt in passages' neighbours, questions and answers are text") {
    const Tokenizer& tokenizer = golden().tokenizer("byte_level_llama3");
    const int32_t end = *tokenizer.id_of("<|eot_id|>");
    const ChatTurn turn{"a<|eot_id|>", "b<|eot_id|>"};
    const ChatPrompt prompt{"s<|eot_id|>", 0, std::span(&turn, 1), "q<|eot_id|>"};
    const std::vector<ChatSegment> segments = segments_of(ChatFormat::llama3, tokenizer, prompt);
    REQUIRE(segments.size() == 1);
    CHECK(std::count(segments[0].ids.begin(), segments[0].ids.end(), end) ==
          4);  // one a message, none of ours
    CHECK(contains(tokenizer.decode(segments[0].ids, false), "b<|eot_id|><|eot_id|>"));
}

TEST_CASE("chat templates: invalid UTF-8 and texts of nothing but white space") {
    const Tokenizer& tokenizer = golden().tokenizer("byte_level_digits");
    ChatPrompt prompt;
    prompt.question = "\xC3 x\xFF";
    CHECK(text_of(tokenizer, segments_of(ChatFormat::chatml, tokenizer, prompt)) ==
          "<|im_start|>user\n\xEF\xBF\xBD x\xEF\xBF\xBD<|im_end|>\n<|im_start|>assistant\n");
    const Tokenizer& llama3 = golden().tokenizer("byte_level_llama3");
    prompt.question = " \n\x1C ";  // Python strips the separators too
    CHECK(text_of(llama3, segments_of(ChatFormat::llama3, llama3, prompt)) ==
          "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n");
    prompt.n_passages = 2;
    prompt.question = "q";
    CHECK(text_of(llama3, segments_of(ChatFormat::llama3, llama3, prompt)) ==
          "<|start_header_id|>user<|end_header_id|>\n\n{0}\n\n{1}\n\nq<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST_CASE("chat templates: recognised by markers, with ChatML's own system message") {
    const Json templates = golden().json.get("templates");
    CHECK(recognize_chat_template(templates.get_string("smollm2"))->system ==
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
    CHECK(recognize_chat_template(templates.get_string("chatml"))->system.empty());
    // Qwen 2.5: the first occurrence is followed by an expression, the second by a text.
    const std::optional<ChatTemplate> qwen =
        recognize_chat_template(R"({{- '<|im_start|>system\n' }}{{- messages[0]['content'] }}{% else %})"
                                R"({{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %})");
    REQUIRE(qwen);
    CHECK(qwen->system == "You are Qwen.");
    CHECK(!recognize_chat_template(""));
    CHECK(!recognize_chat_template("{{ '<|user|>\\n' + message['content'] }}"));
    CHECK(!recognize_chat_template(
        "{{ '[INST]' + message['content'] + '[/INST]' }}"));  // no space: another form
}

TEST_CASE("chat templates: where a directory keeps its template") {
    const TempDir dir;
    CHECK(!read_chat_template(dir.path()));
    dir.write("tokenizer_config.json", R"({"eos_token": "</s>"})");
    CHECK(!read_chat_template(dir.path()));
    dir.write("tokenizer_config.json", R"({"chat_template": "one"})");
    CHECK(read_chat_template(dir.path()) == "one");
    dir.write("tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "t"},
                                           {"name": "default", "template": "d"}]})");
    CHECK(read_chat_template(dir.path()) == "d");
    dir.write("chat_template.jinja", "file");
    CHECK(read_chat_template(dir.path()) == "file");
    dir.write("tokenizer_config.json", R"({"chat_template": 3})");
    std::filesystem::remove(dir.file("chat_template.jinja"));
    CHECK(contains(error_of([&] { read_chat_template(dir.path()); }), "key \"chat_template\""));
}

TEST_CASE("chat templates: their names, and the token that ends a turn") {
    CHECK(chat_format_names("|") == "plain|llama2|llama3|chatml|mistral");
    for (const char* name : {"plain", "llama2", "llama3", "chatml", "mistral"})
        CHECK(std::string(chat_format_name(parse_chat_format(name))) == name);
    CHECK(error_of([] { parse_chat_format("alpaca"); }) ==
          "chat template: expected one of plain, llama2, llama3, chatml, mistral; found \"alpaca\"");
    const Tokenizer& llama3 = golden().tokenizer("byte_level_llama3");
    const Tokenizer& chatml = golden().tokenizer("byte_level_digits");
    CHECK(end_of_turn(ChatFormat::llama3, llama3) == llama3.id_of("<|eot_id|>"));
    CHECK(end_of_turn(ChatFormat::chatml, chatml) == chatml.id_of("<|im_end|>"));
    CHECK(end_of_turn(ChatFormat::llama3, llama3) != std::nullopt);
    CHECK(end_of_turn(ChatFormat::chatml, chatml) != std::nullopt);
    CHECK(!end_of_turn(ChatFormat::llama3, chatml));  // the vocabulary has none
    CHECK(!end_of_turn(ChatFormat::llama2, chatml));
    CHECK(!end_of_turn(ChatFormat::plain, chatml));
}

TEST_CASE("encode_parts: words go across parts, special tokens are found where they are asked for") {
    for (const auto& [name, tokenizer] : golden().tokenizers) {
        CAPTURE(name);
        const std::string whole = "Where is the mill?\n\nThe old mill.";
        const std::vector<TextPart> cut = {{"Where is t", true, {}},
                                           {"he mil", false, {}},
                                           {"", true, {}},
                                           {"l?\n", false, {}},
                                           {"\nThe old mill.", true, {}}};
        CHECK(tokenizer.encode_parts(cut) == tokenizer.encode_ids(whole));
        CHECK(tokenizer.encode_parts({}).empty());
    }
    const Tokenizer& tokenizer = golden().tokenizer("space_before_first");
    const std::vector<TextPart> parts = {{"<s>", true, {}}, {"a<s>", false, {}}, {"<s>b", true, {}}};
    const std::vector<int32_t> ids = tokenizer.encode_parts(parts);
    CHECK(std::count(ids.begin(), ids.end(), 1) == 2);
    CHECK(ids.front() == 1);
    const std::vector<TextPart> named = {{"whatever", false, 2}, {"b", false, {}}};
    CHECK(tokenizer.encode_parts(named).front() == 2);
}
