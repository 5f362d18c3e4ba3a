// Earlier turns in a prompt: row by row what training lays out, and nothing of them in the policy's choice.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>

#include "golden.h"
#include "refrag/engine.h"
#include "refrag/prompt_work.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Fixture = TinyRefrag;

std::vector<Passage> some_passages() {
    std::vector<Passage> passages;
    passages.emplace_back(Passage{"a", "Hill", "The old mill stands on a hill above the river."});
    passages.emplace_back(Passage{"b", "", "A red lantern hangs over the door; owners light it."});
    return passages;
}

// Two turns, one of which spells a special token.
const std::vector<Turn>& some_turns() {
    static const std::vector<Turn> turns = {{"Where is the mill?", "on a hill"},
                                            {"What ends it </s>?", "the </s> lantern"}};
    return turns;
}

struct Made {
    std::unique_ptr<Backend> backend;  // outlives the memory of the prompt
    Prompt prompt;
    Answer answer;
    std::vector<Passage> passages = some_passages();
};

Made make(const Model& model, SelectPolicy policy, double p, std::span<const Turn> history) {
    Made made;
    PassageCache cache;
    const std::vector<Segment> segments = make_segments(
        model, history, share_passages(model, made.passages, cache), "What hangs over the door?");
    AnswerOptions options;
    options.policy = policy;
    options.expand_fraction = p;
    options.want_logits = true;
    made.backend = model.device().make_backend();
    Arena arena(*made.backend);
    made.prompt = make_prompt(*made.backend, model, segments, options, 512, arena, made.answer);
    const int64_t most = most_positions(model, segments, options);
    CHECK(static_cast<int64_t>(made.answer.positions) <= most);
    if (p == 0.0 || p == 1.0) CHECK(static_cast<int64_t>(made.answer.positions) == most);
    return made;
}

// The rows by hand, with the tiny model's template: what was expanded as tokens, the rest as chunk rows.
std::vector<int32_t> by_hand(const Model& model, const Made& made, bool question_first) {
    std::vector<int32_t> rows{0};  // <s>
    const auto add = [&](const std::string& text, bool special) {
        const std::vector<int32_t> ids = model.tokenizer().encode_ids(text, special);
        rows.insert(rows.end(), ids.begin(), ids.end());
    };
    add("Passages:\n", true);
    const auto add_conversation = [&] {
        for (const Turn& turn : some_turns()) {
            add("Question: ", true);
            add(turn.question, false);
            add("\nAnswer:", true);
            add(" " + turn.answer, false);
            rows.push_back(2);  // </s>
        }
        add("Question: ", true);
        add("What hangs over the door?", false);
        add("\nAnswer:", true);
    };
    if (question_first) add_conversation();
    size_t i = 0;
    int32_t row = 0;
    for (const Passage& passage : made.passages) {
        add("- ", true);
        const CutPassage cut(model, passage.content(), made.answer.chunk_len);
        for (const Chunk& chunk : cut.chunks()) {
            if (made.answer.chunks[i++].expanded) {
                rows.insert(rows.end(), chunk.ids.begin(), chunk.ids.end());
            } else {
                rows.push_back(-1 - row++);
            }
        }
        add("\n", true);
    }
    if (!question_first) add_conversation();
    return rows;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "history: the prompt's rows are those of training, put together by hand") {
    for (const double p : {0.0, 0.3, 1.0}) {
        CAPTURE(p);
        const Made made = make(model, SelectPolicy::model, p, some_turns());
        CHECK(made.prompt.input.source == by_hand(model, made, false));
        // The two end tokens are the turns' own: spelt in a text they are text.
        const std::vector<int32_t>& source = made.prompt.input.source;
        CHECK(std::count(source.begin(), source.end(), model.end_id()) == 2);
    }
}

TEST_CASE("history: with the question first, earlier turns still come right before it") {
    const TempDir dir;
    std::filesystem::copy(tiny_refrag_path(), dir.file("model"), std::filesystem::copy_options::recursive);
    std::string config = read_file(dir.file("model/refrag.json"), 1 << 20);
    const std::string order = "[\"passages\",\"question\"]";
    REQUIRE(contains(config, order));
    config.replace(config.find(order), order.size(), "[\"question\",\"passages\"]");
    dir.write("model/refrag.json", config);
    const Model model(cpu().device(), dir.file("model"));
    const Made made = make(model, SelectPolicy::random, 0.5, some_turns());
    CHECK(made.prompt.input.source == by_hand(model, made, true));
}

TEST_CASE_FIXTURE(Fixture,
                  "history: the policy sees the present question alone, no history changes nothing") {
    const Made with = make(model, SelectPolicy::model, 0.3, some_turns());
    const Made without = make(model, SelectPolicy::model, 0.3, {});
    REQUIRE(with.answer.chunks.size() == without.answer.chunks.size());
    for (size_t i = 0; i < with.answer.chunks.size(); ++i) {
        CHECK(*with.answer.chunks[i].logit == *without.answer.chunks[i].logit);
        CHECK(with.answer.chunks[i].expanded == without.answer.chunks[i].expanded);
    }
    const std::vector<int32_t> alone =
        token_ids(model, conversation_segments(model, {}, "What hangs over the door?"));
    const std::vector<int32_t> all =
        token_ids(model, conversation_segments(model, some_turns(), "What hangs over the door?"));
    CHECK(with.answer.positions == without.answer.positions + all.size() - alone.size());
    CHECK(with.answer.plain_tokens == without.answer.plain_tokens + all.size() - alone.size());
    CHECK(std::equal(alone.rbegin(), alone.rend(), all.rbegin()));
}

TEST_CASE_FIXTURE(Fixture, "history: an engine reads a request's, a session what it is given") {
    AnswerOptions options;
    options.max_new_tokens = 12;
    options.expand_fraction = 0.3;
    const std::string question = "What hangs over the door?";
    std::vector<Passage> passages = some_passages();
    Session session(model);
    const Answer said = session.answer(passages, question, options, {}, some_turns());
    CHECK(said.positions == make(model, SelectPolicy::model, 0.3, some_turns()).answer.positions);

    Engine engine(model, 2);
    for (const bool with_history : {true, false}) {
        Request request;
        PassageCache cache;
        request.segments = make_segments(model, with_history ? some_turns() : std::vector<Turn>{},
                                         share_passages(model, some_passages(), cache), question);
        request.options = options;
        engine.submit(std::move(request));
    }
    std::vector<Result> results;
    while (!engine.idle()) {
        engine.step();
        for (Result& result : engine.take_finished()) results.push_back(std::move(result));
    }
    REQUIRE(results.size() == 2);
    std::sort(results.begin(), results.end(), [](const Result& a, const Result& b) { return a.id < b.id; });
    CHECK(results[0].answer.ids == said.ids);
    CHECK(results[1].answer.ids == session.answer(passages, question, options).ids);
    // The next question of the session has forgotten it, and what does not fit is refused with its length.
    CHECK(results[1].answer.positions < said.positions);
    Session small(model, static_cast<int64_t>(said.positions));
    CHECK(contains(error_of([&] { small.answer(passages, question, options, {}, some_turns()); }),
                   str("the prompt takes ", said.positions, " decoder positions")));
}
