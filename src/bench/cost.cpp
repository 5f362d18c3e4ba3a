// See cost.h.
#include "bench/cost.h"

namespace refrag {
namespace {

// Operations of n rows that pass matrices of so many values.
double products(uint64_t values, int64_t n) {
    return 2.0 * static_cast<double>(values) * static_cast<double>(n);
}

// Operations of one layer's attention in which every row sees all n: q k^T and the sums of v.
double full_attention(int64_t dim, int64_t n) {
    return 4.0 * static_cast<double>(dim) * static_cast<double>(n) * static_cast<double>(n);
}

}  // namespace

WeightCount count_weights(const ModelParts& parts) {
    const int32_t d_enc = parts.encoder.dim, d_dec = parts.decoder.dim;
    WeightCount n = Llama::count(parts.decoder);
    n += Roberta::count(parts.encoder, parts.config.pooling);
    n += Projector::count(d_enc, d_dec);
    n += Policy::count(parts.config.policy, d_enc);
    return n;
}

double prefill_flops(const LlamaConfig& config, int64_t n) {
    const double rows = static_cast<double>(n);
    const double q_dim = static_cast<double>(config.n_heads) * config.head_dim;
    const double attention = 4.0 * q_dim * rows * (rows + 1.0) / 2.0;
    return products(Llama::count(config).every_row, n) + config.n_layers * attention;
}

double head_flops(const LlamaConfig& config) {
    return products(Llama::count(config).some_rows, 1);
}

double encode_flops(const RobertaConfig& config, int64_t n) {
    return products(Roberta::count(config, ChunkPooling::cls).every_row, n) +
           config.n_layers * full_attention(config.dim, n);
}

double policy_flops(const PolicyConfig& config, int32_t d_enc, int64_t n) {
    return products(Policy::count(config, d_enc).every_row, n) +
           config.n_layers * full_attention(config.dim, n);
}

double projector_flops(int32_t d_enc, int32_t d_dec, int64_t n) {
    return products(Projector::count(d_enc, d_dec).every_row, n);
}

}  // namespace refrag
