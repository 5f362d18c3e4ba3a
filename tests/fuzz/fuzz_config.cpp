// Any bytes as config.json of the decoder and of the encoder and as refrag.json, and as the
// generation_config.json beside them. What is accepted lies in its documented range, so that nothing after it
// overflows or divides by zero.
#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "main.h"
#include "models/refrag_config.h"
#include "models/transformer_config.h"

namespace refrag_fuzz {
namespace {

bool in(int64_t value, int64_t min, int64_t max) {
    return value >= min && value <= max;
}

void check_llama(const refrag::DecoderConfig& c) {
    promise(in(c.dim, 1, 1 << 20) && in(c.hidden_dim, 1, 1 << 20) && in(c.n_layers, 1, 4096),
            "sizes are in range");
    promise(in(c.n_heads, 1, 4096) && in(c.n_kv_heads, 1, c.n_heads) && c.n_heads % c.n_kv_heads == 0,
            "heads share their keys evenly");
    promise(in(c.head_dim, 2, 65536) && c.head_dim % 2 == 0, "a head's dimension is even");
    promise(in(c.vocab_size, 1, 1 << 24) && in(c.max_seq_len, 1, 1 << 28),
            "vocabulary and window are in range");
    promise(c.norm_eps >= 0.0f && c.norm_eps <= 1.0f, "norm_eps is in range");
    promise(c.rope_theta >= 1.0 && c.rope_theta <= 1e12 && c.rope_linear_factor >= 1.0, "RoPE is in range");
    if (c.bos_id) promise(in(*c.bos_id, 0, c.vocab_size - 1), "BOS is a token");
    for (const int32_t id : c.eos_ids) promise(in(id, 0, c.vocab_size - 1), "an end token is a token");
    if (c.head_dim > 256) return;  // thirty thousand powers say no more than a hundred
    for (const float f : c.inverse_frequencies())
        promise(std::isfinite(f) && f >= 0.0f && f <= 1.0f, "a frequency is in [0, 1]");
}

void check_roberta(const refrag::RobertaConfig& c) {
    promise(in(c.dim, 1, 1 << 20) && in(c.hidden_dim, 1, 1 << 20) && in(c.n_layers, 1, 4096),
            "sizes are in range");
    promise(in(c.n_heads, 1, 4096) && c.dim % c.n_heads == 0, "heads divide the dimension");
    promise(in(c.vocab_size, 1, 1 << 24) && in(c.max_positions, 1, 1 << 24),
            "vocabulary and positions are in range");
    promise(in(c.type_vocab_size, 1, 1024), "types are in range");
    promise(c.norm_eps >= 0.0f && c.norm_eps <= 1.0f, "norm_eps is in range");
    for (const int32_t id : {c.bos_id, c.pad_id, c.eos_id})
        promise(in(id, 0, c.vocab_size - 1), "an id is a token");
    promise(c.max_seq_len() >= 1, "there is room for a token");
}

void check_refrag(const refrag::RefragConfig& c) {
    promise(in(c.chunk_len, 1, 4096), "k is in range");
    promise(std::find(c.chunk_lens.begin(), c.chunk_lens.end(), c.chunk_len) != c.chunk_lens.end(),
            "k is one of the trained lengths");
    for (const int32_t k : c.chunk_lens) promise(in(k, 1, 4096), "a trained length is in range");
    promise(c.expand_fraction >= 0.0 && c.expand_fraction <= 1.0, "p is in [0, 1]");
    const refrag::PolicyConfig& p = c.policy;
    promise(in(p.n_layers, 1, 1024) && in(p.n_heads, 1, 1024), "the policy's layers and heads are in range");
    promise(in(p.dim, 2, 1 << 20) && p.dim % 2 == 0 && p.dim % p.n_heads == 0,
            "the policy's dimension is even");
    promise(in(p.hidden_dim, 1, 1 << 20) && p.norm_eps >= 0.0f && p.norm_eps <= 1.0f,
            "the policy is in range");
}

}  // namespace

void fuzz_config(std::string_view input) {
    static const ScratchDir scratch;
    const size_t zero = input.find('\0');
    scratch.write("config.json", input.substr(0, zero));
    if (zero == std::string_view::npos) {
        scratch.remove("generation_config.json");
    } else {
        scratch.write("generation_config.json", input.substr(zero + 1));
    }
    refused([&] { check_llama(refrag::load_decoder_config(scratch.path())); });
    refused([&] { check_roberta(refrag::load_roberta_config(scratch.path())); });
    scratch.write("refrag.json", input.substr(0, zero));
    refused([&] { check_refrag(refrag::load_refrag_config(scratch.path())); });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_config)
