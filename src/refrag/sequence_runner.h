// What an engine hands made prompts to, and what gives it their answers token by token: a Generator, which
// runs the decoder here, or a RemoteGenerator, which asks one elsewhere. Knows neither passages nor text. One
// thread drives it.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "models/llama.h"
#include "refrag/logits.h"
#include "refrag/logprobs.h"
#include "refrag/prefix_cache.h"
#include "refrag/sampler.h"

namespace refrag {

class SequenceRunner {
  public:
    // The logits after all rows fed so far, as many as `start` was told, or all of them, valid during the
    // call; logits_ms: what making them took. Returns the id to feed next, or nothing when the sequence is to
    // end. What it throws ends its sequence. It calls nothing of this runner.
    using NextToken = std::function<std::optional<int32_t>(const Logits& logits, double logits_ms)>;
    // The log-probabilities of one of the rows that `start` was told to score, in their order, each once, all
    // before the first call of NextToken. What it throws ends its sequence.
    using RowScored = std::function<void(const ScoredRow& row, TokenLogprobs&& logprobs)>;
    using Draw = std::function<std::optional<TokenDraw>()>;

    struct Ended {
        int32_t slot = 0;
        bool context_full = false;  // there was a next token, but no position for it
        std::exception_ptr error;   // what a callback or the decoder threw; null if nothing
    };

    // How tokens are to be drawn, for a runner whose decoder draws them elsewhere.
    struct Drawing {
        SamplerOptions sampler;
        std::vector<int32_t> end_ids;
        bool ignore_eos = false;          // end_ids are never drawn
        std::optional<int32_t> logprobs;  // alternatives to tell of with each token
    };

    struct Start {
        // The prompt's rows (Llama::forward), 1 to max_context of them; chunk rows are numbered 0, 1, ... in
        // the order of the prompt.
        std::vector<int32_t> source;
        Buffer chunk_rows;           // their values [n, dim] F32
        std::vector<RowName> names;  // of all rows; empty: nothing is shared with other sequences
        int64_t max_new = -1;  // ids that `next` gives at most; -1: until max_context or the pool's end;
                               // 0: it ends when its rows have been read, and `next` is never called
        NextToken next;
        int32_t n_logits = 0;  // how many of the largest logits `next` needs; 0: all
        // Asked before each call of `next`; where it gives something, the token may have been drawn when
        // `next` is called.
        Draw draw;
        std::vector<ScoredRow> scores;  // rising rows of the prompt; those from the first on are not reused
        int32_t n_top = 0;              // alternatives of each (row_logprobs)
        RowScored scored;
        Drawing drawing;
    };

    // Since the runner was made.
    struct Counts {
        int64_t steps = 0;         // that fed something
        int64_t steps_redone = 0;  // of these, sequence by sequence
        int64_t prompt_rows = 0;   // that the decoder read here
        int64_t prompts = 0;       // begun
        int64_t prefix_hits = 0;   // of these, that took over rows of an earlier one
        int64_t rows_reused = 0;   // that they took over
    };

    virtual ~SequenceRunner() = default;

    // Whether the pool could hold such a sequence if there were no other.
    virtual bool can_hold(int64_t n_rows, int64_t max_new) const = 0;
    // Begins a sequence and returns its slot; nothing, and `start` unchanged, where there is now no free slot
    // or too little room for all rows and max_new more.
    virtual std::optional<int32_t> start(Start& start) = 0;
    // Rows of a sequence's prompt that it took over from an earlier one.
    virtual int32_t n_reused(int32_t /*slot*/) const { return 0; }
    // Drops a sequence; its slot is free at once. Between steps.
    virtual void stop(int32_t slot) noexcept = 0;
    // What there is to do for the sequences, of prompts about max_rows rows. Returns the sequences that ended
    // in it, until the next step; their slots are free again.
    virtual const std::vector<Ended>& step(int64_t max_rows) = 0;
    // Waits until a step would have something to do, so long at most. Where it always has, not at all.
    virtual void wait(std::chrono::milliseconds /*most*/) {}

    virtual size_t n_running() const = 0;
    virtual size_t n_generating() const = 0;  // whose prompts have been read
    virtual int64_t n_unread() const = 0;     // rows of prompts that have not been read
    virtual int32_t n_slots() const = 0;
    virtual int64_t max_context() const = 0;
    virtual const Counts& counts() const = 0;

    // Of the pool of a decoder that runs here; a block holds kPageEntries positions.
    virtual int64_t n_blocks() const { return 0; }
    virtual int64_t free_blocks() const { return 0; }
    virtual int64_t idle_blocks() const { return 0; }  // hold prefixes, and no sequence uses them
    virtual size_t kv_bytes() const { return 0; }
    // Positions that the pool holds.
    int64_t pool_entries() const { return n_blocks() * kPageEntries; }
    // Of steps in which all sequences generated: how often the work was recorded, and done again.
    virtual Recording::Counts decode_counts() const { return {}; }
};

}  // namespace refrag
