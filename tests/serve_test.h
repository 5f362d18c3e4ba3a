// A server in this process, over a real socket, and a client that says exactly what it is told.
#pragma once

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/cpu_backend.h"
#include "io/json.h"
#include "refrag/remote_decoder.h"
#include "refrag/session.h"
#include "server/server.h"
#include "support.h"

namespace refrag_test {

struct HttpReply {
    int status = 0;       // 0: the connection ended without a response
    std::string headers;  // in small letters
    std::string body;     // chunks joined
    bool whole = false;   // it came to its end

    refrag::Json json() const { return refrag::Json::parse(body, "the reply"); }
    bool has_header(const std::string& line) const { return headers.find(line) != std::string::npos; }
    // "error"."message"
    std::string message() const { return json().get_object("error").get_string("message"); }
    std::string error(const char* key) const {
        const auto value = json().get_object("error").find(key);
        return value ? std::string(value->as_string()) : "";
    }
};

// One connection.
class HttpClient {
  public:
    explicit HttpClient(uint16_t port) {
        socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons(port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        connected_ = ::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    }
    ~HttpClient() { leave(); }
    HttpClient(const HttpClient&) = delete;
    HttpClient& operator=(const HttpClient&) = delete;

    bool connected() const { return connected_; }
    void leave() {
        if (socket_ >= 0) ::close(socket_);
        socket_ = -1;
    }
    // Whether all of it could be sent.
    bool send(std::string_view bytes) const {
        while (!bytes.empty()) {
            const ssize_t n = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (n <= 0) return false;
            bytes.remove_prefix(static_cast<size_t>(n));
        }
        return true;
    }
    bool ask(const std::string& method, const std::string& path, const std::string& body = "",
             const std::string& headers = "Content-Type: application/json\r\n") const {
        return send(method + " " + path + " HTTP/1.1\r\nHost: test\r\n" + headers +
                    (body.empty() ? "" : "Content-Length: " + std::to_string(body.size()) + "\r\n") + "\r\n" +
                    body);
    }
    // Reads on until `text` has come; false where the connection ends, or nothing comes for so long.
    bool read_until(std::string_view text, int ms = 60000) {
        while (buffer_.find(text) == std::string::npos)
            if (!read_some(ms)) return false;
        return true;
    }
    bool closed(int ms = 60000) {
        while (read_some(ms)) {
        }
        return ended_;
    }
    const std::string& received() const { return buffer_; }

    HttpReply reply(bool is_head = false) {
        HttpReply reply;
        if (!read_until("\r\n\r\n")) return reply;
        size_t at = buffer_.find("\r\n\r\n") + 4;
        reply.headers = buffer_.substr(0, at);
        for (char& c : reply.headers) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
        reply.status = std::stoi(reply.headers.substr(9, 3));
        buffer_.erase(0, at);
        if (reply.status == 100) return this->reply(is_head);
        reply.whole = is_head || reply.status == 204 || read_body(reply);
        return reply;
    }

  private:
    bool read_some(int ms) {
        pollfd waiting{socket_, POLLIN, 0};
        if (socket_ < 0 || ::poll(&waiting, 1, ms) <= 0) return false;
        char bytes[16384];
        const ssize_t n = ::recv(socket_, bytes, sizeof bytes, 0);
        if (n <= 0) {
            ended_ = true;
            return false;
        }
        buffer_.append(bytes, static_cast<size_t>(n));
        return true;
    }
    bool take(size_t n, std::string& to) {
        while (buffer_.size() < n)
            if (!read_some(60000)) return false;
        to.append(buffer_, 0, n);
        buffer_.erase(0, n);
        return true;
    }
    bool read_body(HttpReply& reply) {
        const size_t length = reply.headers.find("content-length: ");
        if (length != std::string::npos)
            return take(std::stoul(reply.headers.substr(length + 16)), reply.body);
        if (!reply.has_header("transfer-encoding: chunked")) return true;
        while (true) {
            if (!read_until("\r\n")) return false;
            const size_t n = std::stoul(buffer_, nullptr, 16);
            buffer_.erase(0, buffer_.find("\r\n") + 2);
            std::string end;
            if (!take(n, reply.body) || !take(2, end)) return false;
            if (n == 0) return true;
        }
    }

    int socket_ = -1;
    bool connected_ = false;
    bool ended_ = false;
    std::string buffer_;
};

inline HttpReply http(uint16_t port, const std::string& method, const std::string& path,
                      const std::string& body = "",
                      const std::string& headers = "Content-Type: application/json\r\n") {
    HttpClient client(port);
    client.ask(method, path, body, headers);
    return client.reply(method == "HEAD");
}

// The data of a stream's events, as they come.
inline std::vector<std::string> events_of(const std::string& body) {
    std::vector<std::string> events;
    for (size_t at = 0; at < body.size();) {
        const size_t end = std::min(body.find("\n\n", at), body.size());
        const std::string event = body.substr(at, end - at);
        const size_t data = event.find("data: ");
        if (data != std::string::npos) events.push_back(event.substr(data + 6));
        at = end + 2;
    }
    return events;
}

struct ServedOptions {
    std::string model = "weights_tools/refrag-nano";
    refrag::HttpOptions http = {};
    refrag::SchedulerOptions scheduler = {};
    refrag::ApiOptions api = {};
    refrag::StoreFinder find = {};
    std::shared_ptr<const refrag::RemoteDecoder> decoder = {};  // null: here
};

// Serves a model until it goes.
class Served {
  public:
    explicit Served(ServedOptions options = {})
        : device_(refrag::make_cpu_device(2)),
          model_(*device_, options.model, {}, refrag::WeightFormat::as_stored, {}, {}, options.decoder),
          server_([&] {
              options.http.port = 0;
              return options.http;
          }()) {
        if (options.api.model_name.empty()) options.api.model_name = "test";
        if (options.api.defaults.max_new_tokens == 256) options.api.defaults.max_new_tokens = -1;
        server_.serve(model_, cache_, options.find, options.scheduler, options.api);
    }
    const refrag::Model& model() const { return model_; }
    refrag::Server& server() { return server_; }
    uint16_t port() const { return server_.port(); }
    HttpReply get(const std::string& path) const { return http(port(), "GET", path); }
    HttpReply post(const std::string& path, const std::string& body) const {
        return http(port(), "POST", path, body);
    }

    // Whether it becomes true within so many seconds.
    static bool soon(const std::function<bool()>& true_now, double seconds = 20.0) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
        while (!true_now()) {
            if (std::chrono::steady_clock::now() > until) return false;
            ::usleep(2000);
        }
        return true;
    }

  private:
    std::unique_ptr<refrag::Device> device_;
    refrag::Model model_;
    refrag::PassageCache cache_;
    refrag::Server server_;
};

}  // namespace refrag_test
