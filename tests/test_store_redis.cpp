// The chunk-embedding cache in Redis or Valkey: kept = fresh bit for bit, a server that goes away, hangs,
// comes back, refuses or lies is a miss and one warning, and nobody waits for it.
#include <chrono>
#include <random>
#include <thread>

#include "cli_test.h"
#include "golden.h"
#include "refrag/passage_cache.h"
#include "refrag/passage_record.h"
#include "server_process.h"
#include "store/redis_cache.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const char* const kText = "The old mill stands on a hill above the river, and a red lantern hangs over it.";

// A server on a Unix socket of its own; nothing is written to disk.
class RedisServer {
  public:
    explicit RedisServer(std::vector<std::string> options = {}) : options_(std::move(options)) {
        program_ = find_program("valkey-server");
        if (program_.empty()) program_ = find_program("redis-server");
        if (program_.empty()) {
            skip("no Redis or Valkey server found here");
        } else {
            start();
        }
    }
    explicit operator bool() const { return !program_.empty(); }
    std::string socket() const { return dir_.file("s"); }
    std::string url() const { return "unix://" + socket(); }
    void start() {
        std::vector<std::string> command = {program_, "--port",       "0", "--unixsocket", socket(), "--save",
                                            "",       "--appendonly", "no"};
        command.insert(command.end(), options_.begin(), options_.end());
        process_.start(command, dir_.file("log"));
        const bool ready = becomes_true([this] {
            const RedisPlace place = parse_redis_place(url());
            try {
                RedisConnection(place).open();
                return true;
            } catch (const Error& error) {
                return error.status() == Status::usage;  // there, and wants a password
            }
        });
        if (!ready) fail(Status::runtime, "redis: ", read_file(dir_.file("log"), 1 << 20));
    }
    void crash() { process_.kill_with(SIGKILL); }
    void signal(int number) const { process_.signal(number); }
    std::optional<std::string> run(const std::vector<std::string_view>& command,
                                   const std::string& options = "") const {
        const RedisPlace place = parse_redis_place(url() + options);
        RedisConnection connection(place);
        connection.open();
        return connection.run({command}).front();
    }

  private:
    const TempDir dir_;
    const std::vector<std::string> options_;
    std::string program_;
    ServerProcess process_;
};

// What a cache says.
struct Said {
    std::mutex mutex;
    std::vector<std::string> lines;
    CacheWarning take() {
        return [this](const std::string& line) {
            const std::lock_guard lock(mutex);
            lines.push_back(line);
        };
    }
    size_t count() {
        const std::lock_guard lock(mutex);
        return lines.size();
    }
    std::string line(size_t i) {
        const std::lock_guard lock(mutex);
        return i < lines.size() ? lines[i] : "";
    }
};

double ms_of(const std::function<void()>& body) {
    const auto started = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
}

Sha256Digest key(int i) {
    return sha256(str("key ", i));
}

std::string key_name(const Sha256Digest& digest) {
    return "refrag:1:" + std::string(digest.view());
}

}  // namespace

TEST_CASE("Redis: servers as they are named; passwords stay out of names and messages") {
    const RedisPlace plain = parse_redis_place("redis://cache.example");
    CHECK(plain.host == "cache.example");
    CHECK(plain.port == 6379);
    CHECK(plain.database == 0);
    CHECK(plain.ttl_seconds == 0);
    CHECK(plain.name == "redis://cache.example:6379/0");
    const RedisPlace full = parse_redis_place("valkey://me:p%40:s?/@x@h:7000/3?ttl=60");
    CHECK(full.user == "me");
    CHECK(full.password == "p@:s?/@x");
    CHECK(full.host == "h");
    CHECK(full.port == 7000);
    CHECK(full.database == 3);
    CHECK(full.ttl_seconds == 60);
    CHECK(full.name == "redis://h:7000/3");
    CHECK(parse_redis_place("redis://:p@h/").password == "p");
    CHECK(parse_redis_place("redis://:p@h/").user == "");
    const RedisPlace six = parse_redis_place("redis://[::1]:7001/2");
    CHECK(six.host == "::1");
    CHECK(six.port == 7001);
    CHECK(parse_redis_place("redis://[::1]").port == 6379);
    const RedisPlace socket = parse_redis_place("redis+unix://me:secret@/run/a%20b.sock?db=4&ttl=9");
    CHECK(socket.socket == "/run/a b.sock");
    CHECK(socket.password == "secret");
    CHECK(socket.database == 4);
    CHECK(socket.ttl_seconds == 9);
    CHECK(socket.name == "unix:///run/a b.sock?db=4");
    for (const char* wrong : {"redis://", "redis://h:x", "redis://h:70000", "redis://h/x", "redis://h/-1",
                              "redis://h?ttl=soon", "redis://h?secret=1", "rediss://h", "unix://relative",
                              "redis://u:secret%zz@h", "redis://:secret@"}) {
        CAPTURE(wrong);
        const std::string said = error_of([&] { parse_redis_place(wrong); });
        CHECK(contains(said, "--cache: expected redis://"));
        CHECK(!contains(said, "secret"));
    }
    CHECK(is_redis_place("valkey://h"));
    CHECK(!is_redis_place("redis"));
    CHECK(!is_redis_place("/var/cache"));
}

TEST_CASE_FIXTURE(TinyRefrag, "Redis: what was encoded once is kept for other processes, bit for bit") {
    const RedisServer server;
    if (!server) return;
    Arena arena(backend);
    for (const EmbeddingForm form : {EmbeddingForm::bf16, EmbeddingForm::int8}) {
        std::vector<float> fresh;
        {
            PassageCache cache(1 << 20, std::make_shared<RedisCache>(server.url(), form));
            const auto passage = cache.share(model, kText, 4);
            CHECK(!passage->encoded());
            encode_passages(backend, model, std::vector{passage}, arena);
            fresh = passage->encoded()->download(backend);
        }
        const auto keeper = std::make_shared<RedisCache>(server.url(), form);
        PassageCache cache(1 << 20, keeper);
        const auto kept = cache.share(model, kText, 4);
        REQUIRE(kept->encoded());
        CHECK(kept->encoded()->download(backend) == fresh);
        CHECK(!cache.share(model, std::string(kText) + " ", 4)->encoded());
        // What a server makes of a record is a miss, and the record is thrown away.
        const std::string name = key_name(kept->key());
        std::string record = *server.run({"GET", name});
        record[record.size() / 2] ^= 1;
        server.run({"SET", name, record});
        CHECK(!PassageCache(1 << 20, keeper).share(model, kText, 4)->encoded());
        keeper->flush();
        CHECK(!server.run({"GET", name}));
        for (const std::string& other : {std::string(), std::string("RFRGPASS"), std::string(100000, '\0')}) {
            server.run({"SET", name, other});
            CHECK(!PassageCache(1 << 20, keeper).share(model, kText, 4)->encoded());
        }
    }
}

TEST_CASE("Redis: records of any bytes; those of other databases, and those whose time is over, are none") {
    const RedisServer server;
    if (!server) return;
    Said said;
    std::mt19937 random(3);
    std::vector<std::string> records;
    for (int i = 0; i < 50; ++i) {
        records.emplace_back(static_cast<size_t>(i) * 4000, '\0');
        for (char& c : records.back()) c = static_cast<char>(random());
    }
    {
        RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
        for (int i = 1; i < 50; ++i) {
            cache.keep(key(i), records[static_cast<size_t>(i)]);
            CHECK(cache.find(key(i)) == records[static_cast<size_t>(i)]);  // before or after it is written
        }
        cache.forget(key(7));
        CHECK(!cache.find(key(7)));
    }
    RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
    for (int i = 1; i < 50; ++i) {
        if (i == 7) {
            CHECK(!cache.find(key(i)));
        } else {
            CHECK(cache.find(key(i)) == records[static_cast<size_t>(i)]);
        }
    }
    RedisCache other(server.url() + "?db=1&ttl=1", EmbeddingForm::bf16, said.take());
    CHECK(!other.find(key(1)));
    other.keep(key(1), "short");
    other.flush();
    CHECK(other.find(key(1)) == "short");
    CHECK(becomes_true([&] { return !other.find(key(1)); }));
    CHECK(cache.find(key(1)) == records[1]);
    CHECK(said.count() == 0);
}

TEST_CASE("Redis: a server that goes away is misses and one warning, until it is back") {
    RedisServer server;
    if (!server) return;
    Said said;
    RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
    cache.keep(key(1), "one");
    cache.flush();
    CHECK(cache.find(key(1)) == "one");
    server.crash();
    for (int i = 0; i < 100; ++i) CHECK(!cache.find(key(1)));
    cache.keep(key(2), "two");
    cache.flush();
    CHECK(!cache.find(key(2)));
    CHECK(said.count() == 1);
    CHECK(contains(said.line(0), "unix://" + server.socket() + ": cannot be reached ("));
    CHECK(contains(said.line(0), ": going on without it"));
    server.start();
    CHECK(becomes_true([&] {
        cache.keep(key(3), "three");
        cache.flush();
        return cache.find(key(3)) == "three";
    }));
    CHECK(!cache.find(key(1)));  // it kept nothing on disk
    CHECK(said.count() == 1);
    server.crash();
    for (int i = 0; i < 10; ++i) CHECK(!cache.find(key(3)));
    CHECK(said.count() == 2);
}

TEST_CASE("Redis: nobody waits for a server that hangs") {
    RedisServer server;
    if (!server) return;
    Said said;
    RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
    cache.keep(key(1), "one");
    cache.flush();
    server.signal(SIGSTOP);
    // Once 200 ms, with what a busy machine adds.
    const double first = ms_of([&] { CHECK(!cache.find(key(1))); });
    CHECK(first >= 150);
    CHECK(first < 1500);
    CHECK(contains(said.line(0), "no answer within 200 ms"));
    // Then nothing, although the thread tries to connect the while: far less than 200 ms each.
    const double rest = ms_of([&] {
        for (int i = 0; i < 1000; ++i) CHECK(!cache.find(key(1)));
    });
    CHECK(rest < 1500);
    CHECK(said.count() == 1);
    server.signal(SIGCONT);
    CHECK(becomes_true([&] { return cache.find(key(1)) == "one"; }));
}

TEST_CASE("Redis: a server that is not there yet is tried again; one that refuses is an error at once") {
    RedisServer server({"--requirepass", "secret"});
    if (!server) return;
    const auto refused = [](const std::string& place) {
        try {
            RedisCache(place, EmbeddingForm::bf16);
        } catch (const Error& error) {
            CHECK(error.status() == Status::usage);
            CHECK(!contains(error.message(), "secret"));
            return error.message();
        }
        return std::string("(no error)");
    };
    CHECK(contains(refused(server.url()), "unix://" + server.socket() + ": refused (NOAUTH"));
    const std::string at = "@" + server.socket();
    CHECK(contains(refused("redis+unix://:secretx" + at), ": refused (WRONGPASS"));
    CHECK(contains(refused("redis+unix://nobody:secret" + at), ": refused (WRONGPASS"));
    CHECK(
        contains(refused("redis+unix://:secret" + at + "?db=99"), ": refused (ERR DB index is out of range"));
    CHECK(refused("redis+unix://:secret" + at) == "(no error)");
    CHECK(refused("redis+unix://default:secret" + at) == "(no error)");
    server.crash();
    Said said;
    RedisCache early("redis+unix://:secret" + at, EmbeddingForm::bf16, said.take());
    CHECK(said.count() == 1);
    CHECK(!early.find(key(1)));
    server.start();
    CHECK(becomes_true([&] {
        early.keep(key(1), "one");
        early.flush();
        return early.find(key(1)) == "one";
    }));
    CHECK(said.count() == 1);
}

TEST_CASE("Redis: what a server refuses, or holds in another form, is said once and is a miss") {
    RedisServer server({"--maxmemory", "3mb", "--maxmemory-policy", "noeviction"});
    if (!server) return;
    Said said;
    RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
    cache.keep(key(1), "one");
    cache.flush();
    const std::string name = key_name(key(2));
    server.run({"LPUSH", name, "a list"});
    CHECK(!cache.find(key(2)));
    CHECK(contains(said.line(0), ": refused (WRONGTYPE"));
    for (int i = 10; i < 90; ++i) cache.keep(key(i), std::string(100000, 'x'));
    cache.flush();
    CHECK(!cache.find(key(89)));
    CHECK(cache.find(key(1)) == "one");  // the connection is as good as before
    CHECK(said.count() == 1);
    // Full: where the server lets go of the oldest, new ones are kept.
    server.run({"CONFIG", "SET", "maxmemory-policy", "allkeys-lru"});
    cache.keep(key(89), "new");
    cache.flush();
    CHECK(cache.find(key(89)) == "new");
}

TEST_CASE("Redis: many threads, and a server that is killed again and again") {
    RedisServer server;
    if (!server) return;
    Said said;
    std::atomic<int> n_wrong = 0;
    std::atomic<int> n_hits = 0;
    {
        RedisCache cache(server.url(), EmbeddingForm::bf16, said.take());
        std::atomic<bool> stop = false;
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t) {
            threads.emplace_back([&, t] {
                for (int i = 0; !stop; ++i) {
                    const int which = (i * 7 + t) % 50;
                    const std::optional<std::string> found = cache.find(key(which));
                    const std::string record = str("record ", which, std::string(2000, 'r'));
                    if (found) ++(*found == record ? n_hits : n_wrong);
                    if (!found) cache.keep(key(which), record);
                    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                }
            });
        }
        for (int round = 0; round < 3; ++round) {
            std::this_thread::sleep_for(std::chrono::milliseconds(300));
            server.crash();
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            server.start();
            std::this_thread::sleep_for(std::chrono::milliseconds(1100));
        }
        stop = true;
        for (std::thread& thread : threads) thread.join();
    }
    CHECK(n_wrong == 0);
    CHECK(n_hits > 100);
    CHECK(said.count() >= 1);
    CHECK(said.count() <= 3);
}

TEST_CASE("Redis: run --cache as a user runs it") {
    RedisServer server({"--requirepass", "secret"});
    if (!server) return;
    TempDir dir;
    dir.write("p.jsonl", kPassages);
    const auto run = [&](const std::string& place) {
        return refrag_run(dir, std::string("run ") + kModel + "-k 4 --passages " + dir.file("p.jsonl") +
                                   " -q 'Where is the mill?' -n 4 --json --cache '" + place + "'");
    };
    const std::string place = "redis+unix://:secret@" + server.socket();
    const Ran first = run(place);
    const Ran second = run(place);
    CHECK(first.code == 0);
    CHECK(second.code == 0);
    CHECK(json_lines(first.out)[0].get_int("n_cached") == 0);
    CHECK(json_lines(second.out)[0].get_int("n_cached") == json_lines(second.out)[0].get_int("n_chunks"));
    CHECK(json_lines(first.out)[0].get_string("answer") == json_lines(second.out)[0].get_string("answer"));
    const Ran wrong = run("redis+unix://:secretx@" + server.socket());
    CHECK(wrong.code == 2);
    CHECK(contains(wrong.err, ": refused (WRONGPASS"));
    CHECK(line_count(wrong.err) == 1);
    CHECK(!contains(wrong.err, "secret"));
    server.crash();
    const Ran without = run(place);
    CHECK(without.code == 0);
    CHECK(contains(without.err, "refrag: warning: unix://" + server.socket() + ": cannot be reached ("));
    CHECK(json_lines(without.out)[0].get_string("answer") == json_lines(first.out)[0].get_string("answer"));
}
