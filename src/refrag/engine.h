// Answers many requests at once: each joins the batch when a slot is free and leaves it when its answer ends,
// so one long answer keeps nobody waiting. The one generation loop: a Session is an Engine with one slot. On
// the CPU an answer does not depend on what else is in the batch, bit for bit. One thread drives it; several
// engines can share a Model.
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
    TextSink sink;  // may be empty; what it throws ends its request
};

struct Result {
    uint64_t id = 0;  // as submit gave it
    Answer answer;    // as far as it came, when there is an error
    std::optional<Error> error;
};

class Engine {
  public:
    // n_slots requests run at a time. max_context: decoder positions of each, prompt and answer together; 0
    // for the decoder's own window. Status::usage when it is beyond that window.
    Engine(const Model& model, int32_t n_slots, int64_t max_context = 0);
    ~Engine();

    // Queues a request; first come, first served. Status::usage for options that make no sense. Ids count up
    // from 0.
    uint64_t submit(Request request);
    // Forgets a request, queued or running; it gives no result. Not from within a sink.
    void cancel(uint64_t id) noexcept;
    // Brings waiting requests into free slots (compress, sense, expand), then one batch through the decoder.
    // A request that fails ends with its error and leaves the others alone. Throws std::bad_alloc alone, and
    // then nothing is lost: the next step goes on.
    void step();
    // Requests that have ended since the last call, in the order of their end.
    std::vector<Result> take_finished();

    size_t n_waiting() const { return waiting_.size(); }
    size_t n_running() const { return generator_.n_running(); }
    int32_t n_slots() const { return generator_.n_slots(); }
    bool idle() const { return n_waiting() == 0 && n_running() == 0; }
    int64_t max_context() const { return generator_.max_context(); }
    size_t kv_bytes() const { return generator_.kv_bytes(); }

  private:
    struct Waiting {
        uint64_t id;
        Request request;
        double submitted_ms;
    };
    struct Running;
    void admit();
    // Makes the prompt and gives it to the generator, which makes `running` the slot's.
    void begin(std::unique_ptr<Running>& running);
    void finish(std::unique_ptr<Running> running, const Generator::Ended& ended);

    const Model& model_;
    std::unique_ptr<Backend> backend_;  // outlives what takes memory through it
    Generator generator_;
    Arena arena_;
    std::deque<Waiting> waiting_;
    std::vector<std::unique_ptr<Running>> running_;  // by the generator's slot
    std::vector<Result> finished_;
    uint64_t next_id_ = 0;
};

}  // namespace refrag
