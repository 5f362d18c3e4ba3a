// Passages of requests in every form, passages by id, embeddings, tokens, Cohere's chat, a passage store.
#include <cstring>

#include "io/base64.h"
#include "refrag/pooling.h"
#include "serve_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kText =
    "The lighthouse of Ardmore is kept by Maria Ferreira. It stands on the northern cape since 1820.";

std::string asked(const std::string& fields, const std::string& question = "Who keeps the lighthouse?") {
    return str(R"({"messages": [{"role": "user", "content": )", json_quote(question),
               R"(}], "max_tokens": 8, )", fields, "}");
}

std::string answer_of(const HttpReply& reply) {
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    return reply.json().get_array("choices").at(0).get_object("message").get_string("content");
}

std::vector<float> floats(const Json& list) {
    std::vector<float> values;
    for (size_t i = 0; i < list.size(); ++i) values.push_back(static_cast<float>(list.at(i).as_number()));
    return values;
}

}  // namespace

TEST_CASE("serve: documents as strings, as objects, and as Cohere has them give the same prompt") {
    const Served served;
    const std::string text = json_quote(kText);
    const std::vector<std::string> forms = {
        str(R"("documents": [)", text, "]"), str(R"("documents": [{"text": )", text, "}]"),
        str(R"("documents": [{"id": "x", "data": {"text": )", text, "}}]"),
        str(R"("documents": [{"id": 5, "data": {"snippet": )", text, "}}]"),
        str(R"("documents": [{"data": )", text, "}]")};
    Session session(served.model());
    AnswerOptions options;
    options.max_new_tokens = 8;
    const Answer expected =
        session.answer(std::vector<Passage>{{"1", "", kText}}, "Who keeps the lighthouse?", options);
    for (const std::string& form : forms) {
        CAPTURE(form);
        const HttpReply reply = served.post("/v1/chat/completions", asked(form));
        CHECK(answer_of(reply) == expected.text);
        CHECK(reply.json().get_object("refrag").get_int("plain_tokens") ==
              static_cast<int64_t>(expected.plain_tokens));
    }
    // A title, and fields of one's own, are read too.
    const Answer titled =
        session.answer(std::vector<Passage>{{"1", "Cape", kText + "\nyear: 1820\nopen: true"}},
                       "Who keeps the lighthouse?", options);
    const HttpReply reply = served.post(
        "/v1/chat/completions", asked(str(R"("documents": [{"id": "x", "title": "Cape", "text": )", text,
                                          R"(, "year": 1820, "open": true}])")));
    CHECK(reply.json().get_object("refrag").get_int("plain_tokens") ==
          static_cast<int64_t>(titled.plain_tokens));
    const std::vector<std::pair<std::string, std::string>> bad = {
        {R"("documents": "x")", "an array"},
        {R"("documents": [5])", "a string, or an object"},
        {R"("documents": [{"id": "x"}])", "\"text\", or another key"},
        {R"("documents": [""])", "a text that is not empty"},
        {R"("documents": [{"title": "t", "data": {"text": "x"}}])", "title"},
        {R"("documents": [{"text": ["x"]}])", "a string, a number or a boolean"},
        {R"("documents": [{"id": "x", "text": "a"}, {"id": "x", "text": "b"}])",
         "an id of its own, found x twice"},
    };
    for (const auto& [fields, message] : bad) {
        CAPTURE(fields);
        const HttpReply refused = served.post("/v1/chat/completions", asked(fields));
        CHECK(refused.status == 400);
        CHECK(refused.error("param") == "documents");
        CHECK(contains(refused.message(), message));
    }
}

TEST_CASE("serve: a request's passages and chunks are bounded") {
    ServedOptions options;
    options.api.limits = {3, 10};
    const Served served(std::move(options));
    CHECK(
        contains(served.post("/v1/chat/completions", asked(R"("documents": ["a", "b", "c", "d"])")).message(),
                 "at most 3 passages in all, found 4"));
    std::string words;
    for (int i = 0; i < 400; ++i) words += " word";
    CHECK(contains(
        served.post("/v1/chat/completions", asked(str(R"("documents": [")", words, "\"]"))).message(),
        "at most 10 chunks in all"));
}

TEST_CASE("serve: a passage that is put is encoded once, and answers by its id as it does when it is sent") {
    const Served served;
    const std::string body = str(R"({"title": "Cape", "text": )", json_quote(kText), "}");
    HttpReply put = http(served.port(), "PUT", "/v1/passages/light%20house/1", body);
    CAPTURE(put.body);
    REQUIRE(put.status == 201);
    CHECK(put.json().get_string("id") == "light house/1");
    CHECK(put.json().get_bool("encoded"));
    const int64_t n_chunks = put.json().get_int("chunks");
    CHECK(n_chunks > 1);
    CHECK(http(served.port(), "PUT", "/v1/passages/light%20house/1", body).status == 200);
    const HttpReply by_id = served.post("/v1/chat/completions", asked(R"("passage_ids": ["light house/1"])"));
    CHECK(by_id.json().get_object("refrag").get_int("cached") == n_chunks);
    CHECK(by_id.json().get_object("refrag").get_array("documents").at(0).get_string("id") == "light house/1");
    const HttpReply sent =
        served.post("/v1/chat/completions",
                    asked(str(R"("documents": [{"title": "Cape", "text": )", json_quote(kText), "}]")));
    CHECK(answer_of(by_id) == answer_of(sent));
    const HttpReply got = served.get("/v1/passages/light%20house/1");
    CHECK(got.json().get_string("text") == kText);
    CHECK(served.get("/v1/passages").json().get_array("data").size() == 1);
    CHECK_FALSE(served.get("/v1/passages").json().get_bool("has_more"));
    CHECK(http(served.port(), "DELETE", "/v1/passages/light%20house/1").json().get_bool("deleted"));
    for (const HttpReply& gone :
         {served.get("/v1/passages/light%20house/1"),
          http(served.port(), "DELETE", "/v1/passages/light%20house/1"),
          served.post("/v1/chat/completions", asked(R"("passage_ids": ["light house/1"])"))}) {
        CHECK(gone.status == 404);
        CHECK(gone.error("code") == "passage_not_found");
    }
    for (const char* bad : {"{}", R"({"text": ""})", R"({"text": 5})", R"({"text": "a", "x": 1})",
                            R"({"text": "a", "id": "b"})"})
        CHECK(http(served.port(), "PUT", "/v1/passages/a", bad).status == 400);
    CHECK(served.get("/v1/passages/a").status == 404);
}

TEST_CASE("serve: there is room for so many passages, and the next is refused without harm") {
    ServedOptions options;
    options.api.max_passages = 2;
    const Served served(std::move(options));
    for (const char* id : {"a", "b"})
        CHECK(http(served.port(), "PUT", str("/v1/passages/", id), R"({"text": "Some words."})").status ==
              201);
    const HttpReply full = http(served.port(), "PUT", "/v1/passages/c", R"({"text": "Some words."})");
    CHECK(full.status == 507);
    CHECK(full.error("code") == "passages_full");
    CHECK(http(served.port(), "PUT", "/v1/passages/a", R"({"text": "Others."})").status == 200);
    CHECK(served.get("/v1/passages/a").json().get_string("text") == "Others.");
}

TEST_CASE("serve: embeddings are the encoder's, pooled or by chunk, as numbers or base64") {
    const Served served;
    const Model& model = served.model();
    const auto backend = model.device().make_backend();
    Arena arena(*backend);
    const auto passage = std::make_shared<SharedPassage>(model, kText);
    encode_passages(*backend, model, std::vector{passage}, arena);
    const std::vector<float> rows = passage->encoded()->download(*backend);
    const std::vector<float> mean = mean_direction(rows, model.d_enc());
    const std::string input = json_quote(kText);
    const HttpReply pooled = served.post("/v1/embeddings", str(R"({"input": [)", input, R"(, "Bread."]})"));
    CAPTURE(pooled.body);
    REQUIRE(pooled.status == 200);
    const Json data = pooled.json().get_array("data");
    REQUIRE(data.size() == 2);
    CHECK(floats(data.at(0).get_array("embedding")) == mean);
    CHECK(data.at(1).get_int("index") == 1);
    double norm = 0.0;
    for (const float value : floats(data.at(1).get_array("embedding")))
        norm += static_cast<double>(value) * static_cast<double>(value);
    CHECK(norm == doctest::Approx(1.0).epsilon(1e-5));
    CHECK(pooled.json().get_object("usage").get_int("prompt_tokens") >
          static_cast<int64_t>(passage->cut(model)->n_tokens()));
    const HttpReply coded = served.post(
        "/v1/embeddings",
        str(R"({"input": )", input, R"(, "encoding_format": "base64", "model": "test", "user": "u"})"));
    const auto bytes = base64_decode(coded.json().get_array("data").at(0).get_string("embedding"));
    REQUIRE(bytes);
    REQUIRE(bytes->size() == mean.size() * sizeof(float));
    CHECK(std::memcmp(bytes->data(), mean.data(), bytes->size()) == 0);
    const HttpReply chunks =
        served.post("/v1/embeddings", str(R"({"input": )", input, R"(, "pooling": "none"})"));
    const Json list = chunks.json().get_array("data");
    const auto cut = passage->cut(model);
    REQUIRE(list.size() == cut->chunks().size());
    for (size_t i = 0; i < list.size(); ++i) {
        const auto dim = static_cast<size_t>(model.d_enc());
        CHECK(floats(list.at(i).get_array("embedding")) ==
              std::vector<float>(rows.begin() + static_cast<std::ptrdiff_t>(i * dim),
                                 rows.begin() + static_cast<std::ptrdiff_t>((i + 1) * dim)));
        CHECK(list.at(i).get_int("begin") == static_cast<int64_t>(cut->chunks()[i].begin));
    }
    std::string ids;
    for (const int32_t id : model.tokenizer().encode_ids(kText)) ids += str(ids.empty() ? "" : ", ", id);
    CHECK(floats(served.post("/v1/embeddings", str(R"({"input": [)", ids, "]}"))
                     .json()
                     .get_array("data")
                     .at(0)
                     .get_array("embedding")) == mean);
    for (const char* bad :
         {R"({})", R"({"input": []})", R"({"input": ""})", R"({"input": "a", "encoding_format": "x"})",
          R"({"input": "a", "dimensions": 7})", R"({"input": "a", "pooling": "max"})",
          R"({"input": [99999999]})", R"({"input": "a", "what": 1})"}) {
        CAPTURE(bad);
        CHECK(served.post("/v1/embeddings", bad).status == 400);
    }
}

TEST_CASE(
    "serve: a plain decoder serves chat, chooses passages by their words, and says that it embeds nothing") {
    ServedOptions options;
    options.model = "weights_tools/refrag-nano/decoder";
    const Served served(std::move(options));
    CHECK(contains(served.post("/v1/embeddings", R"({"input": "a"})").message(), "has no encoder"));
    CHECK(served
              .post("/v1/chat/completions",
                    R"({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})")
              .status == 200);
}

TEST_CASE("serve: tokens there and back, as llama.cpp's and vLLM's servers have them") {
    const Served served;
    const std::string text = "The sea, 12 ships — é.";
    const std::vector<int32_t> ids = served.model().tokenizer().encode_ids(text, true);
    const Json plain = served.post("/tokenize", str(R"({"content": )", json_quote(text), "}")).json();
    REQUIRE(plain.get_array("tokens").size() == ids.size());
    for (size_t i = 0; i < ids.size(); ++i) CHECK(plain.get_array("tokens").at(i).as_int() == ids[i]);
    CHECK(plain.get_int("count") == std::ssize(ids));
    CHECK(plain.get_int("max_model_len") == 2048);
    const Json with_bos = served.post("/tokenize", str(R"({"prompt": )", json_quote(text), "}")).json();
    CHECK(with_bos.get_int("count") == std::ssize(ids) + (served.model().bos_id() ? 1 : 0));
    const Json pieces =
        served.post("/tokenize", str(R"({"content": )", json_quote(text), R"(, "with_pieces": true})"))
            .json();
    CHECK(pieces.get_array("tokens").at(0).get_string("piece") ==
          served.model().tokenizer().token_bytes(ids[0]));
    std::string list;
    for (const int32_t id : ids) list += str(list.empty() ? "" : ", ", id);
    CHECK(served.post("/detokenize", str(R"({"tokens": [)", list, "]}")).json().get_string("content") ==
          text);
    CHECK(served.post("/detokenize", R"({"tokens": [-1]})").error("param") == "tokens");
    CHECK(served.post("/tokenize", R"({"content": "a", "prompt": "b"})").status == 400);
    CHECK(served.post("/tokenize", "{}").status == 400);
}

TEST_CASE("serve: Cohere's chat, whole and streamed, its citations in the answer's own words") {
    const Served served;
    const std::string documents = str(R"("documents": [{"id": "cape", "data": {"title": "Cape", "snippet": )",
                                      json_quote(kText), "}}]");
    const std::string expected =
        answer_of(served.post("/v1/chat/completions", asked(documents + R"(, "expand_fraction": 1)")));
    const HttpReply whole = served.post("/v2/chat", asked(documents + R"(, "expand_fraction": 1)"));
    CAPTURE(whole.body);
    REQUIRE(whole.status == 200);
    const Json message = whole.json().get_object("message");
    CHECK(message.get_array("content").at(0).get_string("text") == expected);
    const std::string finish = whole.json().get_string("finish_reason");
    CHECK((finish == "COMPLETE" || finish == "MAX_TOKENS"));
    CHECK(whole.json().get_object("usage").get_object("tokens").get_int("output_tokens") > 0);
    size_t n_citations = 0;
    if (const auto citations = message.find("citations")) {
        n_citations = citations->size();
        for (size_t i = 0; i < n_citations; ++i) {
            const Json citation = citations->at(i);
            CHECK(contains(expected, citation.get_string("text")));
            CHECK(citation.get_array("sources").at(0).get_string("id") == "cape");
            CHECK(citation.get_array("sources").at(0).get_object("document").get_string("snippet") == kText);
        }
    }
    const HttpReply stream =
        served.post("/v2/chat", asked(documents + R"(, "expand_fraction": 1, "stream": true)"));
    std::vector<std::string> types;
    std::string text;
    for (const std::string& event : events_of(stream.body)) {
        if (event == "[DONE]") continue;
        const Json json = Json::parse(event, "event");
        types.push_back(json.get_string("type"));
        if (types.back() == "content-delta")
            text += json.get_object("delta").get_object("message").get_object("content").get_string("text");
    }
    CHECK(text == expected);
    REQUIRE(types.size() >= 4);
    CHECK(types[0] == "message-start");
    CHECK(types[1] == "content-start");
    CHECK(types.back() == "message-end");
    CHECK(std::count(types.begin(), types.end(), "content-end") == 1);
    CHECK(static_cast<size_t>(std::count(types.begin(), types.end(), "citation-start")) == n_citations);
    CHECK(stream.body.ends_with("data: [DONE]\n\n"));
    CHECK_FALSE(served
                    .post("/v2/chat",
                          asked(documents + R"(, "expand_fraction": 1, "citation_options": {"mode": "OFF"})"))
                    .json()
                    .get_object("message")
                    .has("citations"));
    // Log-probabilities come with the text that they are of.
    std::vector<double> values[2];
    const Json list = served.post("/v2/chat", asked(R"("logprobs": true)")).json().get_array("logprobs");
    for (size_t i = 0; i < list.size(); ++i)
        values[0].push_back(list.at(i).get_array("logprobs").at(0).as_number());
    for (const std::string& event :
         events_of(served.post("/v2/chat", asked(R"("logprobs": true, "stream": true)")).body)) {
        if (event == "[DONE]") continue;
        const Json json = Json::parse(event, "event");
        if (const auto item = json.find("logprobs"))
            for (size_t i = 0; i < item->get_array("logprobs").size(); ++i)
                values[1].push_back(item->get_array("logprobs").at(i).as_number());
    }
    CHECK(values[0].size() > 0);
    CHECK(values[0] == values[1]);
    // An error is where Cohere's clients look for it, too.
    const HttpReply bad = served.post("/v2/chat", R"({"messages": []})");
    CHECK(bad.status == 400);
    CHECK(bad.json().get_string("message") == bad.message());
    CHECK(served.post("/v2/chat", asked(R"("p": 2)")).error("param") == "p");
    CHECK(
        served.post("/v2/chat", asked(R"("k": 5, "p": 0.9, "stop_sequences": ["x"], "safety_mode": "NONE")"))
            .status == 200);
}

TEST_CASE("serve: a store answers where there is one") {
    const Served without;
    CHECK(contains(without.post("/v1/chat/completions", asked(R"("store": {"top": 3})")).message(),
                   "started without --store"));
    ServedOptions options;
    StoreQuery last;
    const Model* model = nullptr;
    options.find = [&](const StoreQuery& query) {
        last = query;
        return std::vector<FoundPassage>{
            {"d7", "Cape", kText, std::make_shared<SharedPassage>(*model, "Cape\n" + kText)}};
    };
    const Served served(std::move(options));
    model = &served.model();
    const HttpReply reply =
        served.post("/v1/chat/completions", asked(R"("store": {"top": 3, "where": ["lang=en"]})"));
    CHECK(answer_of(reply) == answer_of(served.post("/v1/chat/completions",
                                                    asked(str(R"("documents": [{"title": "Cape", "text": )",
                                                              json_quote(kText), "}]")))));
    CHECK(last.query == "Who keeps the lighthouse?");
    CHECK(last.top == 3);
    CHECK(last.where == std::vector<std::string>{"lang=en"});
    CHECK(reply.json().get_object("refrag").get_array("documents").at(0).get_string("id") == "d7");
    served.post("/v1/chat/completions", asked(R"("store": {"query": "lighthouse keeper"})"));
    CHECK(last.query == "lighthouse keeper");
    CHECK(served.post("/v1/chat/completions", asked(R"("store": {"tops": 3})")).error("param") == "store");
}
