// See policy.h.
#include "models/policy.h"

#include <array>
#include <cmath>

#include "io/file.h"
#include "models/device_batch.h"

namespace refrag {
namespace {

// pe(i)[2m] = sin(i / 10000^(2m / dim)), pe(i)[2m + 1] = cos of the same angle; [n, dim].
std::vector<float> sinusoidal_positions(int64_t n, int32_t dim) {
    std::vector<float> pe(static_cast<size_t>(n * dim));
    for (int32_t m = 0; m < dim / 2; ++m) {
        const double frequency = std::pow(10000.0, -2.0 * m / dim);
        for (int64_t i = 0; i < n; ++i) {
            const double angle = static_cast<double>(i) * frequency;
            pe[static_cast<size_t>(i * dim + 2 * m)] = static_cast<float>(std::sin(angle));
            pe[static_cast<size_t>(i * dim + 2 * m + 1)] = static_cast<float>(std::cos(angle));
        }
    }
    return pe;
}

}  // namespace

Policy::Policy(Device& device, const std::string& dir, const PolicyConfig& config, int32_t d_enc,
               const LoadedBytes& loaded)
    : config_(config) {
    WeightLoader weights(device, path_join(dir, "policy.safetensors"), "", loaded);
    load(weights, d_enc);
}

Policy::Policy(const PolicyConfig& config, int32_t d_enc, WeightSource& weights) : config_(config) {
    load(weights, d_enc);
}

void Policy::load(WeightSource& weights, int32_t d_enc) {
    const uint64_t given_before = weights.parameters(), held_before = weights.held_bytes();
    const PolicyConfig& config = config_;
    const int64_t dim = config.dim;
    in_proj_ = weights.matrix("in_proj.weight", dim, d_enc);
    in_proj_bias_ = weights.vector("in_proj.bias", dim);
    for (int32_t i = 0; i < config.n_layers; ++i) {
        const std::string p = str("layers.", i, ".");
        Layer layer;
        layer.norm1 = weights.vector(p + "norm1.weight", dim);
        layer.norm1_bias = weights.vector(p + "norm1.bias", dim);
        layer.q = weights.matrix(p + "q.weight", dim, dim);
        layer.k = weights.matrix(p + "k.weight", dim, dim);
        layer.v = weights.matrix(p + "v.weight", dim, dim);
        layer.o = weights.matrix(p + "o.weight", dim, dim);
        layer.q_bias = weights.vector(p + "q.bias", dim);
        layer.k_bias = weights.vector(p + "k.bias", dim);
        layer.v_bias = weights.vector(p + "v.bias", dim);
        layer.o_bias = weights.vector(p + "o.bias", dim);
        layer.norm2 = weights.vector(p + "norm2.weight", dim);
        layer.norm2_bias = weights.vector(p + "norm2.bias", dim);
        layer.fc1 = weights.matrix(p + "fc1.weight", config.hidden_dim, dim);
        layer.fc1_bias = weights.vector(p + "fc1.bias", config.hidden_dim);
        layer.fc2 = weights.matrix(p + "fc2.weight", dim, config.hidden_dim);
        layer.fc2_bias = weights.vector(p + "fc2.bias", dim);
        layers_.push_back(std::move(layer));
    }
    norm_ = weights.vector("norm.weight", dim);
    norm_bias_ = weights.vector("norm.bias", dim);
    head_ = weights.matrix("head.weight", 1, dim);
    head_bias_ = weights.vector("head.bias", 1);
    if (config.sees_question) question_type_ = weights.vector("question_type", dim);
    weights.finish({});
    parameters_ = weights.parameters() - given_before;
    weight_bytes_ = weights.held_bytes() - held_before;
}

std::vector<float> Policy::logits(Backend& b, Tensor chunk_emb, Tensor question_emb, Arena& arena) const {
    const int64_t n_chunks = chunk_emb.rows;
    const int64_t n_pieces = config_.sees_question ? question_emb.rows : 0;
    const int64_t rows = n_chunks + n_pieces;
    std::vector<float> result(static_cast<size_t>(n_chunks));
    if (n_chunks == 0) return result;
    const int64_t dim = config_.dim;
    const int32_t head_dim = config_.dim / config_.n_heads;
    const AttentionShape shape{config_.n_heads, config_.n_heads, head_dim,
                               1.0f / std::sqrt(static_cast<float>(head_dim)), layers_[0].k->dtype()};

    const ArenaScope scratch(arena);
    BatchPlan plan;
    plan.add_encoder(static_cast<int32_t>(rows));
    const Batch batch = plan.upload(b, arena);
    const Tensor x = arena.tensor(rows, dim);
    const Tensor h = arena.tensor(rows, dim);
    const Tensor q = arena.tensor(rows, dim);
    const Tensor k = arena.tensor(rows, dim);
    const Tensor v = arena.tensor(rows, dim);
    const Tensor attn = arena.tensor(rows, dim);
    const Tensor y = arena.tensor(rows, dim);
    const Tensor hidden = arena.tensor(rows, config_.hidden_dim);
    const Tensor logit = arena.tensor(rows, 1);
    Tensor positions = arena.tensor(rows, dim);
    b.upload(positions.data, sinusoidal_positions(rows, config_.dim).data(), positions.bytes());

    b.linear(x.row_slice(0, n_chunks), chunk_emb, *in_proj_, in_proj_bias_.view());
    if (n_pieces > 0) {
        const Tensor question = x.row_slice(n_chunks, n_pieces);
        b.linear(question, question_emb, *in_proj_, in_proj_bias_.view());
        b.add(question, question_type_.view());
    }
    b.add(x, positions);
    b.layer_norm(h, x, layers_[0].norm1.view(), layers_[0].norm1_bias.view(), config_.norm_eps);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = layers_[i];
        b.linears(h, std::array{Product{q, layer.q.get(), layer.q_bias.view()},
                                Product{k, layer.k.get(), layer.k_bias.view()},
                                Product{v, layer.v.get(), layer.v_bias.view()}});
        b.attention(attn, q, k, v, shape, nullptr, 0, batch);
        b.linear_add(x, attn, {y, layer.o.get(), layer.o_bias.view()});
        b.layer_norm(h, x, layer.norm2.view(), layer.norm2_bias.view(), config_.norm_eps);

        b.linear_gelu(hidden, h, *layer.fc1, layer.fc1_bias.view());
        b.linear_add(x, hidden, {y, layer.fc2.get(), layer.fc2_bias.view()});
        const bool last = i + 1 == layers_.size();
        const DeviceVector& norm = last ? norm_ : layers_[i + 1].norm1;
        const DeviceVector& norm_bias = last ? norm_bias_ : layers_[i + 1].norm1_bias;
        b.layer_norm(h, x, norm.view(), norm_bias.view(), config_.norm_eps);
    }
    b.linear(logit, h, *head_, head_bias_.view());
    b.download(result.data(), logit.data, result.size() * sizeof(float));
    return result;
}

}  // namespace refrag
