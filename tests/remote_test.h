// A server in this process that stands for vLLM: it reads what the client sent, and a test's handler says
// what it answers, event by event. With answer_as() it decodes with a model of its own what came as vectors.
#pragma once

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "io/json.h"
#include "refrag/session.h"
#include "support.h"

namespace refrag_test {

// "" for what is no base64.
inline std::string from_base64(std::string_view text) {
    std::string out;
    uint32_t group = 0;
    int bits = 0;
    for (const char c : text) {
        if (c == '=') break;
        constexpr std::string_view digits =
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        const size_t digit = digits.find(c);
        if (digit == std::string_view::npos) return "";
        group = group << 6 | static_cast<uint32_t>(digit);
        bits += 6;
        if (bits < 8) continue;
        bits -= 8;
        out += static_cast<char>(group >> bits & 0xff);
    }
    return out;
}

// The members of a zip archive without compression, by its central directory: name, bytes, where they begin.
struct ZipMember {
    std::string name;
    std::string bytes;
    size_t at = 0;
    uint32_t crc = 0;
};
inline std::vector<ZipMember> zip_members(const std::string& zip) {
    const auto number = [&](size_t at, size_t n) {
        uint32_t value = 0;
        for (size_t i = 0; i < n; ++i)
            value |= static_cast<uint32_t>(static_cast<uint8_t>(zip.at(at + i))) << (8 * i);
        return value;
    };
    std::vector<ZipMember> out;
    const size_t end = zip.size() - 22;
    if (number(end, 4) != 0x06054b50) return out;
    size_t at = number(end + 16, 4);
    for (uint32_t i = 0; i < number(end + 10, 2); ++i) {
        ZipMember member;
        const size_t name_size = number(at + 28, 2), local = number(at + 42, 4);
        member.name = zip.substr(at + 46, name_size);
        member.crc = number(at + 16, 4);
        const bool same = number(local, 4) == 0x04034b50 && number(local + 14, 4) == member.crc &&
                          number(local + 18, 4) == number(at + 20, 4) && number(local + 26, 2) == name_size;
        if (!same) return {};
        member.at = local + 30 + name_size + number(local + 28, 2);
        member.bytes = zip.substr(member.at, number(at + 20, 4));
        out.push_back(member);
        at += 46 + name_size + number(at + 30, 2) + number(at + 32, 2);
    }
    return out;
}

class RemoteServer {
  public:
    struct Asked {
        std::string method;
        std::string path;
        std::string head;  // with its header lines
        std::string body;
        refrag::Json json() const { return refrag::Json::parse(body, "the request"); }
        // What came as "prompt_embeds", widened.
        std::vector<float> rows() const {
            const std::string zip = from_base64(json().get("prompt_embeds").as_string());
            std::vector<float> out;
            for (const ZipMember& member : zip_members(zip)) {
                if (member.name != "archive/data/0") continue;
                for (size_t i = 0; i + 1 < member.bytes.size(); i += 2) {
                    uint16_t bits = 0;
                    std::memcpy(&bits, member.bytes.data() + i, 2);
                    out.push_back(refrag::bf16_to_f32(bits));
                }
            }
            return out;
        }
    };

    // A connection's answer, as it is written.
    class Reply {
      public:
        explicit Reply(int socket) : socket_(socket) {}
        // Whether the client is there.
        bool raw(std::string_view bytes) const {
            while (!bytes.empty()) {
                const ssize_t n = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
                if (n <= 0) return false;
                bytes.remove_prefix(static_cast<size_t>(n));
            }
            return true;
        }
        void whole(int status, const std::string& body) const {
            raw("HTTP/1.1 " + std::to_string(status) +
                " X\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: " +
                std::to_string(body.size()) + "\r\n\r\n" + body);
        }
        void begin() const {
            raw("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
        }
        bool event(const std::string& data) const { return raw("data: " + data + "\n\n"); }
        bool token(int32_t id, const std::string& more = "") const {
            return event("{\"choices\":[{\"index\":0,\"text\":\"x\",\"token_ids\":[" + std::to_string(id) +
                         "],\"finish_reason\":null" + more + "}]}");
        }
        void finish(const std::string& reason) const {
            event("{\"choices\":[{\"index\":0,\"text\":\"\",\"token_ids\":[],\"finish_reason\":\"" + reason +
                  "\"}]}");
            event("{\"choices\":[],\"usage\":{\"prompt_tokens\":1}}");
            event("[DONE]");
        }
        // Waits for the client to leave, so long at most.
        bool left(int ms = 20000) const {
            pollfd waiting{socket_, POLLIN, 0};
            char byte = 0;
            return ::poll(&waiting, 1, ms) > 0 && ::recv(socket_, &byte, 1, 0) <= 0;
        }

      private:
        int socket_;
    };

    // Called on a thread of the connection's own for everything but GET .../models.
    using Handler = std::function<void(const Asked&, const Reply&)>;

    explicit RemoteServer(Handler handler, uint16_t port = 0) : handler_(std::move(handler)) {
        socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        const int yes = 1;
        ::setsockopt(socket_, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons(port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof address;
        if (::bind(socket_, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(socket_, 64) != 0 ||
            ::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) != 0)
            refrag::fail(refrag::Status::runtime, "the test's server cannot listen");
        port_ = ntohs(address.sin_port);
        accepting_ = std::thread([this] { accept(); });
    }
    ~RemoteServer() { stop(); }
    // Goes away: no new connections, and those that there are end.
    void stop() {
        if (stopping_.exchange(true)) return;
        accepting_.join();
        ::close(socket_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (const int one : connections_) ::shutdown(one, SHUT_RDWR);
        }
        for (std::thread& thread : threads_) thread.join();
    }
    RemoteServer(const RemoteServer&) = delete;
    RemoteServer& operator=(const RemoteServer&) = delete;

    uint16_t port() const { return port_; }
    std::string url() const { return "http://127.0.0.1:" + std::to_string(port_) + "/v1"; }
    std::vector<Asked> asked() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return asked_;
    }
    // The requests for completions but the two of check_remote_decoder.
    std::string models = R"({"data":[{"id":"remote","max_model_len":512}]})";  // the answer to GET .../models
    int models_status = 200;                                                   // 0: no answer at all

  private:
    void accept() {
        while (!stopping_) {
            pollfd waiting{socket_, POLLIN, 0};
            if (::poll(&waiting, 1, 20) <= 0) continue;
            const int connection = ::accept(socket_, nullptr, nullptr);
            if (connection < 0) continue;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                connections_.push_back(connection);
            }
            threads_.emplace_back([this, connection] {
                serve(connection);
                const std::lock_guard<std::mutex> lock(mutex_);
                std::erase(connections_, connection);
                ::close(connection);
            });
        }
    }
    void serve(int connection) {
        Asked asked;
        std::string received;
        const auto more = [&] {
            char bytes[65536];
            const ssize_t n = ::recv(connection, bytes, sizeof bytes, 0);
            if (n > 0) received.append(bytes, static_cast<size_t>(n));
            return n > 0;
        };
        while (received.find("\r\n\r\n") == std::string::npos)
            if (!more()) return;
        const size_t body = received.find("\r\n\r\n") + 4;
        asked.head = received.substr(0, body);
        asked.method = asked.head.substr(0, asked.head.find(' '));
        const size_t path = asked.method.size() + 1;
        asked.path = asked.head.substr(path, asked.head.find(' ', path) - path);
        const size_t length = asked.head.find("Content-Length: ");
        const size_t n = length == std::string::npos ? 0 : std::stoul(asked.head.substr(length + 16));
        while (received.size() < body + n)
            if (!more()) return;
        asked.body = received.substr(body, n);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            asked_.push_back(asked);
        }
        const Reply reply(connection);
        if (asked.method == "GET") {
            if (models_status == 0) {
                reply.left(60000);
            } else {
                reply.whole(models_status, models);
            }
        } else {
            handler_(asked, reply);
        }
        ::shutdown(connection, SHUT_WR);
    }

    Handler handler_;
    int socket_ = -1;
    uint16_t port_ = 0;
    std::atomic<bool> stopping_{false};
    std::thread accepting_;
    std::list<std::thread> threads_;
    mutable std::mutex mutex_;
    std::list<int> connections_;
    std::vector<Asked> asked_;
};

// Answers as a server with this decoder would: ids or vectors in, tokens out, greedily.
inline RemoteServer::Handler answer_as(const refrag::Model& model) {
    return [&model](const RemoteServer::Asked& asked, const RemoteServer::Reply& reply) {
        const refrag::Json json = asked.json();
        std::vector<refrag::Segment> segments;
        if (const auto prompt = json.find("prompt")) {
            refrag::TokenSegment tokens;
            for (size_t i = 0; i < prompt->size(); ++i)
                tokens.ids.push_back(static_cast<int32_t>(prompt->at(i).as_int()));
            segments.emplace_back(tokens);
        } else {
            segments.emplace_back(refrag::VectorSegment{asked.rows()});
        }
        refrag::AnswerOptions options;
        options.max_new_tokens = static_cast<int32_t>(json.get_int("max_tokens"));
        options.ignore_eos = json.get_bool("ignore_eos");
        if (const auto n = json.find("logprobs")) options.logprobs = static_cast<int32_t>(n->as_int());
        refrag::Session session(model, 512);
        const refrag::Answer answer = session.answer(segments, options);
        reply.begin();
        for (size_t i = 0; i < answer.ids.size(); ++i) {
            std::string more;
            if (options.logprobs) {
                const refrag::TokenLogprobs& said = answer.logprobs[i];
                const auto name = [](int32_t id) { return "\"token_id:" + std::to_string(id) + "\""; };
                // As vLLM: the chosen token is there too, and nothing is sorted.
                std::string top = name(said.chosen.id) + ":" + std::to_string(said.chosen.logprob);
                for (auto one = said.top.rbegin(); one != said.top.rend(); ++one)
                    if (one->id != said.chosen.id)
                        top += "," + name(one->id) + ":" + std::to_string(one->logprob);
                more = ",\"logprobs\":{\"token_logprobs\":[" + std::to_string(said.chosen.logprob) +
                       "],\"tokens\":[" + name(said.chosen.id) + "],\"top_logprobs\":[{" + top + "}]}";
            }
            if (!reply.token(answer.ids[i], more)) return;
        }
        const bool stopped = answer.finish == refrag::FinishReason::end_token;
        if (stopped)
            reply.token(
                model.end_ids()[0],
                options.logprobs ? ",\"logprobs\":{\"token_logprobs\":[-1.0],\"top_logprobs\":[{}]}" : "");
        reply.finish(stopped ? "stop" : "length");
    };
}

}  // namespace refrag_test
