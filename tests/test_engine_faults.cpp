// One request's failure is its own, in every phase: at whichever op a pass fails, or allocation, the others'
// answers do not differ by a bit, and the engine answers on.
#include <algorithm>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine_test.h"
#include "failing.h"
#include "faulty_device.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture {
    FaultyDevice device{cpu().device()};
    Model model{device, tiny_refrag_path()};

    // Four requests, sampled, so that a sampler that drew once too often would say something else.
    std::vector<Request> requests() const {
        std::vector<Request> list;
        for (int i = 0; i < 3; ++i) {
            list.push_back(token_request(20 + 30 * i, 12, 3 + 60 * i));
            list.back().options.logprobs = 2;
        }
        list.push_back(compressed_request(model, 3, 12));
        for (size_t i = 0; i < list.size(); ++i)
            list[i].options.sampler = {.temperature = 1.5f, .seed = 40 + i};
        return list;
    }
    // poison_at: the request that brings the poison, itself in its prompt.
    std::vector<Request> poisoned(size_t poison_at, int32_t poison) const {
        std::vector<Request> list = requests();
        list[poison_at].segments.emplace_back(TokenSegment{{poison}});
        return list;
    }
    static Results run(Engine& engine, std::vector<Request> list) {
        for (Request& request : list) engine.submit(std::move(request));
        return run_all(engine);
    }
};

constexpr int32_t kPoison = 310;  // no other prompt has it, and none of the answers below

// Ids that a request alone says, at its third token or later.
int32_t said_by_one_alone(const Results& results, uint64_t& who) {
    for (const auto& [id, result] : results) {
        for (size_t i = 2; i + 1 < result.answer.ids.size(); ++i) {
            const int32_t candidate = result.answer.ids[i];
            if (candidate < 203) continue;  // of a prompt, perhaps
            int64_t n = 0;
            for (const auto& [other, its] : results)
                n += std::count(its.answer.ids.begin(), its.answer.ids.end(), candidate);
            who = id;
            if (n == 1) return candidate;
        }
    }
    return -1;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture,
                  "engine faults: a prompt that fails at any op ends alone, the others are as without it") {
    for (const int64_t step_rows : {int64_t{32}, int64_t{2048}}) {
        const EngineOptions options{.n_slots = 4, .max_context = 512, .step_rows = step_rows};
        device.poison = kPoison;
        device.fail_at = -1;
        Results expected;
        {
            Engine engine(model, options);
            expected = run(engine, poisoned(1, kPoison));
        }
        REQUIRE(expected.size() == 4);
        for (const auto& [id, result] : expected) {
            REQUIRE(!result.error);
            REQUIRE(std::count(result.answer.ids.begin(), result.answer.ids.end(), kPoison) == 0);
        }
        const int64_t n_ops = device.longest_pass;
        CHECK(n_ops > 20);  // of two layers, and what reads the logits
        for (device.fail_at = 0; device.fail_at < n_ops; ++device.fail_at) {
            CAPTURE(device.fail_at);
            device.n_failed = 0;
            Engine engine(model, options);
            const Results results = run(engine, poisoned(1, kPoison));
            REQUIRE(results.size() == 4);
            for (const auto& [id, result] : results) {
                CAPTURE(id);
                CHECK(result.error.has_value() == (id == 1));
                if (id != 1) check_same_answer(result.answer, expected.at(id).answer);
            }
            CHECK(results.at(1).error->message() == FaultyDevice::message);
            CHECK(results.at(1).error->status() == Status::runtime);
            CHECK(results.at(1).answer.ids.empty());
            // With others, and alone.
            CHECK(device.n_failed == 2);
            CHECK(engine.stats().steps_redone == 1);
            CHECK(engine.stats().failed == 1);
            // Its pages are back.
            CHECK(engine.stats().kv_blocks_used == 0);
        }
    }
}

TEST_CASE_FIXTURE(Fixture, "engine faults: a step of decoding that fails at any op ends one answer alone") {
    const EngineOptions options{.n_slots = 4, .max_context = 512};
    Results expected;
    {
        Engine engine(model, options);
        expected = run(engine, requests());
    }
    uint64_t who = 0;
    const int32_t word = said_by_one_alone(expected, who);
    REQUIRE(word >= 0);
    const std::vector<int32_t>& whole = expected.at(who).answer.ids;
    const auto n_said = std::find(whole.begin(), whole.end(), word) - whole.begin() + 1;
    device.poison = word;
    {
        Engine engine(model, options);
        run(engine, requests());
    }
    const int64_t n_ops = device.longest_pass;
    CHECK(n_ops > 20);
    for (device.fail_at = 0; device.fail_at < n_ops; ++device.fail_at) {
        CAPTURE(device.fail_at);
        Engine engine(model, options);
        const Results results = run(engine, requests());
        REQUIRE(results.size() == 4);
        for (const auto& [id, result] : results) {
            CAPTURE(id);
            CHECK(result.error.has_value() == (id == who));
            if (id != who) check_same_answer(result.answer, expected.at(id).answer);
        }
        // What it had said is there.
        const std::vector<int32_t>& ids = results.at(who).answer.ids;
        CHECK(std::ssize(ids) == n_said);
        CHECK(std::equal(ids.begin(), ids.end(), whole.begin()));
        CHECK(engine.stats().steps_redone == 1);
    }
}

TEST_CASE_FIXTURE(Fixture, "engine faults: a passage that fails in the encoder ends its request alone") {
    const EngineOptions options{.n_slots = 3, .max_context = 512, .step_rows = 64};
    const auto list = [&] {
        std::vector<Request> requests;
        requests.push_back(token_request(40, 30));
        requests.push_back(compressed_request(model, 4, 10));
        Request other;
        other.segments.emplace_back(
            PassageSegment{std::make_shared<SharedPassage>(model, "A passage of its own, with a zebra.")});
        other.segments.emplace_back(TextSegment{"Which?"});
        other.options = requests[1].options;
        requests.push_back(std::move(other));
        return requests;
    };
    Results expected;
    {
        Engine engine(model, options);
        expected = run(engine, list());
    }
    // An id of the one passage's chunks, and of no other's.
    std::set<int32_t> ids;
    const std::vector<Request> all = list();
    const auto chunks_of = [&](const Request& request, const auto& take) {
        for (const Segment& segment : request.segments) {
            if (const auto* passage = std::get_if<PassageSegment>(&segment)) {
                for (const Chunk& chunk : passage->passage->cut(model)->chunks())
                    for (const int32_t id : chunk.encoder_ids) take(id);
            }
        }
    };
    chunks_of(all[2], [&](int32_t id) { ids.insert(id); });
    chunks_of(all[1], [&](int32_t id) { ids.erase(id); });
    for (int32_t id = 0; id < 203; ++id) ids.erase(id);
    REQUIRE(!ids.empty());
    device.poison = *ids.begin();
    device.fail_at = 3;
    Engine engine(model, options);
    const Results results = run(engine, list());
    REQUIRE(results.size() == 3);
    CHECK(device.n_failed == 1);
    REQUIRE(results.at(2).error);
    CHECK(results.at(2).error->message() == FaultyDevice::message);
    for (const uint64_t id : {0, 1}) {
        REQUIRE(!results.at(id).error);
        check_same_answer(results.at(id).answer, expected.at(id).answer);
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "engine faults: where every sequence fails each has its error, and the engine answers on") {
    const EngineOptions options{.n_slots = 4, .max_context = 512};
    Engine engine(model, options);
    const Results expected = run(engine, requests());
    std::vector<uint64_t> ids;
    for (Request& request : requests()) ids.push_back(engine.submit(std::move(request)));
    for (int i = 0; i < 4; ++i) engine.step();
    REQUIRE(engine.n_running() == 4);
    device.all_fail = true;
    device.fail_at = 7;
    engine.step();
    CHECK(engine.n_running() == 0);
    const Results results = run_all(engine);
    REQUIRE(results.size() == 4);
    for (const uint64_t id : ids) {
        REQUIRE(results.at(id).error);
        CHECK(results.at(id).error->message() == FaultyDevice::message);
        CHECK(!results.at(id).answer.ids.empty());
    }
    device.all_fail = false;
    const Results again = run(engine, requests());
    REQUIRE(again.size() == 4);
    for (const auto& [id, result] : again) {
        REQUIRE(!result.error);
        check_same_answer(result.answer, expected.at(id - 8).answer);
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "engine faults: an allocation that fails once while several run costs none of them") {
    const EngineOptions options{.n_slots = 4, .max_context = 512};
    Results expected;
    {
        Engine engine(model, options);
        expected = run(engine, requests());
    }
    bool done = false;
    int n_redone = 0;
    for (int64_t n = 1; !done; n += 1 + n / 60) {
        CAPTURE(n);
        Engine engine(model, options);
        for (Request& request : requests()) engine.submit(std::move(request));
        engine.step();  // all prompts are made, and read
        REQUIRE(engine.n_running() == 4);
        Results results;
        const auto step = [&] {
            try {
                engine.step();
            } catch (const std::bad_alloc&) {
            }
        };
        FailingMemory memory(n);
        for (int i = 0; i < 14; ++i) step();
        memory.disarm();
        done = memory.asked() < n;
        results = run_all(engine);
        REQUIRE(results.size() == 4);
        // What is an answer's own (its text, its log-probabilities) may fail, and then that one ends.
        int64_t n_failed = 0;
        for (const auto& [id, result] : results) {
            CAPTURE(id);
            n_failed += result.error ? 1 : 0;
            if (!result.error) check_same_answer(result.answer, expected.at(id).answer);
            if (result.error) CHECK(result.error->status() == Status::out_of_memory);
        }
        CHECK(n_failed <= 1);
        n_redone += engine.stats().steps_redone > 0 ? 1 : 0;
    }
    // The same while prompts are read: the backend's scratch.
    done = false;
    for (int64_t n = 1; !done; ++n) {
        CAPTURE(n);
        Engine engine(model, {.n_slots = 4, .max_context = 512, .step_rows = 96});
        for (Request& request : requests()) engine.submit(std::move(request));
        FailingMemory memory(n, false, Memory::large);
        Results results;
        for (int i = 0; i < 14; ++i) engine.step();
        memory.disarm();
        done = memory.asked() < n;
        results = run_all(engine);
        int64_t n_failed = 0;
        for (const auto& [id, result] : results) {
            n_failed += result.error ? 1 : 0;
            if (!result.error) check_same_answer(result.answer, expected.at(id).answer);
        }
        CHECK(n_failed <= 1);
        n_redone += engine.stats().steps_redone > 0 ? 1 : 0;
    }
    CHECK(n_redone > 0);
}

TEST_CASE_FIXTURE(Fixture, "engine faults: an answer is not lost because its prefix cannot be kept") {
    bool done = false;
    int n_fewer = 0;
    for (int64_t n = 1; !done; ++n) {
        CAPTURE(n);
        Generator generator(cpu(), model.decoder(), 1, 512);
        const auto start_of = [&](int& n_ids) {
            Generator::Start start;
            for (int32_t i = 0; i < 50; ++i) {
                start.source.push_back(5 + i);
                start.names.push_back(token_row_name(5 + i));
            }
            start.max_new = 15;
            start.next = [&n_ids](const Logits&, double) {
                return ++n_ids == 15 ? std::nullopt : std::optional<int32_t>(100 + n_ids);
            };
            return start;
        };
        int n_ids = 0;
        Generator::Start start = start_of(n_ids);
        REQUIRE(generator.start(start));
        for (int i = 0; i < 14; ++i) REQUIRE(generator.step().empty());
        // 64 positions are held: the end completes a second block.
        FailingMemory memory(n);
        const std::vector<Generator::Ended>& ended = generator.step();
        memory.disarm();
        done = memory.asked() < n;
        REQUIRE(ended.size() == 1);
        CHECK(!ended[0].error);
        CHECK(n_ids == 15);
        CHECK(generator.n_running() == 0);
        CHECK(generator.available_blocks() == generator.n_blocks());
        n_fewer += generator.idle_blocks() == 1 ? 1 : 0;
        CHECK(generator.idle_blocks() >= 1);
        if (done) CHECK(generator.idle_blocks() == 2);
    }
    CHECK(n_fewer > 2);
}

TEST_CASE_FIXTURE(Fixture, "engine faults: a sequence that fails to begin leaves no page behind") {
    Backend& backend = cpu();
    const Llama& decoder = model.decoder();
    bool done = false;
    for (int64_t n = 1; !done; ++n) {
        CAPTURE(n);
        Generator generator(backend, decoder, 2, 512, 16);
        const auto start_of = [&] {
            Generator::Start start;
            for (int32_t i = 0; i < 100; ++i) {
                start.source.push_back(5 + i);
                start.names.push_back(token_row_name(5 + i));
            }
            start.max_new = 4;
            start.next = [](const Logits&, double) { return std::optional<int32_t>(); };
            return start;
        };
        Generator::Start first = start_of();
        REQUIRE(generator.start(first));
        while (generator.n_running() > 0) generator.step();
        REQUIRE(generator.available_blocks() == 16);
        Generator::Start second = start_of();
        FailingMemory memory(n);
        try {
            generator.start(second);
        } catch (const std::bad_alloc&) {
        }
        memory.disarm();
        done = memory.asked() < n;
        // 104 positions are four blocks, of which three are taken over.
        CHECK(generator.available_blocks() == (memory.failed() ? 16 : 12));
        if (memory.failed()) {
            REQUIRE(generator.start(second));
            CHECK(generator.n_reused(0) == 96);
        }
    }
}
