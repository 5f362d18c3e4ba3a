// `refrag run --batch`: every request of a file through one Engine, results as JSON Lines in the file's
// order. A request that cannot be answered gives a line with "error"; the others are answered.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/median.h"
#include "cli/answer_json.h"
#include "cli/run.h"
#include "io/file.h"
#include "io/lines.h"
#include "io/output.h"
#include "refrag/engine.h"
#include "refrag/prompt_work.h"
#include "refrag/requests.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

struct Job {
    JsonId id;
    std::string question;
    std::shared_ptr<const std::vector<Passage>> passages;
};

// Reads and checks both files.
std::vector<Job> read_jobs(const RunOptions& options) {
    const std::string name = input_name(options.batch);
    std::vector<BatchRequest> requests = parse_requests(read_text(options.batch), name);
    using Passages = std::vector<Passage>;
    std::shared_ptr<const Passages> common;
    if (!options.passages.empty()) common = std::make_shared<const Passages>(read_passages(options));
    std::vector<Job> jobs;
    for (BatchRequest& request : requests) {
        REFRAG_CHECK(
            request.passages || !options.passages.empty(), Status::bad_input, printable(name), ": line ",
            request.line,
            ": expected \"passages\" here, or --passages FILE for all requests without, found neither");
        jobs.push_back(
            {std::move(request.id), std::move(request.question),
             request.passages ? std::make_shared<const Passages>(std::move(*request.passages)) : common});
    }
    return jobs;
}

// Passages with the same content are one, as long as they are kept.
std::vector<Segment> segments_of(const Model& model, const Job& job, PassageCache& cache, int32_t chunk_len) {
    return make_segments(model, {}, share_passages(model, *job.passages, cache, chunk_len), job.question,
                         chunk_len);
}

// Decoder positions that the longest request can take, prompt and answer; never more than `limit`.
int64_t needed_context(const Model& model, const std::vector<Job>& jobs, PassageCache& cache,
                       const AnswerOptions& options, int64_t limit) {
    int64_t needed = 1;
    const Progress progress("tokenising");
    for (const Job& job : jobs) {
        const int64_t prompt =
            most_positions(model, segments_of(model, job, cache, options.chunk_len), options);
        needed = std::max(needed, options.max_new_tokens < 0 ? limit : prompt + options.max_new_tokens);
        if (needed >= limit) return limit;
    }
    return needed;
}

// Lines in the order of the requests, whatever the order in which they come.
class OrderedOutput {
  public:
    explicit OrderedOutput(const std::string& path) : path_(path) {}
    void put(uint64_t index, std::string line) {
        early_[index] = std::move(line);
        while (!early_.empty() && early_.begin()->first == next_) {
            const std::string text = early_.begin()->second + "\n";
            early_.erase(early_.begin());
            ++next_;
            if (path_.empty()) {
                write_stdout(text);
                flush_stdout();
            } else {
                whole_ += text;
            }
        }
    }
    void close() const {
        if (path_.empty()) return;
        try {
            write_result(path_, whole_);
        } catch (const Error&) {
            write_stdout(whole_);  // what was computed is not lost
            flush_stdout();
            throw;
        }
    }

  private:
    std::string path_;
    std::string whole_;
    std::map<uint64_t, std::string> early_;
    uint64_t next_ = 0;
};

std::string result_line(const Model& model, const Job& job, const Result& result) {
    JsonWriter json;
    json.begin_object();
    json.key("id");
    if (const auto* number = std::get_if<int64_t>(&job.id)) {
        json.integer(*number);
    } else {
        json.string(std::get<std::string>(job.id));
    }
    if (result.error) {
        json.key("question").string(job.question).key("error").string(result.error->message());
    } else {
        write_answer(json, model.tokenizer(), job.question, result.answer);
    }
    json.end_object();
    return json.text();
}

}  // namespace

void run_batch(const RunOptions& options) {
    // Everything that can be refused without the model is refused before it is loaded.
    const AnswerOptions answer_options = checked_answer_options(options);
    check_output_paths({{"-o", options.output}});
    std::vector<Job> jobs = read_jobs(options);

    const std::shared_ptr<PassageKeeper> keeper = open_cache(options.cache);
    const std::unique_ptr<Device> device = make_device(options.device);
    const std::unique_ptr<Model> model = load_run_model(*device, options, answer_options);
    warn_chunk_len(*model, options.chunk_len);
    const int64_t window = model->window();
    REFRAG_CHECK(options.context <= window, Status::usage, "context size: expected at most ", window,
                 " positions (the decoder's max_position_embeddings), found ", options.context);

    PassageCache cache(default_passage_cache_bytes, keeper);
    const double started_ms = now_ms();
    const int64_t limit = options.context == 0 ? window : options.context;
    const int64_t context = needed_context(*model, jobs, cache, answer_options, limit);
    const auto wanted =
        static_cast<int32_t>(std::min<size_t>(jobs.size(), static_cast<size_t>(options.parallel)));
    Engine engine(*model,
                  {.n_slots = wanted, .max_context = context, .prefix_cache = !options.no_prefix_cache});
    OrderedOutput output(options.output);
    Progress progress("answering");
    size_t submitted = 0;
    size_t done = 0;
    size_t n_failed = 0;
    size_t n_tokens = 0;
    std::vector<double> ttft_ms;
    while (done < jobs.size()) {
        // Just enough to fill the slots: what waits holds no prompt, but there may be many.
        while (submitted < jobs.size() && engine.n_running() + engine.n_preparing() + engine.n_waiting() <
                                              static_cast<size_t>(engine.n_slots())) {
            Request request;
            request.segments = segments_of(*model, jobs[submitted], cache, options.chunk_len);
            jobs[submitted].passages.reset();
            request.options = answer_options;
            engine.submit(std::move(request));
            ++submitted;
        }
        engine.step();
        for (const Result& result : engine.take_finished()) {
            output.put(result.id, result_line(*model, jobs[result.id], result));
            progress.update(static_cast<int64_t>(++done), std::ssize(jobs));
            n_failed += result.error ? 1 : 0;
            n_tokens += result.answer.ids.size();
            if (!result.error) ttft_ms.push_back(result.answer.ttft_ms);
        }
    }
    output.close();
    const double seconds = (now_ms() - started_ms) / 1000.0;
    std::fprintf(
        stderr,
        "requests %zu, failed %zu, tokens %zu | %.1f requests/s, %.1f tokens/s | median TTFT %.1f ms | "
        "%d at a time, %lld positions each\n",
        jobs.size(), n_failed, n_tokens, static_cast<double>(jobs.size()) / seconds,
        static_cast<double>(n_tokens) / seconds, median(ttft_ms), engine.n_slots(),
        static_cast<long long>(engine.max_context()));
    REFRAG_CHECK(n_failed == 0, Status::runtime, n_failed, " of ", jobs.size(),
                 " requests failed: their lines say why in \"error\"");
}

}  // namespace refrag
