// `refrag run`: its options and its two ways, one question after another (run.cpp) or a file of requests at
// once (run_batch.cpp).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/cache_options.h"
#include "cli/common.h"
#include "cli/decoder_options.h"
#include "refrag/answer.h"
#include "refrag/passages.h"

namespace refrag {

struct RunOptions {
    std::string model_dir;
    DeviceOptions device;
    std::vector<std::string> questions;
    std::string passages;   // "": none given
    bool skip_bad = false;  // leave out passages that cannot be read
    int32_t chunk_len = 0;
    double expand_fraction = -1.0;  // -1: the model's
    std::string policy;             // "": the model's
    std::string unexpanded;         // "": the model's
    ChatFlags chat;
    int64_t context = 0;
    AnswerOptions answer;  // what the command line gives directly
    std::string explain;
    bool json = false;
    std::string batch;  // "": no batch
    std::string output;
    int32_t parallel = 8;
    bool no_prefix_cache = false;
    CacheOptions cache;
    DecoderOptions decoder;
};

// Options that `run` shares with `ask` and `chat`: what is expanded; how much is generated; sampling.
void add_expansion_options(CLI::App& sub, RunOptions& options);
CLI::Option* add_logprobs_option(CLI::App& app, AnswerOptions& answer);
CLI::Option* add_explain_option(CLI::App& app, RunOptions& options);
// A list option whose values are taken as they are; CLI11 reads "{}" and "[a,b]" as lists of its own.
CLI::Option* add_texts(CLI::App& app, const std::string& name, std::vector<std::string>& values,
                       const std::string& description);

// One line on standard error: chunks, expanded, cached, positions, times.
void print_summary(const Answer& answer);

void add_generation_options(CLI::App& sub, RunOptions& options);
void add_sampling_options(CLI::App& sub, SamplerOptions& sampler);

// The options of every request, checked. Status::usage.
AnswerOptions checked_answer_options(const RunOptions& options);

// The passages of --passages; with --skip-bad a line that is refused is named on standard error and left out.
std::vector<Passage> read_passages(const RunOptions& options);

// On standard error, when a chunk length is none that the model was trained for.
void warn_chunk_len(const Model& model, int32_t chunk_len);

// Loads the model of these options and refuses what it cannot do. Status::usage.
std::unique_ptr<Model> load_run_model(Device& device, const RunOptions& options, const AnswerOptions& answer);

// Answers the requests of options.batch. Status::runtime at the end when some could not be answered.
void run_batch(const RunOptions& options);

}  // namespace refrag
