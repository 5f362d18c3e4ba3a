// See policy.h.
#include "models/policy.h"

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

struct PolicyActivations : EncoderActivations {
    Tensor h;          // [rows, dim] normed
    Tensor positions;  // [rows, dim]
    Tensor logit;      // [rows, 1]
};

std::vector<ActivationColumn<PolicyActivations>> columns(const PolicyConfig& config) {
    std::vector<ActivationColumn<PolicyActivations>> all;
    for (const auto& column : EncoderActivations::columns(config.dim, config.hidden_dim))
        all.push_back({column.tensor, column.width});
    all.push_back({&PolicyActivations::h, config.dim});
    all.push_back({&PolicyActivations::positions, config.dim});
    all.push_back({&PolicyActivations::logit, 1});
    return all;
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

void Policy::describe(PolicyWeights& w, const PolicyConfig& config, int32_t d_enc, ParameterVisitor& visit) {
    const int64_t dim = config.dim, hidden_dim = config.hidden_dim;
    const auto plain = [](const std::string& name, int64_t out_dim, int64_t in_dim) {
        return MatrixSpec{name, out_dim, in_dim, Use::every_row, false};
    };
    visit.linear(plain("in_proj", dim, d_enc), w.in_proj);
    for (size_t i = 0; i < w.layers.size(); ++i) {
        EncoderLayer& layer = w.layers[i];
        const std::string p = str("layers.", i, ".");
        visit.layer_norm(p + "norm1", dim, layer.attn_norm);
        visit.linear(plain(p + "q", dim, dim), layer.q);
        visit.linear(plain(p + "k", dim, dim), layer.k);
        visit.linear(plain(p + "v", dim, dim), layer.v);
        visit.linear(plain(p + "o", dim, dim), layer.o);
        visit.layer_norm(p + "norm2", dim, layer.ffn_norm);
        visit.linear(plain(p + "fc1", hidden_dim, dim), layer.fc1);
        visit.linear(plain(p + "fc2", dim, hidden_dim), layer.fc2);
    }
    visit.layer_norm("norm", dim, w.norm);
    visit.linear(plain("head", 1, dim), w.head);
    if (config.sees_question) visit.vector("question_type", dim, w.question_type);
}

WeightCount Policy::count(const PolicyConfig& config, int32_t d_enc) {
    PolicyWeights none;
    none.layers.resize(static_cast<size_t>(config.n_layers));
    CountParameters count;
    describe(none, config, d_enc, count);
    return count.count();
}

int64_t Policy::activation_floats(const PolicyConfig& config) {
    return floats_per_row(columns(config));
}

void Policy::load(WeightSource& weights, int32_t d_enc) {
    weights_.layers.resize(static_cast<size_t>(config_.n_layers));
    LoadParameters load(weights);
    describe(weights_, config_, d_enc, load);
    weights.finish({});
    footprint_ = load.footprint();
}

std::vector<float> Policy::logits(Backend& b, Tensor chunk_emb, Tensor question_emb, Arena& arena) const {
    const PolicyWeights& w = weights_;
    const int64_t n_chunks = chunk_emb.rows;
    const int64_t n_pieces = config_.sees_question ? question_emb.rows : 0;
    const int64_t rows = n_chunks + n_pieces;
    std::vector<float> result(static_cast<size_t>(n_chunks));
    if (n_chunks == 0) return result;
    const AttentionShape shape = encoder_attention_shape(config_.dim, config_.n_heads, w.layers[0]);

    const ArenaScope scratch(arena);
    BatchPlan plan;
    plan.add_encoder(static_cast<int32_t>(rows));
    const Batch batch = plan.upload(b, arena);
    PolicyActivations a;
    allocate(columns(config_), a, arena, rows);
    b.upload(a.positions.data, sinusoidal_positions(rows, config_.dim).data(), a.positions.bytes());

    const Tensor x = a.x, h = a.h;
    b.linear(x.row_slice(0, n_chunks), chunk_emb, *w.in_proj.weight, w.in_proj.bias.view());
    if (n_pieces > 0) {
        const Tensor question = x.row_slice(n_chunks, n_pieces);
        b.linear(question, question_emb, *w.in_proj.weight, w.in_proj.bias.view());
        b.add(question, w.question_type.view());
    }
    b.add(x, a.positions);
    const auto norm_into_h = [&](const LayerNorm& norm) {
        b.layer_norm(h, x, norm.weight.view(), norm.bias.view(), config_.norm_eps);
    };
    for (const EncoderLayer& layer : w.layers) {
        norm_into_h(layer.attn_norm);
        attend(b, layer, a, h, shape, batch);
        norm_into_h(layer.ffn_norm);
        feed_forward(b, layer, a, h);
    }
    norm_into_h(w.norm);
    b.linear(a.logit, h, *w.head.weight, w.head.bias.view());
    b.download(result.data(), a.logit.data, result.size() * sizeof(float));
    return result;
}

}  // namespace refrag
