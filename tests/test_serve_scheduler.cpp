// Many requests at once: the queue and its bound, who is first, clients that leave, deadlines, shutting down.
#include <atomic>
#include <thread>

#include "serve_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// A request that takes so many tokens.
std::string long_request(int n_tokens, const std::string& more = "", const std::string& prompt = "Once") {
    return str(R"({"prompt": ")", prompt, R"(", "ignore_eos": true, "max_tokens": )", n_tokens,
               more.empty() ? "" : ", ", more, "}");
}

std::string long_prompt(int n_words) {
    std::string words;
    for (int i = 0; i < n_words; ++i) words += str(" w", i % 100);
    return words;
}

ServedOptions with(int32_t n_slots, size_t queue) {
    ServedOptions options;
    options.scheduler.engine.n_slots = n_slots;
    options.scheduler.max_queue = queue;
    return options;
}

}  // namespace

namespace {

// A decoder that says nothing until it is released: what it was asked holds its slot, however fast or slow
// the machine is.
class StuckDecoder final : public RemoteDecoder {
  public:
    std::string name() const override { return "stuck"; }
    int64_t max_context() const override { return 2048; }
    std::unique_ptr<RemoteAnswers> open() const override { return std::make_unique<Answers>(released); }
    std::atomic<bool> released{false};

  private:
    class Answers final : public RemoteAnswers {
      public:
        explicit Answers(const std::atomic<bool>& released) : released_(released) {}
        void start(uint64_t, const RemotePrompt&) override {}
        void stop(uint64_t) noexcept override {}
        void wait(std::chrono::milliseconds most) override { std::this_thread::sleep_for(most); }
        RemoteNews take(uint64_t) override {
            RemoteNews news;
            news.ended = news.at_end = released_;
            return news;
        }

      private:
        const std::atomic<bool>& released_;
    };
};

}  // namespace

TEST_CASE("serve: beyond slots and queue a request is answered 429 at once, and health goes on") {
    const auto decoder = std::make_shared<StuckDecoder>();
    ServedOptions options = with(1, 1);
    options.decoder = decoder;
    Served served(options);
    HttpClient first(served.port()), second(served.port());
    REQUIRE(first.ask("POST", "/v1/completions", long_request(1900)));
    REQUIRE(second.ask("POST", "/v1/completions", long_request(5)));
    REQUIRE(Served::soon([&] { return served.server().stats().n_pending == 2; }));
    const HttpReply third = served.post("/v1/completions", long_request(5));
    CHECK(third.status == 429);
    CHECK(third.has_header("retry-after: 1"));
    CHECK(third.error("code") == "queue_full");
    CHECK(served.post("/v1/completions", long_request(5, R"("stream": true)")).status == 429);
    CHECK(served.get("/health").status == 200);
    first.leave();
    decoder->released = true;
    CHECK(second.reply().status == 200);
    CHECK(served.post("/v1/completions", long_request(5)).status == 200);
}

TEST_CASE("serve: who comes first is served first") {
    const auto device = make_cpu_device(2);
    const Model model(*device, "weights_tools/refrag-nano");
    std::vector<size_t> order;  // written on the scheduler's thread
    SchedulerOptions options;
    options.engine.n_slots = 1;
    Scheduler scheduler(model, options);
    for (size_t i = 0; i < 6; ++i) {
        Scheduler::Job job;
        job.request.segments = {TextSegment{str("Number ", i)}};
        // The first is the longest: whoever overtook it would be seen.
        job.request.options.max_new_tokens = i == 0 ? 200 : 5;
        job.request.options.ignore_eos = true;
        job.done = [&order, i](Result&& result) {
            if (!result.error) order.push_back(i);
        };
        std::vector<Scheduler::Job> jobs;
        jobs.push_back(std::move(job));
        REQUIRE(scheduler.submit(std::move(jobs)));
    }
    REQUIRE(scheduler.wait_idle(std::chrono::steady_clock::now() + std::chrono::seconds(60)));
    scheduler.stop();
    CHECK(order == std::vector<size_t>{0, 1, 2, 3, 4, 5});
}

TEST_CASE(
    "serve: a client that leaves frees its place, whether it waits, its prompt is made or read, or it is "
    "answered") {
    Served served(with(1, 8));
    const auto all_gone = [&] { return served.server().stats().n_pending == 0; };
    SUBCASE("streamed") {
        HttpClient client(served.port());
        REQUIRE(client.ask("POST", "/v1/completions", long_request(1900, R"("stream": true)")));
        REQUIRE(client.read_until("data: "));
        client.leave();
        CHECK(Served::soon(all_gone));
    }
    SUBCASE("not streamed") {
        HttpClient client(served.port());
        REQUIRE(client.ask("POST", "/v1/completions", long_request(1900)));
        REQUIRE(Served::soon([&] { return served.server().stats().engine.n_running == 1; }));
        client.leave();
        CHECK(Served::soon(all_gone));
    }
    SUBCASE("in the queue") {
        HttpClient first(served.port()), second(served.port());
        REQUIRE(first.ask("POST", "/v1/completions", long_request(1900)));
        REQUIRE(Served::soon([&] { return served.server().stats().engine.n_running == 1; }));
        REQUIRE(second.ask("POST", "/v1/completions", long_request(1900)));
        REQUIRE(Served::soon([&] { return served.server().stats().n_pending == 2; }));
        second.leave();
        CHECK(Served::soon([&] { return served.server().stats().n_pending == 1; }));
        first.leave();
        CHECK(Served::soon(all_gone));
    }
    SUBCASE("while its passages are encoded") {
        HttpClient client(served.port());
        std::string documents;
        for (int i = 0; i < 45; ++i) documents += str(i == 0 ? "" : ", ", "\"", i, long_prompt(200), "\"");
        REQUIRE(client.ask(
            "POST", "/v1/chat/completions",
            str(R"({"messages": [{"role": "user", "content": "x"}], "expand_fraction": 0, "documents": [)",
                documents, "]}")));
        REQUIRE(Served::soon([&] { return served.server().stats().n_pending == 1; }));
        client.leave();
        CHECK(Served::soon(all_gone));
    }
    SUBCASE("a passage that is put, embeddings") {
        HttpClient client(served.port());
        REQUIRE(client.ask("PUT", "/v1/passages/a", str(R"({"text": ")", long_prompt(50000), "\"}")));
        REQUIRE(Served::soon([&] { return served.server().stats().n_encoding == 1; }));
        client.leave();
        CHECK(Served::soon([&] { return served.server().stats().n_encoding == 0; }));
        CHECK(served.get("/v1/passages/a").status == 404);
    }
    CHECK(served.post("/v1/completions", long_request(3)).status == 200);
    CHECK(contains(served.get("/metrics").body, "refrag_requests_failed_total 0\n"));
}

TEST_CASE("serve: a request's time ends it: 504 before its first token, what there is after it") {
    Served served(with(1, 8));
    const HttpReply part = served.post("/v1/completions", long_request(1900, R"("timeout": 0.3)"));
    CAPTURE(part.body);
    REQUIRE(part.status == 200);
    CHECK(part.json().get_array("choices").at(0).get_string("finish_reason") == "length");
    const int64_t n = part.json().get_object("usage").get_int("completion_tokens");
    CHECK(n > 0);
    CHECK(n < 1900);
    HttpClient first(served.port());
    REQUIRE(first.ask("POST", "/v1/completions", long_request(1900)));
    REQUIRE(Served::soon([&] { return served.server().stats().n_pending == 1; }));
    for (const char* stream : {"false", "true"}) {
        const HttpReply late =
            served.post("/v1/completions", long_request(5, str(R"("timeout": 0.05, "stream": )", stream)));
        CHECK(late.status == 504);
        CHECK(late.error("code") == "deadline_exceeded");
    }
    ServedOptions options = with(1, 8);
    options.api.max_seconds = 0.2;
    const Served bounded(std::move(options));
    const HttpReply capped = bounded.post("/v1/completions", long_request(1900, R"("timeout": 50)"));
    CHECK(capped.json().get_object("usage").get_int("completion_tokens") < 1900);
}

TEST_CASE("serve: answers under way get their tokens while a long prompt is read beside them") {
    ServedOptions options = with(2, 8);
    options.scheduler.step_ms = 0.01;  // for which the fewest rows of a step, 16, are too many on any machine
    Served served(std::move(options));
    HttpClient running(served.port());
    REQUIRE(running.ask("POST", "/v1/completions", long_request(2000, R"("stream": true)")));
    REQUIRE(running.read_until("data: "));
    // How long steps take is known once a prompt has been read.
    served.post("/v1/completions", long_request(1, "", "warm" + long_prompt(100)));
    REQUIRE(Served::soon([&] { return served.server().stats().step_rows == 16; }));
    const int64_t steps_before = served.server().stats().engine.steps;
    const HttpReply reply = served.post("/v1/completions", long_request(1, "", "cold" + long_prompt(200)));
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    const int64_t n = reply.json().get_object("usage").get_int("prompt_tokens");
    CHECK(n > 400);
    // Each of its steps gave the other answer its token.
    CHECK(Served::soon([&] { return served.server().stats().engine.steps - steps_before >= n / 16; }, 1.0));
}

TEST_CASE("serve: many clients at once get what each would get alone") {
    Served served(with(4, 64));
    std::vector<std::string> alone;
    for (int i = 0; i < 8; ++i)
        alone.push_back(served.post("/v1/completions", long_request(20, "", str("Number ", i)))
                            .json()
                            .get_array("choices")
                            .at(0)
                            .get_string("text"));
    std::atomic<int> n_good{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([&, i] {
            for (int round = 0; round < 4; ++round) {
                const bool streams = (round + i) % 2 == 0;
                const HttpReply reply =
                    http(served.port(), "POST", "/v1/completions",
                         long_request(20, streams ? R"("stream": true)" : "", str("Number ", i)));
                std::string text;
                if (streams) {
                    for (const std::string& event : events_of(reply.body))
                        if (event != "[DONE]")
                            text += Json::parse(event, "event").get_array("choices").at(0).get_string("text");
                } else if (reply.status == 200) {
                    text = reply.json().get_array("choices").at(0).get_string("text");
                }
                n_good += text == alone[static_cast<size_t>(i)] ? 1 : 0;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(n_good == 32);
}

TEST_CASE("serve: drained, the server ends what it has, and takes no more") {
    Served served(with(1, 8));
    HttpClient client(served.port()), kept(served.port());
    REQUIRE(kept.ask("GET", "/health"));
    CHECK(kept.reply().status == 200);
    REQUIRE(client.ask("POST", "/v1/completions", long_request(150)));
    REQUIRE(Served::soon([&] { return served.server().stats().n_pending == 1; }));
    served.server().drain();
    CHECK_FALSE(HttpClient(served.port()).connected());
    REQUIRE(kept.ask("POST", "/v1/completions", long_request(1)));
    const HttpReply refused = kept.reply();
    CHECK(refused.status == 503);
    CHECK(refused.error("code") == "shutting_down");
    REQUIRE(kept.ask("GET", "/ready"));
    CHECK(kept.reply().status == 503);
    const HttpReply whole = client.reply();
    CHECK(whole.status == 200);
    CHECK(whole.json().get_object("usage").get_int("completion_tokens") == 150);
    CHECK(served.server().wait_idle(std::chrono::steady_clock::now() + std::chrono::seconds(5)));
}

TEST_CASE("serve: a server that goes while it answers cuts its clients off, and hangs on none") {
    auto served = std::make_unique<Served>(with(2, 8));
    std::vector<std::unique_ptr<HttpClient>> clients;
    for (int i = 0; i < 4; ++i) {
        clients.push_back(std::make_unique<HttpClient>(served->port()));
        REQUIRE(clients.back()->ask("POST", "/v1/completions",
                                    long_request(1900, i % 2 == 0 ? R"("stream": true)" : "")));
    }
    REQUIRE(Served::soon([&] { return served->server().stats().n_pending == 4; }));
    served.reset();
    for (const auto& client : clients) CHECK(client->closed());
}
