// `eval perplexity` with lists: rows for every context and policy, policies compared window by window, and
// every window's figure for the comparison of two runs.
#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <tuple>

#include "cli_test.h"
#include "eval/perplexity.h"
#include "eval/statistics.h"
#include "golden.h"
#include "io/json.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Fixture = TinyRefrag;

std::string some_text(int lines) {
    std::string text;
    for (int i = 0; i < lines; ++i)
        text += str("Line ", i, ": the mill on hill ", i * 7, " grinds barley.\n");
    return text;
}

PerplexityOptions some_options() {
    PerplexityOptions options;
    options.contexts = {40};
    options.output = 8;
    options.modes = {EvalMode::refrag};
    options.chunk_lens = {4};
    options.expand_fractions = {0.3};
    options.limit = 5;
    return options;
}

// The windows' figures of every row, in the table's order.
struct Measured {
    std::vector<PerplexityRow> rows;
    std::vector<std::vector<double>> windows;
};

Measured measure(const Model& model, const PerplexityOptions& options) {
    Measured measured;
    std::vector<PerplexityRow> seen;
    int64_t last_done = 0;
    int64_t last_total = 0;
    measured.rows = evaluate_perplexity(
        model, some_text(60), options,
        [&](int64_t done, int64_t total) {
            last_done = done;
            last_total = total;
        },
        [&](const PerplexityRow& row, int64_t window, double log_perplexity) {
            if (window == 0) measured.windows.emplace_back();
            CHECK(window == std::ssize(measured.windows.back()));
            CHECK(row.n > window);
            measured.windows.back().push_back(log_perplexity);
        });
    CHECK(last_done == last_total);
    return measured;
}

}  // namespace

// The rows' figures by the networks alone: every span and window by the definition, tokens straight into the
// decoder (golden.h), one log-softmax a target in double.
TEST_CASE_FIXTURE(Fixture, "eval perplexity: figures are those of the networks on the same spans") {
    const std::string text = some_text(60);
    const std::vector<Token> tokens = model.tokenizer().encode(text);
    const auto n_tokens = std::ssize(tokens);
    constexpr int64_t kOutput = 8, kLongest = 40, kLimit = 5, kChunk = 8;
    PerplexityOptions options = some_options();
    options.modes = {EvalMode::none, EvalMode::full, EvalMode::last, EvalMode::refrag};
    options.contexts = {kLongest, 16};
    options.chunk_lens = {kChunk};
    options.expand_fractions = {0.0};
    const Measured measured = measure(model, options);
    REQUIRE(measured.windows.size() == 8);

    Arena arena(backend);
    Decoder decoder(backend, tiny_refrag_path() + "/decoder");
    const auto mean_nll = [&](std::vector<int32_t> source, std::span<const Token> targets) {
        for (const Token& token : targets) source.push_back(token.id);
        decoder.kv.truncate(0, 0);
        const std::vector<float> logits = decoder.feed(0, source);
        double sum = 0.0;
        for (size_t i = 0; i < targets.size(); ++i) {
            const auto row = rows_of(logits, decoder.vocab(), source.size() - targets.size() - 1 + i, 1);
            double total = 0.0;
            for (const float logit : row) total += std::exp(static_cast<double>(logit));
            sum += std::log(total) - static_cast<double>(row[static_cast<size_t>(targets[i].id)]);
        }
        return sum / static_cast<double>(targets.size());
    };
    for (size_t c = 0; c < 2; ++c) {
        const int64_t context = options.contexts[c];
        for (int64_t w = 0; w < kLimit; ++w) {
            // Both contexts have the same spans: those of what has 40 ids before it.
            const int64_t begin = kLongest + w * (n_tokens - kLongest) / kLimit;
            REQUIRE(begin + kOutput <= n_tokens);
            const auto before =
                std::span(tokens).subspan(static_cast<size_t>(begin - context), static_cast<size_t>(context));
            const auto targets = std::span(tokens).subspan(static_cast<size_t>(begin), kOutput);
            const auto with = [&](std::span<const Token> part) {
                std::vector<int32_t> source{0};  // <s>
                for (const Token& token : part) source.push_back(token.id);
                return source;
            };
            // Each chunk's own encoder call, then the projector.
            std::vector<int32_t> compressed{0};
            std::vector<float> rows;
            for (int64_t at = 0; at < context; at += kChunk) {
                std::vector<int32_t> ids{0};  // <s> ids </s>
                for (int64_t i = at; i < at + kChunk; ++i) ids.push_back(before[static_cast<size_t>(i)].id);
                ids.push_back(2);
                const ArenaScope scratch(arena);
                const Tensor chunk_emb = arena.tensor(1, model.d_enc());
                const Tensor row = arena.tensor(1, model.decoder().config().dim);
                model.encoder().encode(backend, std::span(&ids, 1), chunk_emb, arena);
                model.projector().forward(backend, row, chunk_emb, arena);
                const std::vector<float> values = download(backend, row);
                rows.insert(rows.end(), values.begin(), values.end());
                compressed.push_back(static_cast<int32_t>(-1 - at / kChunk));
            }
            const auto window = static_cast<size_t>(w);
            const auto near = [&](size_t row, double expected) {
                CAPTURE(context);
                CAPTURE(row);
                // Sums of a few hundred float terms in another order.
                CHECK(std::fabs(measured.windows[c * 4 + row][window] - expected) < 1e-5);
            };
            near(0, mean_nll(with({}), targets));
            near(1, mean_nll(with(before), targets));
            near(2, mean_nll(with(before.last(static_cast<size_t>(context / kChunk))), targets));
            decoder.set_chunk_rows(rows);
            near(3, mean_nll(compressed, targets));
            decoder.set_chunk_rows({});
        }
    }
    // No context is the same for both, window by window and bit for bit.
    CHECK(measured.windows[0] == measured.windows[4]);
    CHECK(measured.windows[1] != measured.windows[5]);
}

TEST_CASE_FIXTURE(Fixture,
                  "eval perplexity: spans do not overlap, and without a limit leave no room for one more") {
    PerplexityOptions options = some_options();
    options.modes = {EvalMode::none};
    options.limit = 0;
    const auto n_tokens = std::ssize(model.tokenizer().encode(some_text(60)));
    const Measured all = measure(model, options);
    CHECK(all.rows[0].n == (n_tokens - 40) / 8);
    CHECK(std::ssize(all.windows[0]) == all.rows[0].n);
    options.limit = 1 << 20;
    CHECK(measure(model, options).windows == all.windows);
}

TEST_CASE_FIXTURE(Fixture,
                  "eval perplexity: a context beyond the decoder's window has rows without figures") {
    PerplexityOptions options = some_options();
    options.modes = {EvalMode::none, EvalMode::full, EvalMode::last, EvalMode::refrag};
    options.contexts = {600, 16};
    const Measured together = measure(model, options);
    REQUIRE(together.rows.size() == 8);
    CHECK(together.rows[0].log_perplexity);
    CHECK(!together.rows[1].log_perplexity);
    CHECK(together.rows[3].log_perplexity);
    CHECK(!together.rows[3].share_recovered);
    CHECK(together.rows[7].share_recovered);
    // The longest alone has the same spans.
    options.contexts = {600};
    const Measured alone = measure(model, options);
    for (size_t i = 0; i < 4; ++i) CHECK(together.rows[i].log_perplexity == alone.rows[i].log_perplexity);
}

TEST_CASE_FIXTURE(Fixture, "eval perplexity: policies are compared with the first, window by window") {
    PerplexityOptions options = some_options();
    options.chunk_lens = {4, 6};  // 40 is no multiple of 6
    options.modes = {EvalMode::last, EvalMode::refrag};
    options.expand_fractions = {0.0, 0.3};
    options.policies = {SelectPolicy::random, SelectPolicy::model, SelectPolicy::all,
                        SelectPolicy::perplexity_desc};
    const Measured measured = measure(model, options);
    // For each k: last at p = 0, 1 and .3; refrag at 0 (random alone), all, and .3 by three policies.
    REQUIRE(measured.rows.size() == 2 * 3 + 2 * 5);
    for (size_t i = 0; i < 6; ++i) {
        CHECK(measured.rows[i].mode == EvalMode::last);
        CHECK(measured.rows[i].expand_fraction == std::array{0.0, 1.0, 0.3}[i % 3]);
        CHECK(!measured.rows[i].difference);
    }
    for (size_t first = 6; first < 16; first += 5) {
        CHECK(measured.rows[first].expand_fraction == 0.0);
        CHECK(measured.rows[first].policy == SelectPolicy::random);
        CHECK(measured.rows[first + 1].policy == SelectPolicy::all);
        CHECK(measured.rows[first + 1].expand_fraction == 1.0);
        // The first policy itself, and what it has no row for.
        for (size_t i = first; i < first + 3; ++i) {
            CHECK(!measured.rows[i].difference);
            CHECK(!measured.rows[i].ci95);
        }
        for (size_t i = first + 3; i < first + 5; ++i) {
            const PairedDifference paired =
                paired_difference(measured.windows[i], measured.windows[first + 2]);
            CHECK(measured.rows[i].expand_fraction == 0.3);
            CHECK(measured.rows[i].difference == paired.mean);
            CHECK(measured.rows[i].ci95 == paired.ci95);
            CHECK(*measured.rows[i].difference == doctest::Approx(*measured.rows[i].log_perplexity -
                                                                  *measured.rows[first + 2].log_perplexity));
            CHECK(*measured.rows[i].ci95 > 0.0);
        }
    }
    // One window has a difference, but no interval.
    options.limit = 1;
    const PerplexityRow last = measure(model, options).rows.back();
    CHECK(last.difference);
    CHECK(!last.ci95);
}

TEST_CASE_FIXTURE(Fixture, "eval perplexity: what a policy picks does not depend on the others listed") {
    PerplexityOptions options = some_options();
    options.policies = {SelectPolicy::random};
    options.seed = 3;
    const Measured alone = measure(model, options);
    options.policies = {SelectPolicy::perplexity_asc, SelectPolicy::model, SelectPolicy::random};
    options.expand_fractions = {0.6, 0.3};
    const Measured among = measure(model, options);
    CHECK(among.rows[5].policy == SelectPolicy::random);
    CHECK(among.windows[5] == alone.windows[0]);
    CHECK(among.windows[2] != alone.windows[0]);
    options.seed = 4;
    CHECK(measure(model, options).windows[5] != alone.windows[0]);
}

TEST_CASE_FIXTURE(Fixture, "eval perplexity: lists that make no sense are refused") {
    const auto refusal = [&](auto change) {
        PerplexityOptions options = some_options();
        change(options);
        return error_of([&] { evaluate_perplexity(model, some_text(60), options); });
    };
    using Options = PerplexityOptions;
    CHECK(refusal([](Options& o) {
              o.contexts = {16, 40, 16};
          }) == "context: expected each once, found 16 twice");
    CHECK(contains(refusal([](Options& o) { o.contexts = {16, 0}; }), "found 0 and 8"));
    CHECK(contains(refusal([](Options& o) { o.contexts.clear(); }), "at least one"));
    CHECK(contains(refusal([](Options& o) { o.modes.clear(); }), "at least one"));
    CHECK(contains(refusal([](Options& o) { o.chunk_lens = {4, 0}; }), "found 0"));
    CHECK(contains(refusal([](Options& o) { o.policies.push_back(o.policies[0]); }), "\"model\" twice"));
    CHECK(contains(refusal([](Options& o) { o.contexts = {16, 100000}; }), "expected at least 100008"));
}

TEST_CASE("eval perplexity: lists from outside, the table and --windows") {
    const TempDir dir;
    const std::string base = "eval perplexity -m tests/golden/tiny-refrag --text '" +
                             dir.write("text.txt", some_text(60)) + "' --output 16 --limit 3 -k 4,8 ";
    const std::string lists = base + "--context 32,48 -p 0,0.5 --policy model,random,none ";
    const Ran ran = refrag_run(dir, lists + "-o json --windows '" + dir.file("windows.jsonl") + "'");
    REQUIRE(ran.code == 0);
    const Json rows = Json::parse(ran.out, "stdout");
    // A context: none, full, and for both k last at two p, refrag at 0 once and at .5 twice.
    REQUIRE(rows.as_array().size() == 2 * (2 + 2 * 2 + 2 * 3));
    using Key = std::tuple<int64_t, std::string, int64_t, double, std::string>;
    const auto key_of = [](const Json& json) {
        return Key{json.get_int("context"), json.get_string("mode"), json.get_int_or("k", 0),
                   json.get_number_or("p", -1.0), json.get_string_or("policy", "")};
    };
    std::map<Key, std::vector<double>> windows;
    for (const Json& line : json_lines(read_file(dir.file("windows.jsonl"), 1 << 20))) {
        line.check_keys(
            {"context", "output", "mode", "k", "p", "policy", "unexpanded", "window", "log_perplexity"});
        CHECK(line.get_int("output") == 16);
        std::vector<double>& list = windows[key_of(line)];
        CHECK(line.get_int("window") == std::ssize(list));
        list.push_back(line.get_number("log_perplexity"));
    }
    CHECK(windows.size() == rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        row.check_keys({"mode", "context", "output", "k", "p", "policy", "unexpanded", "log_perplexity",
                        "standard_error", "share_recovered", "n", "difference", "ci95"});
        const std::vector<double>& list = windows[key_of(row)];
        REQUIRE(list.size() == 3);
        CHECK(row.get_number("log_perplexity") == mean_of(list).value);
        const bool compared = row.get_string_or("policy", "") == "random";
        CHECK(row.get("difference").is_null() == !compared);
        CHECK(row.get("ci95").is_null() == !compared);
        if (!compared) continue;
        Key first = key_of(row);
        std::get<4>(first) = "model";
        CHECK(row.get_number("difference") == paired_difference(list, windows[first]).mean);
        CHECK(row.get_number("ci95") == *paired_difference(list, windows[first]).ci95);
    }
    CHECK(
        refrag_run(dir, lists + "-o csv")
            .out.starts_with("mode,context,output,k,p,policy,log_perplexity,standard_error,share_recovered,n,"
                             "difference,ci95\nnone,32,16,,,,"));
    CHECK(line_count(refrag_run(dir, lists).out) == 2 + rows.size());

    const auto refused = [&](const std::string& arguments, int code, const char* part) {
        CAPTURE(arguments);
        const Ran wrong = refrag_run(dir, base + arguments);
        CHECK(wrong.code == code);
        CHECK(wrong.out.empty());
        CHECK(line_count(wrong.err) == 1);
        CHECK(contains(wrong.err, part));
    };
    refused("--policy model,best", 2, "found \"best\"");
    refused("--policy model,random,model", 2, "found \"model\" twice");
    refused("--context 32,16,32", 2, "found 32 twice");
    refused("--context 32,0", 2, "--context");
    refused("--context 32 --modes none --windows '" + dir.file("no/such/file") + "'", 1, "no/such");
}
