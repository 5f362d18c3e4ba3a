// A decoder elsewhere: what is sent to it, what becomes of its answer, and of one that does not come.
#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "cli_test.h"
#include "golden.h"
#include "refrag/prompt_work.h"
#include "refrag/remote_generator.h"
#include "refrag/session.h"
#include "remote/tensor_file.h"
#include "remote/vllm_decoder.h"
#include "remote_test.h"
#include "safetensors_edit.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string nano = "weights_tools/refrag-nano";

const Model& local_model() {
    static const Model model(cpu().device(), repo_path(nano));
    return model;
}

std::shared_ptr<const RemoteDecoder> decoder_at(const RemoteServer& server, VllmOptions options = {}) {
    options.url = server.url();
    return std::make_shared<VllmDecoder>(std::move(options));
}

std::unique_ptr<Model> remote_model(const RemoteServer& server, VllmOptions options = {}) {
    return std::make_unique<Model>(cpu().device(), repo_path(nano), LoadProgress{}, WeightFormat::as_stored,
                                   ChatOptions{}, std::vector<std::string>{},
                                   decoder_at(server, std::move(options)));
}

std::vector<Passage> passages() {
    return {{"1", "Mills", "The mill on the Orla was built in 1742 by a farmer called Anna Berg."},
            {"2", "Bridges", "The old bridge at Halden has seven arches and is made of red stone."},
            {"3", "Towns", "Halden is a town of two thousand people. Its market is held every Friday."}};
}

Answer ask(const Model& model, const std::string& question, const AnswerOptions& options) {
    Session session(model, 512);
    return session.answer(passages(), question, options);
}

AnswerOptions options_of(double p, int32_t n = 24) {
    AnswerOptions options;
    options.expand_fraction = p;
    options.max_new_tokens = n;
    return options;
}

// A model's first answer from a server that says this and no more.
std::string error_from(const RemoteServer::Handler& handler) {
    const RemoteServer server(handler);
    const auto model = remote_model(server);
    try {
        ask(*model, "Who?", options_of(0.0));
    } catch (const Error& error) {
        CHECK(error.status() == Status::unavailable);
        return error.message();
    }
    return "(no error)";
}

}  // namespace

TEST_CASE("remote: a tensor's file is the archive that torch.load reads") {
    const std::vector<uint16_t> rows = {0x3f80, 0x4000, 0x4040, 0xbf80, 0x0000, 0x7f80};
    const std::vector<ZipMember> members = zip_members(bf16_tensor_file(rows, 2, 3));
    REQUIRE(members.size() == 4);
    CHECK(members[0].name == "archive/data.pkl");
    const std::string pickle =
        std::string("\x80\x02") + "ctorch._utils\n_rebuild_tensor_v2\n((X" + std::string("\7\0\0\0", 4) +
        "storagectorch\nBFloat16Storage\nX" + std::string("\1\0\0\0", 4) + "0X" + std::string("\3\0\0\0", 4) +
        "cpuK\6tQK" + std::string("\0", 1) + "K\2K\3\x86K\3K\1\x86\x89" + "ccollections\nOrderedDict\n)RtR.";
    CHECK(members[0].bytes == pickle);
    CHECK(members[1].name == "archive/byteorder");
    CHECK(members[1].bytes == "little");
    CHECK(members[1].crc == 0x19e33d85u);  // of "little", by zlib
    CHECK(members[2].name == "archive/data/0");
    CHECK(members[2].bytes == std::string("\x80\x3f\0\x40\x40\x40\x80\xbf\0\0\x80\x7f", 12));
    CHECK(members[2].at % 64 == 0);
    CHECK(members[3].bytes == "3\n");
    // Sizes beyond a byte and beyond two.
    const std::vector<uint16_t> more(size_t{300} * 700);
    const std::string large = zip_members(bf16_tensor_file(more, 300, 700))[0].bytes;
    CHECK(contains(large, "J" + std::string("\x50\x34\x03\0", 4)));
    CHECK(contains(large, "J" + std::string("\x2c\1\0\0", 4) + "J" + std::string("\xbc\2\0\0", 4)));
}

TEST_CASE("remote: base64") {
    const auto encoded = [](std::string_view bytes) {
        std::string out = ">";
        add_base64(out, bytes);
        CHECK(out.size() - 1 == base64_bytes(bytes.size()));
        return out;
    };
    CHECK(encoded("") == ">");
    CHECK(encoded("f") == ">Zg==");
    CHECK(encoded("fo") == ">Zm8=");
    CHECK(encoded("foo") == ">Zm9v");
    CHECK(encoded("foobar") == ">Zm9vYmFy");
    CHECK(encoded("\xff\xfe\xfd") == ">//79");
}

TEST_CASE(
    "remote: a decoder elsewhere answers as the one here, from what is compressed, mixed and expanded") {
    const RemoteServer server(answer_as(local_model()));
    const auto model = remote_model(server);
    CHECK(model->window() == 512);
    CHECK_FALSE(check_remote_decoder(*model));
    for (const double p : {0.0, 0.3, 1.0}) {
        CAPTURE(p);
        std::string streamed;
        Session session(*model, 512);
        const Answer there =
            session.answer(passages(), "Who built the mill?", options_of(p), [&](std::string_view piece) {
                streamed += piece;
                return true;
            });
        const Answer here = ask(local_model(), "Who built the mill?", options_of(p));
        CHECK(there.text == here.text);
        CHECK(there.ids == here.ids);
        CHECK(there.finish == here.finish);
        CHECK(there.positions == here.positions);
        CHECK(there.n_expanded == here.n_expanded);
        CHECK(streamed == there.text);
        CHECK(there.ttft_ms > 0.0);
        const RemoteServer::Asked last = server.asked().back();
        CHECK(last.path == "/v1/completions");
        CHECK(last.json().get_string("model") == "remote");
        CHECK(last.json().has("prompt_embeds") == (p < 1.0));
        CHECK(last.json().has("prompt") == (p == 1.0));
        if (p < 1.0) {
            const auto dim = static_cast<size_t>(local_model().decoder().config().dim);
            CHECK(last.rows().size() == there.positions * dim);
        }
    }
}

TEST_CASE("remote: the rows are the decoder's own input, rounded to BF16") {
    const RemoteServer server([](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.finish("stop");
    });
    const auto model = remote_model(server);
    const AnswerOptions options = options_of(0.3);
    const Answer answer = ask(*model, "Who built the mill?", options);
    CHECK(answer.text.empty());
    CHECK(answer.finish == FinishReason::end_token);
    // The same input, made here.
    const auto backend = cpu().device().make_backend();
    Arena arena(*backend);
    PassageCache cache;
    Answer story;
    const Prompt prompt = make_prompt(
        *backend, local_model(),
        make_segments(local_model(), {}, share_passages(local_model(), passages(), cache, options.chunk_len),
                      "Who built the mill?", options.chunk_len),
        options, 512, arena, story);
    const int64_t dim = local_model().decoder().config().dim;
    const auto n_chunk_rows = static_cast<int64_t>(prompt.row_keys.size());
    const Tensor rows = local_model().decoder().embed(
        *backend, prompt.input.source, {prompt.chunk_rows.data(), DType::f32, n_chunk_rows, dim}, arena);
    std::vector<float> wanted(static_cast<size_t>(rows.rows * dim));
    backend->download(wanted.data(), rows.data, rows.bytes());
    const std::vector<float> sent = server.asked().back().rows();
    REQUIRE(sent.size() == wanted.size());
    CHECK(std::equal(sent.begin(), sent.end(), wanted.begin(),
                     [](float a, float b) { return a == bf16_to_f32(f32_to_bf16(b)); }));
    CHECK(std::count_if(prompt.input.source.begin(), prompt.input.source.end(),
                        [](int32_t row) { return row < 0; }) > 3);
}

TEST_CASE("remote: what is asked of sampling is said there") {
    const RemoteServer server([](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.finish("stop");
    });
    const auto model = remote_model(server);
    AnswerOptions options = options_of(0.0, 7);
    options.sampler = {.temperature = 0.5f,
                       .top_k = 40,
                       .top_p = 0.75f,
                       .min_p = 0.125f,
                       .presence_penalty = 0.25f,
                       .frequency_penalty = -0.5f,
                       .seed = 11};
    ask(*model, "Who?", options);
    const std::string body = server.asked().back().body;
    CHECK(contains(
        body, R"({"model": "remote", "max_tokens": 7, "temperature": 0.5, "top_p": 0.75, "top_k": 40, )"
              R"("min_p": 0.125, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": 11, )"
              R"("ignore_eos": false, "stop_token_ids": [2], "stream": true, "return_token_ids": true)"));
    options.ignore_eos = true;
    options.max_new_tokens = -1;
    const Answer answer = ask(*model, "Who?", options);
    const Json json = server.asked().back().json();
    CHECK(json.get_bool("ignore_eos"));
    CHECK(json.get_int("max_tokens") == 512 - static_cast<int64_t>(answer.positions));
    for (const int32_t id : model->end_ids())
        CHECK(json.get_object("logit_bias").get_int(std::to_string(id)) == -100);
    CHECK_FALSE(json.has("stop_token_ids"));
}

TEST_CASE("remote: log-probabilities come back") {
    const RemoteServer server(answer_as(local_model()));
    const auto model = remote_model(server);
    AnswerOptions options = options_of(1.0, 6);
    options.logprobs = 3;
    options.ignore_eos = true;
    const Answer there = ask(*model, "Who built the mill?", options);
    const Answer here = ask(local_model(), "Who built the mill?", options);
    REQUIRE(there.ids == here.ids);
    REQUIRE(there.logprobs.size() == 6);
    for (size_t i = 0; i < 6; ++i) {
        CHECK(there.logprobs[i].chosen.id == here.logprobs[i].chosen.id);
        CHECK(std::abs(there.logprobs[i].chosen.logprob - here.logprobs[i].chosen.logprob) < 1e-5);
        REQUIRE(there.logprobs[i].top.size() == 3);
        for (size_t t = 0; t < 3; ++t) CHECK(there.logprobs[i].top[t].id == here.logprobs[i].top[t].id);
    }
}

TEST_CASE("remote: stop strings, limits and ends") {
    const std::vector<int32_t> said = local_model().tokenizer().encode_ids(" one two three four");
    std::atomic<int> n_left = 0;
    const RemoteServer server([&](const RemoteServer::Asked& asked, const RemoteServer::Reply& reply) {
        reply.begin();
        const auto n = std::min<size_t>(static_cast<size_t>(asked.json().get_int("max_tokens")), said.size());
        for (size_t i = 0; i < n; ++i) reply.token(said[i]);
        if (n < said.size()) {
            reply.finish("length");
        } else if (reply.left()) {
            ++n_left;  // the answer was over before we said so
        }
    });
    const auto model = remote_model(server);
    AnswerOptions options = options_of(0.0, 50);
    options.stop = {" three"};
    const Answer stopped = ask(*model, "Count.", options);
    CHECK(stopped.text == "one two");
    CHECK(stopped.finish == FinishReason::stop_string);
    CHECK(stopped.stop == " three");
    const Answer limited = ask(*model, "Count.", options_of(0.0, 2));
    CHECK(limited.finish == FinishReason::max_tokens);
    CHECK(limited.ids == std::vector<int32_t>(said.begin(), said.begin() + 2));
    // A context that is full.
    Session session(*model, static_cast<int64_t>(limited.positions) + 1);
    const Answer full = session.answer(passages(), "Count.", options_of(0.0, 50));
    CHECK(full.finish == FinishReason::context_full);
    CHECK(full.ids.size() == 1);
    // A reader who has enough.
    const Answer cancelled =
        Session(*model, 512).answer(passages(), "Count.", options_of(0.0, 50), [](std::string_view) {
            return false;
        });
    CHECK(cancelled.finish == FinishReason::cancelled);
    for (int i = 0; i < 200 && n_left < 2; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(n_left == 2);
    const Answer nothing = ask(*model, "Count.", options_of(0.0, 0));
    CHECK(nothing.text.empty());
}

TEST_CASE("remote: a server that fails is told of, with what it said") {
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.whole(400, R"({"error":{"message":"You must set `--enable-prompt-embeds`"}})");
                   }),
                   "HTTP 400: You must set `--enable-prompt-embeds`"));
    CHECK(contains(error_from([](const auto&, const auto& reply) { reply.whole(503, "busy\nnow"); }),
                   "HTTP 503: busy"));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.token(5);
                   }),
                   "the answer broke off: the connection was closed"));
    CHECK(contains(error_from([](const auto&, const auto&) {}), "no answer: "));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.token(5);
                       reply.event(R"({"error":{"message":"engine died"}})");
                   }),
                   "engine died"));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.finish("abort");
                   }),
                   "given up: finish_reason \"abort\""));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.event(R"({"choices":[{"index":0,"text":"hi","finish_reason":null}]})");
                   }),
                   "expected vLLM 0.10.2"));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.event("{\"choices\":");
                   }),
                   "event: "));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.event("[DONE]");
                   }),
                   "without a finish_reason"));
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.token(-4);
                   }),
                   "token_ids"));
    // An id that is none of the vocabulary is no crash.
    CHECK(contains(error_from([](const auto&, const auto& reply) {
                       reply.begin();
                       reply.token(2000000000);
                   }),
                   "2000000000"));
}

TEST_CASE("remote: a server that falls silent is given up") {
    const RemoteServer server([](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.token(5);
        reply.left();
    });
    VllmOptions options;
    options.silent_seconds = 1.0;
    const auto model = remote_model(server, options);
    const std::string error = error_of([&] { ask(*model, "Who?", options_of(0.0)); });
    CHECK(contains(error, "the answer broke off: "));
}

TEST_CASE("remote: the models of a server") {
    const auto refused = [](const std::string& models, int status, const std::string& name,
                            Status expected) -> std::string {
        RemoteServer server([](const auto&, const auto&) {});
        server.models = models;
        server.models_status = status;
        try {
            VllmOptions options;
            options.url = server.url() + "//";
            options.model = name;
            const VllmDecoder decoder(options);
            return decoder.name() + " " + std::to_string(decoder.max_context());
        } catch (const Error& error) {
            CHECK(error.status() == expected);
            return error.message();
        }
    };
    const std::string two = R"({"data":[{"id":"a","max_model_len":7},{"id":"b","max_model_len":9}]})";
    CHECK(contains(refused(two, 200, "b", Status::usage), "b at http://127.0.0.1:"));
    CHECK(contains(refused(two, 200, "b", Status::usage), "/v1 9"));
    CHECK(contains(refused(two, 200, "", Status::usage), "by --decoder-model, found a, b"));
    CHECK(contains(refused(two, 200, "c", Status::usage), "expected a model named c, found a, b"));
    CHECK(contains(refused(R"({"data":[]})", 200, "", Status::usage), "found none"));
    CHECK(contains(refused(R"({"data":[{"id":"a"}]})", 200, "", Status::unavailable), "max_model_len"));
    CHECK(contains(refused("<html>", 200, "", Status::unavailable), "/v1/models: "));
    CHECK(contains(refused(R"({"error":"Unauthorized"})", 401, "", Status::unavailable),
                   "HTTP 401: Unauthorized"));
    CHECK(contains(error_of([] { VllmDecoder({.url = "ftp://x/v1"}); }), "expected http://HOST:PORT/PATH"));
    CHECK(contains(error_of([] { VllmDecoder({.url = "localhost"}); }), "expected http://HOST:PORT/PATH"));
    // Nobody listens on a port that was just free.
    const std::string url = RemoteServer([](const auto&, const auto&) {}).url();
    CHECK(contains(error_of([&] { VllmDecoder({.url = url}); }), url + "/models: "));
}

TEST_CASE("remote: the key is sent") {
    const RemoteServer server([](const auto&, const auto& reply) {
        reply.begin();
        reply.finish("stop");
    });
    VllmOptions options;
    options.key = "secret";
    const auto model = remote_model(server, options);
    ask(*model, "Who?", options_of(0.0));
    for (const RemoteServer::Asked& asked : server.asked())
        CHECK(contains(asked.head, "\r\nAuthorization: Bearer secret\r\n"));
    CHECK(server.asked().size() == 2);
}

TEST_CASE("remote: what cannot be done there is refused") {
    RemoteServer server(answer_as(local_model()));
    const auto model = remote_model(server);
    const auto refused = [&](const std::function<void(AnswerOptions&)>& set) {
        AnswerOptions options = options_of(0.3);
        set(options);
        return error_of([&] { ask(*model, "Who?", options); });
    };
    CHECK(contains(refused([](AnswerOptions& o) { o.policy = SelectPolicy::perplexity_asc; }),
                   "--policy perplexity-asc and -desc: the decoder runs elsewhere (remote at http://127"));
    CHECK(contains(refused([](AnswerOptions& o) { o.prompt_logprobs = 0; }),
                   "log-probabilities of the prompt"));
    CHECK(
        contains(refused([](AnswerOptions& o) { o.sampler.repetition_penalty = 1.1f; }), "--repeat-penalty"));
    CHECK(contains(refused([](AnswerOptions& o) {
                       o.sampler.presence_penalty = 0.5f;
                       o.sampler.repeat_last_n = 64;
                   }),
                   "--repeat-last-n"));
    CHECK(refused([](AnswerOptions& o) { o.policy = SelectPolicy::bm25; }) == "(no error)");
    const std::vector<Segment> scored = {TokenSegment{.ids = {5, 6, 7}, .score = false},
                                         TokenSegment{.ids = {8}, .score = true}};
    CHECK(contains(error_of([&] { Session(*model, 512).answer(scored, options_of(0.0)); }),
                   "not with a decoder that runs elsewhere"));
    // A prompt beyond what may be sent, with both sizes.
    VllmOptions small;
    small.max_body_bytes = 1000;
    const auto narrow = remote_model(server, small);
    const std::string error = error_of([&] { ask(*narrow, "Who?", options_of(0.0)); });
    CHECK(contains(error, " bytes as vectors, more than the 1000 of --decoder-max-body"));
    CHECK(contains(error_of([&] {
                       const Model with_adapter(cpu().device(), repo_path(nano), {}, WeightFormat::as_stored,
                                                {}, {"some/adapter"}, decoder_at(server));
                   }),
                   "some/adapter: an adapter of the decoder, which is remote at http://"));
    // The window is the smaller one.
    CHECK(contains(error_of([&] { const Session session(*model, 513); }), "expected at most 512 positions"));
    server.models = R"({"data":[{"id":"remote","max_model_len":100000}]})";
    CHECK(remote_model(server)->window() == local_model().decoder().config().max_seq_len);
}

TEST_CASE("remote: another decoder than the model's is noticed") {
    // It answers ids as it should, and vectors with something else.
    const RemoteServer server([](const RemoteServer::Asked& asked, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.token(asked.json().has("prompt") ? 5 : 6);
        reply.finish("length");
    });
    const auto model = remote_model(server);
    const auto doubt = check_remote_decoder(*model);
    REQUIRE(doubt);
    CHECK(contains(*doubt, "is it the decoder of this model?"));
    const RemoteServer refusing([](const RemoteServer::Asked& asked, const RemoteServer::Reply& reply) {
        if (asked.json().has("prompt_embeds")) {
            reply.whole(400, R"({"error":{"message":"hidden_size 64 does not match"}})");
        } else {
            reply.begin();
            reply.token(5);
            reply.finish("length");
        }
    });
    const auto other = remote_model(refusing);
    CHECK(contains(error_of([&] { check_remote_decoder(*other); }), "HTTP 400: hidden_size 64"));
}

TEST_CASE("remote: of the decoder's weights only the embeddings are needed") {
    const RemoteServer server(answer_as(local_model()));
    const TempDir dir;
    std::filesystem::copy(repo_path(nano), dir.file("model"), std::filesystem::copy_options::recursive);
    std::vector<TestTensor> tensors = read_tensors(dir.file("model/decoder"));
    std::erase_if(tensors, [](const TestTensor& one) { return one.name != "model.embed_tokens.weight"; });
    REQUIRE(tensors.size() == 1);
    for (const auto& entry : std::filesystem::directory_iterator(dir.file("model/decoder")))
        if (contains(entry.path().string(), ".safetensors")) std::filesystem::remove(entry.path());
    write_tensors(dir.file("model/decoder/model.safetensors"), tensors);
    CHECK(error_of([&] { const Model model(cpu().device(), dir.file("model")); }) ==
          dir.file("model/decoder") +
              ": tensor \"layers.0.input_layernorm.weight\" is missing, expected shape [384]");
    const Model model(cpu().device(), dir.file("model"), {}, WeightFormat::as_stored, {}, {},
                      decoder_at(server));
    CHECK(ask(model, "Who built the mill?", options_of(0.0)).text ==
          ask(local_model(), "Who built the mill?", options_of(0.0)).text);
    CHECK(model.decoder().weight_bytes() < local_model().decoder().weight_bytes() / 2);
}

TEST_CASE("remote: many at once, a server that goes away and comes back") {
    auto server = std::make_unique<RemoteServer>(answer_as(local_model()));
    const auto model = remote_model(*server);
    Engine engine(*model, {.n_slots = 4, .max_context = 512});
    PassageCache cache;
    const std::vector<std::string> questions = {"Who built the mill?", "How many arches?",
                                                "When is the market?", "Who lives there?",
                                                "What is red?",        "Where is Halden?"};
    const auto submit = [&](const std::string& question) {
        Request request;
        request.options = options_of(0.3, 12);
        request.segments =
            make_segments(*model, {}, share_passages(*model, passages(), cache, 0), question, 0);
        return engine.submit(std::move(request));
    };
    const auto run = [&] {
        while (!engine.idle()) engine.step();
        return engine.take_finished();
    };
    for (const std::string& question : questions) submit(question);
    std::vector<Result> results = run();
    REQUIRE(results.size() == questions.size());
    for (const Result& result : results) {
        CHECK_FALSE(result.error);
        CHECK(result.answer.text ==
              ask(local_model(), questions[static_cast<size_t>(result.id)], options_of(0.3, 12)).text);
    }
    CHECK(engine.stats().prompts == 6);
    CHECK(engine.stats().kv_blocks == 0);

    const uint16_t port = server->port();
    server.reset();
    submit(questions[0]);
    submit(questions[1]);
    results = run();
    REQUIRE(results.size() == 2);
    for (const Result& result : results) {
        REQUIRE(result.error);
        CHECK(result.error->status() == Status::unavailable);
        CHECK(contains(result.error->message(), "no answer: "));
    }
    server = std::make_unique<RemoteServer>(answer_as(local_model()), port);
    submit(questions[2]);
    results = run();
    REQUIRE(results.size() == 1);
    CHECK_FALSE(results[0].error);
    CHECK(results[0].answer.text == ask(local_model(), questions[2], options_of(0.3, 12)).text);
}

TEST_CASE("remote: a request that is cancelled, or late, leaves at once") {
    std::atomic<int> n_left = 0;
    const RemoteServer server([&](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.token(5);
        if (reply.left()) ++n_left;
    });
    const auto model = remote_model(server);
    Engine engine(*model, {.n_slots = 2, .max_context = 512});
    Request request;
    request.options = options_of(0.0);
    request.segments = {
        TokenSegment{.ids = {5, 6, 7}},
        VectorSegment{std::vector<float>(static_cast<size_t>(model->decoder().config().dim))}};
    Request late = request;
    late.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
    const uint64_t id = engine.submit(std::move(request));
    engine.submit(std::move(late));
    while (engine.n_generating() < 2) engine.step();
    engine.cancel(id);
    CHECK(engine.n_running() == 1);
    while (!engine.idle()) engine.step();
    const std::vector<Result> results = engine.take_finished();
    REQUIRE(results.size() == 1);
    CHECK(results[0].answer.finish == FinishReason::deadline);
    CHECK(results[0].answer.ids == std::vector<int32_t>{5});
    for (int i = 0; i < 500 && n_left < 2; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(n_left == 2);
}

namespace {

// Answers every prompt with one token and an end; waiting for it fails where it is told to.
class FakeAnswers final : public RemoteAnswers {
  public:
    explicit FakeAnswers(int& n_failing) : n_failing_(n_failing) {}
    void start(uint64_t ticket, const RemotePrompt&) override { waiting_.push_back(ticket); }
    void stop(uint64_t ticket) noexcept override { std::erase(waiting_, ticket); }
    void wait(std::chrono::milliseconds) override {
        if (n_failing_ > 0 && n_failing_-- > 0) fail(Status::runtime, "no more sockets");
    }
    RemoteNews take(uint64_t) override { return {{{5, std::nullopt}}, true, true, std::nullopt}; }

  private:
    int& n_failing_;
    std::vector<uint64_t> waiting_;
};

class FakeDecoder final : public RemoteDecoder {
  public:
    std::string name() const override { return "fake"; }
    int64_t max_context() const override { return 512; }
    std::unique_ptr<RemoteAnswers> open() const override { return std::make_unique<FakeAnswers>(n_failing); }
    mutable int n_failing = 0;
};

}  // namespace

TEST_CASE("remote: a wait that fails ends the requests that wait, and no others") {
    const auto decoder = std::make_shared<FakeDecoder>();
    const Model model(cpu().device(), repo_path(nano), {}, WeightFormat::as_stored, {}, {}, decoder);
    Engine engine(model, {.n_slots = 2, .max_context = 512});
    const auto submit = [&] {
        Request request;
        request.options = options_of(0.0);
        request.segments = {TokenSegment{.ids = {5, 6, 7}}};
        engine.submit(std::move(request));
    };
    const auto errors = [&] {
        while (!engine.idle()) engine.step();
        std::vector<std::string> out;
        for (const Result& result : engine.take_finished())
            out.push_back(result.error ? result.error->message() : "(no error)");
        return out;
    };
    submit();
    submit();
    decoder->n_failing = 1;
    CHECK(errors() == std::vector<std::string>(2, "no more sockets"));
    submit();
    CHECK(errors() == std::vector<std::string>{"(no error)"});
}

TEST_CASE("remote: on the command line") {
    const RemoteServer server(answer_as(local_model()));
    const TempDir dir;
    const std::string file =
        dir.write("passages.jsonl", "{\"title\": \"Mills\", \"text\": \"The mill was built in 1742.\"}\n");
    const std::string key = dir.write("key", "# a comment\nsecret\n");
    const auto run = [&](const std::string& more) {
        return refrag_run(dir, "run -m " + repo_path(nano) + " --passages " + file +
                                   " -q 'When was the mill built?' -p 0 " + more);
    };
    const Ran here = run("");
    const Ran there = run("--decoder-url " + server.url() + " --decoder-key-file " + key);
    CHECK(there.code == 0);
    CHECK(there.out == here.out);
    CHECK(contains(there.err, "TTFT"));
    CHECK(contains(server.asked().back().head, "Bearer secret"));
    const Ran page = run("--decoder-url " + server.url() + " --explain " + dir.file("a.html"));
    CHECK(page.code == 2);
    CHECK(contains(page.err, "--explain: a page shows the decoder's attention"));
    CHECK(run("--decoder-url " + server.url() + " --explain " + dir.file("a.json")).code == 0);
    const Ran nobody = run("--decoder-url http://127.0.0.1:1/v1");
    CHECK(nobody.code == 1);
    CHECK(contains(nobody.err, "refrag: http://127.0.0.1:1/v1/models: "));
    CHECK(run("--decoder-url nonsense").code == 2);
    CHECK(run("--decoder-model x").code == 2);
}
