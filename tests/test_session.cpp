// The REFRAG identities on a tiny random model: expand all = the plain decoder on the same ids, expand none =
// all slots, a cached passage = a freshly encoded one, and what `sense` promises.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>

#include "eval/perplexity.h"
#include "golden.h"
#include "refrag/scoring.h"
#include "refrag/session.h"
#include "text/unicode.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

struct Fixture {
    std::unique_ptr<Backend> backend = make_cpu_backend(2);
    Model model{backend->device(), refrag_test::repo_path("tests/golden/tiny-refrag")};
};

std::vector<Passage> some_passages() {
    std::vector<Passage> passages;
    passages.emplace_back(Passage{"a", "Hill", "The old mill stands on a hill above the river."});
    passages.emplace_back(
        Passage{"b", "", "A red lantern hangs over the door; caf\xc3\xa9 owners light it."});
    passages.emplace_back(Passage{"c", "Sea", "Ships carry barley and glass to the far coast."});
    return passages;
}

AnswerOptions options_with(SelectPolicy policy, double p) {
    AnswerOptions options;
    options.policy = policy;
    options.expand_fraction = p;
    options.max_new_tokens = 8;
    options.want_logits = true;
    return options;
}

// The ids of the whole prompt as plain tokens, by the rules of the template.
std::vector<int32_t> full_context_ids(const Model& model, const std::vector<Passage>& passages,
                                      const std::string& question) {
    std::vector<int32_t> ids;
    const auto add = [&](const std::string& text, bool parse_special) {
        const std::vector<int32_t> piece = model.tokenizer().encode_ids(text, parse_special);
        ids.insert(ids.end(), piece.begin(), piece.end());
    };
    const PromptTemplate& t = model.config().prompt;
    if (model.bos_id()) ids.push_back(*model.bos_id());
    add(t.before, true);
    for (const Passage& passage : passages) {
        add(t.passage_prefix, true);
        add(passage.content(), false);
        add(t.passage_suffix, true);
    }
    add(t.question_prefix, true);
    add(question, false);
    add(t.question_suffix, true);
    return ids;
}

std::vector<int32_t> greedy(const Model& model, std::vector<int32_t> ids, int n) {
    const std::unique_ptr<Backend> backend = model.device().make_backend();
    Arena arena(*backend);
    std::vector<int32_t> out;
    std::vector<float> logits(static_cast<size_t>(model.decoder().config().vocab_size));
    for (int i = 0; i < n; ++i) {
        // Everything anew for every token: no cache to be wrong.
        KvCache kv = model.decoder().make_kv_cache(*backend, 1, std::ssize(ids));
        const ArenaScope scratch(arena);
        const Tensor hidden = prefill(*backend, model.decoder(), ids, Tensor{}, kv, 0, 1, arena);
        const Tensor device = model.decoder().logits(*backend, hidden, arena);
        backend->download(logits.data(), device.data, device.bytes());
        const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (model.is_end(static_cast<int32_t>(best))) break;
        out.push_back(static_cast<int32_t>(best));
        ids.push_back(static_cast<int32_t>(best));
    }
    return out;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "expanding everything is the plain decoder on the same ids") {
    std::vector<Passage> passages = some_passages();
    Session session(model);
    const std::string question = "What hangs over the door?";
    const Answer all = session.answer(passages, question, options_with(SelectPolicy::all, 0.0));
    const std::vector<int32_t> ids = full_context_ids(model, passages, question);
    CHECK(all.positions == ids.size());
    CHECK(all.plain_tokens == ids.size());
    CHECK(all.n_expanded == all.chunks.size());
    CHECK(all.ids == greedy(model, ids, 8));
    CHECK(!all.ids.empty());
    // p = 1 with any policy is the same.
    CHECK(session.answer(passages, question, options_with(SelectPolicy::model, 1.0)).ids == all.ids);
    // The full context encodes nothing.
    std::vector<Passage> fresh = some_passages();
    AnswerOptions plain = options_with(SelectPolicy::all, 1.0);
    Session other(model);
    other.answer(fresh, question, plain);
    for (const auto& passage : share_passages(model, fresh, other.cache())) CHECK(!passage->encoded());
    CHECK(other.cache().size() == fresh.size());
}

TEST_CASE_FIXTURE(Fixture, "expanding nothing leaves one row a chunk") {
    std::vector<Passage> passages = some_passages();
    Session session(model);
    const Answer none = session.answer(passages, "Where?", options_with(SelectPolicy::none, 0.7));
    CHECK(none.n_expanded == 0);
    CHECK(none.expand_fraction == 0.0);
    size_t chunk_tokens = 0;
    int32_t last_position = -1;
    for (const ChunkReport& chunk : none.chunks) {
        CHECK(!chunk.expanded);
        CHECK(chunk.n_positions == 1);
        CHECK(chunk.position > last_position);
        last_position = chunk.position;
        chunk_tokens += chunk.n_tokens;
    }
    CHECK(none.positions == none.plain_tokens - chunk_tokens + none.chunks.size());
    CHECK(none.plain_tokens == full_context_ids(model, passages, "Where?").size());
}

TEST_CASE_FIXTURE(Fixture, "a cached passage answers as a freshly encoded one, alone or among others") {
    const std::string question = "What do ships carry?";
    std::vector<Passage> passages = some_passages();
    Session session(model);
    const AnswerOptions options = options_with(SelectPolicy::model, 0.3);
    const Answer fresh = session.answer(passages, question, options);
    const Answer cached = session.answer(passages, question, options);
    CHECK(fresh.n_cached == 0);
    CHECK(cached.n_cached == cached.chunks.size());
    CHECK(cached.ids == fresh.ids);
    REQUIRE(cached.chunks.size() == fresh.chunks.size());
    for (size_t i = 0; i < fresh.chunks.size(); ++i) {
        CHECK(*cached.chunks[i].logit == *fresh.chunks[i].logit);
        CHECK(cached.chunks[i].expanded == fresh.chunks[i].expanded);
    }
    // Encoded one by one: batch of N = N batches of one, bit for bit.
    Arena arena(*backend);
    for (const auto& together : share_passages(model, passages, session.cache())) {
        REQUIRE(together->encoded());
        const auto cut = together->cut(model);
        const std::vector<float> kept = together->encoded()->download(*backend);
        const auto d_enc = static_cast<size_t>(model.d_enc());
        for (size_t c = 0; c < cut->chunks().size(); ++c) {
            const ArenaScope scratch(arena);
            const Tensor one = arena.tensor(1, model.d_enc());
            model.encoder().encode(*backend, std::span(&cut->chunks()[c].encoder_ids, 1), one, arena);
            const std::vector<float> alone = refrag_test::download(*backend, one);
            CHECK(std::equal(alone.begin(), alone.end(),
                             kept.begin() + static_cast<std::ptrdiff_t>(c * d_enc)));
        }
    }
    // Chunks of another length are other chunks.
    AnswerOptions other = options;
    other.chunk_len = 3;
    const Answer rechunked = session.answer(passages, question, other);
    CHECK(rechunked.n_cached == 0);
    CHECK(rechunked.chunks.size() > fresh.chunks.size());
}

TEST_CASE_FIXTURE(Fixture, "the policy expands its n largest logits, and every policy is repeatable") {
    const std::string question = "What hangs over the door?";
    for (const SelectPolicy policy : {SelectPolicy::model, SelectPolicy::random, SelectPolicy::perplexity_asc,
                                      SelectPolicy::perplexity_desc}) {
        CAPTURE(select_policy_name(policy));
        std::vector<Passage> passages = some_passages();
        Session session(model);
        AnswerOptions options = options_with(policy, 0.4);
        options.chunk_len = 4;
        const Answer answer = session.answer(passages, question, options);
        CHECK(static_cast<int64_t>(answer.n_expanded) == n_expand(0.4, std::ssize(answer.chunks)));
        std::vector<Passage> again = some_passages();
        Session other(model);
        const Answer repeated = other.answer(again, question, options);
        CHECK(repeated.ids == answer.ids);
        for (size_t i = 0; i < answer.chunks.size(); ++i) {
            CHECK(repeated.chunks[i].expanded == answer.chunks[i].expanded);
        }
        if (policy == SelectPolicy::random) continue;
        const float sign = policy == SelectPolicy::perplexity_asc ? -1.0f : 1.0f;
        float smallest_in = 1e30f;
        float largest_out = -1e30f;
        for (const ChunkReport& chunk : answer.chunks) {
            REQUIRE(chunk.logit.has_value());
            if (chunk.expanded) smallest_in = std::min(smallest_in, sign * *chunk.logit);
            if (!chunk.expanded) largest_out = std::max(largest_out, sign * *chunk.logit);
        }
        CHECK(smallest_in >= largest_out);
    }
}

TEST_CASE_FIXTURE(Fixture, "a prompt beyond the context window is refused with both numbers") {
    std::vector<Passage> passages = some_passages();
    Session session(model, 16);
    const std::string message =
        error_of([&] { session.answer(passages, "Where?", options_with(SelectPolicy::all, 1.0)); });
    const size_t tokens = full_context_ids(model, passages, "Where?").size();
    CHECK(contains(message, str("the prompt takes ", tokens, " decoder positions")));
    CHECK(contains(message, "context of 16"));
    // What would not fit even with nothing expanded is refused before anything is encoded.
    std::vector<Passage> long_ones;
    for (int i = 0; i < 20; ++i) long_ones.push_back(some_passages()[0]);
    CHECK(contains(
        error_of([&] { session.answer(long_ones, "Where?", options_with(SelectPolicy::model, 0.3)); }),
        "the prompt takes at least "));
    CHECK(!share_passages(model, long_ones, session.cache())[0]->encoded());
    // The session still works, and a short context ends the answer.
    std::vector<Passage> one;
    one.emplace_back(Passage{"x", "", "tiny"});
    Session small(model, 32);
    AnswerOptions options = options_with(SelectPolicy::none, 0.0);
    options.max_new_tokens = 1000;
    const Answer answer = small.answer(one, "Q", options);
    CHECK(answer.positions + answer.ids.size() <= 33);
    CHECK(contains(error_of([&] { const Session too_long(model, 1 << 20); }), "max_position_embeddings"));
}

TEST_CASE_FIXTURE(Fixture, "streamed text is the answer, with one leading space taken off") {
    std::vector<Passage> passages = some_passages();
    Session session(model);
    std::string streamed;
    AnswerOptions options = options_with(SelectPolicy::model, 0.3);
    options.max_new_tokens = 20;
    const Answer answer = session.answer(passages, "Why?", options, [&](std::string_view piece) {
        streamed += piece;
        return true;
    });
    CHECK(streamed == answer.text);
    std::string whole = model.tokenizer().decode(answer.ids, true);
    if (!whole.empty() && whole[0] == ' ') whole.erase(0, 1);
    CHECK(whole == answer.text);
    CHECK(answer.ids.size() <= 20);
    CHECK(answer.ttft_ms > 0.0);
}

TEST_CASE_FIXTURE(Fixture,
                  "eval perplexity: p = 1 is full, modes are ordered as asked, windows are counted") {
    std::string text;
    for (int i = 0; i < 40; ++i) text += str("Line ", i, ": the mill on hill ", i * 7, " grinds barley. ");
    PerplexityOptions options;
    options.contexts = {24};
    options.output = 8;
    options.modes = {EvalMode::none, EvalMode::full, EvalMode::last, EvalMode::refrag};
    options.chunk_lens = {8, 5};
    options.expand_fractions = {0.0, 1.0};
    options.limit = 6;
    const std::vector<PerplexityRow> rows = evaluate_perplexity(model, text, options);
    REQUIRE(rows.size() == 10);
    const double none = *rows[0].log_perplexity;
    const double full = *rows[1].log_perplexity;
    CHECK(rows[0].n == 6);
    CHECK(*rows[0].share_recovered == doctest::Approx(0.0));
    CHECK(*rows[1].share_recovered == doctest::Approx(1.0));
    for (const PerplexityRow& row : rows) {
        if (row.mode == EvalMode::last || row.mode == EvalMode::refrag) {
            // Everything kept or expanded: the same rows as the full context, so the same bits.
            if (*row.expand_fraction == 1.0) CHECK(*row.log_perplexity == full);
            if (*row.expand_fraction == 0.0) CHECK(*row.log_perplexity != full);
            CHECK(*row.share_recovered == doctest::Approx((none - *row.log_perplexity) / (none - full)));
        }
        REQUIRE(row.standard_error.has_value());
        CHECK(*row.standard_error > 0.0);
    }
    // A window beyond the decoder's: rows with nothing in them, but compressed ones may still fit.
    options.contexts = {model.decoder().config().max_seq_len};
    options.chunk_lens = {8};
    options.expand_fractions = {0.0};
    std::string longer;
    while (model.tokenizer().encode_ids(longer).size() <
           static_cast<size_t>(options.contexts[0] + options.output)) {
        longer += text;
    }
    const std::vector<PerplexityRow> beyond = evaluate_perplexity(model, longer, options);
    CHECK(!beyond[1].log_perplexity.has_value());
    CHECK(beyond[0].log_perplexity.has_value());
    CHECK(beyond[3].log_perplexity.has_value());
    CHECK(!beyond[3].share_recovered.has_value());
    CHECK(contains(error_of([&] { evaluate_perplexity(model, "short", options); }), "expected at least"));
}

TEST_CASE_FIXTURE(Fixture, "mean_nll_alone equals scoring each sequence by itself") {
    std::vector<std::vector<int32_t>> sequences;
    for (const char* text : {"The mill", "a hill above the river", "x", "Ships carry barley and glass"}) {
        sequences.push_back(model.tokenizer().encode_ids(text));
    }
    sequences.push_back({});
    Arena arena(*backend);
    const std::vector<float> together = mean_nll_alone(*backend, model, sequences, arena);
    for (size_t i = 0; i < sequences.size(); ++i) {
        CHECK(together[i] == mean_nll_alone(*backend, model, std::span(&sequences[i], 1), arena)[0]);
    }
    CHECK(together[4] == 0.0f);
    CHECK(together[0] > 0.0f);
}

TEST_CASE_FIXTURE(Fixture, "a stop string ends the answer before it, whatever tokens it lies in") {
    std::vector<Passage> passages = some_passages();
    Session session(model);
    AnswerOptions options = options_with(SelectPolicy::model, 0.3);
    options.max_new_tokens = 40;
    const Answer whole = session.answer(passages, "Why?", options);
    CHECK(!whole.stop);
    REQUIRE(whole.text.size() > 12);
    // Every stretch of the text's characters as a stop string.
    int inside = 0;
    for (size_t begin = 0; begin < whole.text.size(); begin += 3) {
        for (const size_t n : {1u, 2u, 5u}) {
            const std::string stop = whole.text.substr(begin, n);
            if (!is_valid_utf8(stop) || stop.size() < n) continue;
            CAPTURE(stop);
            options.stop = {"never to be seen", stop};
            std::string streamed;
            const Answer answer = session.answer(passages, "Why?", options, [&](std::string_view piece) {
                streamed += piece;
                return true;
            });
            CHECK(answer.finish == FinishReason::stop_string);
            CHECK(answer.stop == stop);
            CHECK(answer.text == whole.text.substr(0, whole.text.find(stop)));
            CHECK(streamed == answer.text);
            // The ids are all that it took, no more.
            REQUIRE(answer.ids.size() <= whole.ids.size());
            CHECK(std::equal(answer.ids.begin(), answer.ids.end(), whole.ids.begin()));
            inside += answer.ids.size() < whole.ids.size() ? 1 : 0;
        }
    }
    CHECK(inside > 10);
    // A stop string at the very start, where the leading space would be taken off.
    options.stop = {model.tokenizer().decode(whole.ids, true).substr(0, 1)};
    if (is_valid_utf8(options.stop[0])) CHECK(session.answer(passages, "Why?", options).text.empty());
}

TEST_CASE("several end tokens all end an answer, and ignore_eos never samples them") {
    const refrag_test::TempDir dir;
    std::filesystem::copy(refrag_test::tiny_refrag_path(), dir.file("model"),
                          std::filesystem::copy_options::recursive);
    const std::string generation = "model/decoder/generation_config.json";
    Backend& backend = refrag_test::cpu();
    std::vector<Passage> passages = some_passages();
    AnswerOptions options = options_with(SelectPolicy::model, 0.3);
    options.max_new_tokens = 12;
    std::vector<int32_t> ids;
    {
        const Model model(backend.device(), dir.file("model"));
        ids = Session(model).answer(passages, "Why?", options).ids;
    }
    REQUIRE(ids.size() == 12);
    // The token first said at place n becomes an end token beside others.
    for (const size_t n : {size_t{0}, size_t{3}, size_t{7}}) {
        const auto first = static_cast<size_t>(std::find(ids.begin(), ids.end(), ids[n]) - ids.begin());
        dir.write(generation, str("{\"eos_token_id\": [2, ", ids[n], ", 319]}"));
        const Model model(backend.device(), dir.file("model"));
        Session session(model, 100);
        options.max_new_tokens = 12;
        options.ignore_eos = false;
        const Answer answer = session.answer(passages, "Why?", options);
        CHECK(answer.finish == FinishReason::end_token);
        CHECK(answer.ids == std::vector<int32_t>(ids.begin(), ids.begin() + static_cast<int>(first)));

        options.ignore_eos = true;
        for (const float temperature : {0.0f, 1.5f}) {
            options.sampler.temperature = temperature;
            options.max_new_tokens = -1;
            const Answer endless = session.answer(passages, "Why?", options);
            CHECK(endless.finish == FinishReason::context_full);
            // The last token needs no position of its own.
            CHECK(endless.positions + endless.ids.size() == 101);
            for (const int32_t id : endless.ids) CHECK(!model.is_end(id));
        }
        options.sampler = {};
    }
}

TEST_CASE_FIXTURE(Fixture, "log-probabilities are those of the decoder on the same ids, before any option") {
    std::vector<Passage> passages = some_passages();
    Session session(model);
    AnswerOptions options = options_with(SelectPolicy::all, 1.0);
    options.max_new_tokens = 10;
    options.logprobs = 5;
    options.ignore_eos = true;
    options.sampler.temperature = 1.3f;
    options.sampler.seed = 3;
    options.sampler.repetition_penalty = 1.5f;
    options.sampler.top_p = 0.9f;
    const Answer answer = session.answer(passages, "Where?", options);
    REQUIRE(answer.ids.size() == 10);
    REQUIRE(answer.logprobs.size() == 10);

    // Directly: the whole text through a fresh cache, one softmax a row.
    std::vector<int32_t> ids = full_context_ids(model, passages, "Where?");
    const auto n_prompt = static_cast<int64_t>(ids.size());
    ids.insert(ids.end(), answer.ids.begin(), answer.ids.end() - 1);
    KvCache kv = model.decoder().make_kv_cache(*backend, 1, std::ssize(ids));
    Arena arena(*backend);
    const Tensor hidden = prefill(*backend, model.decoder(), ids, Tensor{}, kv, 0, 10, arena);
    REQUIRE(n_prompt + 9 == std::ssize(ids));
    const std::vector<float> logits =
        refrag_test::download(*backend, model.decoder().logits(*backend, hidden, arena));
    const auto vocab = static_cast<size_t>(model.decoder().config().vocab_size);
    for (size_t i = 0; i < 10; ++i) {
        const std::span<const float> row = std::span(logits).subspan(i * vocab, vocab);
        std::vector<std::pair<double, int32_t>> ranked;
        double sum = 0.0;
        for (size_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]));
        for (size_t v = 0; v < vocab; ++v)
            ranked.emplace_back(std::log(sum) - static_cast<double>(row[v]), static_cast<int32_t>(v));
        const TokenLogprobs& got = answer.logprobs[i];
        CHECK(got.chosen.id == answer.ids[i]);
        // The same float logits; 320 doubles are summed with 1e-16 each.
        CHECK(got.chosen.logprob ==
              doctest::Approx(-ranked[static_cast<size_t>(answer.ids[i])].first).epsilon(1e-12));
        std::sort(ranked.begin(), ranked.end());
        REQUIRE(got.top.size() == 5);
        for (size_t t = 0; t < 5; ++t) {
            CHECK(got.top[t].id == ranked[t].second);
            CHECK(got.top[t].logprob == doctest::Approx(-ranked[t].first).epsilon(1e-12));
        }
    }
    options.logprobs = 0;
    const Answer bare = session.answer(passages, "Where?", options);
    CHECK(bare.ids == answer.ids);
    CHECK(bare.logprobs[4].chosen == answer.logprobs[4].chosen);
    CHECK(bare.logprobs[4].top.empty());
}

TEST_CASE_FIXTURE(Fixture,
                  "the repetition penalty reads the prompt's tokens, but no chunk that stays compressed") {
    // So strong a penalty that a token of the prompt cannot come before every other has.
    AnswerOptions options = options_with(SelectPolicy::none, 0.0);
    options.sampler.repetition_penalty = 1e6f;
    options.ignore_eos = true;
    options.max_new_tokens = 60;
    // Long enough that an answer of 60 tokens says one of its tokens, whatever the rounding.
    const std::string text =
        "zebra quartz, twelve grey foxes jumping over black vowels; MIXED Letters 0123456789 (and more)";
    std::vector<Passage> one;
    one.emplace_back(Passage{"x", "", text});
    Session session(model);
    const std::vector<int32_t> passage_ids = model.tokenizer().encode_ids(text);
    std::vector<int32_t> prompt_ids;  // of the template and the question
    std::vector<Passage> empty;
    empty.emplace_back(Passage{"x", "", ""});
    for (const int32_t id : full_context_ids(model, empty, "Why?")) prompt_ids.push_back(id);
    // Logits of a random network are as often above as below 0, so some 160 tokens are above every penalised
    // one: those below 0 go to -1e6 times themselves, those above to nearly 0.
    const Answer none = session.answer(one, "Why?", options);
    std::vector<int32_t> sorted = none.ids;
    std::sort(sorted.begin(), sorted.end());
    CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
    for (const int32_t id : prompt_ids) CHECK(!std::binary_search(sorted.begin(), sorted.end(), id));
    // The same logits with the passage's ids as past too: reading them as tokens forbids them.
    const auto says_one_of_passage = [&](const Answer& answer) {
        return std::any_of(answer.ids.begin(), answer.ids.end(), [&](int32_t id) {
            return std::find(prompt_ids.begin(), prompt_ids.end(), id) == prompt_ids.end() &&
                   std::find(passage_ids.begin(), passage_ids.end(), id) != passage_ids.end();
        });
    };
    CHECK(says_one_of_passage(none));
    options.policy = SelectPolicy::all;
    CHECK(!says_one_of_passage(session.answer(one, "Why?", options)));
}

TEST_CASE_FIXTURE(Fixture,
                  "an answer within limits: a callback ends it without one, a deadline as far as it came") {
    AnswerOptions options = options_with(SelectPolicy::model, 0.3);
    options.ignore_eos = true;
    Session session(model);
    const std::vector<Passage> passages = some_passages();
    const Answer whole = session.answer(passages, "Where is the mill?", options);
    const auto segments = [&] {
        return make_segments(model, {}, share_passages(model, passages, session.cache()),
                             "Where is the mill?");
    };
    int n_asked = 0;
    std::optional<Answer> answer = session.answer(segments(), options, {}, {.keep_going = [&] {
                                                      ++n_asked;
                                                      return true;
                                                  }});
    REQUIRE(answer);
    CHECK(answer->ids == whole.ids);
    CHECK(n_asked >= 8);  // before every step; a token is one
    for (int at = 1; at <= n_asked; ++at) {
        CAPTURE(at);
        int n = 0;
        CHECK(!session.answer(segments(), options, {}, {.keep_going = [&] { return ++n < at; }}));
        CHECK(n == at);
    }
    // What it throws comes out; the session goes on.
    CHECK(contains(error_of([&] {
                       session.answer(segments(), options, {},
                                      {.keep_going = []() -> bool { fail(Status::runtime, "enough"); }});
                   }),
                   "enough"));
    answer = session.answer(segments(), options, {}, {.deadline = std::chrono::steady_clock::now()});
    REQUIRE(answer);
    CHECK(answer->finish == FinishReason::deadline);
    CHECK(answer->ids.empty());
    CHECK(session.answer(segments(), options).ids == whole.ids);
}
