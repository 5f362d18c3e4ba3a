// REFRAG against the full context with the same weights in the same run: time to first token, time to
// iterative token, throughput (the paper's Figures 2, 8 and 9). What is timed is what `run` does: the
// requests go through an Engine.
//
// A row is (mode, context, k, p, cached, batch). Each context is one passage of exactly that many tokens and
// a question of its own for each request of the batch. Rows of one context and batch size are measured in
// turn, round by round, so that a machine that slows down slows them all. A row's first round is a warm-up
// and thrown away unless it took longer than two seconds.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "refrag/model.h"

namespace refrag {

struct BenchOptions {
    std::vector<int64_t> contexts{512, 1024, 2048, 4096, 8192, 16384};  // tokens
    std::vector<int32_t> chunk_lens{8, 16, 32};                         // k
    std::vector<double> expand_fractions{0.0, 0.1};                     // p
    std::vector<int32_t> batches{1};  // requests that run together, and all there are
    bool full = true;                 // without, there are no ratios
    bool refrag = true;
    // cached: passages held as ids and chunk embeddings, so they are neither tokenised nor encoded; the full
    // context from ids. text: raw passages, nothing held, everything included. With an encoder vocabulary of
    // its own a passage is tokenised for it too, in full rows as well: 2 ms for 16384 tokens on a busy core.
    bool cached = true;
    bool text = true;
    int32_t question_tokens = 16;
    int32_t output_tokens = 256;  // of each request, at least 2; end tokens are never sampled
    int32_t repeats = 3;          // rounds of a row that count
    double row_seconds = 60.0;    // no further round of a row that has taken longer
    // Run the policy network at p = 0 and p = 1 too, where its choice is known beforehand and `run` leaves it
    // out unless it is to explain: TTFT is then an upper bound.
    bool always_sense = true;
    uint64_t seed = 0;
};

// Medians over the rounds.
struct BenchFigures {
    int64_t positions = 0;        // of one request's prompt (the largest of the batch)
    double ttft_ms = 0.0;         // from submission to the first sampled token, mean over the batch
    double ttit_ms = 0.0;         // between the further tokens of the request that began last
    double tokens_per_s = 0.0;    // batch * output_tokens / time from submission to the last token
    double prefill_gflops = 0.0;  // prefill_flops over the time of the decoder's pass over the prompts
    double decode_gbs = 0.0;      // weights and cache entries that a step reads, over ttit_ms
    uint64_t kv_bytes = 0;        // cache for these prompts and answers, whole pages
    double flops = 0.0;           // of all that TTFT takes in, of one request
    int32_t repeats = 0;          // rounds that count
    // (largest - smallest) / median of TTFT or TTIT, whichever is more; none with a single round.
    std::optional<double> spread;
};

struct BenchRow {
    bool full = false;
    int64_t context = 0;
    std::optional<int32_t> chunk_len;       // none in full rows
    std::optional<double> expand_fraction;  // none in full rows
    bool cached = false;
    int32_t batch = 1;
    std::optional<BenchFigures> figures;  // none where the prompt and answer pass the decoder's window
    // The full row's TTFT and TTIT over this row's, and this row's throughput over the full row's; same
    // context, batch and `cached`. None where there is no such row. 1 for the full row itself.
    std::optional<double> ttft_ratio;
    std::optional<double> ttit_ratio;
    std::optional<double> throughput_ratio;
    std::optional<double> flop_ratio;  // the same of `flops`: what the shapes promise
};

using BenchProgress = std::function<void(int64_t done, int64_t total)>;

// Status::usage naming the first option that makes no sense.
void check_bench_options(const BenchOptions& options);

// Memory of the sweep beside the weights, from above: the largest cache (of dtype `kv`) and the workspace.
struct BenchMemory {
    uint64_t kv_bytes = 0;
    uint64_t workspace_bytes = 0;
};
BenchMemory bench_memory(const DecoderConfig& decoder, DType kv, const RobertaConfig& encoder,
                         const RefragConfig& config, const BenchOptions& options);

// Rows by batch, context, then full before refrag, k, p, cached before text.
std::vector<BenchRow> run_bench(const Model& model, const BenchOptions& options,
                                const BenchProgress& progress = {});

}  // namespace refrag
