// `refrag run`: answers questions from passages. The answer goes to standard output as it is generated, a
// one-line summary to standard error, and with --explain the whole story of every chunk to a JSON file.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "io/file.h"
#include "io/json.h"
#include "refrag/session.h"

namespace refrag {
namespace {

struct RunOptions {
    std::string model_dir;
    DeviceOptions device;
    std::vector<std::string> questions;
    std::string passages;
    int32_t chunk_len = 0;
    double expand_fraction = -1.0;
    std::string policy = "model";
    int32_t max_new_tokens = 256;
    int64_t context = 0;
    SamplerOptions sampler;
    std::string explain;
    bool json = false;
};

void write_times(JsonWriter& json, const StageTimes& times) {
    json.begin_object();
    json.key("tokenize").number(times.tokenize);
    json.key("encode").number(times.encode);
    json.key("sense").number(times.sense);
    json.key("project").number(times.project);
    json.key("prefill").number(times.prefill);
    json.key("sample").number(times.sample);
    json.key("decode").number(times.decode);
    json.end_object();
}

// The fields that --json and --explain share; the object stays open.
void write_answer(JsonWriter& json, const std::string& question, const RunOptions& options,
                  const Answer& answer) {
    json.begin_object();
    json.key("question").string(question);
    json.key("answer").string(answer.text);
    json.key("finish").string(finish_reason_name(answer.finish));
    json.key("policy").string(options.policy);
    json.key("k").integer(answer.chunk_len);
    json.key("p").number(answer.expand_fraction);
    json.key("n_chunks").integer(std::ssize(answer.chunks));
    json.key("n_expanded").integer(static_cast<int64_t>(answer.n_expanded));
    json.key("n_cached").integer(static_cast<int64_t>(answer.n_cached));
    json.key("positions").integer(static_cast<int64_t>(answer.positions));
    json.key("plain_tokens").integer(static_cast<int64_t>(answer.plain_tokens));
    json.key("new_tokens").integer(std::ssize(answer.ids));
    json.key("ttft_ms").number(answer.ttft_ms);
    json.key("tokens_per_s").number(answer.tokens_per_s);
    json.key("times_ms");
    write_times(json, answer.times);
}

void write_chunks(JsonWriter& json, const std::vector<ContextPassage>& passages, const Answer& answer) {
    json.key("chunks").begin_array();
    std::string text;  // of the passage that the chunks are now of; chunks come passage by passage
    size_t text_of = passages.size();
    for (const ChunkReport& chunk : answer.chunks) {
        const Passage& passage = passages[chunk.passage].passage();
        if (text_of != chunk.passage) {
            text = passage.content();
            text_of = chunk.passage;
        }
        json.begin_object();
        json.key("document").string(passage.id);
        json.key("begin").integer(static_cast<int64_t>(chunk.begin));
        json.key("end").integer(static_cast<int64_t>(chunk.end));
        json.key("text").string(std::string_view(text).substr(chunk.begin, chunk.end - chunk.begin));
        json.key("tokens").integer(static_cast<int64_t>(chunk.n_tokens));
        json.key("logit");
        if (chunk.logit) {
            json.number(*chunk.logit);
        } else {
            json.null();
        }
        json.key("expanded").boolean(chunk.expanded);
        json.key("cached").boolean(chunk.cached);
        json.key("position").integer(chunk.position);
        json.key("slots").integer(chunk.slots);
        json.end_object();
    }
    json.end_array();
}

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

void warn_chunk_len(const Model& model, int32_t chunk_len) {
    const std::vector<int32_t>& known = model.config().chunk_lens;
    if (chunk_len == 0 || std::find(known.begin(), known.end(), chunk_len) != known.end()) return;
    std::string list;
    for (const int32_t k : known) list += str(list.empty() ? "" : ", ", k);
    std::fprintf(stderr, "refrag: warning: -k %d: this model was trained for %s\n", chunk_len, list.c_str());
}

void run(const RunOptions& options) {
    // Everything that can be refused without the model is refused before it is loaded.
    AnswerOptions answer_options;
    answer_options.chunk_len = options.chunk_len;
    answer_options.policy = parse_select_policy(options.policy);
    if (options.expand_fraction != -1.0) {
        n_expand(options.expand_fraction, 1);
        answer_options.expand_fraction = options.expand_fraction;
    }
    answer_options.sampler = options.sampler;
    const Sampler checked(options.sampler);
    answer_options.max_new_tokens = options.max_new_tokens;
    answer_options.want_logits = !options.explain.empty();
    std::vector<ContextPassage> passages;
    for (Passage& passage : read_passages(options.passages)) passages.emplace_back(std::move(passage));

    const std::unique_ptr<Backend> backend = make_backend(options.device);
    const std::unique_ptr<Model> model = load_model(*backend, options.model_dir);
    warn_chunk_len(*model, options.chunk_len);
    Session session(*model, options.context);
    JsonWriter explain(1);
    const bool several = options.questions.size() > 1;
    if (several) explain.begin_array();
    for (const std::string& question : options.questions) {
        TextSink sink;
        if (!options.json) {
            sink = [](std::string_view text) {
                write_stdout(text);
                flush_stdout();
            };
        }
        const Answer answer = session.answer(passages, question, answer_options, sink);
        if (options.json) {
            JsonWriter line;
            write_answer(line, question, options, answer);
            line.end_object();
            write_stdout(line.text());
        }
        write_stdout("\n");
        flush_stdout();
        print_summary(answer);
        if (!options.explain.empty()) {
            write_answer(explain, question, options, answer);
            write_chunks(explain, passages, answer);
            explain.end_object();
        }
    }
    if (several) explain.end_array();
    if (!options.explain.empty()) write_file_atomic(options.explain, explain.text() + "\n");
}

}  // namespace

void add_run(CLI::App& app) {
    auto options = std::make_shared<RunOptions>();
    CLI::App& sub = *app.add_subcommand("run", "Answers questions from passages");
    add_model_option(sub, options->model_dir);
    sub.add_option("-q,--question", options->questions,
                   "The question; given several times, each is answered and passages stay encoded")
        ->required()
        ->type_name("TEXT")
        ->allow_extra_args(false);
    sub.add_option("--passages", options->passages,
                   "Passages: JSON Lines of {\"id\", \"title\", \"text\"}, or plain text with blank lines "
                   "between them")
        ->required()
        ->type_name("FILE");
    sub.add_option("-k,--chunk-len", options->chunk_len, "Decoder tokens to a chunk (default: the model's)")
        ->check(CLI::Range(1, 4096))
        ->type_name("K");
    sub.add_option(
           "-p,--expand-fraction", options->expand_fraction,
           "Share of chunks expanded to tokens, 0 to 1 (default: the model's; in llama.cpp -p is the prompt, "
           "here that is -q)")
        ->check(CLI::Range(0.0, 1.0))
        ->type_name("P");
    sub.add_option("--policy", options->policy,
                   "Which chunks are expanded: model, none, all, random, perplexity-asc, perplexity-desc; "
                   "none and all overrule -p")
        ->capture_default_str()
        ->type_name("NAME");
    sub.add_option("-n,--n-predict", options->max_new_tokens, "Tokens to generate at most")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 28))
        ->type_name("N");
    sub.add_option("-c,--ctx-size", options->context,
                   "Decoder positions, prompt and answer; 0: the decoder's window")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber)
        ->type_name("N");
    sub.add_option("-s,--seed", options->sampler.seed, "Seed of sampling and of --policy random")
        ->capture_default_str()
        ->type_name("N");
    sub.add_option("--temp", options->sampler.temperature, "Temperature; 0: greedy")
        ->capture_default_str()
        ->type_name("T");
    sub.add_option("--top-p", options->sampler.top_p,
                   "Sample from the most likely tokens that reach this probability")
        ->capture_default_str()
        ->type_name("P");
    sub.add_option("--explain", options->explain,
                   "Write a JSON file: every chunk with document, byte span, logit, expanded or not, slots; "
                   "stage times")
        ->type_name("FILE");
    sub.add_flag("--json", options->json,
                 "One JSON object a question on standard output instead of the text");
    add_device_options(sub, options->device);
    sub.final_callback([options] { run(*options); });
}

}  // namespace refrag
