// See context.h.
#include "refrag/context.h"

#include <algorithm>
#include <utility>

namespace refrag {

void ContextPassage::tokenize(const Model& model, int32_t chunk_len) {
    if (chunk_len_ == chunk_len) return;
    const std::string content = passage_.content();
    const std::vector<Token> tokens = model.tokenizer().encode(content);
    // Everything that can fail first, so that an error leaves the passage as it was.
    std::vector<Chunk> chunks = cut_chunks(content, tokens, chunk_len, model.encoder_vocabulary());
    const auto d_enc = static_cast<size_t>(model.d_enc());
    std::vector<float> embeddings(chunks.size() * d_enc, 0.0f);
    std::vector<bool> encoded(chunks.size(), false);
    chunks_ = std::move(chunks);
    embeddings_ = std::move(embeddings);
    encoded_ = std::move(encoded);
    n_tokens_ = tokens.size();
    d_enc_ = d_enc;
    chunk_len_ = chunk_len;
}

std::span<const float> ContextPassage::embedding(size_t chunk) const {
    REFRAG_DCHECK(encoded_[chunk]);
    return std::span(embeddings_).subspan(chunk * d_enc_, d_enc_);
}

void ContextPassage::set_embedding(size_t chunk, std::span<const float> values) {
    std::copy(values.begin(), values.end(),
              embeddings_.begin() + static_cast<std::ptrdiff_t>(chunk * d_enc_));
    encoded_[chunk] = true;
}

std::shared_ptr<ContextPassage> PassagePool::share(Passage passage) {
    const std::string content = passage.content();
    auto& same_hash = by_hash_[std::hash<std::string>{}(content)];
    for (const auto& known : same_hash) {
        if (known->passage().content() == content) return known;
    }
    same_hash.push_back(std::make_shared<ContextPassage>(std::move(passage)));
    ++size_;
    return same_hash.back();
}

size_t encode_chunks(Backend& backend, const Model& model, PassageRefs passages,
                     const std::vector<bool>& wanted, Arena& arena) {
    std::vector<std::vector<int32_t>> sequences;
    std::vector<std::pair<size_t, size_t>> places;  // (passage, chunk) of each sequence
    size_t index = 0;
    for (size_t p = 0; p < passages.size(); ++p) {
        const std::vector<Chunk>& chunks = passages[p]->chunks();
        for (size_t c = 0; c < chunks.size(); ++c, ++index) {
            if (passages[p]->has_embedding(c) || !(wanted.empty() || wanted[index])) continue;
            sequences.push_back(chunks[c].encoder_ids);
            places.emplace_back(p, c);
        }
    }
    if (sequences.empty()) return 0;
    const ArenaScope scratch(arena);
    const Tensor device = arena.tensor(std::ssize(sequences), model.d_enc());
    model.encoder().encode(backend, sequences, device, arena);
    std::vector<float> host(static_cast<size_t>(device.size()));
    backend.download(host.data(), device.data, device.bytes());
    const auto d_enc = static_cast<size_t>(model.d_enc());
    for (size_t i = 0; i < places.size(); ++i) {
        passages[places[i].first]->set_embedding(places[i].second, std::span(host).subspan(i * d_enc, d_enc));
    }
    return sequences.size();
}

size_t encode_chunks(Backend& backend, const Model& model, std::span<ContextPassage> passages,
                     const std::vector<bool>& wanted, Arena& arena) {
    std::vector<ContextPassage*> refs;
    for (ContextPassage& passage : passages) refs.push_back(&passage);
    return encode_chunks(backend, model, refs, wanted, arena);
}

}  // namespace refrag
