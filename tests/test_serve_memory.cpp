// The server while memory runs out: every allocation that fails costs one request at most, and the next one
// is answered as ever.
#include "failing.h"
#include "serve_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kAsked =
    R"({"messages": [{"role": "user", "content": "When was the mill built?"}], "max_tokens": 6, )"
    R"("documents": [{"title": "Mills", "text": "The mill on the Orla was built in 1742 by Anna Berg."}], )";

std::string whole_request(const std::string& body) {
    return "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
           "Connection: close\r\nContent-Length: " +
           std::to_string(body.size()) + "\r\n\r\n" + body;
}

// Sends and receives without asking for memory, so that it is the server's that fails.
class QuietClient {
  public:
    explicit QuietClient(uint16_t port) : buffer_(size_t{1} << 20, '\0') {
        socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons(port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        connected_ = ::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    }
    ~QuietClient() { ::close(socket_); }
    QuietClient(const QuietClient&) = delete;
    QuietClient& operator=(const QuietClient&) = delete;

    // False where nothing came for a minute. Whether the connection was ended by the other side.
    bool ask(std::string_view request) {
        if (!connected_ || ::send(socket_, request.data(), request.size(), MSG_NOSIGNAL) < 0) return false;
        while (n_ < buffer_.size()) {
            pollfd waiting{socket_, POLLIN, 0};
            if (::poll(&waiting, 1, 60000) <= 0) return false;
            const ssize_t n = ::recv(socket_, buffer_.data() + n_, buffer_.size() - n_, 0);
            if (n <= 0) return true;
            n_ += static_cast<size_t>(n);
        }
        return false;
    }
    std::string_view received() const { return std::string_view(buffer_).substr(0, n_); }

  private:
    int socket_ = -1;
    bool connected_ = false;
    std::string buffer_;
    size_t n_ = 0;
};

// What of a response is always alike: all but ids, dates and times.
std::string content_of(std::string_view response) {
    std::string out;
    const std::string_view key = "\"content\": \"";
    for (size_t at = response.find(key); at != std::string_view::npos; at = response.find(key, at + 1))
        out += response.substr(at + key.size(), response.find('"', at + key.size()) - at - key.size());
    return out;
}

}  // namespace

TEST_CASE("serve: memory that runs out costs one request, and the next is answered as ever") {
    ServedOptions options;
    options.scheduler.engine.n_slots = 1;
    const Served served(options);
    for (const bool stream : {false, true}) {
        CAPTURE(stream);
        const std::string request =
            whole_request(kAsked + (stream ? R"("stream": true})" : R"("stream": false})"));
        const auto answered = [&] {
            QuietClient client(served.port());
            REQUIRE(client.ask(request));
            REQUIRE(client.received().starts_with("HTTP/1.1 200"));
            return content_of(client.received());
        };
        const std::string expected = answered();
        REQUIRE_FALSE(expected.empty());
        answered();  // what is kept between requests is kept now
        int64_t n = 0, n_refused = 0, n_closed = 0;
        bool done = false;
        while (!done) {
            n += n < 250 ? 1 : 3;
            CAPTURE(n);
            QuietClient client(served.port());
            FailingMemory memory(n);
            const bool ended = client.ask(request);
            // The server's threads go on when the client has its answer.
            const int64_t asked = memory.asked();
            memory.disarm();
            REQUIRE(ended);
            done = asked < n;
            const std::string_view got = client.received();
            const bool is_right = got.starts_with("HTTP/1.1 200") && content_of(got) == expected;
            const bool is_error = got.find("out of memory") != std::string_view::npos;
            // Where not even the error found memory the connection is closed.
            CAPTURE(std::string(got.substr(0, 700)));
            CHECK((is_right || is_error || got.empty()));
            if (!memory.failed()) CHECK(is_right);
            n_refused += is_error ? 1 : 0;
            n_closed += got.empty() ? 1 : 0;
            REQUIRE(answered() == expected);
            REQUIRE(Served::soon([&] { return http(served.port(), "GET", "/health").status == 200; }));
        }
        CHECK(n > 300);
        CHECK(n_refused > 20);
        CHECK(n_closed < n_refused);
    }
    CHECK(served.get("/metrics").body.find("refrag_requests_pending 0") != std::string::npos);
}
