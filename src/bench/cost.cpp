// See cost.h.
#include "bench/cost.h"

#include <algorithm>

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

double prefill_flops(const DecoderConfig& config, int64_t n) {
    const double q_dim = static_cast<double>(config.n_heads) * config.head_dim;
    double seen = 0.0;  // entries, of all rows in all layers
    for (int32_t layer = 0; layer < config.n_layers; ++layer) {
        const int64_t window = config.window(layer) == 0 ? n : std::min<int64_t>(config.window(layer), n);
        const double first = static_cast<double>(window), rest = static_cast<double>(n - window);
        seen += first * (first + 1.0) / 2.0 + rest * first;
    }
    return products(Llama::count(config).every_row, n) + 4.0 * q_dim * seen;
}

double head_flops(const DecoderConfig& config) {
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
