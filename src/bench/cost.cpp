// See cost.h.
#include "bench/cost.h"

namespace refrag {
namespace {

void add_linear(WeightCount& n, int64_t out, int64_t in, bool bias) {
    n.matrix += static_cast<uint64_t>(out * in);
    n.vector += bias ? static_cast<uint64_t>(out) : 0;
}

void add_vectors(WeightCount& n, int64_t count, int64_t dim) {
    n.vector += static_cast<uint64_t>(count * dim);
}

// A layer of four square matrices and two of the hidden width, all with biases, and two LayerNorms: the
// encoder's and the policy's.
void add_encoder_layer(WeightCount& n, int64_t dim, int64_t hidden_dim) {
    add_linear(n, 4 * dim, dim, true);
    add_linear(n, hidden_dim, dim, true);
    add_linear(n, dim, hidden_dim, true);
    add_vectors(n, 4, dim);
}

}  // namespace

WeightCount count_weights(const LlamaConfig& config) {
    WeightCount n;
    const int64_t q_dim = int64_t{config.n_heads} * config.head_dim;
    const int64_t kv_dim = int64_t{config.n_kv_heads} * config.head_dim;
    add_linear(n, config.vocab_size, config.dim, false);
    if (!config.tied_embeddings) add_linear(n, config.vocab_size, config.dim, false);
    for (int32_t i = 0; i < config.n_layers; ++i) {
        add_linear(n, q_dim + 2 * kv_dim, config.dim, config.attention_bias);
        add_linear(n, config.dim, q_dim, config.attention_bias);
        add_linear(n, 2 * int64_t{config.hidden_dim}, config.dim, config.mlp_bias);
        add_linear(n, config.dim, config.hidden_dim, config.mlp_bias);
        add_vectors(n, 2, config.dim);
    }
    add_vectors(n, 1, config.dim);
    n.layer_matrix = n.matrix;
    if (!config.tied_embeddings)
        n.layer_matrix -= static_cast<uint64_t>(config.vocab_size) * static_cast<uint64_t>(config.dim);
    return n;
}

WeightCount count_weights(const RobertaConfig& config, ChunkPooling pooling) {
    WeightCount n;
    const int64_t rows = int64_t{config.vocab_size} + config.max_positions + config.type_vocab_size;
    add_linear(n, rows, config.dim, false);
    add_vectors(n, 2, config.dim);
    const uint64_t tables = n.matrix;
    for (int32_t i = 0; i < config.n_layers; ++i) add_encoder_layer(n, config.dim, config.hidden_dim);
    if (pooling == ChunkPooling::pooler) add_linear(n, config.dim, config.dim, true);
    n.layer_matrix = n.matrix - tables;
    return n;
}

WeightCount count_weights(const ModelParts& parts) {
    WeightCount n = count_weights(parts.decoder);
    const WeightCount encoder = count_weights(parts.encoder, parts.config.pooling);
    n.matrix += encoder.matrix;
    n.vector += encoder.vector;
    n.layer_matrix += encoder.layer_matrix;
    const int64_t d_enc = parts.encoder.dim, d_dec = parts.decoder.dim;
    add_linear(n, d_dec, d_enc, true);  // the projector
    add_linear(n, d_dec, d_dec, true);
    const PolicyConfig& policy = parts.config.policy;
    add_linear(n, policy.dim, d_enc, true);
    for (int32_t i = 0; i < policy.n_layers; ++i) add_encoder_layer(n, policy.dim, policy.hidden_dim);
    add_vectors(n, 2, policy.dim);
    add_linear(n, 1, policy.dim, true);
    if (policy.sees_question) add_vectors(n, 1, policy.dim);
    return n;
}

double prefill_flops(const LlamaConfig& config, int64_t n) {
    const double rows = static_cast<double>(n), dim = config.dim, hidden = config.hidden_dim;
    const double q_dim = static_cast<double>(config.n_heads) * config.head_dim;
    const double kv_dim = static_cast<double>(config.n_kv_heads) * config.head_dim;
    const double products = 2.0 * rows * (2.0 * dim * q_dim + 2.0 * dim * kv_dim + 3.0 * dim * hidden);
    const double attention = 4.0 * q_dim * rows * (rows + 1.0) / 2.0;
    return config.n_layers * (products + attention);
}

double head_flops(const LlamaConfig& config) {
    return 2.0 * config.dim * config.vocab_size;
}

double encode_flops(const RobertaConfig& config, int64_t n) {
    const double rows = static_cast<double>(n), dim = config.dim, hidden = config.hidden_dim;
    return config.n_layers * (2.0 * rows * (4.0 * dim * dim + 2.0 * dim * hidden) + 4.0 * dim * rows * rows);
}

double policy_flops(const PolicyConfig& config, int32_t d_enc, int64_t n) {
    const double rows = static_cast<double>(n), dim = config.dim, hidden = config.hidden_dim;
    const double layer = 2.0 * rows * (4.0 * dim * dim + 2.0 * dim * hidden) + 4.0 * dim * rows * rows;
    return 2.0 * rows * dim * d_enc + config.n_layers * layer + 2.0 * rows * dim;
}

double projector_flops(int32_t d_enc, int32_t d_dec, int64_t n) {
    return 2.0 * static_cast<double>(n) * d_dec * (static_cast<double>(d_enc) + d_dec);
}

}  // namespace refrag
