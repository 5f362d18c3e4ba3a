// One HTTP request and its response, between the thread that serves connections and those that work. Whoever
// answers holds it by shared pointer, writes when there is something, and never waits for the client; a
// client that leaves is told to whoever asked.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace refrag {

struct HttpRequest {
    std::string method;  // "GET", ...
    std::string path;    // decoded, without the query
    std::string authorization;
    std::string content_type;
    std::string origin;
    std::string body;
    std::chrono::steady_clock::time_point received;  // all of it
};

struct HttpHead {
    int status = 200;
    std::string content_type = "application/json";
    std::vector<std::pair<std::string, std::string>> headers = {};
};

// Any number of threads may use it at the same time.
class Exchange {
  public:
    explicit Exchange(HttpRequest from) : request(std::move(from)) {}
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;
    virtual ~Exchange() = default;

    // Immutable once the handler has it, but that the handler may move the body away.
    HttpRequest request;

    // A whole response. Does nothing where one has begun.
    void respond(HttpHead head, std::string body);
    // A response whose length is not known yet: begin, any number of writes, end. False where the client has
    // left: nobody reads what is written.
    bool begin(HttpHead head);
    bool write(std::string_view piece);
    void end();

    bool begun() const;
    bool left() const;
    // `leave` is called once when the client leaves before the response has ended, on another thread; at once
    // where it has left already.
    void on_leave(std::function<void()> leave);

    // Called once, when the response begins: its status. Set before anyone answers.
    std::function<void(int status)> on_status;

    // What the connections' side does (http_server.cpp). The client has left.
    void client_left();
    // Headers of every response, known before the handler runs.
    std::vector<std::pair<std::string, std::string>> common_headers;

  protected:
    // There is something to send, or the client has left; called under mutex_.
    virtual void wake() = 0;

    mutable std::mutex mutex_;  // of all that follows
    bool begun_ = false;
    bool ended_ = false;
    bool left_ = false;
    HttpHead head_;
    std::string out_;    // written and not yet sent
    size_t n_sent_ = 0;  // of out_

  private:
    std::function<void()> leave_;
};

}  // namespace refrag
