// Sequences whose decoder runs elsewhere: a prompt's rows become vectors here and are sent, the tokens of its
// answer come back one by one. A prompt of tokens alone is sent as ids, which is shorter.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/arena.h"
#include "refrag/remote_decoder.h"
#include "refrag/sequence_runner.h"

namespace refrag {

class Model;

class RemoteGenerator final : public SequenceRunner {
  public:
    // `backend`, `decoder` (its table of embeddings) and `remote` must outlive it. n_slots and max_context
    // are as an engine has checked them.
    RemoteGenerator(Backend& backend, const Llama& decoder, const RemoteDecoder& remote, int32_t n_slots,
                    int64_t max_context);

    bool can_hold(int64_t n_rows, int64_t max_new) const override;
    // Status::usage for rows to be scored: a prompt of vectors has no log-probabilities there.
    std::optional<int32_t> start(Start& start) override;
    void stop(int32_t slot) noexcept override;
    // Hands out the tokens that have come.
    const std::vector<Ended>& step(int64_t max_rows) override;
    void wait(std::chrono::milliseconds most) override;

    size_t n_running() const override { return n_running_; }
    size_t n_generating() const override;
    int64_t n_unread() const override { return 0; }
    int32_t n_slots() const override { return static_cast<int32_t>(sequences_.size()); }
    int64_t max_context() const override { return max_context_; }
    const Counts& counts() const override { return counts_; }

  private:
    struct Sequence {
        uint64_t ticket = 0;
        NextToken next;  // empty: a free slot
        int64_t n_left = 0;
        bool asked = false;    // it was sent: tokens are wanted
        bool limited = false;  // by the answer's own limit, not by the context
        bool generating = false;
        std::vector<int32_t> end_ids;
    };
    RemotePrompt prompt_of(const Start& start);
    // Takes what has come for the sequence; whether it has ended.
    bool hear(Sequence& sequence, Ended& ended);

    Backend& backend_;
    const Llama& decoder_;
    const int64_t max_context_;
    Arena arena_;
    std::unique_ptr<RemoteAnswers> answers_;
    std::vector<Sequence> sequences_;  // by slot
    size_t n_running_ = 0;
    uint64_t next_ticket_ = 0;
    std::vector<Ended> ended_;
    std::exception_ptr failure_;  // of waiting: it ends every sequence with the next step
    Counts counts_;
};

// Asks a model's remote decoder for the token after the same few, given as ids and as vectors. Throws what it
// answers where it cannot take vectors, or not of this size. A line for the user where the two tokens differ:
// then it is another decoder than the model's.
std::optional<std::string> check_remote_decoder(const Model& model);

}  // namespace refrag
