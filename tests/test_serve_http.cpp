// The server's transport: sockets, limits, keys, origins.
#include <sys/resource.h>

#include <fstream>
#include <set>
#include <thread>

#include "serve_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const char* const kChat =
    R"({"messages": [{"role": "user", "content": "Who lives here?"}], "max_tokens": 4})";

[[maybe_unused]] int64_t resident_kib() {
    std::ifstream status("/proc/self/status");
    std::string word;
    while (status >> word) {
        if (word != "VmRSS:") continue;
        int64_t kib = 0;
        status >> kib;
        return kib;
    }
    return 0;
}

}  // namespace

TEST_CASE(
    "serve: paths, methods and kinds of content that are not there have their own status and the one form") {
    const Served served;
    CHECK(served.get("/health").json().get_string("status") == "ok");
    CHECK(served.get("/ready").json().get_string("status") == "ready");
    const auto refused = [](const HttpReply& reply, int status, const std::string& message) {
        CAPTURE(reply.body);
        CHECK(reply.status == status);
        CHECK(reply.has_header("content-type: application/json"));
        CHECK(reply.message() == message);
        const Json error = reply.json().get_object("error");
        CHECK(error.get_string("type") == "invalid_request_error");
        CHECK(error.has("param"));
        CHECK(error.has("code"));
    };
    refused(served.get("/v1/nothing"), 404, "/v1/nothing: there is no such path");
    const HttpReply method = served.get("/v1/chat/completions");
    refused(method, 405, "/v1/chat/completions: expected POST, found GET");
    CHECK(method.has_header("allow: post"));
    refused(http(served.port(), "POST", "/v1/chat/completions", kChat, "Content-Type: text/plain\r\n"), 415,
            "Content-Type: expected application/json, found text/plain");
    refused(http(served.port(), "POST", "/v1/chat/completions", kChat, ""), 415,
            "Content-Type: expected application/json, found none");
    CHECK(http(served.port(), "POST", "/v1/chat/completions", kChat,
               "Content-Type: application/JSON; charset=utf-8\r\n")
              .status == 200);
    for (const char* bad : {"{", "[1]", "\"x\"", "{\"a\": 1, \"a\": 2}", "nonsense"}) {
        const HttpReply reply = served.post("/v1/chat/completions", bad);
        CAPTURE(bad);
        CHECK(reply.status == 400);
        CHECK(contains(reply.message(), "the body"));
    }
    CHECK(served.get("http://any.host/v1/models").status == 200);
    CHECK(served.get("/tokenizer_info").json().has("eos_token"));
    // A path that a zero byte would cut short, or that no JSON could name.
    for (const char* bad : {"/health%00x", "/v1/passages/a%00b", "/v1/passages/%FF"})
        CHECK(served.get(bad).status == 400);
    const std::string deep = std::string(1000000, '[') + std::string(1000000, ']');
    CHECK(contains(served.post("/v1/chat/completions", "{\"messages\": " + deep + "}").message(), "levels"));
    HttpReply head = http(served.port(), "HEAD", "/health", "", "");
    CHECK(head.status == 200);
    CHECK(head.body.empty());
    // One connection serves request after request.
    HttpClient client(served.port());
    for (int i = 0; i < 3; ++i) {
        REQUIRE(client.ask("GET", "/health"));
        CHECK(client.reply().status == 200);
        REQUIRE(client.ask("POST", "/v1/chat/completions", kChat));
        CHECK(client.reply().status == 200);
    }
    const HttpReply metrics = served.get("/metrics");
    CHECK(metrics.has_header("content-type: text/plain"));
    CHECK(contains(metrics.body,
                   "refrag_http_responses_total{route=\"/v1/chat/completions\",status=\"200\"} 4\n"));
    CHECK(contains(metrics.body, "refrag_http_responses_total{route=\"-\",status=\"405\"} 1\n"));
    // What the scheduler holds is told a moment later.
    CHECK(Served::soon(
        [&] { return contains(served.get("/metrics").body, "refrag_requests_finished_total 4\n"); }));
    CHECK(contains(metrics.body, "refrag_time_to_first_token_seconds_count 4\n"));
}

TEST_CASE("serve: the description has every path and method there is, and no other") {
    const Served served;
    const Json described = served.get("/openapi.json").json();
    CHECK(described.get_string("openapi") == "3.1.0");
    CHECK(described.get_object("info").get_string("version") == REFRAG_VERSION);
    std::set<std::string> expected;
    for (auto [method, path] : Api::paths()) {
        for (char& c : method) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
        expected.insert(method + " " + path);
    }
    std::set<std::string> found;
    const Json paths = described.get_object("paths");
    for (size_t i = 0; i < paths.size(); ++i) {
        std::string path(paths.key_at(i));
        path.erase(std::min(path.find('{'), path.size()));
        for (size_t m = 0; m < paths.at(i).size(); ++m) {
            const std::string method(paths.at(i).key_at(m));
            if (method != "parameters") found.insert(method + " " + path);
        }
    }
    CHECK(found == expected);
}

TEST_CASE("serve: keys are asked for everywhere but for health, readiness, the description and preflights") {
    ServedOptions options;
    options.api.api_keys = {"first-key", "second-key"};
    options.api.cors_origins = {"https://a.example"};
    const Served served(std::move(options));
    for (const char* open : {"/health", "/ready", "/openapi.json"})
        CHECK(http(served.port(), "GET", open, "", "").status == 200);
    const auto with = [&](const std::string& header) {
        return http(served.port(), "GET", "/v1/models", "", header);
    };
    for (const char* bad : {"", "Authorization: first-key\r\n", "Authorization: Bearer first-keyx\r\n",
                            "Authorization: Bearer first-ke\r\n", "Authorization: Bearer \r\n",
                            "Authorization: Basic first-key\r\n"}) {
        CAPTURE(bad);
        const HttpReply reply = with(bad);
        CHECK(reply.status == 401);
        CHECK(reply.error("code") == "invalid_api_key");
        CHECK(reply.has_header("www-authenticate: bearer"));
    }
    CHECK(with("Authorization: Bearer first-key\r\n").status == 200);
    CHECK(with("authorization: bearer second-key\r\n").status == 200);
    const HttpReply preflight =
        http(served.port(), "OPTIONS", "/v1/chat/completions", "", "Origin: https://a.example\r\n");
    CHECK(preflight.status == 204);
    CHECK(preflight.has_header("access-control-allow-origin: https://a.example"));
    CHECK(preflight.has_header("allow: post, options"));
    CHECK(http(served.port(), "OPTIONS", "/v1/nothing", "", "Origin: https://a.example\r\n").status == 404);
    CHECK(preflight.has_header("access-control-allow-headers: authorization, content-type"));
    CHECK_FALSE(preflight.has_header("access-control-allow-credentials"));
    const HttpReply other =
        http(served.port(), "OPTIONS", "/v1/chat/completions", "", "Origin: https://b.example\r\n");
    CHECK_FALSE(other.has_header("access-control-allow-origin"));
    // What is refused can be read by the page that was let in, too.
    CHECK(http(served.port(), "GET", "/v1/models", "", "Origin: https://a.example\r\n")
              .has_header("access-control-allow-origin"));
}

TEST_CASE("serve: any origin is let in without credentials, and none by default") {
    ServedOptions options;
    options.api.cors_origins = {"*"};
    const Served open(std::move(options));
    const HttpReply reply = http(open.port(), "GET", "/health", "", "Origin: https://b.example\r\n");
    CHECK(reply.has_header("access-control-allow-origin: *"));
    CHECK_FALSE(reply.has_header("access-control-allow-credentials"));
    const Served closed;
    CHECK_FALSE(http(closed.port(), "GET", "/health", "", "Origin: https://b.example\r\n")
                    .has_header("access-control"));
}

TEST_CASE("serve: a body over the cap is answered 413, keeps no memory, and the connection goes on") {
    ServedOptions options;
    options.http.max_body_bytes = size_t{1} << 20;
    const Served served(std::move(options));
    CHECK(served.post("/v1/chat/completions", kChat).status == 200);  // all that is made once is made
    [[maybe_unused]] const int64_t before = resident_kib();
    const std::string large(size_t{64} << 20, 'x');
    HttpClient client(served.port());
    REQUIRE(client.ask("POST", "/v1/chat/completions", large));
    const HttpReply reply = client.reply();
    CHECK(reply.status == 413);
    CHECK(reply.message() == "the body: expected at most 1048576 bytes, found 67108864");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which keep memory of their own
    CHECK(resident_kib() - before < 64 * 1024 + 2 * 1024 + 512);     // `large` itself, and twice the cap
#endif
    REQUIRE(client.ask("POST", "/v1/chat/completions", kChat));
    CHECK(client.reply().status == 200);
    // Chunked, without a length said before.
    HttpClient chunked(served.port());
    REQUIRE(
        chunked.send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
                     "application/json\r\nTransfer-Encoding: chunked\r\n\r\n"));
    const std::string part = "10000\r\n" + std::string(0x10000, 'y') + "\r\n";
    for (int i = 0; i < 40; ++i) REQUIRE(chunked.send(part));
    REQUIRE(chunked.send("0\r\n\r\n"));
    CHECK(chunked.reply().status == 413);
    // A header beyond all measure.
    CHECK(http(served.port(), "GET", "/health", "", "X-Long: " + std::string(100000, 'z') + "\r\n").status ==
          431);
    CHECK(served.get("/health").status == 200);
}

TEST_CASE("serve: a header or a body that never comes whole is cut off, however steadily it trickles") {
    ServedOptions options;
    options.http.head_time = std::chrono::milliseconds(300);
    options.http.body_time = std::chrono::milliseconds(300);
    const Served served(std::move(options));
    for (const char* start : {"", "GET /health HTTP/1.1\r\nHost: ",
                              "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
                              "application/json\r\nContent-Length: 1000\r\n\r\n"}) {
        CAPTURE(start);
        HttpClient client(served.port());
        REQUIRE(client.send(start));
        bool cut = false;
        for (int i = 0; i < 400 && !cut; ++i) {
            if (*start != '\0') client.send("a");
            cut = client.closed(20);
        }
        CHECK(cut);
    }
    CHECK(served.get("/health").status == 200);
}

TEST_CASE("serve: a thousand idle connections leave the others alone") {
    rlimit limit = {};
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    const rlimit before = limit;
    limit.rlim_cur = limit.rlim_max;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    if (limit.rlim_cur < 2200) {
        skip("fewer than 2200 files may be open");
        return;
    }
    {
        ServedOptions options;
        options.http.max_connections = 1100;
        const Served served(std::move(options));
        std::vector<std::unique_ptr<HttpClient>> idle;
        for (int i = 0; i < 1000; ++i) {
            idle.push_back(std::make_unique<HttpClient>(served.port()));
            REQUIRE(idle.back()->connected());
        }
        CHECK(Served::soon(
            [&] { return contains(served.get("/metrics").body, "refrag_http_connections 1001\n"); }));
        CHECK(served.get("/health").status == 200);
        CHECK(served.post("/v1/chat/completions", kChat).status == 200);
    }
    setrlimit(RLIMIT_NOFILE, &before);
}

TEST_CASE("serve: a port that is taken and a host that is none are said") {
    const Served served;
    HttpOptions options;
    options.port = served.port();
    CHECK(contains(error_of([&] { const Server second(options); }),
                   str("cannot listen on 127.0.0.1:", served.port(), ": ")));
    options.host = "no such host";
    CHECK(contains(error_of([&] { const Server second(options); }), "--host no such host: "));
}

TEST_CASE("serve: until a model is there, health answers and all else says that it is being loaded") {
    HttpOptions options;
    options.port = 0;
    const Server server(options);
    CHECK(http(server.port(), "GET", "/health").json().get_string("status") == "loading");
    const HttpReply ready = http(server.port(), "GET", "/ready");
    CHECK(ready.status == 503);
    CHECK(ready.error("code") == "loading");
    CHECK(http(server.port(), "POST", "/v1/chat/completions", kChat).status == 503);
}
