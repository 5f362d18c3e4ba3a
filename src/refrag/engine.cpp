// See engine.h. What becomes of one request is engine_job.cpp's.
#include "refrag/engine.h"

#include <algorithm>
#include <utility>

#include "refrag/engine_job.h"
#include "refrag/memory_plan.h"
#include "refrag/remote_generator.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

// How long a step waits for a decoder elsewhere where there is nothing to do here: what others want of the
// engine's thread waits as long.
constexpr std::chrono::milliseconds kNewsTime{5};

int64_t context_of(const Model& model, const EngineOptions& options) {
    return options.max_context == 0 ? model.window() : options.max_context;
}

// Options with the pool's size filled in, when there is memory for an engine. Asked before its queue takes
// any.
EngineOptions planned(const Model& model, EngineOptions options) {
    REFRAG_CHECK(options.step_rows >= 1 && options.kv_entries >= 0, Status::usage,
                 "engine: expected at least 1 row a step and 0 or more KV entries, found ", options.step_rows,
                 " and ", options.kv_entries);
    const int64_t window = model.window(), context = context_of(model, options);
    REFRAG_CHECK(options.n_slots >= 1 && options.n_slots <= max_parallel, Status::usage,
                 "parallel sequences: expected 1 to ", max_parallel, ", found ", options.n_slots);
    REFRAG_CHECK(context >= 1 && context <= window, Status::usage, "context size: expected at most ", window,
                 window == model.decoder().config().max_seq_len
                     ? std::string(" positions (the decoder's max_position_embeddings)")
                     : str(" positions (", model.remote_decoder()->name(), ")"),
                 ", found ", context);
    if (model.remote_decoder() != nullptr) return options;
    const MemoryPlan plan = plan_memory(model, options.n_slots, context, options.kv_entries);
    check_memory_plan(plan, options.max_context != 0);
    options.kv_entries = plan.kv_blocks * kPageEntries;
    return options;
}

std::unique_ptr<SequenceRunner> make_runner(Backend& backend, const Model& model,
                                            const EngineOptions& options) {
    const int64_t context = context_of(model, options);
    if (model.remote_decoder() != nullptr)
        return std::make_unique<RemoteGenerator>(backend, model.decoder(), *model.remote_decoder(),
                                                 options.n_slots, context);
    return std::make_unique<Generator>(backend, model.decoder(), options.n_slots, context,
                                       options.kv_entries / kPageEntries);
}

}  // namespace

Engine::Engine(const Model& model, const EngineOptions& options)
    : model_(model),
      options_(planned(model, options)),
      backend_(model.device().make_backend()),
      runner_(make_runner(*backend_, model, options_)),
      arena_(*backend_),
      running_(static_cast<size_t>(options.n_slots)) {}

Engine::~Engine() = default;

uint64_t Engine::submit(Request request) {
    check_answer_options(request.options);
    waiting_.push_back({next_id_, std::move(request), now_ms()});
    return next_id_++;
}

void Engine::cancel(uint64_t id) noexcept {
    size_t n = std::erase_if(waiting_, [&](const Waiting& waiting) { return waiting.id == id; });
    n += std::erase_if(finished_, [&](const Result& result) { return result.id == id; });
    const auto mark = [&](const std::unique_ptr<EngineJob>& job) {
        if (!job || job->id != id || job->cancelled) return;
        job->cancelled = true;
        ++n;
    };
    std::for_each(preparing_.begin(), preparing_.end(), mark);
    std::for_each(running_.begin(), running_.end(), mark);
    counts_.cancelled += static_cast<int64_t>(n);
    if (!in_step_) drop_cancelled();
}

void Engine::drop_cancelled() noexcept {
    std::erase_if(preparing_, [](const std::unique_ptr<EngineJob>& job) { return job->cancelled; });
    for (size_t slot = 0; slot < running_.size(); ++slot) {
        if (!running_[slot] || !running_[slot]->cancelled) continue;
        runner_->stop(static_cast<int32_t>(slot));
        running_[slot].reset();
    }
}

void Engine::put_result(Result&& result) noexcept {
    if (result.error) {
        ++counts_.failed;
    } else if (result.answer.finish == FinishReason::deadline) {
        ++counts_.expired;
    } else {
        ++counts_.finished;
    }
    finished_.push_back(std::move(result));
}

void Engine::finish(std::unique_ptr<EngineJob>& job, std::optional<FinishReason> reason,
                    const std::exception_ptr& error) noexcept {
    Result result{job->id, {}, {}};
    if (error) {
        result.error = error_from(error);
    } else if (!job->cancelled) {
        try {
            job->end(reason);
        } catch (...) {  // of the sink
            result.error = error_from(std::current_exception());
        }
    }
    // The sink may have cancelled it even now.
    if (!job->cancelled) {
        result.answer = std::move(job->answer);
        put_result(std::move(result));
    }
    job.reset();
}

void Engine::expire() {
    const auto now = std::chrono::steady_clock::now();
    const auto is_late = [&](const Request& request) { return request.deadline && *request.deadline <= now; };
    finished_.reserve(finished_.size() + running_.size() + preparing_.size());
    for (size_t slot = 0; slot < running_.size(); ++slot) {
        if (!running_[slot] || !is_late(running_[slot]->request)) continue;
        runner_->stop(static_cast<int32_t>(slot));
        finish(running_[slot], FinishReason::deadline, nullptr);
    }
    for (auto& job : preparing_) {
        if (is_late(job->request)) finish(job, FinishReason::deadline, nullptr);
    }
    std::erase(preparing_, nullptr);
    finished_.reserve(finished_.size() + waiting_.size());  // a sink may have submitted some
    for (const Waiting& waiting : waiting_) {
        if (!is_late(waiting.request)) continue;
        Result result{waiting.id, {}, {}};
        result.answer.finish = FinishReason::deadline;
        result.answer.times.queue = now_ms() - waiting.submitted_ms;
        put_result(std::move(result));
    }
    std::erase_if(waiting_, [&](const Waiting& waiting) { return is_late(waiting.request); });
}

int64_t Engine::prepare(int64_t max_rows) {
    const auto n_slots = static_cast<size_t>(runner_->n_slots());
    while (!waiting_.empty() && preparing_.size() + runner_->n_running() < n_slots) {
        finished_.reserve(finished_.size() + 1);
        Waiting& first = waiting_.front();
        const uint64_t id = first.id;
        try {
            preparing_.push_back(nullptr);
            preparing_.back() =
                std::make_unique<EngineJob>(model_, id, std::move(first.request), first.submitted_ms,
                                            max_context(), counts_.tokens_generated);
        } catch (...) {
            if (!preparing_.empty() && !preparing_.back()) preparing_.pop_back();
            put_result({id, Answer{}, error_from(std::current_exception())});
        }
        waiting_.pop_front();
    }
    int64_t used = 0;
    while (!preparing_.empty()) {
        EngineJob& job = *preparing_.front();
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
                job.make_start(options_.prefix_cache);
                const auto n_rows = std::ssize(job.start.source);
                REFRAG_CHECK(runner_->can_hold(n_rows, job.start.max_new), Status::too_long,
                             "the prompt takes ", n_rows,
                             " decoder positions, which with the tokens that may follow are more than the ",
                             runner_->pool_entries(),
                             " that the KV cache has memory for: give fewer passages, expand less, or ",
                             "generate fewer tokens");
            }
            const std::optional<int32_t> slot = runner_->start(job.start);
            if (!slot) return used;  // it is the first to get what becomes free
            job.answer.n_reused = static_cast<size_t>(runner_->n_reused(*slot));
            running_[static_cast<size_t>(*slot)] = std::move(preparing_.front());
        } catch (...) {
            finish(preparing_.front(), std::nullopt, std::current_exception());
        }
        preparing_.pop_front();
    }
    return used;
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
    expire();
    const auto n_generating = static_cast<int64_t>(runner_->n_generating());
    const int64_t prepared = prepare(options_.step_rows - std::min(options_.step_rows, runner_->n_unread()));
    counts_.rows_prepared += prepared;
    finished_.reserve(finished_.size() + running_.size());
    if (prepared == 0) runner_->wait(kNewsTime);
    // What making prompts left of the step is for reading them.
    const int64_t for_prompts = std::max<int64_t>(0, options_.step_rows - prepared);
    for (const SequenceRunner::Ended& ended : runner_->step(n_generating + for_prompts)) {
        std::unique_ptr<EngineJob>& job = running_[static_cast<size_t>(ended.slot)];
        std::optional<FinishReason> reason;
        if (ended.context_full) reason = FinishReason::context_full;
        if (job->request.options.max_new_tokens == 0) reason = FinishReason::max_tokens;
        finish(job, reason, ended.error);
    }
}

std::vector<Result> Engine::take_finished() {
    return std::exchange(finished_, {});
}

void Engine::set_step_rows(int64_t step_rows) {
    REFRAG_CHECK(step_rows >= 1, Status::usage, "engine: expected at least 1 row a step, found ", step_rows);
    options_.step_rows = step_rows;
}

EngineStats Engine::stats() const {
    EngineStats stats = counts_;
    stats.n_waiting = n_waiting();
    stats.n_preparing = n_preparing();
    stats.n_running = n_running();
    stats.n_slots = n_slots();
    stats.kv_blocks = runner_->n_blocks();
    stats.kv_blocks_kept = runner_->idle_blocks();
    stats.kv_blocks_used = stats.kv_blocks - runner_->free_blocks() - stats.kv_blocks_kept;
    const SequenceRunner::Counts& counts = runner_->counts();
    stats.steps = counts.steps;
    stats.steps_redone = counts.steps_redone;
    stats.rows_prefilled = counts.prompt_rows;
    stats.rows_reused = counts.rows_reused;
    stats.prompts = counts.prompts;
    stats.prefix_hits = counts.prefix_hits;
    return stats;
}

}  // namespace refrag
