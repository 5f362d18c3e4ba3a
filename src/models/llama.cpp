// See llama.h. The forward reads in the order of the paper (Touvron et al. 2023, section 2.2).
#include "models/llama.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace refrag {
namespace {

// Steps whose longest sequences round up to the same multiple of this are the same work.
constexpr int32_t kStepEntries = 256;

// Equal but for what is lost in BF16 (8 bits, cut off or rounded) or in F16, subnormal ones included.
bool near(std::span<const double> values, std::span<const float> expected) {
    const auto close = [](double value, float wanted) {
        return std::abs(value - static_cast<double>(wanted)) <= static_cast<double>(wanted) / 128.0 + 6e-8;
    };
    return std::equal(values.begin(), values.end(), expected.begin(), expected.end(), close);
}

}  // namespace

Llama::Llama(Device& device, const std::string& dir, const LoadedBytes& loaded, WeightFormat format)
    : device_(device), config_(load_llama_config(dir)) {
    WeightLoader weights(device, dir, "model.", loaded, format);
    load(weights);
}

Llama::Llama(Device& device, LlamaConfig config, WeightSource& weights)
    : device_(device), config_(std::move(config)) {
    load(weights);
}

void Llama::load(WeightSource& weights) {
    const uint64_t given_before = weights.parameters(), held_before = weights.held_bytes();
    // transformers too uses a head of its own where the file has one, whatever the config says. A copy of the
    // embedding is no such head.
    if (config_.tied_embeddings && weights.has("lm_head.weight") &&
        !weights.equal("lm_head.weight", "embed_tokens.weight")) {
        config_.tied_embeddings = false;
        warnings_.emplace_back(
            "tie_word_embeddings is true, but lm_head.weight is not the embedding: it is used as the head");
    }
    const LlamaConfig& c = config_;
    // A tied table is multiplied by as well.
    embedding_ = c.tied_embeddings ? weights.layer_matrix("embed_tokens.weight", c.vocab_size, c.dim)
                                   : weights.matrix("embed_tokens.weight", c.vocab_size, c.dim);
    layers_.reserve(static_cast<size_t>(c.n_layers));
    for (int32_t i = 0; i < c.n_layers; ++i) layers_.push_back(load_layer(weights, i));
    norm_ = weights.vector("norm.weight", c.dim);
    if (!c.tied_embeddings) head_ = weights.layer_matrix("lm_head.weight", c.vocab_size, c.dim);
    inv_freq_ = DeviceVector(device_, c.inverse_frequencies());
    // Older checkpoints carry the RoPE table, before linear scaling too.
    const auto is_table = [&](std::span<const double> values) {
        const std::vector<float> scaled = c.inverse_frequencies();
        LlamaConfig plain = c;
        plain.rope_linear_factor = 1.0;
        return near(values, scaled) || near(values, plain.inverse_frequencies());
    };
    std::vector<KnownUnused> known = {
        {"*rotary_emb.inv_freq", is_table, "the frequencies that config.json gives"}};
    if (c.tied_embeddings) {
        known.push_back({"lm_head.weight"});
        known.push_back({"lm_head.weight_scale"});
    }
    unused_ = weights.finish(known);
    parameters_ = weights.parameters() - given_before;
    weight_bytes_ = weights.held_bytes() - held_before;
}

Llama::Layer Llama::load_layer(WeightSource& weights, int32_t index) const {
    const LlamaConfig& c = config_;
    const std::string prefix = str("layers.", index, ".");
    const std::string attn = prefix + "self_attn.";
    const std::string mlp = prefix + "mlp.";
    const int64_t q_dim = static_cast<int64_t>(c.n_heads) * c.head_dim;
    const int64_t kv_dim = static_cast<int64_t>(c.n_kv_heads) * c.head_dim;
    Layer layer;
    layer.input_norm = weights.vector(prefix + "input_layernorm.weight", c.dim);
    layer.q = weights.layer_matrix(attn + "q_proj.weight", q_dim, c.dim);
    layer.k = weights.layer_matrix(attn + "k_proj.weight", kv_dim, c.dim);
    layer.v = weights.layer_matrix(attn + "v_proj.weight", kv_dim, c.dim);
    layer.o = weights.layer_matrix(attn + "o_proj.weight", c.dim, q_dim);
    layer.ffn_norm = weights.vector(prefix + "post_attention_layernorm.weight", c.dim);
    layer.gate = weights.layer_matrix(mlp + "gate_proj.weight", c.hidden_dim, c.dim);
    layer.up = weights.layer_matrix(mlp + "up_proj.weight", c.hidden_dim, c.dim);
    layer.down = weights.layer_matrix(mlp + "down_proj.weight", c.dim, c.hidden_dim);
    if (c.attention_bias) {
        layer.q_bias = weights.vector(attn + "q_proj.bias", q_dim);
        layer.k_bias = weights.vector(attn + "k_proj.bias", kv_dim);
        layer.v_bias = weights.vector(attn + "v_proj.bias", kv_dim);
        layer.o_bias = weights.vector(attn + "o_proj.bias", c.dim);
    }
    if (c.mlp_bias) {
        layer.gate_bias = weights.vector(mlp + "gate_proj.bias", c.hidden_dim);
        layer.up_bias = weights.vector(mlp + "up_proj.bias", c.hidden_dim);
        layer.down_bias = weights.vector(mlp + "down_proj.bias", c.dim);
    }
    return layer;
}

uint64_t Llama::step_bytes() const {
    uint64_t sum = head_ ? head_->device_bytes() : embedding_->device_bytes();
    for (const Layer& layer : layers_) {
        for (const auto* matrix :
             {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
            sum += (*matrix)->device_bytes();
        }
    }
    return sum;
}

LlamaActivations::LlamaActivations(Arena& arena, const LlamaConfig& c, int64_t rows) {
    const int64_t q_dim = static_cast<int64_t>(c.n_heads) * c.head_dim;
    const int64_t kv_dim = static_cast<int64_t>(c.n_kv_heads) * c.head_dim;
    x = arena.tensor(rows, c.dim);
    q = arena.tensor(rows, q_dim);
    k = arena.tensor(rows, kv_dim);
    v = arena.tensor(rows, kv_dim);
    attn = arena.tensor(rows, q_dim);
    y = arena.tensor(rows, c.dim);
    gate = arena.tensor(rows, c.hidden_dim);
    up = arena.tensor(rows, c.hidden_dim);
    cos_sin = arena.tensor(rows, c.head_dim);
}

LlamaActivations LlamaActivations::first(int64_t n) const {
    LlamaActivations a = *this;
    for (Tensor* t : {&a.x, &a.q, &a.k, &a.v, &a.attn, &a.y, &a.gate, &a.up, &a.cos_sin}) {
        *t = t->row_slice(0, n);
    }
    return a;
}

void Llama::run(Backend& b, const LlamaActivations& a, Tensor h, const int32_t* source, Tensor slots,
                const KvView& kv, const Batch& batch) const {
    const LlamaConfig& c = config_;
    const AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim,
                               1.0f / std::sqrt(static_cast<float>(c.head_dim)), layers_[0].k->dtype()};
    b.embed(a.x, *embedding_, source, slots);
    b.rope_table(a.cos_sin, batch.position, inv_freq_.view());
    b.rms_norm(h, a.x, layers_[0].input_norm.view(), c.norm_eps);
    for (int32_t i = 0; i < c.n_layers; ++i) {
        const Layer& layer = layers_[static_cast<size_t>(i)];
        const std::array qkv = {Product{a.q, layer.q.get(), layer.q_bias.view()},
                                Product{a.k, layer.k.get(), layer.k_bias.view()},
                                Product{a.v, layer.v.get(), layer.v_bias.view()}};
        b.linears_rope_kv_append(kv, i, h, qkv, a.cos_sin, batch);
        b.attention(a.attn, a.q, a.k, a.v, shape, &kv, i, batch);
        b.linear_add(a.x, a.attn, {a.y, layer.o.get(), layer.o_bias.view()});
        b.rms_norm(h, a.x, layer.ffn_norm.view(), c.norm_eps);

        b.linear_silu_mul(h, {a.gate, layer.gate.get(), layer.gate_bias.view()},
                          {a.up, layer.up.get(), layer.up_bias.view()});
        b.linear_add(a.x, a.gate, {a.y, layer.down.get(), layer.down_bias.view()});
        const bool last = i + 1 == c.n_layers;
        const DeviceVector& next = last ? norm_ : layers_[static_cast<size_t>(i) + 1].input_norm;
        b.rms_norm(h, a.x, next.view(), c.norm_eps);
    }
}

Tensor Llama::forward(Backend& backend, const BatchPlan& plan, const std::vector<int32_t>& source,
                      Tensor slots, KvCache& kv, Arena& arena) const {
    const Tensor h = arena.tensor(plan.n_rows(), config_.dim);
    const ArenaScope scratch(arena);
    const Batch batch = plan.upload(backend, arena);
    const LlamaActivations activations(arena, config_, plan.n_rows());
    run(backend, activations, h, upload_vector(backend, arena, source), slots, kv.view(), batch);
    return h;
}

DecodeWorkspace::DecodeWorkspace(const Llama& llama, Backend& backend, int32_t n_sequences)
    : llama_(&llama),
      memory_(backend),
      activations_(memory_, llama.config(), n_sequences),
      h_(memory_.tensor(n_sequences, llama.config().dim)),
      logits_(memory_.tensor(n_sequences, llama.config().vocab_size)),
      batch_(memory_, n_sequences, n_sequences),
      tokens_(static_cast<int32_t*>(memory_.tensor(1, n_sequences, DType::i32).data)),
      recording_(backend.make_recording()) {}

Tensor Llama::decode(Backend& backend, DecodeWorkspace& workspace, const BatchPlan& plan,
                     const std::vector<int32_t>& tokens, KvCache& kv) const {
    DecodeWorkspace& w = workspace;
    const int64_t rows = plan.n_rows();
    REFRAG_DCHECK(w.llama_ == this && plan.max_rows() == 1 && plan.n_seq() == rows);
    REFRAG_DCHECK(rows <= w.n_sequences() && std::ssize(tokens) == rows);
    if (!(w.kv_ == kv.view())) {
        w.recording_->forget();
        w.kv_ = kv.view();
    }
    Batch batch = plan.upload(backend, w.batch_);
    upload_vector(backend, w.tokens_, tokens);
    // Launch sizes alone depend on it, so that a step is the same work until it has grown by as much.
    batch.max_entries = (batch.max_entries + kStepEntries - 1) / kStepEntries * kStepEntries;
    const Tensor h = w.h_.row_slice(0, rows), logits = w.logits_.row_slice(0, rows);
    const uint64_t key = static_cast<uint64_t>(rows) << 32 | static_cast<uint32_t>(batch.max_entries);
    backend.replay(*w.recording_, key, [&] {
        run(backend, w.activations_.first(rows), h, w.tokens_, Tensor{}, w.kv_, batch);
        head(backend, logits, h);
    });
    return logits;
}

void Llama::head(Backend& backend, Tensor logits, Tensor hidden) const {
    backend.linear(logits, hidden, head_ ? *head_ : *embedding_, Tensor{});
}

Tensor Llama::logits(Backend& backend, Tensor hidden, Arena& arena) const {
    const Tensor out = arena.tensor(hidden.rows, config_.vocab_size);
    head(backend, out, hidden);
    return out;
}

KvCache Llama::make_kv_cache(Backend& backend, int32_t n_slots, int64_t max_entries, int64_t n_blocks) const {
    return KvCache(backend, n_slots, config_.n_layers, config_.n_kv_heads, config_.head_dim, max_entries,
                   kv_dtype(), n_blocks);
}

DType Llama::kv_dtype() const {
    return device_.kv_dtype(layers_[0].k->dtype(), config_.head_dim);
}

}  // namespace refrag
