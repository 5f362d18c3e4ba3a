// Answers many requests at once: each joins the batch when a slot and pages are free and leaves it when its
// answer ends. A step does a bounded amount of work, whatever waits: a token of every answer under way, then
// prompts that have been made, then the making of further prompts (encode, sense, project), each in the order
// of arrival. So neither a long answer nor a long context keeps the others waiting. The one generation loop:
// a Session is an Engine with one slot. On the CPU an answer does not depend on what else is in the batch,
// bit for bit. One thread drives it; several engines can share a Model.
//
// A request begins when the pool has pages for its prompt and all tokens that it may generate, so no answer
// is ever broken off for want of pages; the one that waits longest is served first, and nobody overtakes it.
#pragma once

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

namespace refrag {

struct Request {
    // Requests may share passages, which are cut and encoded once for all; they are let go of when the prompt
    // is made.
    std::vector<Segment> segments;
    AnswerOptions options;
    TextSink sink;  // may be empty; what it throws ends its request with an error
};

struct Result {
    uint64_t id = 0;  // as submit gave it
    Answer answer;    // as far as it came, when there is an error
    std::optional<Error> error;
};

struct EngineOptions {
    int32_t n_slots = 1;  // requests that run at a time
    int64_t max_context =
        0;  // decoder positions of each, prompt and answer together; 0: the decoder's window
    // Positions that the pool holds for all requests together; 0: n_slots * max_context, or what memory
    // allows (memory_plan.h).
    int64_t kv_entries = 0;
    // Rows that a step takes through encoder and decoder, beside a token of every answer under way.
    int64_t step_rows = Generator::kStepRows;
    // Prompts that begin alike share the pages of what they have in common, also with those that have ended.
    bool prefix_cache = true;
};

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
    // Forgets a request, wherever it is; it gives no result. Also from within a sink: what it is called for
    // then gives no further text.
    void cancel(uint64_t id) noexcept;
    // The work of one step. A request that fails ends with its error and leaves the others alone. Throws
    // std::bad_alloc alone, and then nothing is lost: the next step goes on.
    void step();
    // Requests that have ended since the last call, in the order of their end.
    std::vector<Result> take_finished();

    size_t n_waiting() const { return waiting_.size(); }
    size_t n_preparing() const {
        return preparing_.size();
    }  // prompts that are being made, or wait for pages
    size_t n_running() const { return generator_.n_running(); }
    int32_t n_slots() const { return generator_.n_slots(); }
    bool idle() const { return n_waiting() == 0 && n_preparing() == 0 && n_running() == 0; }
    int64_t max_context() const { return generator_.max_context(); }
    size_t kv_bytes() const { return generator_.kv_bytes(); }
    // Of steps in which all requests generated: how often the work was recorded, and done again.
    const Recording::Counts& decode_counts() const { return generator_.decode_counts(); }

  private:
    struct Waiting {
        uint64_t id;
        Request request;
        double submitted_ms;
    };
    struct Job;
    // Goes on with prompts, about so many rows; returns the rows used.
    int64_t prepare(int64_t max_rows);
    void make_ready(Job& job);
    void finish(std::unique_ptr<Job> job, const Generator::Ended& ended);
    void drop_cancelled() noexcept;

    const Model& model_;
    EngineOptions options_;
    std::unique_ptr<Backend> backend_;  // outlives what takes memory through it
    Generator generator_;
    Arena arena_;
    std::deque<Waiting> waiting_;
    std::deque<std::unique_ptr<Job>> preparing_;
    std::vector<std::unique_ptr<Job>> running_;  // by the generator's slot
    std::vector<Result> finished_;
    uint64_t next_id_ = 0;
    bool in_step_ = false;
};

}  // namespace refrag
