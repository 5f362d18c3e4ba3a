// See completion.h.
#include "server/completion.h"

#include <algorithm>
#include <utility>

#include "refrag/timer.h"

namespace refrag {

void Completion::start(std::vector<Part> parts,
                       std::optional<std::chrono::steady_clock::time_point> deadline) {
    std::vector<Scheduler::Job> jobs;
    jobs.reserve(parts.size());
    choices_.reserve(parts.size());
    seen_.resize(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
        choices_.push_back(std::move(parts[i].choice));
        Scheduler::Job job;
        job.request.segments = std::move(parts[i].segments);
        job.request.options = std::move(parts[i].options);
        job.request.deadline = deadline;
        job.request.progress = [self = shared_from_this(), i](std::string_view piece, const Answer& so_far) {
            return self->take_piece(i, piece, so_far);
        };
        job.done = [self = shared_from_this(), i](Result&& result) {
            self->take_result(i, std::move(result));
        };
        jobs.push_back(std::move(job));
    }
    const size_t n = jobs.size();
    if (n > scheduler_.capacity())
        refuse_request(n_prompts_ > 1 ? "prompt" : "n", "expected at most ", scheduler_.capacity(),
                       " answers of one call (the server's slots and its queue), found ", n);
    const std::optional<std::vector<uint64_t>> tickets = scheduler_.submit(std::move(jobs));
    if (!tickets)
        throw ApiRefusal({429,
                          str("the queue is full (", scheduler_.capacity(), " requests): try again later"),
                          "rate_limit_error", "", "queue_full", 1});
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        tickets_ = *tickets;
    }
    exchange_->on_leave([&scheduler = scheduler_, &metrics = metrics_, of = *tickets] {
        ++metrics.clients_left;
        scheduler.cancel(of);
    });
}

bool Completion::begin_stream() {
    if (exchange_->begun()) return !exchange_->left();
    return exchange_->begin({200, "text/event-stream", {{"Cache-Control", "no-cache"}}});
}

void Completion::observe_tokens(size_t index, size_t n_tokens) {
    Seen& seen = seen_[index];
    const double now = now_ms();
    if (n_tokens <= seen.n_tokens) return;
    const auto n = static_cast<int64_t>(n_tokens - seen.n_tokens);
    if (seen.n_tokens > 0) metrics_.ttit.observe((now - seen.ms) / 1000.0 / static_cast<double>(n), n);
    seen = {now, n_tokens};
}

bool Completion::take_piece(size_t index, std::string_view text, const Answer& so_far) {
    observe_tokens(index, so_far.ids.size());
    if (failed_) return false;
    if (!stream_) return !exchange_->left();
    return begin_stream() && exchange_->write(format_->piece(choices_[index], text, so_far));
}

void Completion::take_result(size_t index, Result&& result) {
    try {
        take_result_or_throw(index, std::move(result));
    } catch (...) {
        fail_call(caught_error());
    }
}

void Completion::take_result_or_throw(size_t index, Result&& result) {
    if (failed_) return;
    if (result.error) return fail_call(api_error_of(*result.error));
    Answer& answer = result.answer;
    const bool read = answer.finish != FinishReason::deadline || !answer.ids.empty();
    if (!read && !exchange_->begun())
        return fail_call({504, "the request's time was over before its first token", "timeout_error", "",
                          "deadline_exceeded"});
    metrics_.count_answer(answer);
    choices_[index].answer = std::move(answer);
    ++n_ended_;
    const bool is_last = n_ended_ == choices_.size();
    if (stream_) {
        if (!begin_stream()) return;
        std::string events = format_->last(choices_[index]);
        if (is_last) events += format_->close(choices_);
        exchange_->write(events);
        if (is_last) exchange_->end();
    } else if (is_last) {
        exchange_->respond({}, format_->whole(choices_));
    }
    if (is_last) {
        const auto took = std::chrono::steady_clock::now() - exchange_->request.received;
        metrics_.total.observe(std::chrono::duration<double>(took).count());
    }
}

// The others are given up: one answer is all of them.
void Completion::fail_call(const ApiError& error) {
    if (failed_) return;
    failed_ = true;
    std::vector<uint64_t> tickets;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        tickets = tickets_;
    }
    scheduler_.cancel(tickets);
    if (!exchange_->begun()) return respond_error(*exchange_, error);
    exchange_->write(format_->broken(error));
    exchange_->end();
}

}  // namespace refrag
