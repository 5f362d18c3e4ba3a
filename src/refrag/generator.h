// Continuous batching over the decoder: sequences join and leave the slots of one KV cache at any time, and
// every step feeds all of them as one ragged batch. A sequence is rows in, logits out; its owner says what
// comes next. Knows neither passages nor text. One thread drives it.
//
// A step takes at most so many rows: one for each sequence that generates, and what is left for prompts, in
// the order of their start; so a long prompt goes through in parts while others go on, and the memory of
// activations is bounded.
//
// A sequence begins when the pool has pages for all that it may ever hold, so it never runs out of them. A
// prompt that begins like one read before takes over its pages (prefix_cache.h).
//
// A step that fails is undone, and done again sequence by sequence: those whose own rows fail end with the
// error, all others go on as if nothing had been.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/arena.h"
#include "models/llama.h"
#include "refrag/prefix_cache.h"
#include "refrag/sequence_runner.h"

namespace refrag {

constexpr int32_t max_parallel = 1024;  // slots of one generator, well below a step's rows

class Generator final : public SequenceRunner {
  public:
    // `backend` (a queue of the decoder's device, this generator's thread's) and `decoder` must outlive it.
    // max_context: positions of each sequence. Status::usage unless 1 <= n_slots <= max_parallel and 1 <=
    // max_context <= the decoder's window.
    // kv_blocks: of the pool, each for kPageEntries positions; 0: as many as all slots can take.
    Generator(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context,
              int64_t kv_blocks = 0);

    // What the pool of such a generator takes, `kv` being the decoder's kv_dtype(); no argument is checked.
    static uint64_t cache_bytes(const DecoderConfig& config, DType kv, int32_t n_slots, int64_t max_context);
    static uint64_t block_bytes(const DecoderConfig& config, DType kv);

    bool can_hold(int64_t n_rows, int64_t max_new) const override;
    std::optional<int32_t> start(Start& start) override;
    // The same where there must be room: Status::out_of_memory otherwise.
    int32_t start(std::vector<int32_t> source, Buffer chunk_rows, NextToken next, int32_t n_logits = 0,
                  Draw draw = {});
    int32_t n_reused(int32_t slot) const override { return sequences_[static_cast<size_t>(slot)].n_reused; }
    void stop(int32_t slot) noexcept override;
    // One batch of about max_rows rows: fewer sequences than max_rows generate in any case. Returns the
    // sequences that ended in it, until the next step; their slots are free again. Where all sequences
    // generate it allocates nothing, once it has been called so before.
    const std::vector<Ended>& step(int64_t max_rows) override;
    const std::vector<Ended>& step() { return step(kStepRows); }
    static constexpr int64_t kStepRows = 2048;

    bool has_free_slot() const { return order_.size() < sequences_.size(); }
    size_t n_running() const override { return order_.size(); }
    size_t n_generating() const override;
    int64_t n_unread() const override;
    // Blocks that a further sequence could take now.
    int64_t available_blocks() const { return free_blocks() + idle_blocks() - n_promised(); }
    int64_t n_blocks() const override { return kv_.n_pages() / kv_.n_heads(); }
    int64_t free_blocks() const override { return kv_.free_blocks(); }
    int64_t idle_blocks() const override { return prefixes_.n_idle(); }
    int32_t n_slots() const override { return kv_.n_slots(); }
    int64_t max_context() const override { return kv_.max_entries(); }
    size_t kv_bytes() const override { return kv_.device_bytes(); }
    Recording::Counts decode_counts() const override { return decode_workspace_.counts(); }
    const Counts& counts() const override { return counts_; }

  private:
    struct Sequence {
        std::vector<int32_t> source;  // the prompt, or the one token to feed
        size_t fed = 0;               // rows of it that the decoder has read
        Buffer chunk_rows;
        int64_t chunk_rows_fed = 0;
        std::vector<RowName> names;  // of what the slot will hold; empty: not shared
        int64_t n_blocks = 0;        // promised to it
        int64_t n_entries = 0;       // that it may come to hold
        int32_t n_reused = 0;
        bool generating = false;  // the prompt has been read
        bool generates = true;    // a token is wanted after the prompt
        NextToken next;
        int32_t n_logits = 0;
        Draw draw;
        std::vector<ScoredRow> scores;
        size_t n_scored = 0;  // of them
        int32_t n_top = 0;
        RowScored scored;
    };
    struct Part {
        int32_t slot;
        int32_t n;          // rows of this step
        size_t scores_end;  // of scored_: where those of this part end, once it has been fed
    };
    Sequence& at(int32_t slot) { return sequences_[static_cast<size_t>(slot)]; }
    // The chunk rows of a step: the next n of the sequence in `slot`.
    struct ChunkRows {
        int32_t slot;
        int64_t n;
    };
    // Positions that such a sequence may come to hold.
    int64_t most_entries(int64_t n_rows, int64_t max_new) const;
    // Blocks that running sequences may still take.
    int64_t n_promised() const;
    void plan_rows(int64_t max_rows);
    // Keeps what the slot holds for others that begin alike.
    void keep_prefix(int32_t slot) noexcept;
    // Feeds parts_; what threw. Then nothing has changed but which pages the slots hold.
    std::exception_ptr try_feed() noexcept;
    // logits_ become those of outputs_, [outputs_.size(), n_logits_], and ids_ their tokens; scored_ what is
    // scored.
    void feed();
    // The decoder's pass over parts_; the logits of outputs_, in memory that arena_'s scope holds, and when
    // they were begun.
    Tensor feed_decoder(double& logits_began_ms);
    void list_rows();
    // hidden [rows of parts_, dim]
    void score(Tensor hidden);
    // What was fed counts as held.
    void advance();
    // Tells the callbacks what feed() gave.
    void hand_out();
    std::optional<int32_t> next_of(int32_t slot, size_t output);
    // How many logits of each of outputs_ are brought: all, or the largest.
    int64_t logits_wanted() const;
    // Draws the tokens of all of outputs_ where the logits are, into drawn_, if that is wanted of all of
    // them. False where a row must be read after all: then all are.
    bool draw(Tensor logits);

    Backend& backend_;
    const Llama& decoder_;
    KvCache kv_;
    PrefixCache prefixes_{kv_};
    DecodeWorkspace decode_workspace_;
    Arena arena_;
    std::vector<Sequence> sequences_;  // by slot
    std::vector<int32_t> order_;       // slots in use, in the order of their start
    // One step's lists, kept for their memory.
    std::vector<Part> parts_;
    std::vector<Part> redone_;
    BatchPlan plan_;
    std::vector<int32_t> source_;
    std::vector<ChunkRows> chunk_rows_;
    std::vector<int32_t> outputs_;    // slots whose rows have all been read, and which generate
    std::vector<int32_t> last_rows_;  // of outputs_
    std::vector<Ended> ended_;
    std::vector<float> logits_;
    std::vector<int32_t> ids_;  // empty where logits_ are all tokens'
    int64_t n_logits_ = 0;
    std::vector<TokenDraw> draws_;
    std::vector<int32_t> drawn_;  // tokens of outputs_, or empty
    double logits_ms_ = 0.0;
    std::vector<TokenLogprobs> scored_;  // of parts_ in their order
    Counts counts_;
};

}  // namespace refrag
