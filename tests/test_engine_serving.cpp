// What a server asks of an engine beside answers: deadlines, cancelling from anywhere, figures, and steps
// whose work is bounded.
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "engine_test.h"
#include "faulty_device.h"

using namespace refrag;
using namespace refrag_test;
using std::chrono::steady_clock;

namespace {

struct Fixture {
    FaultyDevice device{cpu().device()};
    Model model{device, tiny_refrag_path()};
};

Request with_deadline(Request request, steady_clock::time_point when) {
    request.deadline = when;
    return request;
}

const auto past = [] { return steady_clock::now() - std::chrono::seconds(1); };
const auto far = [] { return steady_clock::now() + std::chrono::hours(1); };

}  // namespace

TEST_CASE_FIXTURE(Fixture, "engine: past its deadline a request ends, in whatever phase it is") {
    Engine engine(model, {.n_slots = 3, .max_context = 512, .step_rows = 16, .prefix_cache = false});
    // Close enough that steps pass, far enough that they do on a slow machine: the test waits, not the steps.
    const auto soon = steady_clock::now() + std::chrono::milliseconds(400);
    std::string streamed;
    Request decoding = with_deadline(token_request(4, 400), soon);
    decoding.sink = [&](std::string_view piece) {
        streamed += piece;
        return true;
    };
    engine.submit(std::move(decoding));
    engine.step();
    engine.submit(with_deadline(token_request(300, 5), soon));
    engine.step();
    engine.step();
    engine.submit(with_deadline(compressed_request(model, 10, 5), soon));
    engine.submit(with_deadline(token_request(4, 5), soon));
    const uint64_t patient = engine.submit(with_deadline(token_request(4, 5), far()));
    engine.step();
    REQUIRE(engine.take_finished().empty());
    REQUIRE(engine.n_running() == 2);
    REQUIRE(engine.n_preparing() == 1);
    REQUIRE(engine.n_waiting() == 2);
    std::this_thread::sleep_until(soon + std::chrono::milliseconds(1));
    engine.step();
    std::vector<Result> ended = engine.take_finished();
    Results results;
    for (Result& result : ended) results[result.id] = std::move(result);
    REQUIRE(results.size() == 4);
    for (const auto& [id, result] : results) {
        CAPTURE(id);
        CHECK(id < 4);
        CHECK(!result.error);
        CHECK(result.answer.finish == FinishReason::deadline);
        CHECK(std::string(finish_reason_name(result.answer.finish)) == "deadline");
    }
    CHECK(!results.at(0).answer.ids.empty());
    CHECK(results.at(0).answer.text == streamed);
    CHECK(results.at(1).answer.ids.empty());
    CHECK(results.at(2).answer.chunk_len > 0);
    CHECK(results.at(3).answer.times.queue > 0.0);
    CHECK(engine.stats().expired == 4);
    // The pages are back, and the one that waited is served.
    const Results rest = run_all(engine);
    REQUIRE(rest.size() == 1);
    CHECK(rest.at(patient).answer.finish == FinishReason::max_tokens);
    CHECK(engine.stats().kv_blocks_used == 0);
    // One that is late when it comes does no work.
    const int64_t rows = device.rows;
    const uint64_t late = engine.submit(with_deadline(token_request(4, 5), past()));
    CHECK(run_all(engine).at(late).answer.finish == FinishReason::deadline);
    CHECK(device.rows == rows);
}

TEST_CASE_FIXTURE(Fixture, "engine: what a sink throws at its deadline is its request's error") {
    constexpr int32_t kTokens = 6;
    Engine engine(model, 1);
    engine.submit(token_request(4, kTokens));
    const std::string text = run_all(engine).at(0).answer.text;
    REQUIRE(!text.empty());
    Request request =
        with_deadline(token_request(4, 300), steady_clock::now() + std::chrono::milliseconds(500));
    // A stop string that begins like the text: all of it is held back, and given at the end.
    request.options.stop = {text + "\x01 nowhere"};
    int pieces = 0;
    request.sink = [&](std::string_view) -> bool {
        ++pieces;
        fail(Status::runtime, "gone");
    };
    const uint64_t id = engine.submit(std::move(request));
    const int64_t before = engine.stats().tokens_generated;
    while (engine.stats().tokens_generated < before + kTokens - 1) engine.step();
    CHECK(pieces == 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(520));
    const Results results = run_all(engine);
    REQUIRE(results.size() == 1);
    REQUIRE(results.at(id).error);
    CHECK(contains(results.at(id).error->message(), "gone"));
    CHECK(pieces == 1);
}

TEST_CASE_FIXTURE(Fixture, "engine: cancelled within a step, a request says no more and gives nothing") {
    Engine engine(model, {.n_slots = 3, .max_context = 512});
    uint64_t other = 0;
    int pieces = 0, other_pieces = 0;
    bool cancelled = false;
    Request first = token_request(4, 30);
    first.sink = [&](std::string_view) {
        if (++pieces == 5) {
            engine.cancel(other);
            cancelled = true;
        }
        return true;
    };
    engine.submit(std::move(first));
    Request second = token_request(6, 200);
    second.sink = [&](std::string_view) {
        CHECK(!cancelled);
        ++other_pieces;
        return true;
    };
    other = engine.submit(std::move(second));
    const Results results = run_all(engine);
    REQUIRE(results.size() == 1);
    CHECK(results.contains(0));
    CHECK(cancelled);
    CHECK(other_pieces > 0);
    CHECK(engine.stats().cancelled == 1);
    CHECK(engine.stats().finished == 1);
}

TEST_CASE_FIXTURE(Fixture, "engine: a sink may cancel its own request, with its last text too") {
    // The text of the last token, or what the end flushes: the count of pieces is learned first.
    int n_pieces = 0;
    Engine engine(model, 1);
    Request counted = token_request(4, 9);
    counted.sink = [&](std::string_view) { return ++n_pieces > 0; };
    engine.submit(std::move(counted));
    const std::string text = run_all(engine).at(0).answer.text;
    REQUIRE(n_pieces > 1);
    for (int at = 1; at <= n_pieces; ++at) {
        CAPTURE(at);
        Request request = token_request(4, 9);
        int pieces = 0;
        uint64_t self = 0;
        request.sink = [&](std::string_view) {
            if (++pieces == at) engine.cancel(self);
            return true;
        };
        self = engine.submit(std::move(request));
        CHECK(run_all(engine).empty());
        CHECK(pieces == at);
    }
    // With a stop string that begins like the text and is never completed all of it comes at the end.
    Request held = token_request(4, 9);
    held.options.stop = {text + "x"};
    uint64_t self = 0;
    std::string given;
    held.sink = [&](std::string_view piece) {
        given += piece;
        engine.cancel(self);
        return true;
    };
    self = engine.submit(std::move(held));
    CHECK(run_all(engine).empty());
    CHECK(given == text);
}

TEST_CASE_FIXTURE(Fixture,
                  "engine: a request that has ended is cancelled as long as its result is not taken") {
    Engine engine(model, {.n_slots = 2, .max_context = 512});
    const uint64_t first = engine.submit(token_request(4, 2));
    const uint64_t second = engine.submit(token_request(5, 2));
    while (!engine.idle()) engine.step();
    engine.cancel(first);
    engine.cancel(first);
    const std::vector<Result> results = engine.take_finished();
    REQUIRE(results.size() == 1);
    CHECK(results[0].id == second);
    CHECK(engine.stats().cancelled == 1);
}

TEST_CASE_FIXTURE(Fixture, "engine: a sink may submit") {
    Engine engine(model, {.n_slots = 1, .max_context = 512});
    int64_t n_submitted = 0;
    std::function<Request(int)> chain = [&](int depth) {
        Request request = token_request(4, 3);
        if (depth == 0) return request;
        auto once = std::make_shared<bool>(false);
        request.sink = [&, depth, once](std::string_view) {
            if (!std::exchange(*once, true)) {
                engine.submit(chain(depth - 1));
                ++n_submitted;
            }
            return true;
        };
        return request;
    };
    engine.submit(chain(4));
    CHECK(run_all(engine).size() == 5);
    CHECK(n_submitted == 4);
}

TEST_CASE_FIXTURE(Fixture, "engine: figures say what it holds and what it has done") {
    Engine engine(model, {.n_slots = 2, .max_context = 512, .kv_entries = 640});
    EngineStats stats = engine.stats();
    CHECK(stats.kv_blocks == 20);
    CHECK(stats.kv_blocks_used == 0);
    CHECK(stats.kv_blocks_kept == 0);
    CHECK(stats.n_slots == 2);
    engine.submit(token_request(100, 30));
    engine.submit(token_request(40, 10, 90));
    engine.submit(token_request(100, 5));
    stats = engine.stats();
    CHECK(stats.n_waiting == 3);
    CHECK(stats.n_running == 0);
    engine.step();
    stats = engine.stats();
    CHECK(stats.n_waiting == 1);
    CHECK(stats.n_running == 2);
    CHECK(stats.steps == 1);
    CHECK(stats.rows_prefilled == 140);
    CHECK(stats.rows_reused == 0);
    CHECK(stats.prompts == 2);
    CHECK(stats.tokens_generated == 2);
    CHECK(stats.kv_blocks_used == 4 + 2);  // 100 and 40 rows, and their first ids are not fed yet
    for (int i = 0; i < 3; ++i) engine.step();
    CHECK(engine.stats().tokens_generated == 8);
    CHECK(engine.stats().rows_prefilled == 140);
    const Results results = run_all(engine);
    stats = engine.stats();
    CHECK(stats.n_waiting + stats.n_preparing + stats.n_running == 0);
    CHECK(stats.tokens_generated == 30 + 10 + 5);
    CHECK(stats.prompts == 3);
    CHECK(stats.prefix_hits == 1);
    CHECK(stats.rows_reused == 96);
    CHECK(stats.rows_prefilled == 140 + 4);
    CHECK(results.at(2).answer.n_reused == 96);
    CHECK(stats.kv_blocks_used == 0);
    // Whole blocks of 129, 49 and 104 positions that were held, the last one's beginning the first's.
    CHECK(stats.kv_blocks_kept == 4 + 1);
    CHECK(stats.finished == 3);
    CHECK(stats.failed + stats.expired + stats.cancelled + stats.steps_redone == 0);
    Request broken = token_request(4, 5);
    broken.sink = [](std::string_view) -> bool { fail(Status::runtime, "gone"); };
    engine.submit(std::move(broken));
    run_all(engine);
    CHECK(engine.stats().failed == 1);
    engine.submit(token_request(600, 5));
    run_all(engine);
    CHECK(engine.stats().failed == 2);
}

TEST_CASE_FIXTURE(Fixture, "engine: the rows of a step are bounded, whatever waits, and answers go on") {
    constexpr int64_t kStepRows = 48;
    Engine engine(model, {.n_slots = 6, .max_context = 512, .step_rows = kStepRows, .prefix_cache = false});
    const auto submit = [&](Request request) { return engine.submit(std::move(request)); };
    submit(token_request(4, 400));
    engine.step();
    for (int i = 0; i < 2; ++i) {
        submit(token_request(300, 3, 10 + i));
        submit(compressed_request(model, 8, 3));
        submit(token_request(90, 40, 50 + i));
    }
    int64_t n_steps = 0, largest = 0;
    while (engine.n_waiting() + engine.n_preparing() > 0 || engine.n_running() > 1) {
        const EngineStats before = engine.stats();
        const int64_t rows = device.rows;
        engine.step();
        // A chunk of the encoder has chunk_len tokens and two special ones.
        const int64_t bound =
            kStepRows + static_cast<int64_t>(before.n_running) + model.config().chunk_len + 2;
        largest = std::max(largest, device.rows - rows);
        CHECK(device.rows - rows <= bound);
        // The stream's token, and one of every other that generated.
        CHECK(engine.stats().tokens_generated > before.tokens_generated);
        REQUIRE(++n_steps < 300);
    }
    CHECK(largest >= kStepRows);
    CHECK(n_steps > 20);
    engine.cancel(0);
    CHECK(engine.take_finished().size() == 6);
}
