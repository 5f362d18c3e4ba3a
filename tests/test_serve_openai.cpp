// OpenAI's API: forms, right values, and what other servers got wrong.
#include <map>
#include <set>

#include "serve_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const char* const kQuestion = "Who keeps the lighthouse?";
const std::vector<Passage> kDocuments = {
    {"a", "Lighthouse",
     "The lighthouse of Ardmore is kept by Maria Ferreira. It stands on the northern cape since 1820."},
    {"b", "", "Bread is made of flour, water and salt; the baker gets up at four."}};

std::string chat(const std::string& more = "", bool with_documents = true) {
    std::string documents;
    for (const Passage& passage : kDocuments)
        documents += str(documents.empty() ? "" : ", ", R"({"id": ")", passage.id, R"(", "title": )",
                         json_quote(passage.title), R"(, "text": )", json_quote(passage.text), "}");
    return str(R"({"messages": [{"role": "user", "content": )", json_quote(kQuestion), "}]",
               with_documents ? R"(, "documents": [)" + documents + "]" : std::string(),
               more.empty() ? "" : ", ", more, "}");
}

// What the same question gives without a server.
Answer direct(const Model& model, const AnswerOptions& options = {}) {
    Session session(model);
    return session.answer(kDocuments, kQuestion, options);
}

struct Streamed {
    std::string text;
    std::vector<Json> events;
    bool done = false;
    std::string finish;
    size_t n_roles = 0;
};

// A stream of one choice, its rules checked.
Streamed streamed(const Served& served, const std::string& path, const std::string& body) {
    const HttpReply reply = served.post(path, body);
    Streamed out;
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    REQUIRE(reply.whole);
    CHECK(reply.has_header("content-type: text/event-stream"));
    for (const std::string& event : events_of(reply.body)) {
        REQUIRE_FALSE(out.done);  // nothing comes after the end
        if (event == "[DONE]") {
            out.done = true;
            continue;
        }
        out.events.push_back(Json::parse(event, "an event"));
        const Json choices = out.events.back().get_array("choices");
        if (choices.size() == 0) continue;
        const Json choice = choices.at(0);
        CHECK(out.finish.empty());
        if (const auto finish = choice.find("finish_reason")) out.finish = finish->as_string();
        if (const auto delta = choice.find("delta")) {
            out.n_roles += delta->has("role") ? 1 : 0;
            out.text += delta->get_string_or("content", "");
        } else {
            out.text += choice.get_string("text");
        }
    }
    CHECK(out.done);
    CHECK((out.finish == "stop" || out.finish == "length"));
    return out;
}

std::string content_of(const HttpReply& reply) {
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    return reply.json().get_array("choices").at(0).get_object("message").get_string("content");
}

std::string text_of(const HttpReply& reply) {
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    return reply.json().get_array("choices").at(0).get_string("text");
}

}  // namespace

TEST_CASE("serve: chat answers as the library does, whole and streamed, and says what was compressed") {
    const Served served;
    AnswerOptions options;
    options.max_new_tokens = 24;
    const Answer expected = direct(served.model(), options);
    REQUIRE_FALSE(expected.text.empty());
    const HttpReply whole = served.post("/v1/chat/completions", chat(R"("max_tokens": 24)"));
    CHECK(content_of(whole) == expected.text);
    const Json json = whole.json();
    CHECK(json.get_string("object") == "chat.completion");
    CHECK(json.get_string("id").rfind("chatcmpl-", 0) == 0);
    CHECK(json.get_string("model") == "test");
    const Json usage = json.get_object("usage");
    CHECK(usage.get_int("prompt_tokens") == static_cast<int64_t>(expected.plain_tokens));
    CHECK(usage.get_int("completion_tokens") == std::ssize(expected.ids));
    CHECK(usage.get_int("total_tokens") == static_cast<int64_t>(expected.plain_tokens + expected.ids.size()));
    const Json refrag = json.get_object("refrag");
    CHECK(refrag.get_int("chunks") == std::ssize(expected.chunks));
    CHECK(refrag.get_int("expanded") == static_cast<int64_t>(expected.n_expanded));
    CHECK(refrag.get_int("positions") == static_cast<int64_t>(expected.positions));
    CHECK(refrag.get_int("plain_tokens") == static_cast<int64_t>(expected.plain_tokens));
    CHECK(refrag.get_int("cached") == 0);
    CHECK(refrag.get_number("ttft_ms") > 0.0);
    const Json documents = refrag.get_array("documents");
    REQUIRE(documents.size() == 2);
    CHECK(documents.at(0).get_string("id") == "a");
    CHECK(documents.at(0).get_int("chunks") + documents.at(1).get_int("chunks") ==
          std::ssize(expected.chunks));
    CHECK(documents.at(0).get_int("expanded") + documents.at(1).get_int("expanded") ==
          static_cast<int64_t>(expected.n_expanded));
    // Citations stand where the library finds them.
    const Json message = json.get_array("choices").at(0).get_object("message");
    if (const auto citations = message.find("citations")) {
        for (size_t i = 0; i < citations->size(); ++i) {
            const Json citation = citations->at(i);
            CHECK(expected.text.substr(
                      static_cast<size_t>(citation.get_int("start")),
                      static_cast<size_t>(citation.get_int("end") - citation.get_int("start"))) ==
                  citation.get_string("text"));
        }
    }
    const Streamed stream =
        streamed(served, "/v1/chat/completions", chat(R"("max_tokens": 24, "stream": true)"));
    CHECK(stream.text == expected.text);
    CHECK(stream.n_roles == 1);
    CHECK(stream.events.back().get_object("refrag").get_int("cached") ==
          std::ssize(expected.chunks));  // encoded once
    for (const Json& event : stream.events) CHECK_FALSE(event.has("usage"));
    const std::string metrics = served.get("/metrics").body;
    CHECK(contains(metrics, str("refrag_chunks_cached_total ", expected.chunks.size(), "\n")));
    CHECK(contains(metrics, "\nrefrag_passage_cache_bytes "));
    CHECK_FALSE(contains(metrics, "\nrefrag_passage_cache_bytes 0\n"));
}

TEST_CASE("serve: usage comes in a stream's last chunk, without choices, and only where it is asked for") {
    const Served served;
    const Streamed stream =
        streamed(served, "/v1/chat/completions",
                 chat(R"("max_tokens": 3, "stream": true, "stream_options": {"include_usage": true})"));
    for (size_t i = 0; i + 1 < stream.events.size(); ++i) {
        CHECK(stream.events[i].get("usage").is_null());
        CHECK(stream.events[i].get_array("choices").size() == 1);
    }
    CHECK(stream.events.back().get_array("choices").size() == 0);
    CHECK(stream.events.back().get_object("usage").get_int("completion_tokens") <= 3);
    const Streamed text = streamed(
        served, "/v1/completions",
        R"({"prompt": "The", "max_tokens": 3, "stream": true, "stream_options": {"include_usage": true}})");
    CHECK(text.events.back().get_array("choices").size() == 0);
    CHECK(text.events.back().get_object("usage").get_int("completion_tokens") == 3);
    const Streamed running = streamed(
        served, "/v1/chat/completions",
        chat(
            R"("max_tokens": 3, "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true})"));
    int64_t so_far = 0;
    for (const Json& event : running.events) {
        CHECK(event.get_object("usage").get_int("completion_tokens") >= so_far);
        CHECK(event.get_object("usage").get_int("prompt_tokens") > 0);
        so_far = event.get_object("usage").get_int("completion_tokens");
    }
    CHECK(so_far == 3);
    const HttpReply alone =
        served.post("/v1/chat/completions", chat(R"("stream_options": {"include_usage": true})"));
    CHECK(alone.status == 400);
    CHECK(alone.error("param") == "stream_options");
}

TEST_CASE("serve: an over-long prompt is 400 with both numbers, streamed or not") {
    const Served served;
    std::string words;
    for (int i = 0; i < 3000; ++i) words += str(" word", i);
    for (const char* stream : {"false", "true"}) {
        for (const std::string& body :
             {str(R"({"messages": [{"role": "user", "content": ")", words, R"("}], "stream": )", stream, "}"),
              str(R"({"prompt": ")", words, R"(", "stream": )", stream, "}")}) {
            const HttpReply reply =
                served.post(body[2] == 'm' ? "/v1/chat/completions" : "/v1/completions", body);
            CAPTURE(reply.body);
            CHECK(reply.status == 400);
            CHECK(reply.error("code") == "context_length_exceeded");
            CHECK(contains(reply.message(), "the prompt takes "));
            CHECK(contains(reply.message(), "in a context of 2048"));
        }
    }
}

TEST_CASE("serve: stop texts neither leak nor swallow, whole and streamed") {
    const Served served;
    AnswerOptions options;
    options.max_new_tokens = 40;
    options.ignore_eos = true;
    const std::string all = direct(served.model(), options).text;
    REQUIRE(all.size() > 20);
    for (const size_t at : {size_t{1}, size_t{5}, all.size() / 2}) {
        for (const size_t length : {size_t{1}, size_t{4}, size_t{9}}) {
            const std::string stop = all.substr(at, length);
            const size_t first = all.find(stop);
            const std::string more =
                str(R"("max_tokens": 40, "ignore_eos": true, "stop": [)", json_quote(stop), "]");
            CAPTURE(stop);
            const HttpReply reply = served.post("/v1/chat/completions", chat(more));
            CHECK(content_of(reply) == all.substr(0, first));
            CHECK(reply.json().get_array("choices").at(0).get_string("finish_reason") == "stop");
            CHECK(streamed(served, "/v1/chat/completions", chat(more + R"(, "stream": true)")).text ==
                  all.substr(0, first));
        }
    }
    // One that never comes holds nothing back at the end.
    const std::string never =
        R"("max_tokens": 40, "ignore_eos": true, "stop": "never to be seen", "stream": true)";
    const Streamed stream = streamed(served, "/v1/chat/completions", chat(never));
    CHECK(stream.text == all);
    CHECK(stream.finish == "length");
}

TEST_CASE(
    "serve: chat's log-probabilities are the library's, with and without alternatives, whole and streamed") {
    const Served served;
    AnswerOptions options;
    options.max_new_tokens = 12;
    options.ignore_eos = true;
    options.logprobs = 2;
    const Answer expected = direct(served.model(), options);
    const auto check_list = [&](const std::vector<Json>& list, size_t n_top) {
        REQUIRE(list.size() == expected.logprobs.size());
        for (size_t i = 0; i < list.size(); ++i) {
            const TokenLogprobs& token = expected.logprobs[i];
            CHECK(list[i].get_number("logprob") == doctest::Approx(token.chosen.logprob).epsilon(1e-12));
            CHECK(list[i].get_string("token") == served.model().tokenizer().token_bytes(token.chosen.id));
            CHECK(list[i].get_array("bytes").size() ==
                  served.model().tokenizer().token_bytes(token.chosen.id).size());
            REQUIRE(list[i].get_array("top_logprobs").size() == n_top);
            for (size_t t = 0; t < n_top; ++t)
                CHECK(list[i].get_array("top_logprobs").at(t).get_number("logprob") ==
                      doctest::Approx(token.top[t].logprob));
        }
    };
    for (const size_t n_top : {size_t{0}, size_t{2}}) {
        const std::string more = str(R"("max_tokens": 12, "ignore_eos": true, "logprobs": true)",
                                     n_top > 0 ? R"(, "top_logprobs": 2)" : "");
        const HttpReply reply = served.post("/v1/chat/completions", chat(more));
        CAPTURE(reply.body);
        REQUIRE(reply.status == 200);
        const Json content =
            reply.json().get_array("choices").at(0).get_object("logprobs").get_array("content");
        std::vector<Json> list;
        for (size_t i = 0; i < content.size(); ++i) list.push_back(content.at(i));
        check_list(list, n_top);
        list.clear();
        for (const Json& event :
             streamed(served, "/v1/chat/completions", chat(more + R"(, "stream": true)")).events) {
            const auto logprobs = event.get_array("choices").at(0).find("logprobs");
            if (!logprobs) continue;
            for (size_t i = 0; i < logprobs->get_array("content").size(); ++i)
                list.push_back(logprobs->get_array("content").at(i));
        }
        check_list(list, n_top);
    }
    const HttpReply alone = served.post("/v1/chat/completions", chat(R"("top_logprobs": 2)"));
    CHECK(alone.status == 400);
    CHECK(alone.error("param") == "top_logprobs");
    // Tokens of a stop text are no part of the answer, nor of its log-probabilities.
    const std::string stop = expected.text.substr(expected.text.size() / 2, 3);
    const HttpReply stopped = served.post(
        "/v1/chat/completions",
        chat(str(R"("max_tokens": 12, "ignore_eos": true, "logprobs": true, "stop": )", json_quote(stop))));
    const Json choice = stopped.json().get_array("choices").at(0);
    std::string joined;
    const Json content = choice.get_object("logprobs").get_array("content");
    for (size_t i = 0; i < content.size(); ++i) joined += content.at(i).get_string("token");
    if (joined.starts_with(' ')) joined.erase(0, 1);
    const std::string text = choice.get_object("message").get_string("content");
    CHECK(joined.substr(0, text.size()) == text);
    CHECK_FALSE(contains(joined, stop + expected.text.substr(expected.text.find(stop) + stop.size(), 4)));
}

TEST_CASE(
    "serve: completions score a prompt as evaluation harnesses ask: echo, logprobs, 0 or 1 tokens, ids") {
    const Served served;
    const Model& model = served.model();
    const std::string prompt = "The river rises in the hills and ends in the sea";
    const std::vector<int32_t> ids = model.tokenizer().encode_ids(prompt, true);
    std::string list;
    for (const int32_t id : ids) list += str(list.empty() ? "" : ", ", id);
    Session session(model);
    AnswerOptions options;
    options.max_new_tokens = 1;
    options.logprobs = 1;
    options.prompt_logprobs = 1;
    options.continues_text = true;
    const Answer expected = session.answer({TokenSegment{ids}}, options);
    for (const int max_tokens : {0, 1}) {
        for (const std::string& given : {"[[" + list + "]]", "[" + list + "]"}) {
            const HttpReply reply = served.post(
                "/v1/completions",
                str(R"({"prompt": )", given,
                    R"(, "echo": true, "logprobs": 1, "temperature": 0, "seed": 1234, "max_tokens": )",
                    max_tokens, "}"));
            CAPTURE(reply.body);
            REQUIRE(reply.status == 200);
            const Json choice = reply.json().get_array("choices").at(0);
            const Json logprobs = choice.get_object("logprobs");
            const Json values = logprobs.get_array("token_logprobs");
            REQUIRE(values.size() == ids.size() + static_cast<size_t>(max_tokens));
            CHECK(logprobs.get_array("tokens").size() == values.size());
            CHECK(logprobs.get_array("top_logprobs").size() == values.size());
            CHECK(logprobs.get_array("text_offset").size() == values.size());
            CHECK(values.at(0).is_null());  // nothing comes before it
            CHECK(logprobs.get_array("top_logprobs").at(0).is_null());
            for (size_t i = 1; i < ids.size(); ++i) {
                REQUIRE(expected.scores[i].logprobs);
                CHECK(values.at(i).as_number() ==
                      doctest::Approx(expected.scores[i].logprobs->chosen.logprob).epsilon(1e-9));
            }
            std::string spelt;
            for (size_t i = 0; i < ids.size(); ++i) {
                CHECK(logprobs.get_array("text_offset").at(i).as_int() == std::ssize(spelt));
                spelt += logprobs.get_array("tokens").at(i).as_string();
            }
            CHECK(spelt == prompt);
            CHECK(choice.get_string("text").substr(0, prompt.size()) == prompt);
            CHECK(choice.get_string("finish_reason") == "length");
            if (max_tokens == 1) {
                CHECK(values.at(ids.size()).as_number() ==
                      doctest::Approx(expected.logprobs[0].chosen.logprob).epsilon(1e-9));
                CHECK(choice.get_string("text") == prompt + expected.text);
            }
        }
    }
    // As text, the model's own first token comes before it, and is no part of what is given back.
    const HttpReply text = served.post(
        "/v1/completions",
        str(R"({"prompt": )", json_quote(prompt), R"(, "echo": true, "logprobs": 0, "max_tokens": 0})"));
    CAPTURE(text.body);
    REQUIRE(text.status == 200);
    CHECK(text_of(text) == prompt);
    CHECK(text.json().get_array("choices").at(0).get_object("logprobs").get_array("tokens").size() ==
          ids.size());
    const Streamed stream =
        streamed(served, "/v1/completions",
                 str(R"({"prompt": )", json_quote(prompt),
                     R"(, "echo": true, "logprobs": 1, "max_tokens": 2, "stream": true})"));
    CHECK(stream.text.substr(0, prompt.size()) == prompt);
    CHECK(served.post("/v1/completions", R"({"prompt": [[1, 999999]]})").error("param") == "prompt");
}

TEST_CASE("serve: a completion goes on from its prompt, its first space included") {
    const Served served;
    const std::string prompt = "Question: Who?\nAnswer:";
    Session session(served.model());
    AnswerOptions options;
    options.max_new_tokens = 6;
    options.continues_text = true;
    std::vector<int32_t> ids = served.model().tokenizer().encode_ids(prompt, true);
    if (served.model().bos_id()) ids.insert(ids.begin(), *served.model().bos_id());
    const Answer expected = session.answer({TokenSegment{ids}}, options);
    CHECK(expected.text.starts_with(' '));
    CHECK(text_of(served.post("/v1/completions", str(R"({"prompt": )", json_quote(prompt),
                                                     R"(, "max_tokens": 6})"))) == expected.text);
    CHECK(streamed(served, "/v1/completions",
                   str(R"({"prompt": )", json_quote(prompt), R"(, "max_tokens": 6, "stream": true})"))
              .text == expected.text);
}

TEST_CASE("serve: several prompts and several choices are each answered, in their order, as if alone") {
    const Served served;
    const auto body = [](const std::string& prompt, int n, int seed) {
        return str(R"({"prompt": )", prompt,
                   R"(, "max_tokens": 8, "temperature": 1.5, "ignore_eos": true, "n": )", n, R"(, "seed": )",
                   seed, "}");
    };
    const HttpReply both = served.post("/v1/completions", body(R"(["The sea", "A hill"])", 3, 5));
    CAPTURE(both.body);
    REQUIRE(both.status == 200);
    const Json choices = both.json().get_array("choices");
    REQUIRE(choices.size() == 6);
    std::set<std::string> different;
    for (size_t i = 0; i < 6; ++i) {
        CHECK(choices.at(i).get_int("index") == static_cast<int64_t>(i));
        const char* prompt = i < 3 ? "\"The sea\"" : "\"A hill\"";
        CHECK(choices.at(i).get_string("text") ==
              text_of(served.post("/v1/completions", body(prompt, 1, 5 + static_cast<int>(i % 3)))));
        different.insert(choices.at(i).get_string("text"));
    }
    CHECK(different.size() > 3);
    // Each prompt is counted once.
    const Json usage = both.json().get_object("usage");
    CHECK(usage.get_int("completion_tokens") == 48);
    CHECK(usage.get_int("prompt_tokens") <
          2 * static_cast<int64_t>(served.model().tokenizer().encode_ids("The sea").size() + 1 +
                                   served.model().tokenizer().encode_ids("A hill").size() + 1));
    const HttpReply chats = served.post("/v1/chat/completions",
                                        chat(R"("n": 2, "max_tokens": 5, "temperature": 1.2, "seed": 3)"));
    CHECK(chats.json().get_array("choices").size() == 2);
    // A stream interleaves them; each ends once.
    const HttpReply stream =
        served.post("/v1/chat/completions",
                    chat(R"("n": 2, "max_tokens": 5, "temperature": 1.2, "seed": 3, "stream": true)"));
    std::map<int64_t, std::string> texts;
    std::map<int64_t, int> ends;
    for (const std::string& event : events_of(stream.body)) {
        if (event == "[DONE]") continue;
        const Json choice = Json::parse(event, "event").get_array("choices").at(0);
        texts[choice.get_int("index")] += choice.get_object("delta").get_string_or("content", "");
        ends[choice.get_int("index")] += choice.find("finish_reason") ? 1 : 0;
    }
    for (int64_t i = 0; i < 2; ++i) {
        CHECK(ends[i] == 1);
        CHECK(texts[i] == chats.json()
                              .get_array("choices")
                              .at(static_cast<size_t>(i))
                              .get_object("message")
                              .get_string("content"));
    }
    const HttpReply many = served.post("/v1/completions", R"({"prompt": "x", "n": 128, "max_tokens": 1})");
    CHECK(many.status == 400);
    CHECK(contains(many.message(), "at most 65 answers"));
}

TEST_CASE("serve: fields that would change the answer are refused by name, harmless ones are let be") {
    const Served served;
    for (const char* field :
         {R"("temperatur": 1)", R"("tools": [{"type": "function"}])", R"("functions": [{}])",
          R"("tool_choice": "required")", R"("response_format": {"type": "json_object"})",
          R"("logit_bias": {"5": 1})", R"("grammar": "x")", R"("guided_json": {})", R"("mirostat": 2)",
          R"("typical_p": 0.5)", R"("reasoning_effort": "high")", R"("modalities": ["audio"])",
          R"("best_of": 2)", R"("suffix": "x")", R"("echo": true)", R"("store": {"query": "x"})"}) {
        CAPTURE(field);
        const HttpReply reply = served.post("/v1/chat/completions", chat(field));
        CHECK(reply.status == 400);
        const std::string name(field + 1, static_cast<size_t>(std::string_view(field + 1).find('"')));
        CHECK(reply.error("param") == name);
        CHECK(contains(reply.message(), name));
    }
    for (const char* field :
         {R"("user": "me")", R"("metadata": {"a": "b"})", R"("store": true)", R"("tools": [])",
          R"("tool_choice": "none")", R"("response_format": {"type": "text"})", R"("logit_bias": {})",
          R"("n": 1)", R"("service_tier": "auto")", R"("parallel_tool_calls": true)",
          R"("temperature": null)", R"("stop": null)", R"("max_tokens": 2.0)"}) {
        CAPTURE(field);
        CHECK(
            served.post("/v1/chat/completions", chat(str(field, R"(, "max_completion_tokens": 2)"))).status ==
            200);
    }
    for (const char* field : {R"("suffix": "x")", R"("best_of": 3)", R"("logit_bias": {"5": 1})",
                              R"("documents": ["x"])", R"("passage_ids": ["x"])"}) {
        CAPTURE(field);
        const HttpReply reply = served.post("/v1/completions", str(R"({"prompt": "x", )", field, "}"));
        CHECK(reply.status == 400);
        CHECK(contains(reply.message(), "not supported") != contains(reply.message(), "expected"));
    }
}

TEST_CASE("serve: every number is checked at the ends of its range") {
    const Served served;
    struct Range {
        const char* field;
        std::vector<const char*> good;
        std::vector<const char*> bad;
    };
    const std::vector<Range> ranges = {
        {"temperature", {"0", "100", "0.5"}, {"-0.001", "100.001", "\"1\"", "true"}},
        {"top_p", {"0.0001", "1"}, {"-0.001", "1.001"}},
        {"top_k", {"-1", "0", "2147483647"}, {"-2", "2147483648", "1.5"}},
        {"min_p", {"0", "1"}, {"-0.1", "1.1"}},
        {"frequency_penalty", {"-2", "2"}, {"-2.01", "2.01"}},
        {"presence_penalty", {"-2", "2"}, {"-2.01", "2.01"}},
        {"repetition_penalty", {"0.01", "2"}, {"-1", "0", "1000001"}},
        {"seed",
         {"-9223372036854775808", "9223372036854775807", "0"},
         {"9223372036854775808", "-9223372036854775809", "0.5"}},
        {"max_tokens", {"1", "2147483647"}, {"0", "-1", "2147483648"}},
        {"max_completion_tokens", {"1"}, {"0", "1e99"}},
        {"n", {"1", "2"}, {"0", "129", "-1"}},
        {"top_logprobs", {"0"}, {"-1", "21"}},
        {"expand_fraction", {"0", "1"}, {"-0.01", "1.01"}},
        {"timeout", {"60"}, {"0", "86401", "-1"}},
    };
    for (const Range& range : ranges) {
        for (const char* value : range.good) {
            CAPTURE(range.field);
            CAPTURE(value);
            const std::string field = str("\"", range.field, "\": ", value);
            const std::string stop = std::string_view(range.field).starts_with("max")
                                         ? R"(, "stop": ["a", "e", "i", "o", "1", "t"])"
                                         : R"(, "max_tokens": 2)";
            CHECK(served.post("/v1/chat/completions", chat(field + stop)).status == 200);
        }
        for (const char* value : range.bad) {
            CAPTURE(range.field);
            CAPTURE(value);
            const HttpReply reply =
                served.post("/v1/chat/completions", chat(str("\"", range.field, "\": ", value)));
            CHECK(reply.status == 400);
            CHECK(contains(reply.message(), range.field) != contains(reply.message(), "repetition penalty"));
        }
    }
}

TEST_CASE("serve: conversations in all their forms, and those that are none") {
    const Served served;
    Session session(served.model());
    AnswerOptions options;
    options.max_new_tokens = 6;
    const std::vector<Turn> history = {{"Who bakes?", "the baker"}};
    const std::string expected =
        session.answer(std::vector<Passage>{}, "When?\n\nAnd why?", options, {}, history).text;
    const std::string messages =
        R"([{"role": "user", "content": "Who bakes?"}, {"role": "assistant", "content": "the baker"},
        {"role": "user", "content": [{"type": "text", "text": "When?"}]}, {"role": "user", "content": "And why?"}])";
    CHECK(content_of(served.post("/v1/chat/completions",
                                 str(R"({"max_tokens": 6, "messages": )", messages, "}"))) == expected);
    const std::string system =
        R"({"max_tokens": 6, "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]})";
    const auto segments = make_segments(served.model(), {}, {}, "Hello", 0, "Be short.");
    CHECK(content_of(served.post("/v1/chat/completions", system)) == session.answer(segments, options).text);
    const std::vector<std::pair<const char*, const char*>> bad = {
        {R"([])", "expected the last one to be the user's"},
        {R"([{"role": "assistant", "content": "x"}])", "the user to speak first"},
        {R"([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])",
         "expected the last one to be the user's"},
        {R"([{"role": "tool", "content": "x"}])", "system, user or assistant"},
        {R"([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}])",
         "system messages before all others"},
        {R"([{"role": "user", "content": [{"type": "image_url"}]}])", "reads nothing else"},
        {R"([{"role": "user"}])", "content"},
        {R"([{"content": "x"}])", "role"},
        {R"("hello")", "an array"},
        {R"([{"role": "user", "content": 5}])", "a string"},
    };
    for (const auto& [list, message] : bad) {
        CAPTURE(list);
        const HttpReply reply = served.post("/v1/chat/completions", str(R"({"messages": )", list, "}"));
        CHECK(reply.status == 400);
        CHECK(reply.error("param") == "messages");
        CHECK(contains(reply.message(), message));
    }
    CHECK(served.post("/v1/chat/completions", "{}").error("param") == "messages");
}

TEST_CASE("serve: one model, by its name; others are not found") {
    const Served served;
    CHECK(served.get("/v1/models").json().get_array("data").at(0).get_string("id") == "test");
    CHECK(served.get("/v1/models/test").json().get_string("object") == "model");
    for (const HttpReply& reply :
         {served.get("/v1/models/other"), served.post("/v1/chat/completions", chat(R"("model": "other")")),
          served.post("/v1/completions", R"({"prompt": "x", "model": "other"})"),
          served.post("/v1/embeddings", R"({"input": "x", "model": "other"})"),
          served.post("/v2/chat", chat(R"("model": "other")"))}) {
        CHECK(reply.status == 404);
        CHECK(reply.error("code") == "model_not_found");
        CHECK(reply.message() == "the model \"other\" does not exist: this server has \"test\"");
    }
    CHECK(served.post("/v1/chat/completions", chat(R"("model": "test", "max_tokens": 1)")).status == 200);
}
