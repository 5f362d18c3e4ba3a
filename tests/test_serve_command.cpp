// `refrag serve` as a process: options, what it says, signals.
#include "cli_test.h"
#include "serve_test.h"
#include "server_process.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// A process that serves; the port is the one that it says.
class ServeProcess {
  public:
    explicit ServeProcess(const TempDir& dir, std::vector<std::string> options = {})
        : log_(dir.write("log", "")) {
        std::vector<std::string> command = {std::filesystem::absolute(binary()),
                                            "serve",
                                            "-m",
                                            std::filesystem::absolute("weights_tools/refrag-nano"),
                                            "--port",
                                            "0"};
        command.insert(command.end(), options.begin(), options.end());
        process_.start(std::move(command), log_);
        becomes_true([&] { return contains(said(), "serving "); });
        const std::string text = said();
        const size_t at = text.find("http://127.0.0.1:");
        if (at != std::string::npos) port_ = static_cast<uint16_t>(std::stoi(text.substr(at + 17)));
    }
    std::string said() const { return read_file(log_, 1 << 20); }
    uint16_t port() const { return port_; }
    ServerProcess& process() { return process_; }

  private:
    std::string log_;
    ServerProcess process_;
    uint16_t port_ = 0;
};

const char* const kLong = R"({"prompt": "Once", "ignore_eos": true, "max_tokens": 1500, "stream": true})";

}  // namespace

TEST_CASE("serve: the command serves, says where, and ends with what is under way on SIGTERM") {
    const TempDir dir;
    ServeProcess served(dir, {"-np", "2", "--alias", "mine"});
    REQUIRE(served.port() != 0);
    CHECK(contains(served.said(), "refrag: serving mine on http://127.0.0.1:"));
    CHECK(http(served.port(), "GET", "/v1/models").json().get_array("data").at(0).get_string("id") == "mine");
    HttpClient client(served.port());
    REQUIRE(client.ask("POST", "/v1/completions", kLong));
    REQUIRE(client.read_until("data: "));
    served.process().signal(SIGTERM);
    const HttpReply reply = client.reply();
    CHECK(reply.whole);
    CHECK(reply.body.ends_with("data: [DONE]\n\n"));
    CHECK(served.process().wait() == 0);
    CHECK(contains(served.said(), "refrag: shutting down"));
}

TEST_CASE("serve: a second signal ends it at once") {
    const TempDir dir;
    ServeProcess served(dir, {"-np", "1"});
    REQUIRE(served.port() != 0);
    HttpClient first(served.port()), second(served.port());
    REQUIRE(first.ask("POST", "/v1/completions", kLong));
    REQUIRE(first.read_until("data: "));
    REQUIRE(second.ask("POST", "/v1/completions", kLong));
    served.process().signal(SIGINT);
    REQUIRE(becomes_true([&] { return contains(served.said(), "shutting down"); }));
    served.process().signal(SIGINT);
    CHECK(served.process().wait() == 0);
    CHECK(second.closed());
}

TEST_CASE("serve: what cannot be served is refused in one line") {
    const TempDir dir;
    dir.write("empty", "# no keys\n\n");
    const auto refused = [&](const std::string& arguments, int code, const std::string& message) {
        const Ran ran = refrag_run(dir, "serve -m weights_tools/refrag-nano " + arguments);
        CAPTURE(arguments);
        CHECK(ran.code == code);
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, message));
    };
    refused("--port 70000", 2, "--port");
    refused("--api-key-file " + dir.file("empty"), 3, "expected an API key on each line, found none");
    refused("--api-key-file " + dir.file("none"), 3, "none");
    refused("--api-key ''", 2, "--api-key: expected a key");
    refused("--store " + dir.file("no.db"), 3, "no.db");
    refused("-p 2", 2, "expand-fraction");
    refused("--step-ms 0", 2, "--step-ms");
    refused("--host nowhere.invalid", 2, "--host nowhere.invalid");
    const Served taken;
    refused("--port " + std::to_string(taken.port()), 1, "cannot listen on 127.0.0.1:");
}

TEST_CASE("serve: keys come from a file, a store answers, and an open address without a key is warned of") {
    const TempDir dir;
    dir.write("keys", "alpha\n# a note\nbeta  \r\n");
    dir.write(
        "docs.jsonl",
        R"({"id": "cape", "title": "Cape", "text": "The lighthouse of Ardmore is kept by Maria Ferreira."})");
    REQUIRE(refrag_run(dir, "index " + dir.file("store.db") + " " + dir.file("docs.jsonl") +
                                " -m weights_tools/refrag-nano")
                .code == 0);
    ServeProcess served(dir, {"--api-key-file", dir.file("keys"), "--store", dir.file("store.db")});
    REQUIRE(served.port() != 0);
    const std::string body =
        R"({"messages": [{"role": "user", "content": "Who keeps the lighthouse?"}], "max_tokens": 5, "store": {"top": 1}})";
    CHECK(http(served.port(), "POST", "/v1/chat/completions", body).status == 401);
    for (const char* key : {"alpha", "beta"}) {
        const HttpReply reply =
            http(served.port(), "POST", "/v1/chat/completions", body,
                 str("Content-Type: application/json\r\nAuthorization: Bearer ", key, "\r\n"));
        CAPTURE(reply.body);
        REQUIRE(reply.status == 200);
        const Json refrag = reply.json().get_object("refrag");
        CHECK(refrag.get_array("documents").at(0).get_string("id") == "cape");
        CHECK(refrag.get_int("cached") == refrag.get_int("chunks"));  // the store's embeddings went in
    }
    const TempDir other;
    ServeProcess open(other, {"--host", "0.0.0.0"});
    CHECK(contains(open.said(), "refrag: warning: listening on 0.0.0.0 without an API key"));
}
