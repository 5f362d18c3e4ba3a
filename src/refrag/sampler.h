// Picks the next token from logits. What it does to them, in this order (that of Hugging Face's generate;
// vLLM's is the same but that it applies min-p before top-k and top-p):
//   1. ids that must never come (ignore_eos) get -inf;
//   2. repetition penalty r, for every id of the prompt's token rows or of the answer so far:
//      l := l / r where l > 0, else l * r;
//   3. frequency penalty f and presence penalty q, for every id that the answer holds n > 0 times:
//      l := l - n f - q;
//   4. greedy (temperature 0) ends here with the largest logit. Else p_i = exp(l_i / T) / sum;
//   5. top-k: the k most likely;   6. top-p: of those, renormalised, the smallest set of most likely tokens
//      whose probabilities reach top_p;   7. min-p: those with p_i >= min_p * max p;   8. one draw from what
//      is left, renormalised.
// Equal logits rank by id, the lower first, so exactly k stay. Everything is computed in double.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "refrag/logits.h"
#include "refrag/random.h"

namespace refrag {

// The defaults change nothing: greedy, no penalty.
struct SamplerOptions {
    float temperature = 0.0f;         // 0: greedy
    int32_t top_k = 0;                // 0 or -1: all
    float top_p = 1.0f;               // (0, 1]
    float min_p = 0.0f;               // [0, 1]
    float repetition_penalty = 1.0f;  // > 0; above 1 discourages
    float presence_penalty = 0.0f;    // -2 to 2
    float frequency_penalty = 0.0f;   // -2 to 2
    int32_t repeat_last_n = -1;       // the penalties look at this many last tokens; 0: none, -1: all
    uint64_t seed = 0;
};

// Status::usage naming the first option that is out of its range, the range, and what was found.
void check_sampler_options(const SamplerOptions& options);

// One sequence's sampler: it remembers what it has drawn. One thread at a time.
class Sampler {
  public:
    // `banned` ids are never sampled. Throws as check_sampler_options does.
    explicit Sampler(const SamplerOptions& options, std::span<const int32_t> banned = {});

    // The prompt's tokens, in order, for the repetition penalty; before the first sample().
    void read_prompt(std::span<const int32_t> ids);

    // The id of the next token, which counts as said from now on. Status::runtime when a logit is NaN or
    // infinitely large or none is left to choose (broken weights), naming what was found.
    int32_t sample(std::span<const float> logits);
    // The same from the largest logits alone, of which needed() must be there (or all tokens'); more do not
    // matter.
    int32_t sample(const Logits& logits);
    // How many of the largest logits are enough; 0: it takes all of them.
    int32_t needed() const;
    // How a backend may draw the next token in its own memory, where it can draw as this sampler would. The
    // next sample(), over logits or over what was drawn, belongs to it.
    std::optional<TokenDraw> draw_elsewhere();

    // (probability, id) of the tokens that the last draw chose among, not normalised: the largest is 1 when
    // it is the largest of all. Empty after a greedy choice.
    std::span<const std::pair<double, int32_t>> candidates() const { return candidates_; }

  private:
    struct Uses {
        int32_t seen = 0;       // in the window, prompt included
        int32_t generated = 0;  // of these, by us
    };
    void remember(int32_t id, bool generated);
    void adjust(std::span<const float> logits);
    int32_t draw(double largest);
    // Steps 6 to 8, over candidates_.
    int32_t choose();

    SamplerOptions options_;
    std::vector<int32_t> banned_;
    bool penalises_;
    Random random_;
    std::optional<double> uniform_;  // drawn already, for the next sample()
    std::unordered_map<int32_t, Uses> uses_;
    std::deque<std::pair<int32_t, bool>> window_;         // (id, generated); only for repeat_last_n > 0
    std::vector<double> adjusted_;                        // the logits after steps 1 to 3
    std::vector<std::pair<double, int32_t>> candidates_;  // reused between calls
};

}  // namespace refrag
