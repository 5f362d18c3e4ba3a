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
    : device_(device), config_(load_decoder_config(dir)) {
    WeightLoader weights(device, dir, "model.", loaded, format);
    load(weights);
}

Llama::Llama(Device& device, DecoderConfig config, WeightSource& weights, bool table_only)
    : device_(device), config_(std::move(config)) {
    if (table_only) {
        load_table(weights);
    } else {
        load(weights);
    }
}

void Llama::describe(LlamaWeights& w, const DecoderConfig& c, ParameterVisitor& visit) {
    const int64_t q_dim = int64_t{c.n_heads} * c.head_dim, kv_dim = int64_t{c.n_kv_heads} * c.head_dim;
    // A tied table is multiplied with as well.
    visit.matrix({"embed_tokens.weight", c.vocab_size, c.dim, c.tied_embeddings ? Use::some_rows : Use::table,
                  c.tied_embeddings},
                 w.embedding);
    for (size_t i = 0; i < w.layers.size(); ++i) {
        LlamaLayer& layer = w.layers[i];
        const std::string prefix = str("layers.", i, "."), attn = prefix + "self_attn.",
                          mlp = prefix + "mlp.";
        const bool before = c.norm_place == NormPlace::before, per_head = c.qk_norm == QkNorm::per_head;
        visit.vector(prefix + (before ? "input_layernorm" : "post_attention_layernorm") + ".weight", c.dim,
                     layer.attention_norm);
        visit.linear({attn + "q_proj", q_dim, c.dim}, layer.q, c.qkv_bias);
        visit.linear({attn + "k_proj", kv_dim, c.dim}, layer.k, c.qkv_bias);
        visit.linear({attn + "v_proj", kv_dim, c.dim}, layer.v, c.qkv_bias);
        if (c.qk_norm != QkNorm::none) {
            visit.vector(attn + "q_norm.weight", per_head ? c.head_dim : q_dim, layer.q_norm);
            visit.vector(attn + "k_norm.weight", per_head ? c.head_dim : kv_dim, layer.k_norm);
        }
        visit.linear({attn + "o_proj", c.dim, q_dim}, layer.o, c.o_bias);
        visit.vector(
            prefix + (before ? "post_attention_layernorm" : "post_feedforward_layernorm") + ".weight", c.dim,
            layer.ffn_norm);
        visit.linear({mlp + "gate_proj", c.hidden_dim, c.dim}, layer.gate, c.mlp_bias);
        visit.linear({mlp + "up_proj", c.hidden_dim, c.dim}, layer.up, c.mlp_bias);
        visit.linear({mlp + "down_proj", c.dim, c.hidden_dim}, layer.down, c.mlp_bias);
    }
    visit.vector("norm.weight", c.dim, w.norm);
    if (!c.tied_embeddings) visit.matrix({"lm_head.weight", c.vocab_size, c.dim, Use::some_rows}, w.head);
}

WeightCount Llama::count(const DecoderConfig& config) {
    LlamaWeights none;
    none.layers.resize(static_cast<size_t>(config.n_layers));
    CountParameters count;
    describe(none, config, count);
    return count.count();
}

void Llama::load(WeightSource& weights) {
    // transformers too uses a head of its own where the file has one, whatever the config says. A copy of the
    // embedding is no such head.
    if (config_.tied_embeddings && weights.has("lm_head.weight") &&
        !weights.equal("lm_head.weight", "embed_tokens.weight")) {
        config_.tied_embeddings = false;
        warnings_.emplace_back(
            "tie_word_embeddings is true, but lm_head.weight is not the embedding: it is used as the head");
    }
    const DecoderConfig& c = config_;
    weights_.layers.resize(static_cast<size_t>(c.n_layers));
    LoadParameters load(weights);
    describe(weights_, c, load);
    footprint_ = load.footprint();
    CountStepBytes step;
    describe(weights_, c, step);
    step_bytes_ = step.bytes();
    inv_freq_ = DeviceVector(device_, c.inverse_frequencies());
    // Older checkpoints carry the RoPE table, before linear scaling too.
    const auto is_table = [&](std::span<const double> values) {
        const std::vector<float> scaled = c.inverse_frequencies();
        DecoderConfig plain = c;
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
}

void Llama::load_table(WeightSource& weights) {
    LoadParameters load(weights);
    load.matrix({"embed_tokens.weight", config_.vocab_size, config_.dim, Use::table, false},
                weights_.embedding);
    footprint_ = load.footprint();
}

std::array<ActivationColumn<LlamaActivations>, 9> LlamaActivations::columns(const DecoderConfig& c) {
    using A = LlamaActivations;
    const int64_t q_dim = int64_t{c.n_heads} * c.head_dim, kv_dim = int64_t{c.n_kv_heads} * c.head_dim;
    return {{{&A::x, c.dim},
             {&A::q, q_dim},
             {&A::k, kv_dim},
             {&A::v, kv_dim},
             {&A::attn, q_dim},
             {&A::y, c.dim},
             {&A::gate, c.hidden_dim},
             {&A::up, c.hidden_dim},
             {&A::cos_sin, c.head_dim}}};
}

LlamaActivations::LlamaActivations(Arena& arena, const DecoderConfig& config, int64_t rows) {
    allocate(columns(config), *this, arena, rows);
}

int64_t Llama::activation_floats(const DecoderConfig& config) {
    return floats_per_row(LlamaActivations::columns(config));
}

LlamaActivations LlamaActivations::first(int64_t n) const {
    LlamaActivations a = *this;
    for (Tensor* t : {&a.x, &a.q, &a.k, &a.v, &a.attn, &a.y, &a.gate, &a.up, &a.cos_sin}) {
        *t = t->row_slice(0, n);
    }
    return a;
}

void Llama::attention_input(Backend& b, const LlamaActivations& a, int32_t index, Tensor x, const KvView& kv,
                            const Batch& batch) const {
    const DecoderConfig& c = config_;
    const LlamaLayer& layer = weights_.layers[static_cast<size_t>(index)];
    const std::array qkv = {layer.q.into(a.q), layer.k.into(a.k), layer.v.into(a.v)};
    const bool rotates = c.layer_rotates(index);
    if (c.qk_norm == QkNorm::none && rotates)
        return b.linears_rope_kv_append(kv, index, x, qkv, a.cos_sin, batch);
    b.linears(x, qkv);
    const auto norm = [&](Tensor heads, const DeviceVector& weight) {
        if (c.qk_norm == QkNorm::per_head)
            heads = {heads.data, heads.dtype, heads.size() / c.head_dim, int64_t{c.head_dim}};
        b.rms_norm(heads, heads, weight.view(), c.norm_eps);
    };
    if (c.qk_norm != QkNorm::none) {
        norm(a.q, layer.q_norm);
        norm(a.k, layer.k_norm);
    }
    if (rotates) {
        b.rope_kv_append(kv, index, a.q, a.k, a.v, a.cos_sin, batch);
    } else {
        b.kv_append(kv, index, a.k, a.v, batch);
    }
}

void Llama::run(Backend& b, const LlamaActivations& a, Tensor h, const int32_t* source, Tensor chunk_rows,
                const KvView& kv, const Batch& batch, const AttentionTap& tap) const {
    const DecoderConfig& c = config_;
    const std::vector<LlamaLayer>& layers = weights_.layers;
    AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim, c.attention_scale(),
                         layers[0].k.weight->dtype()};
    const bool before = c.norm_place == NormPlace::before;
    const auto norm_into_h = [&](const DeviceVector& norm) { b.rms_norm(h, a.x, norm.view(), c.norm_eps); };
    // A block's last product, into the residual stream.
    const auto add_block = [&](Tensor from, const Product& last, const DeviceVector& norm) {
        if (before) return b.linear_add(a.x, from, last);
        b.linear(last.out, from, *last.w, last.bias);
        b.rms_norm(last.out, last.out, norm.view(), c.norm_eps);
        b.add(a.x, last.out);
    };
    b.embed(a.x, *weights_.embedding, source, chunk_rows);
    b.rope_table(a.cos_sin, batch.position, inv_freq_.view());
    for (size_t i = 0; i < layers.size(); ++i) {
        const LlamaLayer& layer = layers[i];
        const auto index = static_cast<int32_t>(i);
        if (before) norm_into_h(layer.attention_norm);
        attention_input(b, a, index, before ? h : a.x, kv, batch);
        if (tap) tap(index, a.q, a.k);
        shape.window = c.window(index);
        b.attention(a.attn, a.q, a.k, a.v, shape, &kv, index, batch);
        add_block(a.attn, layer.o.into(a.y), layer.attention_norm);

        if (before) norm_into_h(layer.ffn_norm);
        b.linear_silu_mul(before ? h : a.x, layer.gate.into(a.gate), layer.up.into(a.up));
        add_block(a.gate, layer.down.into(a.y), layer.ffn_norm);
    }
    norm_into_h(weights_.norm);
}

Tensor Llama::embed(Backend& backend, const std::vector<int32_t>& source, Tensor chunk_rows,
                    Arena& arena) const {
    const Tensor out = arena.tensor(std::ssize(source), config_.dim);
    backend.embed(out, *weights_.embedding, upload_vector(backend, arena, source), chunk_rows);
    return out;
}

Tensor Llama::forward(Backend& backend, const BatchPlan& plan, const std::vector<int32_t>& source,
                      Tensor chunk_rows, KvCache& kv, Arena& arena, const AttentionTap& tap) const {
    const Tensor h = arena.tensor(plan.n_rows(), config_.dim);
    const ArenaScope scratch(arena);
    const Batch batch = plan.upload(backend, arena);
    const LlamaActivations activations(arena, config_, plan.n_rows());
    run(backend, activations, h, upload_vector(backend, arena, source), chunk_rows, kv.view(), batch, tap);
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
    backend.linear(logits, hidden, weights_.head ? *weights_.head : *weights_.embedding, Tensor{});
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
    return device_.kv_dtype(weights_.layers[0].k.weight->dtype(), config_.head_dim);
}

}  // namespace refrag
