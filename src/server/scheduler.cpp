// See scheduler.h.
#include "server/scheduler.h"

#include <algorithm>
#include <utility>

#include "refrag/engine_job.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

constexpr int64_t least_step_rows = 16;
constexpr int64_t first_step_rows = 256;  // until it is known how long they take

}  // namespace

Scheduler::Scheduler(const Model& model, const SchedulerOptions& options)
    : model_(model),
      options_(options),
      n_slots_(static_cast<size_t>(std::max(options.engine.n_slots, 1))),
      engine_(model, options.engine),
      backend_(model.device().make_backend()),
      arena_(*backend_),
      step_rows_(std::min(options.engine.step_rows, first_step_rows)),
      thread_([this] { drive(); }) {}

Scheduler::~Scheduler() {
    stop();
}

void Scheduler::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
}

std::optional<std::vector<uint64_t>> Scheduler::submit(std::vector<Job>&& jobs) {
    std::vector<uint64_t> tickets;
    tickets.reserve(jobs.size());
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (n_pending_ + jobs.size() > capacity()) return std::nullopt;
        mail_.jobs.reserve(mail_.jobs.size() + jobs.size());
        for (Job& job : jobs) {
            tickets.push_back(next_ticket_++);
            mail_.jobs.push_back({tickets.back(), std::move(job)});
        }
        n_pending_ += jobs.size();
    }
    changed_.notify_all();
    return tickets;
}

std::optional<uint64_t> Scheduler::encode(std::vector<std::shared_ptr<SharedPassage>> passages,
                                          Encoded done) {
    uint64_t ticket = 0;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (n_encoding_ >= options_.max_queue) return std::nullopt;
        mail_.encodings.push_back({next_ticket_, std::move(passages), std::move(done)});
        ticket = next_ticket_++;
        ++n_encoding_;
    }
    changed_.notify_all();
    return ticket;
}

void Scheduler::cancel(std::span<const uint64_t> tickets) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        mail_.cancelled.insert(mail_.cancelled.end(), tickets.begin(), tickets.end());
    }
    changed_.notify_all();
}

SchedulerStats Scheduler::stats() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    SchedulerStats stats = stats_;
    stats.n_pending = n_pending_;
    stats.n_encoding = n_encoding_;
    return stats;
}

bool Scheduler::idle() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return n_pending_ == 0 && n_encoding_ == 0;
}

bool Scheduler::wait_idle(std::chrono::steady_clock::time_point until) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_until(lock, until, [&] { return n_pending_ == 0 && n_encoding_ == 0; });
}

void Scheduler::ended(size_t n_jobs, size_t n_encodings) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        n_pending_ -= n_jobs;
        n_encoding_ -= n_encodings;
    }
    changed_.notify_all();
}

void Scheduler::take_stats() {
    SchedulerStats stats;
    stats.engine = engine_.stats();
    stats.step_rows = step_rows_;
    stats.kv_bytes = engine_.kv_bytes();
    stats.max_context = engine_.max_context();
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_ = stats;
}

void Scheduler::drive() {
    constexpr double stats_every_ms = 50.0;
    double stats_ms = 0.0;
    while (true) {
        Mail mail;
        const bool busy = !engine_.idle() || !encodings_.empty();
        if (!busy || now_ms() - stats_ms >= stats_every_ms) {
            take_stats();
            stats_ms = now_ms();
        }
        {
            std::unique_lock<std::mutex> lock(mutex_);
            if (!busy) changed_.wait(lock, [&] { return stopping_ || !mail_.empty(); });
            if (stopping_) return;
            std::swap(mail, mail_);
        }
        open(std::move(mail));
        try {
            step();
            encode_slice();
        } catch (const std::bad_alloc&) {
            // Nothing is lost; what others let go of meanwhile may be enough.
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    }
}

void Scheduler::open(Mail&& mail) {
    for (Waiting& waiting : mail.jobs) start(std::move(waiting));
    for (Encoding& encoding : mail.encodings) {
        try {
            encodings_.push_back(std::move(encoding));
        } catch (const std::bad_alloc&) {  // `encoding` is as it was
            encoding.done(Error(Status::out_of_memory, "out of memory"), *backend_);
            ended(0, 1);
        }
    }
    for (const uint64_t ticket : mail.cancelled) {
        if (const auto at = engine_id_.find(ticket); at != engine_id_.end()) {
            engine_.cancel(at->second);
            running_.erase(at->second);
            engine_id_.erase(at);
            ended(1, 0);
        } else if (std::erase_if(encodings_, [&](const Encoding& one) { return one.ticket == ticket; }) > 0) {
            ended(0, 1);
        }
    }
}

void Scheduler::start(Waiting&& waiting) {
    std::optional<uint64_t> id;
    std::optional<Error> error;
    try {
        id = engine_.submit(std::move(waiting.job.request));
        running_.emplace(*id, Running{waiting.ticket, waiting.job.done});
        engine_id_.emplace(waiting.ticket, *id);
        return;
    } catch (...) {
        error = error_from(std::current_exception());
    }
    if (id) {
        engine_.cancel(*id);
        running_.erase(*id);
    }
    waiting.job.done(Result{0, {}, std::move(error)});
    ended(1, 0);
}

void Scheduler::step() {
    if (engine_.idle()) return;
    const int64_t rows_before = engine_.prompt_rows();
    engine_.set_step_rows(engine_.n_generating() > 0 ? step_rows_ : options_.engine.step_rows);
    const double started_ms = now_ms();
    engine_.step();
    adapt(now_ms() - started_ms, engine_.prompt_rows() - rows_before);
    for (Result& result : engine_.take_finished()) {
        const auto at = running_.find(result.id);
        if (at == running_.end()) continue;
        const Running running = std::move(at->second);
        engine_id_.erase(running.ticket);
        running_.erase(at);
        running.done(std::move(result));
        ended(1, 0);
    }
}

// How many rows fit into step_ms, from how many went through in how long. Too long a step counts at once, a
// short one by and by.
void Scheduler::adapt(double ms, int64_t rows) {
    if (rows < least_step_rows || ms <= 0.0) return;
    const double rate = static_cast<double>(rows) / ms;
    rows_per_ms_ = rows_per_ms_ == 0.0 || rate < rows_per_ms_ ? rate : 0.8 * rows_per_ms_ + 0.2 * rate;
    step_rows_ = std::clamp(static_cast<int64_t>(options_.step_ms * rows_per_ms_), least_step_rows,
                            options_.engine.step_rows);
}

void Scheduler::encode_slice() {
    if (encodings_.empty()) return;
    Encoding& first = encodings_.front();
    std::optional<Error> error;
    bool done = false;
    try {
        const double started_ms = now_ms();
        const int64_t budget = engine_.idle() ? options_.engine.step_rows : step_rows_;
        const int64_t rows = encode_passages(*backend_, model_, first.passages, budget, arena_);
        adapt(now_ms() - started_ms, rows);
        done = std::all_of(first.passages.begin(), first.passages.end(),
                           [](const auto& passage) { return passage->encoded() != nullptr; });
    } catch (const std::bad_alloc&) {
        error = Error(Status::out_of_memory, "out of memory");
    } catch (...) {
        error = error_from(std::current_exception());
    }
    if (!done && !error) return;
    const Encoded tell = std::move(first.done);
    encodings_.erase(encodings_.begin());
    tell(error, *backend_);
    ended(0, 1);
}

}  // namespace refrag
