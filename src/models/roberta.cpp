// See roberta.h.
#include "models/roberta.h"

#include <array>
#include <cmath>
#include <utility>

namespace refrag {
namespace {

// Rows of one call. Enough to fill the matrix kernels, small enough that activations stay near the caches.
constexpr int64_t kGroupRows = 2048;

BatchPlan plan_of(std::span<const std::vector<int32_t>> sequences) {
    BatchPlan plan;
    for (const std::vector<int32_t>& ids : sequences) plan.add_encoder(static_cast<int32_t>(ids.size()));
    return plan;
}

}  // namespace

Roberta::Roberta(Device& device, const std::string& dir, ChunkPooling pooling, bool normalize,
                 const LoadedBytes& loaded, WeightFormat format)
    : config_(load_roberta_config(dir)), pooling_(pooling), normalize_(normalize) {
    WeightLoader weights(device, dir, "roberta.", loaded, format);
    load(weights);
}

Roberta::Roberta(RobertaConfig config, ChunkPooling pooling, bool normalize, WeightSource& weights)
    : config_(config), pooling_(pooling), normalize_(normalize) {
    load(weights);
}

void Roberta::load(WeightSource& weights) {
    const uint64_t given_before = weights.parameters(), held_before = weights.held_bytes();
    const RobertaConfig& c = config_;
    weights.begin_digest();
    word_ = weights.matrix("embeddings.word_embeddings.weight", c.vocab_size, c.dim);
    position_ = weights.matrix("embeddings.position_embeddings.weight", c.max_positions, c.dim);
    type_ = weights.matrix("embeddings.token_type_embeddings.weight", c.type_vocab_size, c.dim);
    norm_ = weights.vector("embeddings.LayerNorm.weight", c.dim);
    norm_bias_ = weights.vector("embeddings.LayerNorm.bias", c.dim);
    for (int32_t i = 0; i < c.n_layers; ++i) layers_.push_back(load_layer(weights, i));
    const auto counts_up = [](std::span<const double> values) {
        for (size_t i = 0; i < values.size(); ++i)
            if (values[i] != static_cast<double>(i)) return false;
        return true;
    };
    // The masked-token head reads the encoder's output and is no part of it; so does the pooler, where it is
    // not asked for.
    std::vector<KnownUnused> known = {{"embeddings.position_ids", counts_up, "0, 1, 2, ..."}};
    for (const char* name : {"bias", "decoder.weight", "decoder.bias", "dense.weight", "dense.bias",
                             "layer_norm.weight", "layer_norm.bias"})
        known.push_back({str("lm_head.", name)});
    if (pooling_ == ChunkPooling::pooler) {
        pooler_ = weights.layer_matrix("pooler.dense.weight", c.dim, c.dim);
        pooler_bias_ = weights.vector("pooler.dense.bias", c.dim);
    } else {
        known.push_back({"pooler.dense.weight"});
        known.push_back({"pooler.dense.bias"});
    }
    weights_digest_ = weights.take_digest();
    unused_ = weights.finish(known);
    parameters_ = weights.parameters() - given_before;
    weight_bytes_ = weights.held_bytes() - held_before;
}

Roberta::Layer Roberta::load_layer(WeightSource& weights, int32_t index) const {
    const int64_t d = config_.dim;
    const std::string prefix = str("encoder.layer.", index, ".");
    const std::string self = prefix + "attention.self.";
    const std::string attn = prefix + "attention.output.";
    Layer layer;
    layer.q = weights.layer_matrix(self + "query.weight", d, d);
    layer.k = weights.layer_matrix(self + "key.weight", d, d);
    layer.v = weights.layer_matrix(self + "value.weight", d, d);
    layer.o = weights.layer_matrix(attn + "dense.weight", d, d);
    layer.q_bias = weights.vector(self + "query.bias", d);
    layer.k_bias = weights.vector(self + "key.bias", d);
    layer.v_bias = weights.vector(self + "value.bias", d);
    layer.o_bias = weights.vector(attn + "dense.bias", d);
    layer.attn_norm = weights.vector(attn + "LayerNorm.weight", d);
    layer.attn_norm_bias = weights.vector(attn + "LayerNorm.bias", d);
    layer.fc1 = weights.layer_matrix(prefix + "intermediate.dense.weight", config_.hidden_dim, d);
    layer.fc1_bias = weights.vector(prefix + "intermediate.dense.bias", config_.hidden_dim);
    layer.fc2 = weights.layer_matrix(prefix + "output.dense.weight", d, config_.hidden_dim);
    layer.fc2_bias = weights.vector(prefix + "output.dense.bias", d);
    layer.ffn_norm = weights.vector(prefix + "output.LayerNorm.weight", d);
    layer.ffn_norm_bias = weights.vector(prefix + "output.LayerNorm.bias", d);
    return layer;
}

Tensor Roberta::run(Backend& b, const BatchPlan& plan, const Batch& batch,
                    std::span<const std::vector<int32_t>> sequences, Arena& arena) const {
    const RobertaConfig& c = config_;
    const int64_t rows = plan.n_rows();
    const int32_t head_dim = c.dim / c.n_heads;
    const AttentionShape shape{c.n_heads, c.n_heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)),
                               layers_[0].k->dtype()};

    std::vector<int32_t> ids;
    std::vector<int32_t> position_ids;  // pad_id + 1, pad_id + 2, ... within each chunk
    for (const std::vector<int32_t>& sequence : sequences) {
        REFRAG_CHECK(!sequence.empty() && static_cast<int64_t>(sequence.size()) <= c.max_seq_len(),
                     Status::runtime, "encoder: a chunk has ", sequence.size(),
                     " encoder tokens, special ones included; expected 1 to ", c.max_seq_len(),
                     " (max_position_embeddings - pad_token_id - 1): give a smaller chunk length (-k)");
        ids.insert(ids.end(), sequence.begin(), sequence.end());
        for (size_t i = 0; i < sequence.size(); ++i) {
            position_ids.push_back(c.pad_id + 1 + static_cast<int32_t>(i));
        }
    }
    const std::vector<int32_t> type_ids(static_cast<size_t>(rows), 0);

    const Tensor x = arena.tensor(rows, c.dim);
    const ArenaScope scratch(arena);
    const Tensor q = arena.tensor(rows, c.dim);
    const Tensor k = arena.tensor(rows, c.dim);
    const Tensor v = arena.tensor(rows, c.dim);
    const Tensor attn = arena.tensor(rows, c.dim);
    const Tensor y = arena.tensor(rows, c.dim);
    const Tensor hidden = arena.tensor(rows, c.hidden_dim);

    b.embed(x, *word_, upload_vector(b, arena, ids), Tensor{});
    b.add_embed(x, *type_, upload_vector(b, arena, type_ids));
    b.add_embed(x, *position_, upload_vector(b, arena, position_ids));
    b.layer_norm(x, x, norm_.view(), norm_bias_.view(), c.norm_eps);
    for (const Layer& layer : layers_) {
        b.linears(x, std::array{Product{q, layer.q.get(), layer.q_bias.view()},
                                Product{k, layer.k.get(), layer.k_bias.view()},
                                Product{v, layer.v.get(), layer.v_bias.view()}});
        b.attention(attn, q, k, v, shape, nullptr, 0, batch);
        b.linear_add(x, attn, {y, layer.o.get(), layer.o_bias.view()});
        b.layer_norm(x, x, layer.attn_norm.view(), layer.attn_norm_bias.view(), c.norm_eps);

        b.linear_gelu(hidden, x, *layer.fc1, layer.fc1_bias.view());
        b.linear_add(x, hidden, {y, layer.fc2.get(), layer.fc2_bias.view()});
        b.layer_norm(x, x, layer.ffn_norm.view(), layer.ffn_norm_bias.view(), c.norm_eps);
    }
    return x;
}

Tensor Roberta::hidden_states(Backend& backend, std::span<const std::vector<int32_t>> sequences,
                              Arena& arena) const {
    const BatchPlan plan = plan_of(sequences);
    const Batch batch = plan.upload(backend, arena);
    return run(backend, plan, batch, sequences, arena);
}

void Roberta::encode(Backend& backend, std::span<const std::vector<int32_t>> sequences, Tensor out,
                     Arena& arena) const {
    REFRAG_DCHECK(out.rows == static_cast<int64_t>(sequences.size()) && out.cols == config_.dim);
    size_t begin = 0;
    while (begin < sequences.size()) {
        size_t end = begin;
        int64_t rows = 0;
        while (end < sequences.size() && (end == begin || rows + std::ssize(sequences[end]) <= kGroupRows)) {
            rows += std::ssize(sequences[end++]);
        }
        const ArenaScope scratch(arena);
        const auto group = sequences.subspan(begin, end - begin);
        const BatchPlan plan = plan_of(group);
        const Batch batch = plan.upload(backend, arena);
        const Tensor x = run(backend, plan, batch, group, arena);
        const Tensor c = out.row_slice(static_cast<int64_t>(begin), static_cast<int64_t>(group.size()));
        if (pooling_ == ChunkPooling::pooler) {
            const Tensor first = arena.tensor(c.rows, c.cols);
            backend.pool(first, x, batch, Pooling::cls);
            backend.linear(c, first, *pooler_, pooler_bias_.view());
            backend.tanh(c);
        } else {
            backend.pool(c, x, batch, pooling_ == ChunkPooling::cls ? Pooling::cls : Pooling::mean);
        }
        if (normalize_) backend.l2_normalize(c);
        begin = end;
    }
}

}  // namespace refrag
