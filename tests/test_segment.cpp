// Requests as segments, and PromptWork: what a prompt is does not depend on how it was put together, in which
// pieces it was made, or where its embeddings came from.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "golden.h"
#include "refrag/prompt_work.h"
#include "refrag/scoring.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture : TinyRefrag {
    Arena arena{backend};
    PassageCache cache;

    Segment passage(const std::string& text) { return PassageSegment{cache.share(model, text)}; }
};

const char* const kMill = "The old mill stands on a hill above the river.";
const char* const kLantern = "A red lantern hangs over the door; owners light it every evening in winter.";
const char* const kShips = "Ships carry barley and glass to the far coast.";

AnswerOptions options_of(SelectPolicy policy, double p) {
    AnswerOptions options;
    options.policy = policy;
    options.expand_fraction = p;
    options.max_new_tokens = 8;
    return options;
}

struct Made {
    std::vector<int32_t> source;
    std::vector<float> chunk_rows;
    std::vector<ChunkRowKey> keys;
    Answer answer;
    int steps = 0;
};

Made make(const Fixture& f, std::vector<Segment> segments, const AnswerOptions& options,
          int64_t budget_rows = 1 << 20) {
    Made made;
    Arena arena(f.backend);
    PromptWork work(f.model, std::move(segments), options, 512, made.answer);
    int64_t used = 0;
    bool done = false;
    while (!done) {
        done = work.advance(f.backend, arena, budget_rows, used);
        REQUIRE(++made.steps < 1000);
        if (!done) CHECK(used > 0);
    }
    const Prompt prompt = work.take();
    made.source = prompt.input.source;
    made.keys = prompt.row_keys;
    made.chunk_rows.resize(prompt.chunk_rows.bytes() / sizeof(float));
    if (!made.chunk_rows.empty())
        f.backend.download(made.chunk_rows.data(), prompt.chunk_rows.data(), prompt.chunk_rows.bytes());
    CHECK(prompt.input.row_chunk.size() == made.keys.size());
    return made;
}

void check_same(const Made& a, const Made& b) {
    CHECK(a.source == b.source);
    CHECK(a.chunk_rows == b.chunk_rows);
    CHECK(a.keys == b.keys);
    REQUIRE(a.answer.chunks.size() == b.answer.chunks.size());
    for (size_t i = 0; i < a.answer.chunks.size(); ++i) {
        CHECK(a.answer.chunks[i].expanded == b.answer.chunks[i].expanded);
        CHECK(a.answer.chunks[i].logit == b.answer.chunks[i].logit);
        CHECK(a.answer.chunks[i].position == b.answer.chunks[i].position);
    }
}

std::vector<bool> choice_of(const Answer& answer, size_t segment) {
    std::vector<bool> choice;
    for (const ChunkReport& chunk : answer.chunks)
        if (chunk.segment == segment) choice.push_back(chunk.expanded);
    return choice;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "prompt work: any budget of rows makes the same prompt, in more steps") {
    for (const SelectPolicy policy : {SelectPolicy::model, SelectPolicy::random, SelectPolicy::bm25,
                                      SelectPolicy::perplexity_desc, SelectPolicy::none}) {
        CAPTURE(select_policy_name(policy));
        const AnswerOptions options = options_of(policy, 0.4);
        const auto segments = [&] {
            PassageCache fresh;
            return make_segments(
                model, {},
                share_passages(model, std::vector<Passage>{{"a", "", kMill}, {"b", "Door", kLantern}}, fresh),
                "What hangs over the door?");
        };
        const Made whole = make(*this, segments(), options);
        CHECK(whole.steps == 1);
        for (const int64_t budget : {1, 7, 40}) {
            const Made pieces = make(*this, segments(), options, budget);
            check_same(pieces, whole);
            CHECK(pieces.steps > 1);
            CHECK(pieces.answer.n_cached == 0);
        }
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "segments: an order of one's own, and passages in front of and behind the question") {
    const std::string question = "Who lights it?";
    const std::vector<Segment> segments{
        TokenSegment{{0}},    passage(kMill),  QuestionSegment{question}, passage(kLantern),
        TextSegment{" and "}, passage(kShips), TextSegment{"</s>", true}};
    // Expanded, the ids one after another.
    std::vector<int32_t> ids{0};
    for (const char* text : {kMill, question.c_str(), kLantern, " and ", kShips}) {
        const std::vector<int32_t> more = model.tokenizer().encode_ids(text);
        ids.insert(ids.end(), more.begin(), more.end());
    }
    ids.push_back(2);
    const Made all = make(*this, segments, options_of(SelectPolicy::all, 1.0));
    CHECK(all.source == ids);
    CHECK(token_ids(model, segments) == ids);
    CHECK(all.answer.positions == ids.size());
    // Sensed: what is sensed, in the order of the input, does not depend on what stands between.
    const AnswerOptions options = options_of(SelectPolicy::model, 0.3);
    const Made some = make(*this, segments, options);
    const Made together =
        make(*this, {passage(kMill), passage(kLantern), passage(kShips), QuestionSegment{question}}, options);
    REQUIRE(some.answer.chunks.size() == together.answer.chunks.size());
    for (size_t i = 0; i < some.answer.chunks.size(); ++i)
        CHECK(some.answer.chunks[i].logit == together.answer.chunks[i].logit);
    CHECK(some.chunk_rows == together.chunk_rows);
    // Another order of passages is another input to the policy, and the rows follow it.
    const Made turned =
        make(*this, {passage(kShips), passage(kMill), TextSegment{"x"}}, options_of(SelectPolicy::none, 0.0));
    const Made straight =
        make(*this, {passage(kMill), passage(kShips), TextSegment{"x"}}, options_of(SelectPolicy::none, 0.0));
    const size_t n_ships = cache.share(model, kShips)->cut(model)->chunks().size();
    std::vector<float> rotated = straight.chunk_rows;
    const size_t dim = rotated.size() / straight.keys.size();
    std::rotate(rotated.begin(), rotated.end() - static_cast<std::ptrdiff_t>(n_ships * dim), rotated.end());
    CHECK(turned.chunk_rows == rotated);
}

TEST_CASE_FIXTURE(Fixture, "segments: kept choices stay, L counts the open chunks alone") {
    const auto shared = cache.share(model, kLantern);
    const size_t n = shared->cut(model)->chunks().size();
    std::vector<bool> kept(n, false);
    kept[1] = true;
    const auto segments = [&] {
        return std::vector<Segment>{PassageSegment{shared, kept}, passage(kMill), passage(kShips),
                                    QuestionSegment{"Where?"}};
    };
    const size_t n_open = cache.share(model, kMill)->cut(model)->chunks().size() +
                          cache.share(model, kShips)->cut(model)->chunks().size();
    for (const double p : {0.0, 0.3, 1.0}) {
        AnswerOptions options = options_of(SelectPolicy::model, p);
        options.want_logits = true;
        const Made made = make(*this, segments(), options);
        CHECK(choice_of(made.answer, 0) == kept);
        CHECK(made.answer.n_expanded == 1 + static_cast<size_t>(n_expand(p, static_cast<int64_t>(n_open))));
        // The open ones are sensed as if nothing else were there.
        const Made alone = make(*this, {passage(kMill), passage(kShips), QuestionSegment{"Where?"}}, options);
        for (size_t i = 0; i < made.answer.chunks.size(); ++i) {
            const ChunkReport& chunk = made.answer.chunks[i];
            CHECK(chunk.logit.has_value() == (i >= n));
            if (i >= n) CHECK(chunk.logit == alone.answer.chunks[i - n].logit);
        }
    }
    kept.pop_back();
    CHECK(contains(error_of([&] { make(*this, segments(), options_of(SelectPolicy::model, 0.3)); }),
                   str("expected one for each of its ", n, " chunks, found ", n - 1)));
}

TEST_CASE_FIXTURE(Fixture, "segments: an earlier turn compressed keeps its choice when asked again") {
    const std::vector<Passage> passages{{"a", "", kMill}, {"b", "", kShips}};
    std::vector<Turn> history{{"Where does the old mill stand?", "on a hill above the river", true}};
    const AnswerOptions options = options_of(SelectPolicy::model, 0.4);
    const auto ask = [&](const std::string& question) {
        return make(*this, make_segments(model, history, share_passages(model, passages, cache), question),
                    options);
    };
    const Made first = ask("What do ships carry?");
    // The turn's question and answer are the last two passage segments.
    std::vector<size_t> segments;
    for (const ChunkReport& chunk : first.answer.chunks)
        if (segments.empty() || segments.back() != chunk.segment) segments.push_back(chunk.segment);
    REQUIRE(segments.size() == 4);
    std::vector<bool> choice = choice_of(first.answer, segments[2]);
    const std::vector<bool> of_answer = choice_of(first.answer, segments[3]);
    choice.insert(choice.end(), of_answer.begin(), of_answer.end());
    CHECK(first.answer.positions < first.answer.plain_tokens);
    // Turned round, so that keeping it is not the policy's doing.
    choice.flip();
    history[0].expanded = choice;
    const Made second = ask("And what else is there to see?");
    std::vector<bool> again = choice_of(second.answer, segments[2]);
    const std::vector<bool> again_answer = choice_of(second.answer, segments[3]);
    again.insert(again.end(), again_answer.begin(), again_answer.end());
    CHECK(again == choice);
    // Expanded, it is what training lays out.
    history[0].expanded.reset();
    const Made expanded =
        make(*this, make_segments(model, history, share_passages(model, passages, cache), "Why?"),
             options_of(SelectPolicy::all, 1.0));
    std::vector<Turn> as_tokens = history;
    as_tokens[0].compress = false;
    const Made tokens =
        make(*this, make_segments(model, as_tokens, share_passages(model, passages, cache), "Why?"),
             options_of(SelectPolicy::all, 1.0));
    CHECK(expanded.source == tokens.source);
    // And the whole path answers with it.
    Session session(model);
    history[0].expanded = choice;
    CHECK(!session.answer(passages, "Why?", options, {}, history).ids.empty());
    history[0].expanded->push_back(true);
    CHECK(contains(error_of([&] { session.answer(passages, "Why?", options, {}, history); }),
                   "an earlier turn's choice"));
}

TEST_CASE_FIXTURE(Fixture, "segments: embeddings and vectors from outside are the passage that they are of") {
    const auto shared = cache.share(model, kLantern);
    encode_passages(backend, model, std::span(&shared, 1), arena);
    const std::vector<float> chunk_emb = shared->encoded()->download(backend);
    const AnswerOptions options = options_of(SelectPolicy::none, 0.0);
    const auto around = [&](Segment segment) {
        return std::vector<Segment>{TokenSegment{{0}}, passage(kMill), std::move(segment), passage(kShips),
                                    QuestionSegment{"Who lights it?"}};
    };
    const Made of_passage = make(*this, around(PassageSegment{shared}), options);
    const Made of_embeddings = make(*this, around(ChunkEmbSegment{chunk_emb}), options, 3);
    CHECK(of_embeddings.source == of_passage.source);
    CHECK(of_embeddings.chunk_rows == of_passage.chunk_rows);
    const auto dim = static_cast<size_t>(model.decoder().config().dim);
    const size_t first = cache.share(model, kMill)->cut(model)->chunks().size();
    const size_t n = shared->cut(model)->chunks().size();
    const std::vector<float> vectors(
        of_passage.chunk_rows.begin() + static_cast<std::ptrdiff_t>(first * dim),
        of_passage.chunk_rows.begin() + static_cast<std::ptrdiff_t>((first + n) * dim));
    const Made of_vectors = make(*this, around(VectorSegment{vectors}), options, 2);
    CHECK(of_vectors.source == of_passage.source);
    CHECK(of_vectors.chunk_rows == of_passage.chunk_rows);
    Session session(model);
    CHECK(session.answer(around(VectorSegment{vectors}), options).ids ==
          session.answer(around(PassageSegment{shared}), options).ids);
    // Keys say where a row came from; equal ones are equal rows.
    CHECK(of_passage.keys[first] == ChunkRowKey{shared->key(), 0});
    CHECK(of_vectors.keys[first] != of_passage.keys[first]);
    CHECK(of_vectors.keys == make(*this, around(VectorSegment{vectors}), options).keys);
    CHECK(of_vectors.keys.back() == of_passage.keys.back());
    for (const char* what : {"chunk embeddings", "input vectors"}) {
        const bool embeddings = what[0] == 'c';
        std::vector<float> odd(3, 0.5f);
        Segment segment = embeddings ? Segment(ChunkEmbSegment{odd}) : Segment(VectorSegment{odd});
        CHECK(contains(error_of([&] { make(*this, around(std::move(segment)), options); }),
                       str(what, ": expected rows of ", embeddings ? model.d_enc() : static_cast<int>(dim))));
    }
    CHECK(contains(error_of([&] { make(*this, {TokenSegment{{0, 1 << 20}}}, options); }), "found 1048576"));
    CHECK(contains(error_of([&] { make(*this, {}, options); }), "the prompt is empty"));
}

TEST_CASE_FIXTURE(Fixture,
                  "segments: a passage is encoded whole or not at all, and only when a row needs it") {
    const auto mill = std::make_shared<SharedPassage>(model, kMill);
    const auto ships = std::make_shared<SharedPassage>(model, kShips);
    const size_t n_mill = mill->cut(model)->chunks().size();
    const size_t n_ships = ships->cut(model)->chunks().size();
    std::vector<bool> but_one(n_ships, true);
    but_one[0] = false;
    make(*this, {PassageSegment{mill, std::vector<bool>(n_mill, true)}, PassageSegment{ships, but_one}},
         options_of(SelectPolicy::none, 0.0));
    CHECK(!mill->encoded());
    REQUIRE(ships->encoded());
    CHECK(ships->encoded()->chunk_emb().rows == static_cast<int64_t>(n_ships));
}

TEST_CASE_FIXTURE(Fixture, "prompt work: one that is left in the middle leaves its passages usable") {
    const auto shared = std::make_shared<SharedPassage>(model, kLantern);
    const AnswerOptions options = options_of(SelectPolicy::model, 0.3);
    {
        Answer answer;
        PromptWork work(model, {PassageSegment{shared}, QuestionSegment{"Who?"}}, options, 512, answer);
        int64_t used = 0;
        CHECK(!work.advance(backend, arena, 1, used));
        CHECK(!shared->encoded());
    }
    const Made after = make(*this, {PassageSegment{shared}, QuestionSegment{"Who?"}}, options);
    const Made fresh = make(
        *this, {PassageSegment{std::make_shared<SharedPassage>(model, kLantern)}, QuestionSegment{"Who?"}},
        options);
    check_same(after, fresh);
}

TEST_CASE_FIXTURE(Fixture, "segments: scored ids have the log-probabilities of the rows before them") {
    const std::vector<int32_t> scored = model.tokenizer().encode_ids(" owners light the lantern");
    const std::vector<int32_t> between = model.tokenizer().encode_ids(" and then ");
    AnswerOptions options = options_of(SelectPolicy::none, 0.0);
    options.max_new_tokens = 0;
    Answer answer;
    const Prompt prompt = make_prompt(backend, model,
                                      {TokenSegment{{0}}, passage(kMill), TokenSegment{scored, true},
                                       TokenSegment{between}, TokenSegment{scored, true}},
                                      options, 512, arena, answer);
    REQUIRE(prompt.scores.size() == 2 * scored.size());
    CHECK(prompt.input.source.size() + 1 == answer.positions);  // the last id is predicted, never read
    const int32_t dim = model.decoder().config().dim;
    const Tensor rows{prompt.chunk_rows.data(), DType::f32, std::ssize(prompt.input.row_chunk), dim};
    const std::vector<float> nll = [&] {
        KvCache kv = model.decoder().make_kv_cache(backend, 1, 512);
        const auto n_rows = std::ssize(prompt.input.source);
        const Tensor all = prefill(backend, model.decoder(), prompt.input.source, rows, kv, 0, n_rows, arena);
        std::vector<int32_t> index, targets;
        for (const ScoredRow& score : prompt.scores) {
            index.push_back(static_cast<int32_t>(score.row));
            targets.push_back(score.target);
        }
        const Tensor wanted = arena.tensor(std::ssize(index), dim);
        backend.gather_rows(wanted, all, upload_vector(backend, arena, index));
        std::vector<float> values;
        for (const TokenLogprobs& row : row_logprobs(backend, model.decoder(), wanted, targets, 0, arena))
            values.push_back(static_cast<float>(-row.chosen.logprob));
        return values;
    }();
    // All logits, one log-softmax a row in double.
    KvCache again = model.decoder().make_kv_cache(backend, 1, 512);
    const Tensor hidden = prefill(backend, model.decoder(), prompt.input.source, rows, again, 0,
                                  std::ssize(prompt.input.source), arena);
    const std::vector<float> logits = download(backend, model.decoder().logits(backend, hidden, arena));
    const auto vocab = static_cast<size_t>(model.decoder().config().vocab_size);
    const size_t n_mill = cache.share(model, kMill)->cut(model)->chunks().size();
    for (size_t i = 0; i < nll.size(); ++i) {
        const size_t row = n_mill + i + (i < scored.size() ? 0 : between.size());
        CHECK(prompt.scores[i].row == static_cast<int64_t>(row));
        CHECK(prompt.scores[i].target == scored[i % scored.size()]);
        double sum = 0.0;
        for (const float logit : rows_of(logits, vocab, row, 1)) sum += std::exp(static_cast<double>(logit));
        const double expected =
            std::log(sum) -
            static_cast<double>(logits[row * vocab + static_cast<size_t>(scored[i % scored.size()])]);
        CHECK(std::fabs(static_cast<double>(nll[i]) - expected) < 1e-5);
    }
    CHECK(contains(error_of([&] {
                       make(*this, {TokenSegment{scored, true}}, options);
                   }),
                   "expected a row before it"));
}
