// See roberta.h.
#include "models/roberta.h"

#include <utility>

namespace refrag {
namespace {

BatchPlan plan_of(std::span<const std::vector<int32_t>> sequences) {
    BatchPlan plan;
    for (const std::vector<int32_t>& ids : sequences) plan.add_encoder(static_cast<int32_t>(ids.size()));
    return plan;
}

}  // namespace

Roberta::Roberta(Device& device, const std::string& dir, ChunkPooling pooling, bool normalize,
                 const LoadedBytes& loaded, WeightFormat format)
    : config_(load_roberta_config(dir)), pooling_(pooling), normalize_(normalize) {
    WeightLoader weights(device, dir, config_.is_bert ? "bert." : "roberta.", loaded, format);
    load(weights);
}

Roberta::Roberta(RobertaConfig config, ChunkPooling pooling, bool normalize, WeightSource& weights)
    : config_(config), pooling_(pooling), normalize_(normalize) {
    load(weights);
}

void Roberta::describe(RobertaWeights& w, const RobertaConfig& c, ChunkPooling pooling,
                       ParameterVisitor& visit) {
    const int64_t d = c.dim;
    const auto table = [&](const char* name, int64_t rows, std::unique_ptr<Matrix>& place) {
        visit.matrix({str("embeddings.", name, "_embeddings.weight"), rows, d, Use::table, false}, place);
    };
    table("word", c.vocab_size, w.word);
    table("position", c.max_positions, w.position);
    table("token_type", c.type_vocab_size, w.type);
    visit.layer_norm("embeddings.LayerNorm", d, w.norm);
    for (size_t i = 0; i < w.layers.size(); ++i) {
        EncoderLayer& layer = w.layers[i];
        const std::string prefix = str("encoder.layer.", i, ".");
        const std::string self = prefix + "attention.self.", attn = prefix + "attention.output.";
        visit.linear({self + "query", d, d}, layer.q);
        visit.linear({self + "key", d, d}, layer.k);
        visit.linear({self + "value", d, d}, layer.v);
        visit.linear({attn + "dense", d, d}, layer.o);
        visit.layer_norm(attn + "LayerNorm", d, layer.attn_norm);
        visit.linear({prefix + "intermediate.dense", c.hidden_dim, d}, layer.fc1);
        visit.linear({prefix + "output.dense", d, c.hidden_dim}, layer.fc2);
        visit.layer_norm(prefix + "output.LayerNorm", d, layer.ffn_norm);
    }
    if (pooling == ChunkPooling::pooler) visit.linear({"pooler.dense", d, d, Use::some_rows}, w.pooler);
}

WeightCount Roberta::count(const RobertaConfig& config, ChunkPooling pooling) {
    RobertaWeights none;
    none.layers.resize(static_cast<size_t>(config.n_layers));
    CountParameters count;
    describe(none, config, pooling, count);
    return count.count();
}

int64_t Roberta::activation_floats(const RobertaConfig& config) {
    return floats_per_row(EncoderActivations::columns(config.dim, config.hidden_dim));
}

void Roberta::load(WeightSource& weights) {
    weights_.layers.resize(static_cast<size_t>(config_.n_layers));
    weights.begin_digest();
    LoadParameters load(weights);
    describe(weights_, config_, pooling_, load);
    weights_digest_ = weights.take_digest();
    footprint_ = load.footprint();

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
    if (config_.is_bert) {
        for (const char* name :
             {"predictions.bias", "predictions.decoder.weight", "predictions.decoder.bias",
              "predictions.transform.dense.weight", "predictions.transform.dense.bias",
              "predictions.transform.LayerNorm.weight", "predictions.transform.LayerNorm.bias",
              "seq_relationship.weight", "seq_relationship.bias"})
            known.push_back({str("cls.", name)});
    }
    if (pooling_ != ChunkPooling::pooler) {
        known.push_back({"pooler.dense.weight"});
        known.push_back({"pooler.dense.bias"});
    }
    unused_ = weights.finish(known);
}

Tensor Roberta::run(Backend& b, const BatchPlan& plan, const Batch& batch,
                    std::span<const std::vector<int32_t>> sequences, Arena& arena) const {
    const RobertaConfig& c = config_;
    const int64_t rows = plan.n_rows();
    const AttentionShape shape = encoder_attention_shape(c.dim, c.n_heads, weights_.layers[0]);

    std::vector<int32_t> ids;
    std::vector<int32_t> position_ids;  // first_position, ... within each chunk
    for (const std::vector<int32_t>& sequence : sequences) {
        REFRAG_CHECK(
            !sequence.empty() && static_cast<int64_t>(sequence.size()) <= c.max_seq_len(), Status::runtime,
            "encoder: a chunk has ", sequence.size(),
            " encoder tokens, special ones included; expected 1 to ", c.max_seq_len(),
            c.is_bert ? " (max_position_embeddings)" : " (max_position_embeddings - pad_token_id - 1)",
            ": give a smaller chunk length (-k)");
        ids.insert(ids.end(), sequence.begin(), sequence.end());
        for (size_t i = 0; i < sequence.size(); ++i) {
            position_ids.push_back(c.first_position + static_cast<int32_t>(i));
        }
    }
    const std::vector<int32_t> type_ids(static_cast<size_t>(rows), 0);

    const Tensor x = arena.tensor(rows, c.dim);
    const ArenaScope scratch(arena);
    EncoderActivations a;
    allocate(EncoderActivations::columns(c.dim, c.hidden_dim), a, arena, rows);
    a.x = x;
    const auto norm = [&](const LayerNorm& n) {
        b.layer_norm(x, x, n.weight.view(), n.bias.view(), c.norm_eps);
    };
    b.embed(x, *weights_.word, upload_vector(b, arena, ids), Tensor{});
    b.add_embed(x, *weights_.type, upload_vector(b, arena, type_ids));
    b.add_embed(x, *weights_.position, upload_vector(b, arena, position_ids));
    norm(weights_.norm);
    for (const EncoderLayer& layer : weights_.layers) {
        attend(b, layer, a, x, shape, batch);
        norm(layer.attn_norm);
        feed_forward(b, layer, a, x);
        norm(layer.ffn_norm);
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
        while (end < sequences.size() && (end == begin || rows + std::ssize(sequences[end]) <= group_rows)) {
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
            backend.linear(c, first, *weights_.pooler.weight, weights_.pooler.bias.view());
            backend.tanh(c);
        } else {
            backend.pool(c, x, batch, pooling_ == ChunkPooling::cls ? Pooling::cls : Pooling::mean);
        }
        if (normalize_) backend.l2_normalize(c);
        begin = end;
    }
}

}  // namespace refrag
