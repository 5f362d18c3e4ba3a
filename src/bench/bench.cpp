// See bench.h.
#include "bench/bench.h"

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/median.h"
#include "bench/cost.h"
#include "bench/random_model.h"
#include "refrag/engine.h"
#include "refrag/memory_plan.h"
#include "refrag/prompt_work.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

constexpr double kWarmUpMs = 2000.0;

using Passages = std::vector<std::shared_ptr<SharedPassage>>;  // one for each request of a batch

// One round of one row.
struct Sample {
    double ttft_ms, ttit_ms, tokens_per_s, prefill_ms;
};

// What is asked in a context: (mode, k, p), measured from either source.
struct Case {
    bool full = false;
    std::optional<int32_t> chunk_len;
    std::optional<double> expand_fraction;
    AnswerOptions answer;
    int64_t positions = 0;  // the longest prompt of the batch: the most it can be, then what it was
    bool fits = false;
    Passages held;  // tokenised and encoded
    struct Source {
        bool wanted = false;
        bool warm = false;
        bool done = false;
        double spent_ms = 0.0;
        std::vector<Sample> samples;
        double flops = 0.0;
    };
    std::array<Source, 2> sources;  // cached, text
};

// Rows of one context and batch size.
class Group {
  public:
    Group(const Model& model, const BenchOptions& options, const WordTexts& words, int64_t context,
          int32_t batch)
        : model_(model),
          options_(options),
          context_(context),
          batch_(batch),
          backend_(model.device().make_backend()),
          arena_(*backend_) {
        for (int32_t i = 0; i < batch; ++i) {
            const uint64_t seed = options.seed + 2 * static_cast<uint64_t>(i);
            texts_.push_back(words.text(context, seed));
            questions_.push_back(words.text(options.question_tokens, seed + 1));
        }
        if (options.full) add_case(true, {}, {});
        if (options.refrag) {
            for (const int32_t k : options.chunk_lens) {
                for (const double p : options.expand_fractions) add_case(false, k, p);
            }
        }
    }

    // tick() is called after every round of every row, and for rounds that are left out.
    void measure(const std::function<void()>& tick) {
        int64_t most = 0;
        for (const Case& c : cases_) most = std::max(most, c.fits ? c.positions : 0);
        std::optional<Engine> engine;
        if (most > 0) {
            // Every round does the whole work anew.
            engine.emplace(model_, EngineOptions{.n_slots = batch_,
                                                 .max_context = most + options_.output_tokens,
                                                 .prefix_cache = false});
        }
        for (int32_t round = 0; round <= options_.repeats; ++round) {
            for (Case& c : cases_) {
                // Text first: what it leaves behind is what the other finds held.
                for (const size_t source : {size_t{1}, size_t{0}}) {
                    if (!c.sources[source].wanted) continue;
                    if (c.fits && !c.sources[source].done) run_round(*engine, c, source == 0);
                    tick();
                }
            }
        }
    }

    void append_rows(std::vector<BenchRow>& rows) const {
        const Case* full = !cases_.empty() && cases_[0].full ? &cases_[0] : nullptr;
        for (const Case& c : cases_) {
            for (const bool cached : {true, false}) {
                const Case::Source& source = c.sources[cached ? 0 : 1];
                if (!source.wanted) continue;
                BenchRow row;
                row.full = c.full;
                row.context = context_;
                row.chunk_len = c.chunk_len;
                row.expand_fraction = c.expand_fraction;
                row.cached = cached;
                row.batch = batch_;
                row.figures = figures(c, source);
                const std::optional<BenchFigures> base =
                    full != nullptr ? figures(*full, full->sources[cached ? 0 : 1]) : std::nullopt;
                if (row.figures && base) {
                    row.ttft_ratio = base->ttft_ms / row.figures->ttft_ms;
                    row.ttit_ratio = base->ttit_ms / row.figures->ttit_ms;
                    row.throughput_ratio = row.figures->tokens_per_s / base->tokens_per_s;
                    row.flop_ratio = base->flops / row.figures->flops;
                }
                rows.push_back(row);
            }
        }
    }

  private:
    void add_case(bool full, std::optional<int32_t> k, std::optional<double> p) {
        Case c;
        c.full = full;
        c.chunk_len = k;
        c.expand_fraction = p;
        c.answer.policy = full ? SelectPolicy::all : SelectPolicy::model;
        c.answer.chunk_len = k.value_or(0);
        c.answer.expand_fraction = p;
        c.answer.max_new_tokens = options_.output_tokens;
        c.answer.ignore_eos = true;
        c.answer.want_logits = !full && options_.always_sense;
        c.sources[0].wanted = options_.cached;
        c.sources[1].wanted = options_.text;
        c.held = raw_passages(c);
        for (int32_t i = 0; i < batch_; ++i) {
            const auto at = static_cast<size_t>(i);
            c.positions = std::max(c.positions, most_positions(model_, segments_of(c, at), c.answer));
        }
        c.fits = c.positions + options_.output_tokens <= model_.decoder().config().max_seq_len;
        cases_.push_back(std::move(c));
    }

    Passages raw_passages(const Case& c) const {
        Passages passages;
        for (const std::string& text : texts_)
            passages.push_back(std::make_shared<SharedPassage>(model_, text, c.answer.chunk_len));
        return passages;
    }

    std::vector<Segment> segments_of(const Case& c, size_t at) const {
        return make_segments(model_, {}, std::span(c.held).subspan(at, 1), questions_[at],
                             c.answer.chunk_len);
    }

    void run_round(Engine& engine, Case& c, bool cached) {
        Case::Source& source = c.sources[cached ? 0 : 1];
        if (!cached) c.held = raw_passages(c);
        if (cached) {
            for (const auto& passage : c.held) passage->cut(model_);
            if (!c.full) encode_passages(*backend_, model_, c.held, arena_);
        }
        const double began_ms = now_ms();
        const Sample sample = answer_all(engine, c, source.flops, !cached);
        const double took_ms = now_ms() - began_ms;
        if (!source.warm && took_ms < kWarmUpMs) {
            source.warm = true;
            return;
        }
        source.warm = true;
        source.samples.push_back(sample);
        source.spent_ms += took_ms;
        source.done =
            std::ssize(source.samples) == options_.repeats || source.spent_ms > options_.row_seconds * 1000.0;
    }

    Sample answer_all(Engine& engine, Case& c, double& flops, bool from_text) {
        const double began_ms = now_ms();
        for (size_t i = 0; i < c.held.size(); ++i) {
            Request request;
            request.segments = segments_of(c, i);
            request.options = c.answer;
            engine.submit(std::move(request));
        }
        while (!engine.idle()) engine.step();
        const double took_ms = now_ms() - began_ms;
        std::vector<Result> results = engine.take_finished();
        std::sort(results.begin(), results.end(),
                  [](const Result& a, const Result& b) { return a.id < b.id; });
        Sample sample{};
        c.positions = 0;
        for (const Result& result : results) {
            if (result.error) throw Error(result.error->status(), result.error->message());
            const Answer& answer = result.answer;
            REFRAG_CHECK(std::ssize(answer.ids) == options_.output_tokens, Status::runtime,
                         "bench: expected an answer of ", options_.output_tokens, " tokens, found ",
                         answer.ids.size());
            c.positions = std::max(c.positions, static_cast<int64_t>(answer.positions));
            sample.ttft_ms += (answer.times.queue + answer.ttft_ms) / batch_;
        }
        const Answer& last = results.back().answer;
        // All prompts are made before the first step, and the last one's first token is the last to come.
        sample.prefill_ms = last.times.prefill;
        sample.ttit_ms = last.times.decode / (options_.output_tokens - 1);
        sample.tokens_per_s = static_cast<double>(batch_) * options_.output_tokens * 1000.0 / took_ms;
        flops = request_flops(c, results[0].answer, *c.held[0]->cut(model_), from_text);
        return sample;
    }

    // Of all that the first token of this request takes.
    double request_flops(const Case& c, const Answer& answer, const CutPassage& passage,
                         bool from_text) const {
        const DecoderConfig& decoder = model_.decoder().config();
        double sum = prefill_flops(decoder, static_cast<int64_t>(answer.positions)) + head_flops(decoder);
        if (c.full) return sum;
        const int64_t n_chunks = std::ssize(answer.chunks);
        const auto n_expanded = static_cast<int64_t>(answer.n_expanded);
        sum += projector_flops(model_.d_enc(), decoder.dim, n_chunks - n_expanded);
        const bool sensed = c.answer.want_logits || (n_expanded > 0 && n_expanded < n_chunks);
        if (sensed) {
            int64_t pieces = 0;
            if (model_.policy().config().sees_question) {
                const int64_t question = options_.question_tokens;
                for (int64_t at = 0; at < question; at += answer.chunk_len, ++pieces)
                    sum +=
                        encode_flops(model_.encoder().config(),
                                     special_tokens() + std::min<int64_t>(answer.chunk_len, question - at));
            }
            sum += policy_flops(model_.policy().config(), model_.d_enc(), n_chunks + pieces);
        }
        if (!from_text) return sum;
        if (!sensed && n_expanded == n_chunks) return sum;
        for (const Chunk& chunk : passage.chunks())
            sum += encode_flops(model_.encoder().config(), std::ssize(chunk.encoder_ids));
        return sum;
    }
    int64_t special_tokens() const { return model_.config().encoder_special_tokens ? 2 : 0; }

    std::optional<BenchFigures> figures(const Case& c, const Case::Source& source) const {
        if (source.samples.empty()) return std::nullopt;
        const auto column = [&](double Sample::*member) {
            std::vector<double> values;
            for (const Sample& sample : source.samples) values.push_back(sample.*member);
            return values;
        };
        const auto spread = [&](double Sample::*member) {
            const std::vector<double> values = column(member);
            const auto [least, most] = std::minmax_element(values.begin(), values.end());
            return (*most - *least) / median(values);
        };
        const DecoderConfig& decoder = model_.decoder().config();
        BenchFigures f;
        f.positions = c.positions;
        f.ttft_ms = median(column(&Sample::ttft_ms));
        f.ttit_ms = median(column(&Sample::ttit_ms));
        f.tokens_per_s = median(column(&Sample::tokens_per_s));
        const double prefill = prefill_flops(decoder, c.positions) * batch_;
        f.prefill_gflops = prefill / median(column(&Sample::prefill_ms)) * 1e-6;
        // A step sees on average half of the answer.
        const double entries = static_cast<double>(c.positions) + options_.output_tokens / 2.0;
        const double step_bytes =
            static_cast<double>(model_.decoder().step_bytes()) +
            entries * static_cast<double>(kv_entry_bytes(decoder, model_.decoder().kv_dtype())) * batch_;
        f.decode_gbs = step_bytes / f.ttit_ms * 1e-6;
        f.kv_bytes = Generator::cache_bytes(decoder, model_.decoder().kv_dtype(), batch_,
                                            c.positions + options_.output_tokens);
        f.flops = source.flops;
        f.repeats = static_cast<int32_t>(source.samples.size());
        if (f.repeats > 1) f.spread = std::max(spread(&Sample::ttft_ms), spread(&Sample::ttit_ms));
        return f;
    }

    const Model& model_;
    const BenchOptions& options_;
    int64_t context_;
    int32_t batch_;
    std::unique_ptr<Backend> backend_;
    Arena arena_;
    std::vector<std::string> texts_;      // one for each request of the batch
    std::vector<std::string> questions_;  // the same
    std::vector<Case> cases_;             // full first
};

}  // namespace

void check_bench_options(const BenchOptions& options) {
    const auto check = [](bool good, const char* what, const auto& found) {
        REFRAG_CHECK(good, Status::usage, "bench: expected ", what, ", found ", found);
    };
    for (const int64_t context : options.contexts)
        check(context >= 1 && context <= 1 << 20, "contexts of 1 to 2^20 tokens", context);
    for (const int32_t k : options.chunk_lens)
        check(k >= 1 && k <= 4096, "chunk lengths of 1 to 4096 tokens", k);
    for (const double p : options.expand_fractions)
        check(p >= 0.0 && p <= 1.0, "shares of chunks of 0 to 1", p);
    for (const int32_t batch : options.batches)
        check(batch >= 1 && batch <= max_parallel, str("batches of 1 to ", max_parallel).c_str(), batch);
    check(!options.contexts.empty() && !options.batches.empty(), "at least one context and batch size",
          "none");
    check(!options.refrag || (!options.chunk_lens.empty() && !options.expand_fractions.empty()),
          "at least one k and p", "none");
    check(options.full || options.refrag, "full, refrag or both", "neither");
    check(options.cached || options.text, "cached, text or both", "neither");
    check(options.output_tokens >= 2, "at least 2 output tokens", options.output_tokens);
    check(options.question_tokens >= 1, "at least 1 question token", options.question_tokens);
    check(options.repeats >= 1, "at least 1 repeat", options.repeats);
    check(options.row_seconds >= 0.0, "at least 0 seconds a row", options.row_seconds);
}

BenchMemory bench_memory(const DecoderConfig& decoder, DType kv, const RobertaConfig& encoder,
                         const RefragConfig& config, const BenchOptions& options) {
    constexpr int64_t kTemplate = 64;  // BOS and template pieces; more of them than any model here has
    const int64_t context = *std::max_element(options.contexts.begin(), options.contexts.end());
    const int32_t batch = *std::max_element(options.batches.begin(), options.batches.end());
    int64_t n_chunks = 0;
    int64_t rows = options.full ? context : 0;
    if (options.refrag) {
        const double p = *std::max_element(options.expand_fractions.begin(), options.expand_fractions.end());
        for (const int32_t k : options.chunk_lens) {
            const int64_t chunks = (context + k - 1) / k;
            const int64_t mixed = chunks + n_expand(p, chunks) * (k - 1);
            n_chunks = std::max(n_chunks, chunks);
            rows = std::max(rows, std::min(context, mixed));
        }
    }
    rows += options.question_tokens + kTemplate;
    rows = std::min<int64_t>(rows, decoder.max_seq_len);
    BenchMemory memory;
    memory.kv_bytes = Generator::cache_bytes(decoder, kv, batch, rows + options.output_tokens);
    memory.workspace_bytes =
        workspace_bytes(decoder, encoder, config.policy, batch, rows, n_chunks * int64_t{batch});
    return memory;
}

std::vector<BenchRow> run_bench(const Model& model, const BenchOptions& options,
                                const BenchProgress& progress) {
    check_bench_options(options);
    for (const int32_t k : options.chunk_lens) {
        const RefragConfig& config = model.config();
        const int32_t longest = k + (config.encoder_special_tokens ? 2 : 0);
        REFRAG_CHECK(
            !options.refrag || !config.shared_vocabulary || longest <= model.encoder().config().max_seq_len(),
            Status::usage, "bench: -k ", k, " needs ", longest, " encoder positions, the encoder has ",
            model.encoder().config().max_seq_len());
    }
    const WordTexts words(model.tokenizer());
    const int64_t n_cases =
        (options.full ? 1 : 0) +
        (options.refrag ? std::ssize(options.chunk_lens) * std::ssize(options.expand_fractions) : 0);
    const int64_t n_rows = n_cases * ((options.cached ? 1 : 0) + (options.text ? 1 : 0)) *
                           std::ssize(options.contexts) * std::ssize(options.batches);
    const int64_t total = n_rows * (options.repeats + 1);
    int64_t done = 0;
    const auto tick = [&] {
        if (progress) progress(++done, total);
    };
    std::vector<BenchRow> rows;
    for (const int32_t batch : options.batches) {
        for (const int64_t context : options.contexts) {
            Group group(model, options, words, context, batch);
            group.measure(tick);
            group.append_rows(rows);
        }
    }
    return rows;
}

}  // namespace refrag
