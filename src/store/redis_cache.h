// The chunk-embedding cache that many machines share: passage records (passage_record.h) in a Redis or Valkey
// server, as "refrag:1:" and the 32 bytes of the name -> record. Records are checked by who reads them, so a
// wrong answer of the server is a miss.
//
// What a server keeps is the server's to decide (maxmemory, maxmemory-policy allkeys-lru); with ttl=SECONDS
// in the URL each record ends that long after it was written.
//
// A server that is away, or slower than 200 ms, is a miss and said once. Then nobody waits for it: the thread
// that writes tries again, no more often than once a second.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "store/write_behind.h"

struct redisContext;

namespace refrag {

// redis://[[user]:password@]host[:port][/database][?ttl=SECONDS], or with a Unix socket
// unix:///path[?db=N&ttl=SECONDS], redis+unix://[[user]:password@]/path; valkey in place of redis. %XX stands
// for a byte in user, password and path.
struct RedisPlace {
    std::string host;
    int port = 6379;
    std::string socket;  // in place of both
    std::string user;
    std::string password;
    int64_t database = 0;
    int64_t ttl_seconds = 0;  // 0: none
    std::string name;         // for messages: without user and password
};

inline bool is_redis_place(std::string_view place) {
    for (const char* scheme : {"redis", "valkey", "unix", "redis+unix", "valkey+unix", "rediss", "valkeys"})
        if (place.starts_with(std::string(scheme) + "://")) return true;
    return false;
}
// Status::usage for what is none.
RedisPlace parse_redis_place(std::string_view place);

// One connection. Any failure to reach the server is Status::runtime, and ends the connection.
class RedisConnection {
  public:
    explicit RedisConnection(const RedisPlace& place) : place_(place) {}
    ~RedisConnection();
    RedisConnection(const RedisConnection&) = delete;
    RedisConnection& operator=(const RedisConnection&) = delete;

    bool is_open() const { return handle_ != nullptr; }
    // Status::usage where the server is there and will not have us: a wrong password, no such database, or
    // no Redis at all.
    void open();
    // Commands sent together, their words as bytes; the replies, in order: a bulk's bytes, else none.
    // Status::runtime for what the server refuses, after all were read.
    std::vector<std::optional<std::string>> run(const std::vector<std::vector<std::string_view>>& commands);

  private:
    void close() noexcept;
    [[noreturn]] void fail_lost();
    void send(const std::vector<std::string_view>& words);
    std::optional<std::string> read_reply(std::string& refused);

    const RedisPlace& place_;
    redisContext* handle_ = nullptr;
};

class RedisCache : public WriteBehind {
  public:
    // Status::usage as RedisConnection::open(). A server that is not there is said, and tried again later.
    RedisCache(const std::string& place, EmbeddingForm form, CacheWarning warn = {});
    ~RedisCache() override;

    const std::string& name() const { return place_.name; }

  private:
    std::optional<std::string> look_up(const Sha256Digest& key) override;
    void write(const std::vector<Entry>& entries) override;
    void connect();

    const RedisPlace place_;
    std::mutex read_mutex_;  // of the reading connection
    std::unique_ptr<RedisConnection> reader_;
    std::unique_ptr<RedisConnection> writer_;         // the thread's
    std::chrono::steady_clock::time_point next_try_;  // the thread's
};

}  // namespace refrag
