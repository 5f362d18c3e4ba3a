// HTTP/1.1 for the API: libmicrohttpd with one thread for all connections. A connection whose answer is being
// worked on is suspended, so that thousands of them cost a socket each and no thread. A second thread looks
// after what libmicrohttpd does not: clients that leave while they wait, requests that take too long to come.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "server/exchange.h"

namespace refrag {

struct HttpOptions {
    std::string host = "127.0.0.1";
    uint16_t port = 8080;  // 0: any that is free
    int32_t max_connections = 1024;
    size_t max_header_bytes = size_t{32} << 10;
    size_t max_body_bytes = size_t{16} << 20;  // of one request; 16 of them in all
    // From the connection's, or the last response's, end to the end of the request's header; then to the end
    // of its body.
    std::chrono::milliseconds head_time = std::chrono::seconds(60);
    std::chrono::milliseconds body_time = std::chrono::seconds(60);
    // A response of which the client takes nothing for so long is given up.
    int32_t stalled_seconds = 60;
    std::chrono::milliseconds look_every = std::chrono::milliseconds(50);
};

// Called on the connections' thread with a request that has come whole: returns soon, and sees to it that the
// exchange is answered. What it throws answers with status 500.
using HttpHandler = std::function<void(const std::shared_ptr<Exchange>&)>;
// The response to a request that is refused before the handler sees it: a body that is too large.
using HttpRefusal = std::function<void(const std::shared_ptr<Exchange>&, int status, const std::string&)>;

class HttpServer {
  public:
    // Listens from now on. Status::runtime where it cannot (address in use, no such host).
    HttpServer(HttpOptions options, HttpHandler handler, HttpRefusal refusal);
    // Clients that still wait are cut off. Nobody may write to an exchange any more.
    ~HttpServer();
    HttpServer(const HttpServer&) = delete;
    HttpServer& operator=(const HttpServer&) = delete;

    uint16_t port() const;
    size_t n_connections() const;
    // No further connections; those that are there go on.
    void stop_listening();

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace refrag
