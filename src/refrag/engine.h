// Answers many requests at once: each joins the batch when a slot and pages are free and leaves it when its
// answer ends. A step does a bounded amount of work, whatever waits: a token of every answer under way, then
// prompts that have been made, then the making of further prompts (encode, sense, project), each in the order
// of arrival. So neither a long answer nor a long context keeps the others waiting. The one generation loop:
// a Session is an Engine with one slot. On the CPU an answer does not depend on what else is in the batch,
// bit for bit. Several engines can share a Model.
//
// A request begins when the pool has pages for its prompt and all tokens that it may generate, so no answer
// is ever broken off for want of pages; the one that waits longest is served first, and nobody overtakes it.
// What goes wrong for one request, in whatever phase, ends that request alone.
//
// Threads: one drives an engine, and every function is called on it. A server with many callers keeps the
// requests and cancellations of its other threads in a queue of its own, and hands them over between steps.
// A sink runs on the driving thread within a step; of the engine's functions it may call submit and cancel.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "refrag/answer.h"
#include "refrag/generator.h"
#include "refrag/model.h"
#include "refrag/segment.h"
#include "refrag/sequence_runner.h"

namespace refrag {

struct Request {
    // Requests may share passages, which are cut and encoded once for all; they are let go of when the prompt
    // is made.
    std::vector<Segment> segments;
    AnswerOptions options;
    TextSink sink;  // may be empty, like the next; what they throw ends the request with an error
    AnswerSink progress = {};
    // Past it the request ends, whatever became of it, with FinishReason::deadline. Looked at once a step.
    std::optional<std::chrono::steady_clock::time_point> deadline;
};

struct Result {
    uint64_t id = 0;  // as submit gave it
    Answer answer;    // as far as it came, where there is an error or the deadline is past
    std::optional<Error> error;
};

struct EngineOptions {
    int32_t n_slots = 1;  // requests that run at a time
    int64_t max_context =
        0;  // decoder positions of each, prompt and answer together; 0: the decoder's window
    // Positions that the pool holds for all requests together; 0: n_slots * max_context, or what memory
    // allows (memory_plan.h).
    int64_t kv_entries = 0;
    // Rows that a step takes through encoder and decoder for prompts, beside a token of every answer under
    // way: a smaller number gives answers under way their tokens at a steadier pace, a larger one reads
    // prompts faster. More by a chunk at most, but that a request's open chunks are sensed together.
    int64_t step_rows = Generator::kStepRows;
    // Prompts that begin alike share the pages of what they have in common, also with those that have ended.
    bool prefix_cache = true;
};

// What an engine holds now, and what it has done since it was made.
struct EngineStats {
    size_t n_waiting = 0;    // requests that have not begun
    size_t n_preparing = 0;  // whose prompts are being made, or wait for pages
    size_t n_running = 0;    // whose prompts are read, or answers generated
    int32_t n_slots = 0;
    int64_t kv_blocks = 0;       // of the pool, kPageEntries positions each
    int64_t kv_blocks_used = 0;  // by requests that run
    int64_t kv_blocks_kept = 0;  // beside them, of prefixes that are kept; given back when they are needed

    int64_t steps = 0;         // in which the decoder ran
    int64_t steps_redone = 0;  // of these, that failed and were done again sequence by sequence
    int64_t tokens_generated = 0;
    int64_t rows_prepared = 0;   // of chunks, questions and heads, on the way to prompts
    int64_t rows_prefilled = 0;  // of prompts, read by the decoder
    int64_t rows_reused = 0;     // of prompts, taken over from earlier ones
    int64_t prompts = 0;         // begun
    int64_t prefix_hits = 0;     // of these, that took over rows
    int64_t finished = 0;        // requests: answered,
    int64_t failed = 0;          // ended with an error,
    int64_t expired = 0;         // past their deadline,
    int64_t cancelled = 0;       // cancelled
};

class EngineJob;

class Engine {
  public:
    // Status::usage for numbers that make no sense or a context beyond the decoder's window.
    // Status::out_of_memory with both numbers where a device's memory cannot hold one request of a
    // max_context that was asked for.
    Engine(const Model& model, const EngineOptions& options);
    Engine(const Model& model, int32_t n_slots, int64_t max_context = 0)
        : Engine(model, EngineOptions{.n_slots = n_slots, .max_context = max_context}) {}
    ~Engine();

    // Queues a request; first come, first served. Status::usage for options that make no sense. Ids count up
    // from 0.
    uint64_t submit(Request request);
    // Forgets a request, wherever it is; it gives no result and no further text, its slot and its pages are
    // free at once; called by a sink, when the step ends. Ids that are unknown are ignored.
    void cancel(uint64_t id) noexcept;
    // The work of one step. A request that fails ends with its error and leaves the others alone. Throws
    // std::bad_alloc alone, and then nothing is lost: the next step goes on.
    void step();
    // Requests that have ended since the last call, in the order of their end.
    std::vector<Result> take_finished();

    // EngineOptions::step_rows from the next step on. Status::usage for less than 1.
    void set_step_rows(int64_t step_rows);

    // Time: linear in the blocks of kept prefixes.
    EngineStats stats() const;
    size_t n_waiting() const { return waiting_.size(); }
    size_t n_preparing() const { return preparing_.size(); }
    size_t n_running() const { return runner_->n_running(); }
    // Of those that run, whose prompts have been read.
    size_t n_generating() const { return runner_->n_generating(); }
    // Rows of encoder and decoder that prompts have taken since the engine was made.
    int64_t prompt_rows() const { return counts_.rows_prepared + runner_->counts().prompt_rows; }
    int32_t n_slots() const { return runner_->n_slots(); }
    bool idle() const { return n_waiting() == 0 && n_preparing() == 0 && n_running() == 0; }
    int64_t max_context() const { return runner_->max_context(); }
    size_t kv_bytes() const { return runner_->kv_bytes(); }
    // Of steps in which all requests generated: how often the work was recorded, and done again.
    Recording::Counts decode_counts() const { return runner_->decode_counts(); }

  private:
    struct Waiting {
        uint64_t id;
        Request request;
        double submitted_ms;
    };
    // Ends the requests whose deadline is past.
    void expire();
    // Goes on with prompts, about so many rows; returns the rows used.
    int64_t prepare(int64_t max_rows);
    // Ends a job of running_ or preparing_: its result, unless it is cancelled. Memory for it is there.
    void finish(std::unique_ptr<EngineJob>& job, std::optional<FinishReason> reason,
                const std::exception_ptr& error) noexcept;
    void put_result(Result&& result) noexcept;
    void drop_cancelled() noexcept;

    const Model& model_;
    EngineOptions options_;
    std::unique_ptr<Backend> backend_;  // outlives what takes memory through it
    std::unique_ptr<SequenceRunner> runner_;
    Arena arena_;
    std::deque<Waiting> waiting_;
    std::deque<std::unique_ptr<EngineJob>> preparing_;
    std::vector<std::unique_ptr<EngineJob>> running_;  // by the generator's slot
    std::vector<Result> finished_;
    EngineStats counts_;  // what is counted here
    uint64_t next_id_ = 0;
    bool in_step_ = false;
};

}  // namespace refrag
