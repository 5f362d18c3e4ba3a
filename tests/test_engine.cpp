// The engine as a server needs it: a long request keeps nobody waiting, admission goes by pages and arrival,
// a request can be ended in every phase, and prompts that begin alike share what they have in common.
#include <doctest/doctest.h>

#include <map>
#include <string>

#include "engine_test.h"
#include "refrag/memory_plan.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;
using refrag_test::run_all;

namespace {

struct Fixture : refrag_test::TinyRefrag {
    static Request tokens(int32_t n, int32_t n_new, int32_t first = 3) {
        return refrag_test::token_request(n, n_new, first);
    }
    Request compressed(int n_passages, int32_t n_new) const {
        return refrag_test::compressed_request(model, n_passages, n_new);
    }
};

TextSink count(int& n) {
    return [&n](std::string_view) {
        ++n;
        return true;
    };
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "engine: while a long request is made, others get a token every step") {
    const EngineOptions options{.n_slots = 2, .max_context = 512, .step_rows = 32};
    Engine engine(model, options);
    const uint64_t stream = engine.submit(tokens(4, 200));
    engine.step();
    REQUIRE(engine.n_running() == 1);
    engine.submit(compressed(12, 2));
    int steps_of_making = 0;
    while (engine.n_waiting() + engine.n_preparing() > 0) {
        engine.step();
        ++steps_of_making;
        CHECK(engine.n_running() >= 1);
        REQUIRE(steps_of_making < 190);
    }
    // The whole of it does not go into one step, nor into a few.
    CHECK(steps_of_making > 5);
    engine.cancel(stream);
    const std::map<uint64_t, Result> results = run_all(engine);
    REQUIRE(results.size() == 1);
    CHECK(!results.begin()->second.error);

    // A token a step: the stream's answer is as long as there were steps.
    Engine counted(model, options);
    std::string text;
    Request watched = tokens(4, 60);
    int pieces_before = 0, pieces = 0;
    watched.options.max_new_tokens = 60;
    watched.sink = count(pieces);
    counted.submit(std::move(watched));
    counted.step();
    counted.submit(compressed(12, 2));
    int steps = 1;
    std::vector<Result> ended;
    while (ended.empty()) {
        counted.step();
        ++steps;
        for (Result& result : counted.take_finished()) {
            if (result.id == 0) ended.push_back(std::move(result));
        }
        REQUIRE(steps < 500);
    }
    CHECK(ended[0].answer.ids.size() == 60);
    CHECK(steps == 60);
    CHECK(pieces > pieces_before);
}

TEST_CASE_FIXTURE(Fixture, "engine: the budget of a step changes no answer") {
    std::vector<Answer> answers;
    for (const int64_t step_rows : {1, 7, 64, 2048}) {
        Engine engine(model, {.n_slots = 3, .max_context = 512, .step_rows = step_rows});
        const uint64_t id = engine.submit(compressed(5, 12));
        engine.submit(tokens(70, 9));
        std::map<uint64_t, Result> results = run_all(engine);
        REQUIRE(results.size() == 2);
        REQUIRE(!results.at(id).error);
        answers.push_back(std::move(results.at(id).answer));
        CHECK(answers.back().ids == answers.front().ids);
        CHECK(answers.back().chunks.size() == answers.front().chunks.size());
    }
}

TEST_CASE_FIXTURE(Fixture, "engine: admission goes by pages, in the order of arrival") {
    // Four blocks of 32 positions for eight slots; prefixes are not kept, so that pages are what they seem.
    Engine engine(model, {.n_slots = 8, .max_context = 512, .kv_entries = 128, .prefix_cache = false});
    CHECK(engine.kv_bytes() ==
          4 * Generator::block_bytes(model.decoder().config(), model.decoder().kv_dtype()));
    engine.submit(tokens(40, 20));  // 60 positions: two blocks
    engine.submit(tokens(50, 40));  // three: must wait
    engine.submit(tokens(5, 5));    // one: would fit, and waits behind
    engine.step();
    CHECK(engine.n_running() == 1);
    std::vector<uint64_t> order;
    for (int step = 0; !engine.idle(); ++step) {
        REQUIRE(step < 500);
        engine.step();
        for (const Result& result : engine.take_finished()) {
            CHECK(!result.error);
            order.push_back(result.id);
        }
    }
    CHECK(order == std::vector<uint64_t>{0, 2, 1});  // 1 and 2 began together, 2 is shorter
    // Without a limit of its own an answer ends with the pool.
    Request endless = tokens(40, -1);
    const uint64_t endless_id = engine.submit(std::move(endless));
    std::map<uint64_t, Result> ended = run_all(engine);
    REQUIRE(!ended.at(endless_id).error);
    CHECK(ended.at(endless_id).answer.finish == FinishReason::context_full);
    CHECK(ended.at(endless_id).answer.ids.size() == 128 - 40 + 1);  // the last is not fed
    CHECK(engine.idle());
    // What can never fit is refused with both numbers, and others are served.
    const uint64_t large = engine.submit(tokens(100, 60));
    const uint64_t small = engine.submit(tokens(5, 5));
    std::map<uint64_t, Result> results = run_all(engine);
    REQUIRE(results.at(large).error);
    CHECK(contains(results.at(large).error->message(), "the prompt takes 100 decoder positions"));
    CHECK(contains(results.at(large).error->message(), "more than the 128 that the KV cache has memory for"));
    CHECK(!results.at(small).error);
}

TEST_CASE_FIXTURE(Fixture, "engine: a request is cancelled wherever it is, and leaves nothing behind") {
    Engine engine(
        model,
        {.n_slots = 2, .max_context = 512, .kv_entries = 1024, .step_rows = 16, .prefix_cache = false});
    const uint64_t running = engine.submit(tokens(4, 300));
    engine.step();
    const uint64_t preparing = engine.submit(compressed(10, 300));
    const uint64_t waiting = engine.submit(tokens(4, 300));
    engine.step();
    CHECK(engine.n_running() == 1);
    CHECK(engine.n_preparing() == 1);
    CHECK(engine.n_waiting() == 1);
    engine.cancel(waiting);
    CHECK(engine.n_waiting() == 0);
    engine.cancel(preparing);
    CHECK(engine.n_preparing() == 0);
    engine.cancel(running);
    CHECK(engine.n_running() == 0);
    CHECK(engine.idle());
    // A prompt half read.
    const uint64_t prefilling = engine.submit(tokens(200, 5));
    engine.step();
    engine.step();
    CHECK(engine.n_running() == 1);
    engine.cancel(prefilling);
    CHECK(engine.idle());
    engine.cancel(12345);  // nobody's
    CHECK(engine.take_finished().empty());
    // All pages are back: two requests that need the whole pool.
    engine.submit(tokens(400, 112));
    engine.submit(tokens(400, 112));
    engine.step();
    engine.step();
    CHECK(engine.n_running() == 2);
    CHECK(run_all(engine).size() == 2);
}

TEST_CASE_FIXTURE(Fixture, "engine: a sink that wants no more ends its answer; a sink may cancel") {
    Engine engine(model, {.n_slots = 3, .max_context = 512});
    Request first = tokens(4, 100);
    std::string streamed;
    int pieces = 0;
    first.sink = [&](std::string_view piece) {
        streamed += piece;
        return ++pieces < 3;
    };
    const uint64_t stopped = engine.submit(std::move(first));
    Request second = tokens(6, 100);
    uint64_t other = 0, self = 0;
    int self_pieces = 0;
    second.sink = [&](std::string_view) {
        if (++self_pieces == 2) {
            engine.cancel(other);
            engine.cancel(self);
        }
        return true;
    };
    self = engine.submit(std::move(second));
    int other_pieces = 0;
    Request third = tokens(8, 100);
    third.sink = count(other_pieces);
    other = engine.submit(std::move(third));
    const std::map<uint64_t, Result> results = run_all(engine);
    REQUIRE(results.size() == 1);
    const Answer& answer = results.at(stopped).answer;
    CHECK(answer.finish == FinishReason::cancelled);
    CHECK(std::string(finish_reason_name(answer.finish)) == "cancelled");
    CHECK(pieces == 3);
    CHECK(answer.text == streamed);
    CHECK(self_pieces == 2);
    CHECK(other_pieces <= 3);
}

TEST_CASE_FIXTURE(Fixture, "engine: prompts that begin alike share pages, and answer the same bit for bit") {
    const auto ask = [&](bool prefix_cache, int32_t n_slots) {
        Engine engine(model, {.n_slots = n_slots, .max_context = 512, .prefix_cache = prefix_cache});
        std::vector<Answer> answers;
        for (int round = 0; round < 2; ++round) {
            std::vector<uint64_t> ids;
            for (const int32_t n : {100, 100, 140}) ids.push_back(engine.submit(tokens(n, 30)));
            Request other = tokens(100, 30, 7);
            ids.push_back(engine.submit(std::move(other)));
            Request mixed = compressed(8, 20);
            mixed.options.logprobs = 3;
            ids.push_back(engine.submit(std::move(mixed)));
            std::map<uint64_t, Result> results = run_all(engine);
            for (const uint64_t id : ids) {
                REQUIRE(!results.at(id).error);
                answers.push_back(std::move(results.at(id).answer));
            }
        }
        return answers;
    };
    const std::vector<Answer> without = ask(false, 1);
    for (const int32_t n_slots : {1, 5}) {
        CAPTURE(n_slots);
        const std::vector<Answer> with = ask(true, n_slots);
        REQUIRE(with.size() == without.size());
        for (size_t i = 0; i < with.size(); ++i) {
            CAPTURE(i);
            CHECK(with[i].ids == without[i].ids);
            CHECK(with[i].logprobs == without[i].logprobs);
            CHECK(without[i].n_reused == 0);
        }
        if (n_slots == 1) {
            CHECK(with[0].n_reused == 0);
            CHECK(with[1].n_reused == 96);  // of 100 rows, whole blocks without the last row
            CHECK(with[2].n_reused == 96);
            CHECK(with[3].n_reused == 0);  // other ids from the first row on
            CHECK(with[4].n_reused == 0);
            CHECK(with[7].n_reused == 128);  // 140 rows
            CHECK(with[9].n_reused > 0);     // chunk rows, in the second round
        }
    }
}

TEST_CASE_FIXTURE(Fixture, "engine: the same chunks with another choice are another prefix") {
    Engine engine(model, {.n_slots = 1, .max_context = 512});
    const auto reused = [&](SelectPolicy policy) {
        Request request = compressed(3, 4);
        request.options.policy = policy;
        const uint64_t id = engine.submit(std::move(request));
        std::map<uint64_t, Result> results = run_all(engine);
        REQUIRE(!results.at(id).error);
        return results.at(id).answer.n_reused;
    };
    CHECK(reused(SelectPolicy::none) == 0);
    CHECK(reused(SelectPolicy::all) == 0);
    CHECK(reused(SelectPolicy::none) > 0);
    CHECK(reused(SelectPolicy::all) > 0);
}

TEST_CASE_FIXTURE(Fixture, "engine: kept prefixes give way to requests that need their pages") {
    Engine engine(model, {.n_slots = 1, .max_context = 512, .kv_entries = 160});  // five blocks
    for (const int32_t first : {3, 40, 77, 3, 111}) {
        engine.submit(tokens(100, 20, first));
        const std::map<uint64_t, Result> results = run_all(engine);
        REQUIRE(results.size() == 1);
        CHECK(!results.begin()->second.error);
        CHECK(results.begin()->second.answer.ids.size() == 20);
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "engine: pages that were promised are there, whatever prefixes are kept meanwhile") {
    // Nine blocks: three and six for two prompts that begin alike and are read at the same time. The first
    // ends, and what is kept of it is promised to the third request. Then the second's prompt is kept, behind
    // the same beginning.
    Engine engine(model, {.n_slots = 3, .max_context = 512, .kv_entries = 288, .step_rows = 32});
    engine.submit(tokens(70, 2));
    engine.submit(tokens(140, 40));
    engine.submit(tokens(60, 30, 120));
    const std::map<uint64_t, Result> results = run_all(engine);
    REQUIRE(results.size() == 3);
    for (const auto& [id, result] : results) {
        CAPTURE(id);
        CHECK(!result.error);
    }
    CHECK(engine.stats().prefix_hits == 0);
}

TEST_CASE_FIXTURE(Fixture, "engine: options that make no sense are refused") {
    CHECK(contains(error_of([&] { Engine(model, {.step_rows = 0}); }), "at least 1 row a step"));
    CHECK(contains(error_of([&] { Engine(model, {.kv_entries = -1}); }), "found 2048 and -1"));
}

TEST_CASE_FIXTURE(Fixture,
                  "engine: the memory plan counts page tables as wide as a sequence can come to be") {
    const DecoderConfig& c = model.decoder().config();
    const auto tables = [&](int64_t longest) {
        return KvCache::most_table_bytes(4, c.n_layers * c.n_kv_heads, longest);
    };
    const MemoryPlan whole = plan_memory(model, 4, 512), pool = plan_memory(model, 4, 512, 96);
    CHECK(pool.kv_blocks == 3);
    CHECK(whole.workspace_bytes - pool.workspace_bytes == tables(16) - tables(3));
}
