// "Sense": which chunks are expanded back to tokens. The model's policy, the baselines of the paper's Figure
// 3, and what needs no training: the question's words, and the last chunks. At inference the choice is
// greedy, the n_expand largest scores (paper, section 2); nothing is sampled but `random`.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace refrag {

enum class SelectPolicy {
    model,            // the policy network's logits
    none,             // nothing is expanded
    all,              // everything is: the plain decoder on the full context
    random,           // n_expand chunks, uniformly, by the seed
    bm25,             // the chunks that the question's words point to (bm25.h)
    recent,           // the last ones
    perplexity_asc,   // the chunks that the decoder finds easiest (lowest mean negative log-likelihood)
    perplexity_desc,  // the hardest
};

// "model", "none", ... Status::usage naming the allowed words otherwise.
SelectPolicy parse_select_policy(const std::string& name);
const char* select_policy_name(SelectPolicy policy);
// All words, `separator` between them.
std::string select_policy_names(const char* separator);
// The same for a list. Status::usage where a word is unknown or comes twice.
std::vector<SelectPolicy> parse_select_policies(const std::vector<std::string>& names);

// What becomes of a chunk that is not expanded.
enum class Unexpanded {
    compress,  // it takes one position: the projected chunk
    drop,      // it is left out, and nothing of it is encoded
};

// "compress", "drop"; Status::usage otherwise.
Unexpanded parse_unexpanded(const std::string& name);
const char* unexpanded_name(Unexpanded unexpanded);

// How many of n_chunks are expanded at fraction p: 0 if p = 0, all if p = 1, else round(p * n_chunks) but at
// least 1. Status::usage unless 0 <= p <= 1.
int64_t n_expand(double expand_fraction, int64_t n_chunks);

// How one row of an evaluation selects.
struct Selection {
    double expand_fraction = 0.0;  // p
    SelectPolicy policy = SelectPolicy::model;
    Unexpanded unexpanded = Unexpanded::compress;
};

// The rows for lists of p and of policies: every policy at every p, p by p. Policies none and all overrule p
// and come once, at 0 and 1. At p = 0 there is nothing to choose: the first policy that comes to it has the
// only row. All of that once for each of `unexpanded`, but where everything is expanded. Status::usage where
// a list is empty, a policy or a word of `unexpanded` comes twice, or a p is outside 0..1.
std::vector<Selection> plan_selections(std::span<const double> expand_fractions,
                                       std::span<const SelectPolicy> policies,
                                       std::span<const Unexpanded> unexpanded);

// Marks the n largest scores; equal scores: lower index first. NaN ranks below everything.
std::vector<bool> select_largest(std::span<const float> scores, int64_t n);
// The n of n_chunks that `policy` expands. `scores`: one a chunk, the network's logits for `model`, mean
// negative log-likelihoods for the perplexity policies, bm25_scores() for `bm25`; not read where n is 0 or
// n_chunks, nor by `random` and `recent`.
std::vector<bool> select_chunks(SelectPolicy policy, std::span<const float> scores, int64_t n_chunks,
                                int64_t n, uint64_t seed);
// Marks n of n_chunks, uniformly, the same for the same seed on every machine.
std::vector<bool> select_random(int64_t n_chunks, int64_t n, uint64_t seed);

}  // namespace refrag
