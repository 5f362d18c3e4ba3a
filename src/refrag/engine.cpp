// See engine.h. A Job is one request from the making of its prompt to its answer's end.
#include "refrag/engine.h"

#include <algorithm>
#include <new>
#include <utility>

#include "refrag/memory_plan.h"
#include "refrag/prompt_work.h"
#include "refrag/scoring.h"
#include "refrag/stop.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

// A request's end is a border: whatever was thrown becomes its error. Needs no memory to say that there is
// none.
Error error_from(const std::exception_ptr& thrown) {
    try {
        try {
            std::rethrow_exception(thrown);
        } catch (const Error& error) {
            return error;
        } catch (const std::bad_alloc&) {
            throw;
        } catch (const std::exception& error) {
            return Error(Status::runtime, error.what());
        }
    } catch (const std::bad_alloc&) {
        return Error(Status::out_of_memory, "out of memory");
    } catch (...) {
        return Error(Status::runtime, "unknown error");
    }
}

}  // namespace

const char* finish_reason_name(FinishReason reason) {
    switch (reason) {
        case FinishReason::end_token:
            return "end";
        case FinishReason::stop_string:
            return "stop";
        case FinishReason::max_tokens:
            return "length";
        case FinishReason::context_full:
            return "context";
        case FinishReason::cancelled:
            return "cancelled";
    }
    return "?";
}

void check_answer_options(const AnswerOptions& options) {
    check_sampler_options(options.sampler);
    check_stop_strings(options.stop);
    REFRAG_CHECK(options.max_new_tokens >= 1 || options.max_new_tokens == -1, Status::usage,
                 "tokens to generate: expected at least 1, or -1 for no limit, found ",
                 options.max_new_tokens);
    const int32_t n_top = options.logprobs.value_or(0);
    REFRAG_CHECK(n_top >= 0 && n_top <= max_top_logprobs, Status::usage, "logprobs: expected 0 to ",
                 max_top_logprobs, " alternatives, found ", n_top);
}

struct Engine::Job {
    Job(const Model& model_, Waiting&& from)
        : model(model_),
          id(from.id),
          request(std::move(from.request)),
          sampler(request.options.sampler, request.options.ignore_eos
                                               ? std::span<const int32_t>(model.end_ids())
                                               : std::span<const int32_t>{}),
          stream(model.tokenizer()),
          stops(request.options.stop) {
        answer.times.queue = started_ms - from.submitted_ms;
    }

    // The next token, taken into the answer; nothing when it was the last.
    std::optional<int32_t> next(const Logits& logits, double logits_ms) {
        const double sampling_ms = now_ms();
        const int32_t token = sampler.sample(logits);
        if (first_token_ms == 0.0) {
            first_token_ms = now_ms();
            answer.times.sample = logits_ms + first_token_ms - sampling_ms;
            answer.times.prefill += sampling_ms - logits_ms - prompted_ms;
            answer.ttft_ms = first_token_ms - started_ms;
        }
        if (model.is_end(token)) {
            answer.finish = FinishReason::end_token;
            return std::nullopt;
        }
        if (request.options.logprobs)
            answer.logprobs.push_back(token_logprobs(logits.values, token, *request.options.logprobs));
        answer.ids.push_back(token);
        emit(stops.push(without_first_space(stream.push(token))));
        if (stops.found() || stopped) return std::nullopt;
        if (std::ssize(answer.ids) == request.options.max_new_tokens) {
            answer.finish = FinishReason::max_tokens;
            return std::nullopt;
        }
        return token;
    }

    // What was held back, and the sums.
    void end() {
        if (!stopped) {
            emit(stops.push(without_first_space(stream.flush())));
            if (!stops.found()) emit(stops.flush());
        }
        if (stopped) {
            answer.finish = FinishReason::cancelled;
        } else if (stops.found()) {
            answer.finish = FinishReason::stop_string;
            answer.stop = stops.found();
        }
        answer.times.decode = now_ms() - first_token_ms;
        // The end token was generated too; the first token's time is TTFT.
        const bool ended = answer.finish == FinishReason::end_token;
        const double further = static_cast<double>(answer.ids.size()) - (ended ? 0.0 : 1.0);
        if (further > 0.0 && answer.times.decode > 0.0)
            answer.tokens_per_s = further * 1000.0 / answer.times.decode;
    }

    // Answers are trained with a space before them. It is no text, so a stop string never meets it.
    std::string without_first_space(std::string piece) {
        if (!at_start || piece.empty()) return piece;
        at_start = false;
        if (piece[0] == ' ') piece.erase(0, 1);
        return piece;
    }

    void emit(const std::string& piece) {
        if (piece.empty()) return;
        answer.text += piece;
        if (request.sink && !request.sink(piece)) stopped = true;
        if (cancelled) stopped = true;
    }

    const Model& model;
    uint64_t id;
    Request request;
    Sampler sampler;
    StreamDecoder stream;
    StopFilter stops;
    Answer answer;
    std::unique_ptr<PromptWork> work;  // until the prompt is made
    Generator::Start start;            // then, until there is room
    bool at_start = true;
    bool stopped = false;    // its sink wants no more
    bool cancelled = false;  // gives no result
    double started_ms = now_ms();
    double prompted_ms = 0.0;     // when its prompt was made
    double first_token_ms = 0.0;  // 0: none yet
};

namespace {

int64_t context_of(const Model& model, const EngineOptions& options) {
    return options.max_context == 0 ? model.decoder().config().max_seq_len : options.max_context;
}

// Options with the pool's size filled in, when there is memory for an engine. Asked before its queue takes
// any.
EngineOptions planned(const Model& model, EngineOptions options) {
    REFRAG_CHECK(options.step_rows >= 1 && options.kv_entries >= 0, Status::usage,
                 "engine: expected at least 1 row a step and 0 or more KV entries, found ", options.step_rows,
                 " and ", options.kv_entries);
    const int64_t window = model.decoder().config().max_seq_len, context = context_of(model, options);
    // Numbers that make no sense are the generator's to refuse.
    if (options.n_slots < 1 || options.n_slots > max_parallel || context < 1 || context > window)
        return options;
    const MemoryPlan plan = plan_memory(model, options.n_slots, context, options.kv_entries);
    check_memory_plan(plan, options.max_context != 0);
    options.kv_entries = plan.kv_blocks * kPageEntries;
    return options;
}

}  // namespace

Engine::Engine(const Model& model, const EngineOptions& options)
    : model_(model),
      options_(planned(model, options)),
      backend_(model.device().make_backend()),
      generator_(*backend_, model.decoder(), options.n_slots, context_of(model, options),
                 options_.kv_entries / kPageEntries),
      arena_(*backend_),
      running_(static_cast<size_t>(options.n_slots)) {}

Engine::~Engine() = default;

uint64_t Engine::submit(Request request) {
    check_answer_options(request.options);
    waiting_.push_back({next_id_, std::move(request), now_ms()});
    return next_id_++;
}

void Engine::cancel(uint64_t id) noexcept {
    std::erase_if(waiting_, [&](const Waiting& waiting) { return waiting.id == id; });
    for (const auto& job : preparing_) {
        if (job->id == id) job->cancelled = true;
    }
    for (const auto& job : running_) {
        if (job && job->id == id) job->cancelled = true;
    }
    if (!in_step_) drop_cancelled();
}

void Engine::drop_cancelled() noexcept {
    std::erase_if(preparing_, [](const std::unique_ptr<Job>& job) { return job->cancelled; });
    for (size_t slot = 0; slot < running_.size(); ++slot) {
        if (!running_[slot] || !running_[slot]->cancelled) continue;
        generator_.stop(static_cast<int32_t>(slot));
        running_[slot].reset();
    }
}

void Engine::make_ready(Job& job) {
    Prompt prompt = job.work->take();
    job.work.reset();
    const std::vector<int32_t>& source = prompt.input.source;
    std::vector<int32_t> said;
    for (const int32_t row : source) {
        if (row >= 0) said.push_back(row);
    }
    job.sampler.read_prompt(said);
    const AnswerOptions& options = job.request.options;
    Generator::Start& start = job.start;
    if (options_.prefix_cache) {
        start.names.reserve(source.size());
        for (const int32_t row : source) {
            const auto chunk_row = static_cast<size_t>(-1 - row);
            start.names.push_back(
                row >= 0 ? token_row_name(row)
                         : chunk_row_name(prompt.row_keys[chunk_row].of, prompt.row_keys[chunk_row].index));
        }
    }
    const auto n_rows = std::ssize(source);
    REFRAG_CHECK(generator_.can_hold(n_rows, options.max_new_tokens), Status::runtime, "the prompt takes ",
                 n_rows, " decoder positions, which with the tokens that may follow are more than the ",
                 generator_.pool_entries(), " that the KV cache has memory for: give fewer passages, expand ",
                 "less, or generate fewer tokens");
    start.source = std::move(prompt.input.source);
    start.chunk_rows = std::move(prompt.chunk_rows);
    start.max_new = options.max_new_tokens;
    start.next = [&job](const Logits& logits, double logits_ms) { return job.next(logits, logits_ms); };
    start.n_logits = options.logprobs ? 0 : job.sampler.needed();
    start.draw = [&job]() -> std::optional<TokenDraw> {
        if (job.request.options.logprobs) return std::nullopt;
        return job.sampler.draw_elsewhere();
    };
    job.prompted_ms = now_ms();
}

int64_t Engine::prepare(int64_t max_rows) {
    const auto n_slots = static_cast<size_t>(generator_.n_slots());
    while (!waiting_.empty() && preparing_.size() + generator_.n_running() < n_slots) {
        finished_.reserve(finished_.size() + 1);
        const uint64_t id = waiting_.front().id;
        try {
            auto job = std::make_unique<Job>(model_, std::move(waiting_.front()));
            waiting_.pop_front();
            job->work = std::make_unique<PromptWork>(model_, std::move(job->request.segments),
                                                     job->request.options, max_context(), job->answer);
            preparing_.push_back(std::move(job));
        } catch (...) {
            if (!waiting_.empty() && waiting_.front().id == id) waiting_.pop_front();
            finished_.push_back({id, Answer{}, error_from(std::current_exception())});
        }
    }
    int64_t used = 0;
    while (!preparing_.empty()) {
        Job& job = *preparing_.front();
        finished_.reserve(finished_.size() + 1);
        try {
            if (job.work) {
                if (used >= max_rows) return used;
                int64_t rows = 0;
                const bool made = job.work->advance(*backend_, arena_, max_rows - used, rows);
                used += rows;
                if (!made) {
                    if (rows == 0) return used;
                    continue;
                }
                make_ready(job);
            }
            const std::optional<int32_t> slot = generator_.start(job.start);
            if (!slot) return used;  // it is the first to get what becomes free
            job.answer.n_reused = static_cast<size_t>(generator_.n_reused(*slot));
            running_[static_cast<size_t>(*slot)] = std::move(preparing_.front());
        } catch (...) {
            finished_.push_back({job.id, std::move(job.answer), error_from(std::current_exception())});
        }
        preparing_.pop_front();
    }
    return used;
}

void Engine::finish(std::unique_ptr<Job> job, const Generator::Ended& ended) {
    if (job->cancelled) return;
    Result result{job->id, {}, {}};
    if (ended.context_full) job->answer.finish = FinishReason::context_full;
    if (ended.error) {
        result.error = error_from(ended.error);
    } else {
        try {
            job->end();
        } catch (...) {  // of the sink
            result.error = error_from(std::current_exception());
        }
    }
    if (job->cancelled) return;
    result.answer = std::move(job->answer);
    finished_.push_back(std::move(result));
}

void Engine::step() {
    struct InStep {
        Engine& engine;
        explicit InStep(Engine& e) : engine(e) { engine.in_step_ = true; }
        ~InStep() {
            engine.in_step_ = false;
            engine.drop_cancelled();
        }
    } in_step(*this);
    const auto n_generating = static_cast<int64_t>(generator_.n_generating());
    const int64_t prepared =
        prepare(options_.step_rows - std::min(options_.step_rows, generator_.n_unread()));
    finished_.reserve(finished_.size() + running_.size());
    // What making prompts left of the step is for reading them.
    const int64_t for_prompts = std::max<int64_t>(0, options_.step_rows - prepared);
    for (const Generator::Ended& ended : generator_.step(n_generating + for_prompts)) {
        finish(std::move(running_[static_cast<size_t>(ended.slot)]), ended);
    }
}

std::vector<Result> Engine::take_finished() {
    return std::exchange(finished_, {});
}

}  // namespace refrag
