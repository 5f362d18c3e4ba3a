// Continuous batching: whatever else is in the batch, an answer is that of the request alone, bit for bit;
// one request's failure is its own; long prompts go through in parts; a slot is free again when it should be.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <new>

#include "failing.h"
#include "golden.h"
#include "refrag/engine.h"
#include "refrag/prompt_work.h"
#include "refrag/scoring.h"
#include "refrag/session.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

using Fixture = refrag_test::TinyRefrag;

const std::vector<Passage>& texts() {
    static const std::vector<Passage> list = {
        {"a", "Hill", "The old mill stands on a hill above the river."},
        {"b", "", "A red lantern hangs over the door; caf\xc3\xa9 owners light it every evening in winter."},
        {"c", "Sea", "Ships carry barley and glass to the far coast, and salt on the way back."},
        {"d", "", "x"}};
    return list;
}

// Requests of every kind: greedy and sampled, penalised, stopped, endless, with and without passages.
struct Kind {
    std::vector<size_t> passages;
    std::string question;
    AnswerOptions options;
};

std::vector<Kind> kinds() {
    std::vector<Kind> list;
    for (int i = 0; i < 24; ++i) {
        Kind kind;
        for (size_t p = 0; p < texts().size(); ++p) {
            if ((i * 7 + static_cast<int>(p) * 3) % 4 < 2) kind.passages.push_back(p);
        }
        kind.question = str("What about number ", i * i, i % 2 == 0 ? "?" : " and the mill on the hill?");
        kind.options.policy = i % 5 == 4 ? SelectPolicy::random : SelectPolicy::model;
        kind.options.expand_fraction = i % 3 * 0.4;
        kind.options.max_new_tokens = i % 6 == 5 ? -1 : 1 + i % 4 * 9;
        SamplerOptions& sampler = kind.options.sampler;
        sampler.seed = static_cast<uint64_t>(i % 2);
        if (i % 2 == 1) {
            sampler.temperature = 0.9f;
            sampler.top_k = i % 4 == 1 ? 20 : 0;
            sampler.top_p = 0.95f;
            sampler.repetition_penalty = i % 3 == 0 ? 1.2f : 1.0f;
            sampler.presence_penalty = i % 3 == 1 ? 0.5f : 0.0f;
        }
        if (i % 4 == 2) kind.options.stop = {"a", "8"};
        kind.options.ignore_eos = i % 5 == 0;
        if (i % 2 == 0 || i > 12) kind.options.logprobs = i % 4;
        list.push_back(kind);
    }
    return list;
}

using Shared = std::vector<std::shared_ptr<SharedPassage>>;

Request request_of(const Model& model, const Kind& kind, const Shared& passages) {
    Shared chosen;
    for (const size_t p : kind.passages) chosen.push_back(passages[p]);
    Request request;
    request.segments = make_segments(model, {}, chosen, kind.question);
    request.options = kind.options;
    return request;
}

Shared shared_passages(const Model& model) {
    Shared list;
    for (const Passage& passage : texts())
        list.push_back(std::make_shared<SharedPassage>(model, passage.content()));
    return list;
}

void check_same(const Answer& a, const Answer& b) {
    CHECK(a.ids == b.ids);
    CHECK(a.text == b.text);
    CHECK(a.logprobs == b.logprobs);
    CHECK(a.finish == b.finish);
    CHECK(a.stop == b.stop);
    CHECK(a.positions == b.positions);
    CHECK(a.plain_tokens == b.plain_tokens);
    CHECK(a.n_expanded == b.n_expanded);
    REQUIRE(a.chunks.size() == b.chunks.size());
    for (size_t i = 0; i < a.chunks.size(); ++i) {
        CHECK(a.chunks[i].logit == b.chunks[i].logit);
        CHECK(a.chunks[i].expanded == b.chunks[i].expanded);
    }
}

std::map<uint64_t, Result> run_all(Engine& engine) {
    std::map<uint64_t, Result> results;
    while (!engine.idle()) {
        engine.step();
        CHECK(engine.n_running() <= static_cast<size_t>(engine.n_slots()));
        for (Result& result : engine.take_finished()) results[result.id] = std::move(result);
    }
    return results;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "a batch's answers are those of its requests alone, bit for bit") {
    constexpr int64_t kContext = 150;
    const std::vector<Kind> list = kinds();
    std::vector<Answer> alone;
    std::map<FinishReason, int> reasons;
    for (const Kind& kind : list) {
        std::vector<Passage> passages;  // nothing shared, nothing cached
        for (const size_t p : kind.passages) passages.emplace_back(texts()[p]);
        Session session(model, kContext);
        alone.push_back(session.answer(passages, kind.question, kind.options));
        ++reasons[alone.back().finish];
        CHECK(alone.back().logprobs.size() == (kind.options.logprobs ? alone.back().ids.size() : 0));
    }
    // The requests do end in different ways, so slots change hands at different times.
    CHECK(reasons[FinishReason::stop_string] > 0);
    CHECK(reasons[FinishReason::max_tokens] > 0);
    CHECK(reasons[FinishReason::context_full] > 0);

    for (const int32_t n_slots : {1, 3, 8, 24}) {
        CAPTURE(n_slots);
        Engine engine(model, n_slots, kContext);
        const auto passages = shared_passages(model);
        std::vector<std::string> streamed(list.size());
        for (size_t i = 0; i < list.size(); ++i) {
            Request request = request_of(model, list[i], passages);
            request.sink = [&streamed, i](std::string_view piece) {
                streamed[i] += piece;
                return true;
            };
            CHECK(engine.submit(std::move(request)) == i);
        }
        CHECK(engine.n_waiting() == list.size());
        const std::map<uint64_t, Result> results = run_all(engine);
        REQUIRE(results.size() == list.size());
        for (const auto& [id, result] : results) {
            CAPTURE(id);
            CHECK(!result.error);
            check_same(result.answer, alone[id]);
            CHECK(streamed[id] == result.answer.text);
            CHECK(result.answer.ttft_ms > 0.0);
        }
        CHECK(engine.idle());
    }
}

TEST_CASE_FIXTURE(Fixture, "every request gives one result, and passages are encoded once and let go") {
    Engine engine(model, 4);
    const std::vector<Kind> list = kinds();
    {
        const auto passages = shared_passages(model);
        for (const Kind& kind : list) engine.submit(request_of(model, kind, passages));
        const std::map<uint64_t, Result> results = run_all(engine);
        REQUIRE(results.size() == list.size());
        CHECK(results.at(0).answer.n_cached == 0);
        const Answer& late = results.at(22).answer;
        CHECK(late.n_cached == late.chunks.size());
        for (const auto& passage : passages) CHECK(passage.use_count() == 1);
    }
    CHECK(engine.take_finished().empty());
}

TEST_CASE_FIXTURE(Fixture, "a request that fails leaves the others alone") {
    const auto passages = shared_passages(model);
    const std::vector<Kind> list = kinds();
    std::map<uint64_t, Result> expected;
    {
        Engine engine(model, 2, 150);
        engine.submit(request_of(model, list[0], passages));
        engine.submit(request_of(model, list[1], passages));
        expected = run_all(engine);
    }
    Engine engine(model, 3, 150);
    engine.submit(request_of(model, list[0], passages));
    Request too_long = request_of(model, list[0], passages);
    for (int i = 0; i < 60; ++i) too_long.segments.emplace_back(PassageSegment{passages[0]});
    const uint64_t long_id = engine.submit(std::move(too_long));
    Request broken = request_of(model, list[2], passages);
    broken.options.stop.clear();
    int pieces = 0;
    broken.sink = [&](std::string_view) {
        if (++pieces == 3) fail(Status::runtime, "the client has gone");
        return true;
    };
    const uint64_t broken_id = engine.submit(std::move(broken));
    Request no_memory = request_of(model, list[4], passages);
    no_memory.sink = [](std::string_view) -> bool { throw std::bad_alloc(); };
    const uint64_t no_memory_id = engine.submit(std::move(no_memory));
    const uint64_t last_id = engine.submit(request_of(model, list[1], passages));
    const std::map<uint64_t, Result> results = run_all(engine);
    REQUIRE(results.size() == 5);
    CHECK(contains(results.at(long_id).error->message(), "leaves no room for an answer in a context of 150"));
    CHECK(results.at(broken_id).error->message() == "the client has gone");
    CHECK(results.at(no_memory_id).error->status() == Status::out_of_memory);
    CHECK(!results.at(0).error);
    CHECK(!results.at(last_id).error);
    check_same(results.at(0).answer, expected.at(0).answer);
    check_same(results.at(last_id).answer, expected.at(1).answer);
}

TEST_CASE_FIXTURE(Fixture, "a cancelled request gives no result and its slot is free at once") {
    const auto passages = shared_passages(model);
    Engine engine(model, 1);
    AnswerOptions endless;
    endless.max_new_tokens = -1;
    endless.ignore_eos = true;
    const auto submit = [&] {
        Request request;
        request.segments = make_segments(model, {}, std::span(passages).first(1), "Why?");
        request.options = endless;
        return engine.submit(std::move(request));
    };
    const uint64_t first = submit();
    const uint64_t second = submit();
    const uint64_t third = submit();
    for (int i = 0; i < 5; ++i) engine.step();
    CHECK(engine.n_running() == 1);
    engine.cancel(second);
    CHECK(engine.n_waiting() == 1);
    engine.cancel(first);
    CHECK(engine.n_running() == 0);
    engine.cancel(first);  // nothing left to forget
    engine.cancel(999);
    const std::map<uint64_t, Result> results = run_all(engine);
    CHECK(results.size() == 1);
    CHECK(results.contains(third));
    CHECK(results.at(third).answer.finish == FinishReason::context_full);
}

TEST_CASE_FIXTURE(Fixture, "most_positions is never less than a prompt takes, and exact at both ends") {
    const std::vector<Kind> list = kinds();
    for (const double p : {0.0, 0.05, 0.3, 0.5, 0.99, 1.0}) {
        for (const Kind& kind : list) {
            std::vector<Passage> passages;
            for (const size_t t : kind.passages) passages.emplace_back(texts()[t]);
            PassageCache cache;
            const std::vector<Segment> segments =
                make_segments(model, {}, share_passages(model, passages, cache), kind.question);
            AnswerOptions options = kind.options;
            options.expand_fraction = p;
            const int64_t most = most_positions(model, segments, options);
            Arena arena(backend);
            Answer answer;
            make_prompt(backend, model, segments, options, model.decoder().config().max_seq_len, arena,
                        answer);
            CHECK(static_cast<int64_t>(answer.positions) <= most);
            if (p == 0.0 || p == 1.0) CHECK(static_cast<int64_t>(answer.positions) == most);
        }
    }
}

TEST_CASE("a prompt longer than a step goes through in parts, the others go on meanwhile") {
    // The tiny decoder with a larger window; RoPE has no table, so nothing else changes.
    const refrag_test::TempDir dir;
    std::filesystem::copy(refrag_test::tiny_refrag_path() + "/decoder", dir.file("decoder"));
    std::string config = read_file(dir.file("decoder/config.json"), 1 << 20);
    const std::string key = "\"max_position_embeddings\":512";
    REQUIRE(contains(config, key));
    config.replace(config.find(key), key.size(), "\"max_position_embeddings\":8192");
    dir.write("decoder/config.json", config);
    Backend& backend = refrag_test::cpu();
    const Llama decoder(backend.device(), dir.file("decoder"));
    const int32_t dim = decoder.config().dim;

    // 5000 rows, every fifth a chunk row: three steps of kPrefillRows, with chunk rows in each.
    std::vector<float> values;
    const auto prompt_of = [&](int32_t n, int32_t shift) {
        std::vector<int32_t> source;
        int32_t n_slots = 0;
        for (int32_t i = 0; i < n; ++i)
            source.push_back(i % 5 == 3 ? -1 - n_slots++ : (i * 37 + shift) % decoder.config().vocab_size);
        values.resize(static_cast<size_t>(n_slots) * static_cast<size_t>(dim));
        for (size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<float>((i * 29 + static_cast<size_t>(shift)) % 17) / 17.0f - 0.5f;
        Buffer chunk_rows;
        if (!values.empty()) {
            chunk_rows = Buffer(backend, values.size() * sizeof(float));
            backend.upload(chunk_rows.data(), values.data(), chunk_rows.bytes());
        }
        return std::pair(source, std::move(chunk_rows));
    };
    struct Track {
        std::vector<std::vector<float>> logits;
        std::vector<int> steps;  // in which step each came
    };
    int step = 0;
    const auto greedy = [&](Track& track, size_t n) {
        return [&track, &step, n](const Logits& row, double) -> std::optional<int32_t> {
            const std::span<const float> logits = row.values;
            track.logits.emplace_back(logits.begin(), logits.end());
            track.steps.push_back(step);
            if (track.logits.size() == n) return std::nullopt;
            return refrag_test::argmax(logits);
        };
    };
    const std::vector<std::pair<int32_t, size_t>> sequences = {{3, 8}, {5000, 3}, {40, 2}};  // rows, tokens
    std::vector<Track> alone(3);
    for (size_t i = 0; i < 3; ++i) {
        // By the plain functions, whole: one prefill, then a row at a time.
        auto [source, chunk_rows] = prompt_of(sequences[i].first, static_cast<int32_t>(i));
        KvCache kv = decoder.make_kv_cache(backend, 1, 8192);
        Arena arena(backend);
        const Tensor given{chunk_rows.data(), DType::f32,
                           static_cast<int64_t>(values.size()) / std::max(1, dim), dim};
        Tensor hidden = prefill(backend, decoder, source, given, kv, 0, 1, arena);
        for (size_t n = 0; n < sequences[i].second; ++n) {
            alone[i].logits.push_back(refrag_test::download(backend, decoder.logits(backend, hidden, arena)));
            const int32_t id = refrag_test::argmax(alone[i].logits.back());
            hidden = prefill(backend, decoder, std::span(&id, 1), Tensor{}, kv, 0, 1, arena);
        }
    }
    std::vector<Track> together(3);
    Generator generator(backend, decoder, 3, 8192);
    for (size_t i = 0; i < 3; ++i) {
        auto [source, chunk_rows] = prompt_of(sequences[i].first, static_cast<int32_t>(i));
        generator.start(std::move(source), std::move(chunk_rows), greedy(together[i], sequences[i].second));
    }
    while (generator.n_running() > 0) {
        for (const Generator::Ended& ended : generator.step()) CHECK(!ended.error);
        ++step;
        REQUIRE(step < 20);
    }
    for (size_t i = 0; i < 3; ++i) {
        CAPTURE(i);
        CHECK(together[i].logits == alone[i].logits);
    }
    CHECK(together[0].steps == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7});  // waits for nobody
    CHECK(together[1].steps == std::vector<int>{2, 3, 4});                 // 2045 + 2047 + 908 rows
    CHECK(together[2].steps == std::vector<int>{2, 3});                    // first come, first served
}

TEST_CASE_FIXTURE(Fixture, "a step that only generates allocates nothing") {
    for (const int32_t parallel : {1, 3}) {
        Generator generator(backend, model.decoder(), parallel, 128);
        for (int32_t i = 0; i < parallel; ++i) {
            generator.start({5, 6, 7}, Buffer{}, [](const Logits& logits, double) {
                return std::optional<int32_t>(logits.values[0] < 0.0f ? 5 : 9);
            });
        }
        for (int i = 0; i < 3; ++i) CHECK(generator.step().empty());
        // Across the border of a page of 32 entries.
        const refrag_test::FailingMemory counting(0);
        for (int i = 0; i < 40; ++i) generator.step();
        CHECK(counting.asked() == 0);
    }
}

TEST_CASE_FIXTURE(Fixture, "an engine that cannot be is refused") {
    CHECK(contains(error_of([&] { const Engine engine(model, 0); }), "parallel sequences: expected 1 to"));
    CHECK(contains(error_of([&] { const Engine engine(model, max_parallel + 1); }), "found 1025"));
    CHECK(contains(error_of([&] { const Engine engine(model, 1, 513); }), "expected at most 512 positions"));
    CHECK(contains(error_of([&] { const Engine engine(model, 1, -1); }), "found -1"));
    for (const int32_t n_slots : {1, 3}) {
        const Engine sized(model, n_slots, 70);
        CHECK(sized.kv_bytes() ==
              Generator::cache_bytes(model.decoder().config(), model.decoder().kv_dtype(), n_slots, 70));
    }
    Engine engine(model, 1);
    const auto message = [&](auto&& change) {
        Request request;
        change(request.options);
        return error_of([&] { engine.submit(std::move(request)); });
    };
    CHECK(contains(message([](AnswerOptions& o) { o.max_new_tokens = -2; }),
                   "expected 0 or more, or -1 for no limit, found -2"));
    CHECK(contains(message([](AnswerOptions& o) { o.logprobs = 21; }), "logprobs: expected 0 to 20"));
    CHECK(contains(message([](AnswerOptions& o) { o.logprobs = -1; }), "found -1"));
    CHECK(contains(message([](AnswerOptions& o) { o.stop = {""}; }), "stop string"));
    CHECK(contains(message([](AnswerOptions& o) { o.sampler.min_p = 2.0f; }), "min-p"));
    CHECK(engine.idle());
}
