// Scored prompts: the log-probabilities of a prompt's own tokens, by the engine, against one log-softmax of
// all logits in double.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "engine_test.h"
#include "refrag/scoring.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture {
    Backend& backend = cpu();
    Model model{backend.device(), tiny_refrag_path()};

    Answer answer(Request request, const EngineOptions& options = {.n_slots = 1, .max_context = 512}) const {
        Engine engine(model, options);
        return answer_of(engine, std::move(request));
    }
    static Answer answer_of(Engine& engine, Request request) {
        const uint64_t id = engine.submit(std::move(request));
        Results results = run_all(engine);
        REQUIRE(results.size() == 1);
        REQUIRE(!results.at(id).error);
        return std::move(results.at(id).answer);
    }
    // Log-probabilities of all ids after each of `ids`, [ids.size()][vocab].
    std::vector<std::vector<double>> by_hand(const std::vector<int32_t>& ids) const {
        KvCache kv = model.decoder().make_kv_cache(backend, 1, 512);
        Arena arena(backend);
        const Tensor hidden = prefill(backend, model.decoder(), ids, Tensor{}, kv, 0, std::ssize(ids), arena);
        const std::vector<float> logits = download(backend, model.decoder().logits(backend, hidden, arena));
        const auto vocab = static_cast<size_t>(model.decoder().config().vocab_size);
        std::vector<std::vector<double>> result;
        for (size_t row = 0; row < ids.size(); ++row) {
            std::vector<double> values;
            double sum = 0.0;
            for (size_t i = 0; i < vocab; ++i) {
                values.push_back(static_cast<double>(logits[row * vocab + i]));
                sum += std::exp(values.back());
            }
            for (double& value : values) value -= std::log(sum);
            result.push_back(std::move(values));
        }
        return result;
    }
};

std::vector<int32_t> ids_from(int32_t first, int32_t n) {
    std::vector<int32_t> ids(static_cast<size_t>(n));
    std::iota(ids.begin(), ids.end(), first);
    return ids;
}

Request scored(Request request, int32_t n_new, int32_t n_top) {
    request.options.max_new_tokens = n_new;
    request.options.prompt_logprobs = n_top;
    return request;
}

// The op gives fp32: of values below 10 nats an error of one part in 2^24 is below 1e-6; the sums in double.
constexpr double kBound = 2e-6;

}  // namespace

TEST_CASE_FIXTURE(Fixture, "prompt logprobs: every token's, its alternatives, and nothing for the first") {
    const std::vector<int32_t> ids = ids_from(3, 90);
    const auto expected = by_hand(ids);
    for (const int32_t n_new : {0, 4}) {
        const Answer answer = this->answer(scored(token_request(90, n_new), n_new, 5));
        CHECK(answer.ids.size() == static_cast<size_t>(n_new));
        CHECK(answer.finish == FinishReason::max_tokens);
        CHECK(answer.positions == 90);
        REQUIRE(answer.scores.size() == 90);
        CHECK(answer.scores[0] == PromptScore{0, 3, std::nullopt});
        for (size_t i = 1; i < 90; ++i) {
            CAPTURE(i);
            const PromptScore& score = answer.scores[i];
            CHECK(score.position == static_cast<int64_t>(i));
            CHECK(score.id == ids[i]);
            REQUIRE(score.logprobs);
            const std::vector<double>& row = expected[i - 1];
            CHECK(score.logprobs->chosen.id == ids[i]);
            CHECK(std::fabs(score.logprobs->chosen.logprob - row[static_cast<size_t>(ids[i])]) < kBound);
            REQUIRE(score.logprobs->top.size() == 5);
            std::vector<int32_t> order = ids_from(0, static_cast<int32_t>(row.size()));
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
                return row[static_cast<size_t>(a)] > row[static_cast<size_t>(b)];
            });
            for (size_t t = 0; t < 5; ++t) {
                const TokenLogprob& top = score.logprobs->top[t];
                CHECK(top.id == order[t]);
                CHECK(std::fabs(top.logprob - row[static_cast<size_t>(top.id)]) < kBound);
                if (top.id == ids[i]) CHECK(top.logprob == score.logprobs->chosen.logprob);
            }
        }
        CHECK((answer.ttft_ms > 0.0) == (n_new > 0));
        CHECK(answer.times.prefill > 0.0);
    }
}

TEST_CASE_FIXTURE(Fixture, "prompt logprobs: rows of chunks have none, and the rows after them see them") {
    Request request = compressed_request(model, 3, 0);
    request.segments.insert(request.segments.begin(), TokenSegment{{0, 7}});
    const Answer answer = this->answer(scored(std::move(request), 0, 0));
    CHECK(answer.ids.empty());
    CHECK(answer.text.empty());
    REQUIRE(answer.scores.size() == answer.positions);
    const std::vector<int32_t> tail = model.tokenizer().encode_ids("And so?");
    const size_t n_chunks = answer.chunks.size();
    REQUIRE(answer.positions == 2 + n_chunks + tail.size());
    for (size_t i = 0; i < answer.scores.size(); ++i) {
        CAPTURE(i);
        const bool is_chunk = i >= 2 && i < 2 + n_chunks;
        CHECK(answer.scores[i].position == static_cast<int64_t>(i));
        CHECK(answer.scores[i].logprobs.has_value() == (i > 0 && !is_chunk));
        if (is_chunk) CHECK(answer.scores[i].id == -1);
        if (i >= 2 + n_chunks) CHECK(answer.scores[i].id == tail[i - 2 - n_chunks]);
    }
    // Other chunks, another probability of the same token.
    Request other = compressed_request(model, 2, 0);
    other.segments.insert(other.segments.begin(), TokenSegment{{0, 7}});
    const Answer less = this->answer(scored(std::move(other), 0, 0));
    CHECK(less.scores.back().id == answer.scores.back().id);
    CHECK(less.scores.back().logprobs != answer.scores.back().logprobs);
    CHECK(less.scores[1] == answer.scores[1]);
}

TEST_CASE_FIXTURE(Fixture,
                  "prompt logprobs: neither the budget, nor others, nor a kept prefix changes a bit") {
    const auto request = [&] { return scored(token_request(140, 6), 6, 3); };
    const Answer expected = answer(request());
    REQUIRE(expected.scores.size() == 140);
    for (const int64_t step_rows : {int64_t{1}, int64_t{7}, int64_t{33}}) {
        CAPTURE(step_rows);
        Engine engine(model, {.n_slots = 3, .max_context = 512, .step_rows = step_rows});
        // The same prompt first, so that its pages are kept; what runs beside is scored too.
        engine.submit(token_request(140, 3));
        run_all(engine);
        engine.submit(scored(token_request(70, 9, 40), 9, 2));
        engine.submit(compressed_request(model, 3, 9));
        const uint64_t id = engine.submit(request());
        const Results results = run_all(engine);
        REQUIRE(!results.at(id).error);
        check_same_answer(results.at(id).answer, expected);
        CHECK(results.at(id).answer.n_reused == 0);
        // What it read is kept for others all the same.
        const Answer after = answer_of(engine, token_request(140, 6));
        CHECK(after.n_reused == 128);
        CHECK(after.ids == expected.ids);
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "prompt logprobs: a prompt and its answer have what the answer had when it was made") {
    Request first = token_request(40, 12);
    first.options.logprobs = 4;
    first.options.sampler = {.temperature = 1.2f, .seed = 5};
    const Answer made = answer(std::move(first));
    REQUIRE(made.ids.size() == 12);
    Request both = token_request(40, 0);
    both.segments.emplace_back(TokenSegment{made.ids});
    const Answer read = answer(scored(std::move(both), 0, 4));
    REQUIRE(read.scores.size() == 52);
    for (size_t i = 0; i < made.ids.size(); ++i) {
        const TokenLogprobs& a = made.logprobs[i];
        const TokenLogprobs& b = *read.scores[40 + i].logprobs;
        CHECK(a.chosen.id == b.chosen.id);
        CHECK(std::fabs(a.chosen.logprob - b.chosen.logprob) < kBound);
        REQUIRE(a.top.size() == b.top.size());
        for (size_t t = 0; t < a.top.size(); ++t) {
            CHECK(a.top[t].id == b.top[t].id);
            CHECK(std::fabs(a.top[t].logprob - b.top[t].logprob) < kBound);
        }
    }
}

TEST_CASE_FIXTURE(Fixture, "prompt logprobs: scored segments alone, where only they are asked for") {
    Request request = token_request(30, 0);
    request.segments.emplace_back(TokenSegment{{50, 51, 52}, /*score=*/true});
    request.segments.emplace_back(TokenSegment{{9, 9}});
    request.segments.emplace_back(TokenSegment{{60}, /*score=*/true});
    const Answer answer = this->answer(std::move(request));
    std::vector<int32_t> ids = ids_from(3, 30);
    ids.insert(ids.end(), {50, 51, 52, 9, 9});
    const auto expected = by_hand(ids);
    REQUIRE(answer.scores.size() == 4);
    const std::vector<std::pair<int64_t, int32_t>> wanted = {{30, 50}, {31, 51}, {32, 52}, {35, 60}};
    for (size_t i = 0; i < wanted.size(); ++i) {
        const auto [position, id] = wanted[i];
        CHECK(answer.scores[i].position == position);
        CHECK(answer.scores[i].id == id);
        REQUIRE(answer.scores[i].logprobs);
        CHECK(answer.scores[i].logprobs->top.empty());
        CHECK(std::fabs(answer.scores[i].logprobs->chosen.logprob -
                        expected[static_cast<size_t>(position) - 1][static_cast<size_t>(id)]) < kBound);
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "prompt logprobs: prompts of one row, of a whole context, and that end in a chunk") {
    const Answer one = answer(scored(token_request(1, 0), 0, 2));
    CHECK(one.scores == std::vector<PromptScore>{{0, 3, std::nullopt}});
    CHECK(one.finish == FinishReason::max_tokens);
    // The last token is predicted and never read: a context of 40 positions scores 41 tokens.
    const EngineOptions small{.n_slots = 1, .max_context = 40};
    const Answer whole = answer(scored(token_request(41, 0), 0, 0), small);
    REQUIRE(whole.scores.size() == 41);
    CHECK(whole.scores.back().logprobs);
    Engine engine(model, small);
    engine.submit(scored(token_request(42, 0), 0, 0));
    const Results refused = run_all(engine);
    REQUIRE(refused.at(0).error);
    CHECK(contains(refused.at(0).error->message(), " 42 decoder positions"));
    // A pool that holds the prompt is enough where nothing follows.
    const EngineOptions pool{.n_slots = 1, .max_context = 512, .kv_entries = 64};
    CHECK(answer(scored(token_request(65, 0), 0, 0), pool).scores.size() == 65);
    Request chunks;
    chunks.segments.emplace_back(TokenSegment{{5, 6}});
    chunks.segments.emplace_back(PassageSegment{
        std::make_shared<SharedPassage>(model, "The old mill stands on a hill above the river.")});
    chunks.options.policy = SelectPolicy::none;
    const Answer ends = answer(scored(std::move(chunks), 0, 0));
    REQUIRE(ends.scores.size() == 2 + ends.chunks.size());
    CHECK(ends.scores[1].logprobs);
    CHECK(!ends.scores.back().logprobs);
}

TEST_CASE_FIXTURE(Fixture,
                  "prompt logprobs: a prompt that is read and no more is kept for those that follow") {
    Engine engine(model, {.n_slots = 1, .max_context = 512});
    CHECK(answer_of(engine, token_request(100, 0)).ids.empty());
    CHECK(answer_of(engine, token_request(120, 2)).n_reused == 96);
}

TEST_CASE_FIXTURE(Fixture, "prompt logprobs: options out of range are refused") {
    Engine engine(model, 1);
    CHECK(contains(error_of([&] { engine.submit(scored(token_request(4, 0), 0, 21)); }),
                   "logprobs of the prompt: expected 0 to 20 alternatives, found 21"));
    CHECK(contains(error_of([&] { engine.submit(scored(token_request(4, 0), 0, -1)); }), "found -1"));
}
