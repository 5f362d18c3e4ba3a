// Requests to an HTTP server whose responses come while others are under way: libcurl's multi interface, and
// the only place that meets libcurl. The connection of a transfer that ended by itself is used again.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

namespace refrag {

struct HttpClientOptions {
    std::string key = {};  // "Authorization: Bearer KEY"; "": none
    double connect_seconds = 10.0;
    double silent_seconds = 600.0;  // a transfer without a byte for so long has failed
};

// What of a transfer has come.
struct Transfer {
    std::string url;
    std::string request;   // its body; let go of when it is sent and the response has begun
    std::string received;  // of the response's body; its reader takes away what it has read
    int status = 0;        // HTTP status; 0: no response yet
    bool ended = false;
    std::string failure;  // why there is no whole response; "": none
};

class HttpClient {
  public:
    // Status::usage for a URL that is not http or https.
    static void check_url(const std::string& url);

    explicit HttpClient(HttpClientOptions options);
    ~HttpClient();
    HttpClient(const HttpClient&) = delete;
    HttpClient& operator=(const HttpClient&) = delete;

    // `id`: not in use. body: JSON to POST; "": a GET.
    void start(uint64_t id, const std::string& url, std::string body);
    // Breaks it off where it has not ended, and forgets it.
    void stop(uint64_t id) noexcept;
    // Null: none of this id.
    Transfer* find(uint64_t id);
    // Waits until something comes, so long at most, and takes it.
    void wait(std::chrono::milliseconds most);

  private:
    struct Handles;
    struct Running;
    HttpClientOptions options_;
    std::unique_ptr<Handles> handles_;
    std::unordered_map<uint64_t, std::unique_ptr<Running>> running_;
    bool heard_ = false;  // something has come since the last wait began
};

}  // namespace refrag
