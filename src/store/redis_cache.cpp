// See redis_cache.h.
#include "store/redis_cache.h"

#include <hiredis/hiredis.h>
#include <signal.h>
#include <sys/time.h>

#include <array>
#include <new>
#include <utility>

#include "io/file.h"

namespace refrag {
namespace {

constexpr std::string_view kKeyBegin = "refrag:1:";
constexpr struct timeval kTimeout = {0, 200000};  // of a connection, and of each reading and writing
constexpr std::chrono::seconds kBetweenTries{1};
constexpr size_t kGroupBytes = size_t{1} << 20;  // of commands sent together

// A connection that the server has closed gives SIGPIPE when it is written to: it is kept from this thread,
// and taken away if it came.
class NoSigpipe {
  public:
    NoSigpipe() {
        sigemptyset(&pipe_);
        sigaddset(&pipe_, SIGPIPE);
        sigset_t pending;
        sigpending(&pending);
        was_pending_ = sigismember(&pending, SIGPIPE) == 1;
        pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
    }
    ~NoSigpipe() {
        const struct timespec at_once = {0, 0};
        if (!was_pending_) sigtimedwait(&pipe_, nullptr, &at_once);
        pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    }
    NoSigpipe(const NoSigpipe&) = delete;
    NoSigpipe& operator=(const NoSigpipe&) = delete;

  private:
    sigset_t pipe_{};
    sigset_t before_{};
    bool was_pending_ = false;
};

std::string key_of_record(const Sha256Digest& digest) {
    return std::string(kKeyBegin) + std::string(digest.view());
}

// What passes by itself: the server is starting, or has too many clients.
bool will_pass(std::string_view refused) {
    for (const std::string_view begin : {"LOADING", "BUSY", "MASTERDOWN", "ERR max number of clients"})
        if (refused.starts_with(begin)) return true;
    return false;
}

}  // namespace

RedisConnection::~RedisConnection() {
    close();
}

void RedisConnection::close() noexcept {
    if (handle_ != nullptr) redisFree(handle_);
    handle_ = nullptr;
}

void RedisConnection::fail_lost() {
    std::string said = "no memory";
    if (handle_ != nullptr && handle_->err != 0) said = printable(handle_->errstr, 100);
    const bool is_other = handle_ != nullptr && handle_->err == REDIS_ERR_PROTOCOL;
    // hiredis takes the end of a timeout for a full buffer.
    if (handle_ != nullptr && handle_->err == REDIS_ERR_IO && (errno == EAGAIN || errno == EWOULDBLOCK))
        said = "no answer within 200 ms";
    close();
    REFRAG_CHECK(!is_other, Status::usage, place_.name, ": expected a Redis or Valkey server, found another");
    fail(Status::runtime, place_.name, ": cannot be reached (", said, ")");
}

void RedisConnection::open() {
    const NoSigpipe quiet;
    close();
    handle_ = place_.socket.empty() ? redisConnectWithTimeout(place_.host.c_str(), place_.port, kTimeout)
                                    : redisConnectUnixWithTimeout(place_.socket.c_str(), kTimeout);
    if (handle_ == nullptr) throw std::bad_alloc();
    if (handle_->err != 0 || redisSetTimeout(handle_, kTimeout) != REDIS_OK) fail_lost();
    std::vector<std::vector<std::string_view>> greeting;
    if (!place_.user.empty()) {
        greeting.push_back({"AUTH", place_.user, place_.password});
    } else if (!place_.password.empty()) {
        greeting.push_back({"AUTH", place_.password});
    }
    const std::string database = str(place_.database);
    greeting.push_back({"SELECT", database});
    std::string refused;
    for (const auto& command : greeting) send(command);
    for (size_t i = 0; i < greeting.size(); ++i) read_reply(refused);
    if (refused.empty()) return;
    close();
    fail(will_pass(refused) ? Status::runtime : Status::usage, place_.name, ": refused (",
         printable(refused, 100), ")");
}

void RedisConnection::send(const std::vector<std::string_view>& words) {
    std::vector<const char*> data;
    std::vector<size_t> sizes;
    for (const std::string_view word : words) {
        data.push_back(word.data());
        sizes.push_back(word.size());
    }
    if (redisAppendCommandArgv(handle_, static_cast<int>(words.size()), data.data(), sizes.data()) !=
        REDIS_OK)
        fail_lost();
}

std::optional<std::string> RedisConnection::read_reply(std::string& refused) {
    void* given = nullptr;
    errno = 0;
    if (redisGetReply(handle_, &given) != REDIS_OK || given == nullptr) fail_lost();
    const std::unique_ptr<redisReply, void (*)(void*)> reply(static_cast<redisReply*>(given),
                                                             freeReplyObject);
    const std::string_view text(reply->str != nullptr ? reply->str : "",
                                reply->str != nullptr ? reply->len : 0);
    if (reply->type == REDIS_REPLY_ERROR && refused.empty())
        refused = text.empty() ? "no reason given" : text;
    if (reply->type != REDIS_REPLY_STRING) return std::nullopt;
    return std::string(text);
}

std::vector<std::optional<std::string>> RedisConnection::run(
    const std::vector<std::vector<std::string_view>>& commands) {
    const NoSigpipe quiet;
    std::vector<std::optional<std::string>> replies;
    std::string refused;
    for (const auto& command : commands) send(command);
    for (size_t i = 0; i < commands.size(); ++i) replies.push_back(read_reply(refused));
    REFRAG_CHECK(refused.empty(), Status::runtime, place_.name, ": refused (", printable(refused, 100), ")");
    return replies;
}

RedisCache::RedisCache(const std::string& place, EmbeddingForm form, CacheWarning warn)
    : WriteBehind(form, std::move(warn)), place_(parse_redis_place(place)) {
    try {
        connect();
    } catch (const Error& error) {
        if (error.status() != Status::runtime) throw;
        complain(error);
    }
    start();
}

RedisCache::~RedisCache() {
    stop();
}

// Both connections, or none.
void RedisCache::connect() {
    next_try_ = std::chrono::steady_clock::now() + kBetweenTries;
    auto reader = std::make_unique<RedisConnection>(place_);
    reader->open();
    auto writer = std::make_unique<RedisConnection>(place_);
    writer->open();
    writer_ = std::move(writer);
    const std::lock_guard lock(read_mutex_);
    reader_ = std::move(reader);
}

std::optional<std::string> RedisCache::look_up(const Sha256Digest& key) {
    const std::string name = key_of_record(key);
    const std::lock_guard lock(read_mutex_);
    if (!reader_ || !reader_->is_open()) {
        wake();
        return std::nullopt;
    }
    return reader_->run({{"GET", name}}).front();
}

void RedisCache::write(const std::vector<Entry>& entries) {
    const bool reader_open = [this] {
        const std::lock_guard lock(read_mutex_);
        return reader_ && reader_->is_open();
    }();
    if (!reader_open || !writer_ || !writer_->is_open()) {
        if (std::chrono::steady_clock::now() < next_try_) return;
        connect();
        recovered();
    }
    const std::string ttl = str(place_.ttl_seconds);
    std::vector<std::string> names;
    names.reserve(entries.size());
    std::vector<std::vector<std::string_view>> commands;
    size_t bytes = 0;
    for (const Entry& entry : entries) {
        names.push_back(key_of_record(entry.key));
        if (!entry.record) {
            commands.push_back({"DEL", names.back()});
        } else if (place_.ttl_seconds == 0) {
            commands.push_back({"SET", names.back(), *entry.record});
        } else {
            commands.push_back({"SET", names.back(), *entry.record, "EX", ttl});
        }
        bytes += entry.record ? entry.record->size() : 0;
        if (bytes < kGroupBytes) continue;
        writer_->run(commands);
        commands.clear();
        bytes = 0;
    }
    if (!commands.empty()) writer_->run(commands);
}

}  // namespace refrag
