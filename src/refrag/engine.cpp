// See engine.h. Running is one request from its prompt to its answer's end.
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

struct Engine::Running {
    Running(const Model& model_, Waiting&& from)
        : model(model_),
          id(from.id),
          request(std::move(from.request)),
          sampler(request.options.sampler, request.options.ignore_eos
                                               ? std::span<const int32_t>(model.decoder().config().eos_ids)
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
        emit(stops.push(stream.push(token)));
        if (stops.found()) return std::nullopt;
        if (std::ssize(answer.ids) == request.options.max_new_tokens) {
            answer.finish = FinishReason::max_tokens;
            return std::nullopt;
        }
        return token;
    }

    // What was held back, and the sums.
    void end() {
        emit(stops.push(stream.flush()));
        if (!stops.found()) emit(stops.flush());
        if (stops.found()) {
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

    void emit(std::string piece) {
        if (at_start && !piece.empty()) {
            if (piece[0] == ' ') piece.erase(0, 1);
            at_start = false;
        }
        if (piece.empty()) return;
        answer.text += piece;
        if (request.sink) request.sink(piece);
    }

    const Model& model;
    uint64_t id;
    Request request;
    Sampler sampler;
    StreamDecoder stream;
    StopFilter stops;
    Answer answer;
    bool at_start = true;
    double started_ms = now_ms();
    double prompted_ms = 0.0;     // when its prompt was made
    double first_token_ms = 0.0;  // 0: none yet
};

namespace {

// The context that is meant by `max_context`.
int64_t context_of(const Model& model, int64_t max_context) {
    return max_context == 0 ? model.decoder().config().max_seq_len : max_context;
}

// A queue, when there is memory for an engine. Asked before the queue takes its own.
std::unique_ptr<Backend> planned_backend(const Model& model, int32_t n_slots, int64_t max_context) {
    const int64_t window = model.decoder().config().max_seq_len;
    // Numbers that make no sense are the generator's to refuse.
    if (n_slots >= 1 && n_slots <= max_parallel && max_context >= 1 && max_context <= window) {
        check_memory_plan(model, n_slots, max_context);
    }
    return model.device().make_backend();
}

}  // namespace

Engine::Engine(const Model& model, int32_t n_slots, int64_t max_context)
    : model_(model),
      backend_(planned_backend(model, n_slots, context_of(model, max_context))),
      generator_(*backend_, model.decoder(), n_slots, context_of(model, max_context)),
      arena_(*backend_),
      running_(static_cast<size_t>(n_slots)) {}

Engine::~Engine() = default;

uint64_t Engine::submit(Request request) {
    check_answer_options(request.options);
    waiting_.push_back({next_id_, std::move(request), now_ms()});
    return next_id_++;
}

void Engine::cancel(uint64_t id) noexcept {
    std::erase_if(waiting_, [&](const Waiting& waiting) { return waiting.id == id; });
    for (size_t slot = 0; slot < running_.size(); ++slot) {
        if (!running_[slot] || running_[slot]->id != id) continue;
        generator_.stop(static_cast<int32_t>(slot));
        running_[slot].reset();
    }
}

void Engine::admit() {
    while (!waiting_.empty() && generator_.has_free_slot()) {
        finished_.reserve(finished_.size() + 1);
        Waiting waiting = std::move(waiting_.front());
        waiting_.pop_front();
        const uint64_t id = waiting.id;
        std::unique_ptr<Running> running;
        try {
            running = std::make_unique<Running>(model_, std::move(waiting));
            begin(running);
        } catch (...) {
            finished_.push_back(
                {id, running ? std::move(running->answer) : Answer{}, error_from(std::current_exception())});
        }
    }
}

void Engine::begin(std::unique_ptr<Running>& running) {
    Running& r = *running;
    Prompt prompt;
    {
        PromptWork work(model_, std::move(r.request.segments), r.request.options, max_context(), r.answer);
        int64_t used_rows = 0;
        while (!work.advance(*backend_, arena_, kPrefillRows, used_rows)) {
        }
        prompt = work.take();
    }
    std::vector<int32_t> said;
    for (const int32_t row : prompt.input.source) {
        if (row >= 0) said.push_back(row);
    }
    r.sampler.read_prompt(said);
    r.prompted_ms = now_ms();
    const int32_t slot = generator_.start(
        std::move(prompt.input.source), std::move(prompt.chunk_rows),
        [&r](const Logits& logits, double logits_ms) { return r.next(logits, logits_ms); },
        r.request.options.logprobs ? 0 : r.sampler.needed(),
        [&r]() -> std::optional<TokenDraw> {
            if (r.request.options.logprobs) return std::nullopt;
            return r.sampler.draw_elsewhere();
        });
    running_[static_cast<size_t>(slot)] = std::move(running);
}

void Engine::finish(std::unique_ptr<Running> running, const Generator::Ended& ended) {
    Result result{running->id, {}, {}};
    if (ended.context_full) running->answer.finish = FinishReason::context_full;
    if (ended.error) {
        result.error = error_from(ended.error);
    } else {
        try {
            running->end();
        } catch (...) {  // of the sink
            result.error = error_from(std::current_exception());
        }
    }
    result.answer = std::move(running->answer);
    finished_.push_back(std::move(result));
}

void Engine::step() {
    admit();
    finished_.reserve(finished_.size() + running_.size());
    for (const Generator::Ended& ended : generator_.step()) {
        finish(std::move(running_[static_cast<size_t>(ended.slot)]), ended);
    }
}

std::vector<Result> Engine::take_finished() {
    return std::exchange(finished_, {});
}

}  // namespace refrag
