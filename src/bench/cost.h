// What a model and a request ask of the machine, counted from the networks' shapes: weights, floating-point
// operations, memory. 2 operations a multiply-add; only matrix products and attention are counted (norms,
// rotations and activations are less than a hundredth). Causal attention counts the entries that a row really
// sees, so half of the square.
#pragma once

#include <cstdint>

#include "refrag/model.h"

namespace refrag {

// The decoder's layers over a prompt of n positions from an empty cache:
//   n_layers * (2 n (2 dim q_dim + 2 dim kv_dim + 3 dim hidden_dim) + 4 q_dim n (n + 1) / 2),
// q_dim = n_heads * head_dim, kv_dim = n_kv_heads * head_dim. The head is not among them (see head_flops).
double prefill_flops(const DecoderConfig& config, int64_t n);
// The head for one row: 2 dim vocab_size.
double head_flops(const DecoderConfig& config);
// The encoder over one sequence of n tokens, which sees all of itself:
//   n_layers * (2 n (4 dim^2 + 2 dim hidden_dim) + 4 dim n^2).
double encode_flops(const RobertaConfig& config, int64_t n);
// The policy over n rows (chunks and question pieces), and the projector over n rows.
double policy_flops(const PolicyConfig& config, int32_t d_enc, int64_t n);
double projector_flops(int32_t d_enc, int32_t d_dec, int64_t n);

// Of all four networks.
WeightCount count_weights(const ModelParts& parts);

}  // namespace refrag
