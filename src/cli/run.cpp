// `refrag run`, one question after another: the answer goes to standard output as it is generated, a one-line
// summary to standard error, and with --explain the whole story of every chunk to a file. --batch is
// run_batch.cpp's.
#include "cli/run.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "base/check.h"
#include "cli/answer_json.h"
#include "cli/explain.h"
#include "cli/explain_page.h"
#include "cli/numbers.h"
#include "io/file.h"
#include "io/output.h"
#include "refrag/choice.h"
#include "refrag/remote_generator.h"
#include "refrag/session.h"

namespace refrag {
namespace {

// Options that do not go together.
void check_combination(const RunOptions& options) {
    REFRAG_CHECK(options.passages != "-" || options.batch != "-", Status::usage,
                 "run: expected --passages - or --batch -, found both: standard input is read once");
    if (!options.batch.empty()) {
        REFRAG_CHECK(options.questions.empty(), Status::usage,
                     "run: expected -q TEXT or --batch FILE, found both");
        REFRAG_CHECK(options.explain.empty(), Status::usage,
                     "run: --explain tells of single questions (-q), --batch has none");
        return;
    }
    REFRAG_CHECK(!options.questions.empty(), Status::usage,
                 "run: expected -q TEXT or --batch FILE, found neither");
    REFRAG_CHECK(!options.answer.logprobs || options.json, Status::usage,
                 "run: --logprobs are written as JSON: add --json");
}

void run_questions(const RunOptions& options) {
    // Everything that can be refused without the model is refused before it is loaded.
    const AnswerOptions answer_options = checked_answer_options(options);
    check_output_paths({{"--explain", options.explain}});
    const std::vector<Passage> passages = read_passages(options);

    const std::shared_ptr<PassageKeeper> keeper = open_cache(options.cache);
    const std::unique_ptr<Device> device = make_device(options.device);
    const std::unique_ptr<Model> model = load_run_model(*device, options, answer_options);
    warn_chunk_len(*model, options.chunk_len);
    const EngineOptions engine{.max_context = options.context, .prefix_cache = !options.no_prefix_cache};
    std::optional<Session> session(std::in_place, *model, engine,
                                   std::make_shared<PassageCache>(default_passage_cache_bytes, keeper));
    const bool several = options.questions.size() > 1;
    Explanation explanation(options.explain, several);
    size_t n_failed = 0;
    for (const std::string& question : options.questions) {
        TextSink sink;
        if (!options.json) {
            sink = [](std::string_view text) {
                write_stdout(text);
                flush_stdout();
                return true;
            };
        }
        Answer answer;
        try {
            const std::vector<Segment> segments = make_segments(
                *model, {}, share_passages(*model, passages, session->cache(), options.chunk_len), question,
                options.chunk_len);
            explanation.ask(question, document_names(passages), segments);
            answer = session->answer(segments, answer_options, sink);
        } catch (const Error& error) {
            if (!several) throw;
            std::fprintf(stderr, "refrag: question \"%s\": %s\n", printable(question, 60).c_str(),
                         error.what());
            ++n_failed;
            continue;
        }
        if (options.json) {
            JsonWriter line;
            line.begin_object();
            write_answer(line, model->tokenizer(), question, answer);
            line.end_object();
            write_stdout(line.text());
        }
        write_stdout("\n");
        flush_stdout();
        print_summary(answer);
        explanation.answered(answer);
    }
    session.reset();
    explanation.write(*model, engine, answer_options);
    REFRAG_CHECK(n_failed == 0, Status::runtime, n_failed, " of ", options.questions.size(),
                 " questions could not be answered");
}

// Returns --batch.
CLI::Option* add_input_options(CLI::App& sub, RunOptions& options) {
    const char* group = "Input";
    add_texts(sub, "-q,--question", options.questions,
              "The question; given several times, each is answered and passages stay encoded")
        ->group(group);
    sub.add_option("--passages", options.passages,
                   "Passages: JSON Lines of {\"id\", \"title\", \"text\"}, or plain text with blank lines "
                   "between them; - for standard input; without it the decoder is asked alone")
        ->group(group)
        ->type_name("FILE");
    sub.add_flag("--skip-bad", options.skip_bad,
                 "Name a line of --passages that cannot be read, and go on without it")
        ->group(group);
    CLI::Option* batch =
        sub.add_option(
               "--batch", options.batch,
               "Instead of -q: JSON Lines of {\"id\", \"question\", \"passages\"}, - for standard input; "
               "\"passages\" (strings, or objects as in --passages) may be absent: --passages then; "
               "answers are JSON Lines in the same order")
            ->group(group)
            ->type_name("FILE");
    return batch;
}

}  // namespace

void add_expansion_options(CLI::App& sub, RunOptions& options) {
    const char* group = "Compression";
    sub.add_option(
           "-p,--expand-fraction", options.expand_fraction,
           "Share of chunks expanded to tokens, 0 to 1 (default: the model's; in llama.cpp -p is the prompt, "
           "here that is -q)")
        ->group(group)
        ->transform(decimal_number(0.0, 1.0))
        ->type_name("P");
    add_policy_option(sub, options.policy)->group(group);
    add_unexpanded_option(sub, options.unexpanded)->group(group);
}

CLI::Option* add_explain_option(CLI::App& app, RunOptions& options) {
    return app
        .add_option(
            "--explain", options.explain,
            "Write what became of every chunk and the time of every stage: JSON, or, where FILE ends in "
            ".html "
            "or .htm, a page to look at, with the answer's attention and the full context's time; for a page "
            "every question goes through the model twice more, after all are answered")
        ->type_name("FILE");
}

CLI::Option* add_logprobs_option(CLI::App& app, AnswerOptions& answer) {
    return app
        .add_option("--logprobs", answer.logprobs,
                    "In JSON: each token's log-probability, before penalties and temperature, and those of "
                    "the N most likely, 0 to 20")
        ->transform(any_int32())
        ->type_name("N");
}

void add_generation_options(CLI::App& sub, RunOptions& options) {
    const char* group = "Generation";
    sub.add_option("-n,--n-predict", options.answer.max_new_tokens,
                   "Tokens to generate at most; -1: until an end token, or the context is full")
        ->group(group)
        ->capture_default_str()
        ->transform(any_int32())
        ->type_name("N");
    sub.add_option("-c,--ctx-size", options.context,
                   "Decoder positions of a request, prompt and answer; 0: the decoder's window")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(0, INT32_MAX))
        ->type_name("N");
    add_texts(sub, "-r,--stop,--reverse-prompt", options.answer.stop,
              "End the answer before this text, taken as it is (in bash $'\\n' is a line's end); may be "
              "given several times: the first to be complete counts")
        ->group(group);
    sub.add_flag("--ignore-eos", options.answer.ignore_eos, "Never sample an end token: go on to -n or -c")
        ->group(group);
    sub.add_flag("--no-prefix-cache", options.no_prefix_cache,
                 "Read every prompt whole: do not take over the positions of an earlier one that began alike")
        ->group(group);
}

void add_sampling_options(CLI::App& sub, SamplerOptions& sampler) {
    const char* group = "Sampling (in this order; the defaults are greedy)";
    const auto add = [&](const char* name, auto& value, const char* description, const char* type) {
        sub.add_option(name, value, description)
            ->group(group)
            ->capture_default_str()
            ->transform(number_of(value))
            ->type_name(type);
    };
    add("--repeat-penalty,--repetition-penalty", sampler.repetition_penalty,
        "Divide the logits above 0 of tokens in prompt or answer by this, multiply those below; 1: off", "R");
    add("--frequency-penalty", sampler.frequency_penalty,
        "Lower a token's logit by this for each time the answer has it, -2 to 2", "F");
    add("--presence-penalty", sampler.presence_penalty,
        "Lower a token's logit by this once the answer has it, -2 to 2", "Q");
    add("--repeat-last-n", sampler.repeat_last_n,
        "The penalties look at this many last tokens; 0: none, -1: all", "N");
    add("--temp,--temperature", sampler.temperature, "Divide logits by this; 0: greedy", "T");
    add("--top-k", sampler.top_k, "Sample from this many most likely tokens; 0: all", "K");
    add("--top-p", sampler.top_p, "Sample from the most likely tokens that reach this probability", "P");
    add("--min-p", sampler.min_p, "Sample from tokens with at least this share of the largest probability",
        "P");
    add_seed_option(sub, sampler.seed, "Seed of sampling, the same for every request, and of --policy random")
        ->group(group);
}

namespace {

void add_output_options(CLI::App& sub, RunOptions& options, CLI::Option* batch) {
    sub.add_option("--parallel", options.parallel,
                   "Requests of --batch that run at a time; may be written -np")
        ->needs(batch)
        ->group("Generation")
        ->capture_default_str()
        ->transform(whole_number(1, max_parallel))
        ->type_name("N");
    const char* group = "Output";
    sub.add_flag("--json", options.json,
                 "One JSON object a question on standard output instead of the text (--batch always does)")
        ->group(group);
    add_logprobs_option(sub, options.answer)->group(group);
    add_explain_option(sub, options)->group(group);
    sub.add_option("-o,--output", options.output,
                   "Write the answers of --batch here, whole or not at all, instead of to standard output")
        ->needs(batch)
        ->group(group)
        ->type_name("FILE");
}

}  // namespace

void print_summary(const Answer& answer) {
    const double shorter =
        static_cast<double>(answer.plain_tokens) / static_cast<double>(std::max<size_t>(1, answer.positions));
    std::fprintf(
        stderr,
        "chunks %zu, expanded %zu, cached %zu | decoder positions %zu for %zu tokens (%.1fx shorter) | "
        "TTFT %.1f ms | %.1f tokens/s\n",
        answer.chunks.size(), answer.n_expanded, answer.n_cached, answer.positions, answer.plain_tokens,
        shorter, answer.ttft_ms, answer.tokens_per_s);
}

CLI::Option* add_texts(CLI::App& app, const std::string& name, std::vector<std::string>& values,
                       const std::string& description) {
    return app
        .add_option(
            name,
            [&values](const CLI::results_t& results) {
                values = results;
                return true;
            },
            description)
        ->type_name("TEXT")
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->type_size(1)
        ->expected(1)
        ->allow_extra_args(false);
}

AnswerOptions checked_answer_options(const RunOptions& options) {
    AnswerOptions answer = options.answer;
    answer.chunk_len = options.chunk_len;
    if (!options.policy.empty()) answer.policy = parse_select_policy(options.policy);
    if (!options.unexpanded.empty()) answer.unexpanded = parse_unexpanded(options.unexpanded);
    chat_options(options.chat);  // refuses a word that is no format
    if (options.expand_fraction != -1.0) {
        n_expand(options.expand_fraction, 1);
        answer.expand_fraction = options.expand_fraction;
    }
    answer.want_logits = !options.explain.empty();
    check_answer_options(answer);
    REFRAG_CHECK(answer.max_new_tokens != 0, Status::usage,
                 "tokens to generate: expected at least 1, or -1 for no limit, found 0");
    return answer;
}

std::unique_ptr<Model> load_run_model(Device& device, const RunOptions& options,
                                      const AnswerOptions& answer) {
    std::shared_ptr<const RemoteDecoder> remote = open_remote_decoder(options.decoder);
    REFRAG_CHECK(!remote || !is_page_path(options.explain), Status::usage,
                 "--explain: a page shows the decoder's attention, which does not come from --decoder-url: "
                 "expected a file of another name than .html, for JSON");
    auto model = load_model(device, options.model_dir, options.device, chat_options(options.chat), remote);
    check_model_can(*model, answer);
    if (remote) {
        const std::optional<std::string> doubt = check_remote_decoder(*model);
        if (doubt) std::fprintf(stderr, "refrag: warning: %s\n", doubt->c_str());
    }
    return model;
}

std::vector<Passage> read_passages(const RunOptions& options) {
    if (options.passages.empty()) return {};
    return read_passages(options.passages, bad_lines_named(options.skip_bad));
}

void warn_chunk_len(const Model& model, int32_t chunk_len) {
    if (!model.has_encoder()) return;  // trained for no chunks at all
    const std::vector<int32_t>& known = model.config().chunk_lens;
    if (chunk_len == 0 || std::find(known.begin(), known.end(), chunk_len) != known.end()) return;
    std::string list;
    for (const int32_t k : known) list += str(list.empty() ? "" : ", ", k);
    std::fprintf(stderr, "refrag: warning: -k %d: this model was trained for %s\n", chunk_len, list.c_str());
}

void add_run(CLI::App& app) {
    auto options = std::make_shared<RunOptions>();
    CLI::App& sub = *app.add_subcommand("run", "Answers questions from passages");
    add_model_option(sub, options->model_dir);
    // By pointer: looking an option up by its name ends the process when memory runs out.
    CLI::Option* batch = add_input_options(sub, *options);
    sub.add_option("-k,--chunk-len", options->chunk_len, "Decoder tokens to a chunk (default: the model's)")
        ->group("Compression")
        ->transform(whole_number(1, 4096))
        ->type_name("K");
    add_expansion_options(sub, *options);
    add_generation_options(sub, *options);
    add_cache_options(sub, options->cache);
    add_sampling_options(sub, options->answer.sampler);
    add_output_options(sub, *options, batch);
    add_chat_options(sub, options->chat);
    add_decoder_options(sub, options->decoder);
    add_device_options(sub, options->device);
    sub.final_callback([options] {
        check_combination(*options);
        if (options->batch.empty()) {
            run_questions(*options);
        } else {
            run_batch(*options);
        }
    });
}

}  // namespace refrag
