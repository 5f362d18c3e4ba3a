// Continuous batching over the decoder: sequences join and leave the slots of one KV cache at any time, and
// every step feeds all of them as one ragged batch. A sequence is rows in, logits out; its owner says what
// comes next. Knows neither passages nor text. One thread drives it.
//
// A step takes at most kPrefillRows rows: one for each sequence that generates, and what is left for prompts,
// in the order of their start; so a long prompt goes through in parts while others go on, and the memory of
// activations is bounded.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/arena.h"
#include "models/llama.h"
#include "refrag/logits.h"

namespace refrag {

constexpr int32_t max_parallel = 1024;  // slots of one generator, well below a step's rows

class Generator {
  public:
    // The logits after all rows fed so far, as many as `start` was told, or all of them, valid during the
    // call; logits_ms: what making them took. Returns the id to feed next, or nothing when the sequence is to
    // end. What it throws ends its sequence.
    using NextToken = std::function<std::optional<int32_t>(const Logits& logits, double logits_ms)>;

    struct Ended {
        int32_t slot = 0;
        bool context_full = false;  // there was a next token, but no position for it
        std::exception_ptr error;   // what NextToken or the decoder threw; null if nothing
    };

    // `backend` (a queue of the decoder's device, this generator's thread's) and `decoder` must outlive it.
    // max_context: positions of each sequence. Status::usage unless 1 <= n_slots <= max_parallel and 1 <=
    // max_context <= the decoder's window.
    Generator(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context);

    // What the cache of such a generator takes, `kv` being the decoder's kv_dtype(); no argument is checked.
    static uint64_t cache_bytes(const LlamaConfig& config, DType kv, int32_t n_slots, int64_t max_context);

    // Begins a sequence in a free slot and returns the slot. source: the prompt's rows (Llama::forward), 1 to
    // max_context of them; slot rows are numbered 0, 1, ... in the order of the prompt. slots: their values
    // [n, dim] F32. n_logits: how many of the largest logits `next` needs; 0: all. draw: asked before each
    // call of `next`; where it gives something, the token may have been drawn when `next` is called.
    using Draw = std::function<std::optional<TokenDraw>()>;
    int32_t start(std::vector<int32_t> source, Buffer slots, NextToken next, int32_t n_logits = 0,
                  Draw draw = {});
    // Drops a sequence; its slot is free at once.
    void stop(int32_t slot) noexcept;
    // One batch. Returns the sequences that ended in it, until the next step; their slots are free again.
    // Where all sequences generate it allocates nothing, once it has been called so before.
    const std::vector<Ended>& step();

    bool has_free_slot() const { return order_.size() < sequences_.size(); }
    size_t n_running() const { return order_.size(); }
    int32_t n_slots() const { return kv_.n_slots(); }
    int64_t max_context() const { return kv_.max_entries(); }
    size_t kv_bytes() const { return kv_.device_bytes(); }

  private:
    struct Sequence {
        std::vector<int32_t> source;  // the prompt, or the one token to feed
        size_t fed = 0;               // rows of it that the decoder has read
        Buffer slots;
        int64_t slots_fed = 0;
        bool generating = false;  // the prompt has been read
        NextToken next;
        int32_t n_logits = 0;
        Draw draw;
    };
    struct Part {
        int32_t slot;
        int32_t n;  // rows of this step
    };
    Sequence& at(int32_t slot) { return sequences_[static_cast<size_t>(slot)]; }
    // What one projected prompt's rows of a step name: the next n of the slots of `slot`.
    struct SlotRows {
        int32_t slot;
        int64_t n;
    };
    void plan_rows();
    // Feeds parts_; logits_ become those of outputs_, [outputs_.size(), n_logits_], and ids_ their tokens.
    void feed();
    // How many logits of each of outputs_ are brought: all, or the largest.
    int64_t logits_wanted() const;
    // Draws the tokens of all of outputs_ where the logits are, into drawn_, if that is wanted of all of
    // them. False where a row must be read after all: then all are.
    bool draw(Tensor logits);

    Backend& backend_;
    const Llama& decoder_;
    KvCache kv_;
    Arena arena_;
    std::vector<Sequence> sequences_;  // by slot
    std::vector<int32_t> order_;       // slots in use, in the order of their start
    // One step's lists, kept for their memory.
    std::vector<Part> parts_;
    BatchPlan plan_;
    std::vector<int32_t> source_;
    std::vector<SlotRows> slot_rows_;
    std::vector<int32_t> outputs_;    // slots whose rows have all been read
    std::vector<int32_t> last_rows_;  // of outputs_
    std::vector<Ended> ended_;
    std::vector<float> logits_;
    std::vector<int32_t> ids_;  // empty where logits_ are all tokens'
    int64_t n_logits_ = 0;
    std::vector<TokenDraw> draws_;
    std::vector<int32_t> drawn_;  // tokens of outputs_, or empty
    double logits_ms_ = 0.0;
};

}  // namespace refrag
