// Picks the next token from logits: greedy, or temperature and top-p with a seed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "refrag/random.h"

namespace refrag {

struct SamplerOptions {
    float temperature = 0.0f;  // 0: greedy, the largest logit (lowest id among equals)
    float top_p = 1.0f;        // keep the smallest set of most likely tokens whose probabilities reach this
    uint64_t seed = 0;
};

class Sampler {
  public:
    // Status::usage for a negative or non-finite temperature, or top_p outside (0, 1].
    explicit Sampler(const SamplerOptions& options);

    // The id of the next token. Status::runtime when no logit is finite (broken weights), naming what was
    // found.
    int32_t sample(std::span<const float> logits);

  private:
    SamplerOptions options_;
    Random random_;
    std::vector<std::pair<float, int32_t>> candidates_;  // (probability, id), reused between calls
};

}  // namespace refrag
