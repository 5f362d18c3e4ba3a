// See llama.h. The forward reads in the order of the paper (Touvron et al. 2023, section 2.2).
#include "models/llama.h"

#include <array>
#include <cmath>
#include <utility>

namespace refrag {
namespace {

// Steps whose longest sequences round up to the same multiple of this are the same work.
constexpr int32_t kStepEntries = 256;

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
    const LlamaConfig& c = config_;
    // A tied table is multiplied by as well.
    embedding_ = c.tied_embeddings ? weights.layer_matrix("embed_tokens.weight", c.vocab_size, c.dim)
                                   : weights.matrix("embed_tokens.weight", c.vocab_size, c.dim);
    layers_.reserve(static_cast<size_t>(c.n_layers));
    for (int32_t i = 0; i < c.n_layers; ++i) layers_.push_back(load_layer(weights, i));
    norm_ = weights.vector("norm.weight", c.dim);
    if (!c.tied_embeddings) head_ = weights.layer_matrix("lm_head.weight", c.vocab_size, c.dim);
    inv_freq_ = DeviceVector(device_, c.inverse_frequencies());
    // Older checkpoints carry the RoPE table; a tied head is sometimes written out as a copy of the
    // embedding.
    std::vector<std::string> known = {"*rotary_emb.inv_freq"};
    if (c.tied_embeddings) known.emplace_back("lm_head.weight");
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

Tensor Llama::forward(Backend& b, const BatchPlan& plan, const std::vector<int32_t>& source, Tensor slots,
                      KvCache& kv, Arena& arena) const {
    const LlamaConfig& c = config_;
    const int64_t rows = plan.n_rows();
    const AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim,
                               1.0f / std::sqrt(static_cast<float>(c.head_dim)), layers_[0].k->dtype()};
    const int64_t q_dim = static_cast<int64_t>(c.n_heads) * c.head_dim;
    const int64_t kv_dim = static_cast<int64_t>(c.n_kv_heads) * c.head_dim;

    const Tensor x = arena.tensor(rows, c.dim);  // the residual stream
    const Tensor h = arena.tensor(rows, c.dim);  // a block's normed input; the result at the end
    const ArenaScope scratch(arena);
    Batch batch = plan.upload(b, arena);
    const Tensor q = arena.tensor(rows, q_dim);
    const Tensor k = arena.tensor(rows, kv_dim);
    const Tensor v = arena.tensor(rows, kv_dim);
    const Tensor attn = arena.tensor(rows, q_dim);
    const Tensor y = arena.tensor(rows, c.dim);  // a block's output
    const Tensor gate = arena.tensor(rows, c.hidden_dim);
    const Tensor up = arena.tensor(rows, c.hidden_dim);
    const Tensor cos_sin = arena.tensor(rows, c.head_dim);
    const int32_t* const rows_of = upload_vector(b, arena, source);

    const auto enqueue = [&] {
        b.embed(x, *embedding_, rows_of, slots);
        b.rope_table(cos_sin, batch.position, inv_freq_.view());
        b.rms_norm(h, x, layers_[0].input_norm.view(), c.norm_eps);
        for (int32_t i = 0; i < c.n_layers; ++i) {
            const Layer& layer = layers_[static_cast<size_t>(i)];
            const std::array qkv = {Product{q, layer.q.get(), layer.q_bias.view()},
                                    Product{k, layer.k.get(), layer.k_bias.view()},
                                    Product{v, layer.v.get(), layer.v_bias.view()}};
            b.linears_rope_kv_append(kv.view(), i, h, qkv, cos_sin, batch);
            b.attention(attn, q, k, v, shape, &kv.view(), i, batch);
            b.linear_add(x, attn, {y, layer.o.get(), layer.o_bias.view()});
            b.rms_norm(h, x, layer.ffn_norm.view(), c.norm_eps);

            b.linear_silu_mul(h, {gate, layer.gate.get(), layer.gate_bias.view()},
                              {up, layer.up.get(), layer.up_bias.view()});
            b.linear_add(x, gate, {y, layer.down.get(), layer.down_bias.view()});
            const bool last = i + 1 == c.n_layers;
            const DeviceVector& next = last ? norm_ : layers_[static_cast<size_t>(i) + 1].input_norm;
            b.rms_norm(h, x, next.view(), c.norm_eps);
        }
    };
    if (plan.max_rows() > 1) {
        enqueue();
        return h;
    }
    // A decode step: the same work again and again, but for what lies in device memory.
    batch.max_entries = (batch.max_entries + kStepEntries - 1) / kStepEntries * kStepEntries;
    const KvView& view = kv.view();
    const auto at = [](const void* data) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data)); };
    const auto n = [](int64_t number) { return static_cast<uint64_t>(number); };
    const std::array key = {at(this),           at(view.pages),      at(view.length), at(view.page_table),
                            n(view.max_pages),  at(batch.row_begin), at(batch.start), at(batch.slot),
                            at(batch.position), n(batch.n_seq),      n(rows),         n(batch.max_entries),
                            at(rows_of),        at(slots.data),      n(slots.rows),   at(x.data),
                            at(h.data),         at(q.data),          at(k.data),      at(v.data),
                            at(attn.data),      at(y.data),          at(gate.data),   at(up.data),
                            at(cos_sin.data)};
    b.repeat(key, enqueue);
    return h;
}

Tensor Llama::logits(Backend& backend, Tensor hidden, Arena& arena) const {
    const Tensor out = arena.tensor(hidden.rows, config_.vocab_size);
    backend.linear(out, hidden, head_ ? *head_ : *embedding_, Tensor{});
    return out;
}

KvCache Llama::make_kv_cache(Backend& backend, int32_t n_slots, int64_t max_entries) const {
    return KvCache(backend, n_slots, config_.n_layers, config_.n_kv_heads, config_.head_dim, max_entries,
                   kv_dtype());
}

DType Llama::kv_dtype() const {
    return device_.kv_dtype(layers_[0].k->dtype(), config_.head_dim);
}

}  // namespace refrag
