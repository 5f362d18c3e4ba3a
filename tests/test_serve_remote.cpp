// The server over a decoder elsewhere: the same answers, and a status of its own where it is gone.
#include <algorithm>

#include "cli_test.h"
#include "golden.h"
#include "remote/vllm_decoder.h"
#include "remote_test.h"
#include "serve_test.h"
#include "server_process.h"

using namespace refrag;
using namespace refrag_test;

namespace {

ServedOptions served_by(const RemoteServer& server) {
    ServedOptions options;
    options.decoder = std::make_shared<VllmDecoder>(VllmOptions{.url = server.url()});
    options.scheduler.engine.n_slots = 2;
    return options;
}

const Model& decoder_there() {
    static const Model model(cpu().device(), "weights_tools/refrag-nano");
    return model;
}

const std::string kQuestion =
    R"("messages": [{"role": "user", "content": "When was the mill built?"}], "max_tokens": 12, )"
    R"("documents": [{"title": "Mills", "text": "The mill on the Orla was built in 1742 by Anna Berg."}], )"
    R"("expand_fraction": 0)";

}  // namespace

TEST_CASE("serve: a decoder elsewhere answers as the one here") {
    const RemoteServer there(answer_as(decoder_there()));
    const Served remote(served_by(there));
    const Served local;
    const auto content = [](const HttpReply& reply) {
        REQUIRE(reply.status == 200);
        return reply.json().get_array("choices").at(0).get_object("message").get_string("content");
    };
    const std::string body = "{" + kQuestion + "}";
    CHECK(content(remote.post("/v1/chat/completions", body)) ==
          content(local.post("/v1/chat/completions", body)));
    const HttpReply stream = remote.post("/v1/chat/completions", "{" + kQuestion + R"(, "stream": true})");
    CHECK(stream.status == 200);
    std::string text;
    for (const std::string& event : events_of(stream.body)) {
        if (event == "[DONE]") continue;
        const Json choices = Json::parse(event, "event").get_array("choices");
        if (choices.size() > 0) text += choices.at(0).get_object("delta").get_string_or("content", "");
    }
    CHECK(text == content(local.post("/v1/chat/completions", body)));
    CHECK(events_of(stream.body).back() == "[DONE]");
    CHECK(remote.get("/v1/models").json().get_array("data").at(0).get_int("max_model_len") == 512);
    const HttpReply echoed =
        remote.post("/v1/completions", R"({"prompt": "Once", "echo": true, "logprobs": 1, "max_tokens": 1})");
    CHECK(echoed.status == 400);
    CHECK(contains(echoed.message(), "log-probabilities of the prompt"));
}

TEST_CASE("serve: a decoder elsewhere that is gone is a 502, one that breaks off an event") {
    std::atomic<bool> breaks = false;
    auto there =
        std::make_unique<RemoteServer>([&](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
            reply.begin();
            reply.token(decoder_there().tokenizer().encode_ids(" one")[0]);
            if (!breaks) reply.finish("stop");
        });
    const Served remote(served_by(*there));
    const std::string body = "{" + kQuestion + "}";
    const std::string streamed = "{" + kQuestion + R"(, "stream": true})";
    CHECK(remote.post("/v1/chat/completions", body).status == 200);
    breaks = true;
    const HttpReply broken = remote.post("/v1/chat/completions", body);
    CHECK(broken.status == 502);
    CHECK(broken.error("code") == "decoder_unavailable");
    CHECK(contains(broken.message(), "the answer broke off"));
    const HttpReply stream = remote.post("/v1/chat/completions", streamed);
    CHECK(stream.status == 200);
    const std::vector<std::string> events = events_of(stream.body);
    REQUIRE(events.size() >= 2);
    CHECK(events.back() == "[DONE]");
    CHECK(contains(events[events.size() - 2], "decoder_unavailable"));
    there.reset();
    for (const std::string& asked : {body, streamed}) {
        const HttpReply gone = remote.post("/v1/chat/completions", asked);
        CHECK(gone.status == 502);
        CHECK(gone.error("code") == "decoder_unavailable");
    }
    CHECK(remote.get("/health").status == 200);
}

TEST_CASE("serve: who leaves is told to the decoder elsewhere") {
    std::atomic<bool> left = false;
    const RemoteServer there([&](const RemoteServer::Asked&, const RemoteServer::Reply& reply) {
        reply.begin();
        reply.token(5);
        left = reply.left();
    });
    Served remote(served_by(there));
    {
        refrag_test::HttpClient client(remote.port());
        client.ask("POST", "/v1/chat/completions", "{" + kQuestion + R"(, "stream": true})");
        CHECK(client.read_until("data: "));
    }
    CHECK(Served::soon([&] { return left.load(); }));
    CHECK(Served::soon([&] { return remote.server().stats().n_pending == 0; }));
}

TEST_CASE("serve: a signal while the model is loaded ends it at once") {
    // It asks a decoder that never answers, and is loading until then.
    RemoteServer there([](const auto&, const auto&) {});
    there.models_status = 0;
    const TempDir dir;
    const std::string log = dir.write("log", "");
    const uint16_t port = RemoteServer([](const auto&, const auto&) {}).port();  // free a moment ago
    ServerProcess process;
    process.start({std::filesystem::absolute(binary()), "serve", "-m",
                   std::filesystem::absolute("weights_tools/refrag-nano"), "--port", std::to_string(port),
                   "--decoder-url", there.url()},
                  log);
    REQUIRE(becomes_true([&] { return http(port, "GET", "/health").status == 200; }));
    CHECK(http(port, "GET", "/ready").status == 503);
    CHECK(http(port, "GET", "/v1/models").status == 503);
    const auto begun = std::chrono::steady_clock::now();
    process.signal(SIGTERM);
    CHECK(process.wait() == 0);
    CHECK(std::chrono::steady_clock::now() - begun < std::chrono::seconds(5));
    CHECK(contains(read_file(log, 1 << 20), "refrag: shutting down: the model was still being loaded"));
}
