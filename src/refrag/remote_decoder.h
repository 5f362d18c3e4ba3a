// A decoder that runs elsewhere and takes a prompt's rows as vectors: passages are compressed, sensed and
// projected here, and what follows is another engine's, with its batching and its parallelism. This is what
// an Engine needs of one; src/remote/ has the one that speaks to vLLM.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "refrag/logprobs.h"
#include "refrag/sequence_runner.h"

namespace refrag {

struct RemotePrompt {
    std::vector<int32_t> ids;    // a prompt of tokens alone; or
    std::vector<uint16_t> rows;  // [n_rows, dim], the bits of BF16
    int64_t n_rows = 0;
    int64_t dim = 0;
    int64_t max_new = 0;  // tokens to generate at most, 1 or more
    SequenceRunner::Drawing drawing;
};

struct RemoteToken {
    int32_t id = 0;
    std::optional<TokenLogprobs> logprobs;  // where they were asked for
};

// What has come of an answer since it was last asked for.
struct RemoteNews {
    std::vector<RemoteToken> tokens;
    bool ended = false;   // no more will come:
    bool at_end = false;  // it was ended by an end token, which may be the last of the tokens
    std::optional<Error> error;
};

// The answers that one engine waits for. One thread at a time.
class RemoteAnswers {
  public:
    virtual ~RemoteAnswers() = default;
    // Sends a prompt; never waits for the answer. `ticket`: a number that is not in use. Throws where the
    // prompt cannot be sent at all: Status::too_long with both sizes, Status::usage.
    virtual void start(uint64_t ticket, const RemotePrompt& prompt) = 0;
    // Forgets an answer; the other side is told by the connection's end.
    virtual void stop(uint64_t ticket) noexcept = 0;
    // Waits until something has come, so long at most.
    virtual void wait(std::chrono::milliseconds most) = 0;
    virtual RemoteNews take(uint64_t ticket) = 0;
};

// Immutable; any number of threads may use it.
class RemoteDecoder {
  public:
    virtual ~RemoteDecoder() = default;
    // How messages name it: "smol at http://host:8000/v1".
    virtual std::string name() const = 0;
    virtual int64_t max_context() const = 0;  // positions of a prompt and its answer
    virtual std::unique_ptr<RemoteAnswers> open() const = 0;
};

}  // namespace refrag
