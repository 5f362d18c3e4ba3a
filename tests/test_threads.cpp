// The thread pool: every task once, exceptions, sleeping and waking, several callers, destruction.
#include <atomic>
#include <chrono>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "base/check.h"
#include "base/threads.h"

using refrag::ThreadPool;

TEST_CASE("threads: every task runs exactly once") {
    for (const int n_threads : {1, 2, 3, 8}) {
        ThreadPool pool(n_threads);
        CHECK(pool.size() == n_threads);
        for (const int64_t n_tasks : {0, 1, 2, 3, 7, 64, 1000}) {
            std::vector<std::atomic<int>> count(static_cast<size_t>(n_tasks));
            pool.run(n_tasks, [&](int64_t i) { count[static_cast<size_t>(i)]++; });
            for (const auto& c : count) CHECK(c == 1);
        }
    }
}

TEST_CASE("threads: run() returns after the last task, and its writes are seen") {
    ThreadPool pool(3);
    std::vector<int64_t> plain(64);
    for (int64_t round = 0; round < 2000; ++round) {
        pool.run(64, [&](int64_t i) { plain[static_cast<size_t>(i)] = round * i; });
        bool all = true;
        for (int64_t i = 0; i < 64; ++i) all = all && plain[static_cast<size_t>(i)] == round * i;
        REQUIRE(all);
    }
}

TEST_CASE("threads: no two running tasks have the same thread number") {
    ThreadPool pool(4);
    std::vector<std::atomic<int>> busy(4);
    std::atomic<bool> clash{false};
    for (int round = 0; round < 200; ++round) {
        pool.run_on(16, [&](int64_t, int thread) {
            if (thread < 0 || thread >= 4 || busy[static_cast<size_t>(thread)]++ != 0) clash = true;
            busy[static_cast<size_t>(thread)]--;
        });
    }
    CHECK_FALSE(clash);
}

TEST_CASE("threads: sleeping workers wake for the next job") {
    ThreadPool pool(3);
    for (int round = 0; round < 5; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        std::atomic<int64_t> sum{0};
        pool.run(100, [&](int64_t i) { sum += i; });
        CHECK(sum == 4950);
    }
}

TEST_CASE("threads: both threads take part in long tasks") {
    ThreadPool pool(2);
    // Two tasks that wait for each other end only if two threads run them.
    std::atomic<int> here{0};
    pool.run(2, [&](int64_t) {
        here++;
        while (here < 2) std::this_thread::yield();
    });
    CHECK(here == 2);
}

TEST_CASE("threads: an exception comes out of run(), and the pool lives on") {
    for (const int n_threads : {1, 2, 4}) {
        ThreadPool pool(n_threads);
        for (int round = 0; round < 20; ++round) {
            std::string message;
            try {
                pool.run(50, [](int64_t i) {
                    if (i >= 10) refrag::fail(refrag::Status::runtime, "task failed");
                });
            } catch (const refrag::Error& e) {
                message = e.message();
            }
            CHECK(message == "task failed");
            std::atomic<int> done{0};
            pool.run(50, [&](int64_t) { done++; });
            CHECK(done == 50);
        }
    }
}

TEST_CASE("threads: several threads may call run() on one pool") {
    ThreadPool pool(2);
    std::atomic<int64_t> sum{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) pool.run(10, [&](int64_t i) { sum += i; });
        });
    }
    for (std::thread& t : callers) t.join();
    CHECK(sum == 3 * 200 * 45);
}

TEST_CASE("threads: a pool can end at any time") {
    for (int round = 0; round < 50; ++round) {
        auto pool = std::make_unique<ThreadPool>(4);
        if (round % 2 == 1) pool->run(8, [](int64_t) {});
        pool.reset();
    }
}

TEST_CASE("threads: sizes that make no sense are refused") {
    CHECK_THROWS_AS(ThreadPool(0), refrag::Error);
    CHECK_THROWS_AS(ThreadPool(-3), refrag::Error);
    CHECK_THROWS_AS(ThreadPool(1 << 20), refrag::Error);
    CHECK(refrag::default_threads() >= 1);
}
