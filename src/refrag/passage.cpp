// See passage.h.
#include "refrag/passage.h"

#include <algorithm>
#include <bit>
#include <set>
#include <utility>

#include "refrag/passage_record.h"

namespace refrag {
namespace {

static_assert(std::endian::native == std::endian::little, "names hash ids as they lie in memory");

void add_ids(Sha256& hash, const std::vector<int32_t>& ids) {
    hash.add_field({reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(int32_t)});
}

}  // namespace

Sha256Digest passage_key(const Sha256Digest& maker, const Sha256Digest& content, std::string_view tenant) {
    return Sha256().add(maker.view()).add(content.view()).add(tenant).digest();
}

CutPassage::CutPassage(const Model& model, std::string text, int32_t chunk_len)
    : text_(std::move(text)), chunk_len_(chunk_len), content_(sha256(text_)) {
    const std::vector<Token> tokens = model.tokenizer().encode(text_);
    chunks_ = cut_chunks(text_, tokens, chunk_len, model.encoder_vocabulary());
    n_tokens_ = tokens.size();
}

CutPassage::CutPassage(const Model& model, std::string_view text, std::span<const Token> tokens,
                       int32_t chunk_len)
    : chunk_len_(chunk_len),
      chunks_(cut_chunks(text, tokens, chunk_len, model.encoder_vocabulary())),
      n_tokens_(tokens.size()) {
    const size_t begin = tokens.empty() ? 0 : tokens.front().begin;
    if (!tokens.empty()) text_ = text.substr(begin, tokens.back().end - begin);
    Sha256 hash;
    hash.add_field("window").add_field(text_);
    for (Chunk& chunk : chunks_) {
        chunk.begin -= begin;
        chunk.end -= begin;
        add_ids(hash, chunk.ids);
        add_ids(hash, chunk.encoder_ids);
    }
    content_ = hash.digest();
}

CutPassage::CutPassage(std::string text, int32_t chunk_len, std::vector<Chunk> chunks)
    : text_(std::move(text)), chunk_len_(chunk_len), chunks_(std::move(chunks)), content_(sha256(text_)) {
    for (const Chunk& chunk : chunks_) n_tokens_ += chunk.ids.size();
}

uint64_t CutPassage::host_bytes() const {
    uint64_t n_ids = 0;
    for (const Chunk& chunk : chunks_) n_ids += chunk.ids.size() + chunk.encoder_ids.size();
    return sizeof(CutPassage) + text_.size() + chunks_.size() * sizeof(Chunk) + n_ids * sizeof(int32_t);
}

EncodedPassage::EncodedPassage(std::shared_ptr<const CutPassage> cut, const Sha256Digest& key, Buffer memory,
                               int32_t d_enc)
    : cut_(std::move(cut)), key_(key), memory_(std::move(memory)), d_enc_(d_enc) {
    REFRAG_DCHECK(memory_.bytes() == chunk_emb().bytes());
}

EncodedPassage::EncodedPassage(const Model& model, std::shared_ptr<const CutPassage> cut,
                               const Sha256Digest& key, std::span<const float> chunk_emb)
    : cut_(std::move(cut)),
      key_(key),
      memory_(model.device(), chunk_emb.size() * sizeof(float)),
      d_enc_(model.d_enc()) {
    const size_t expected = cut_->chunks().size() * static_cast<size_t>(d_enc_);
    REFRAG_CHECK(chunk_emb.size() == expected, Status::usage, "chunk embeddings: expected ", expected,
                 " values, found ", chunk_emb.size());
    if (expected > 0) model.device().upload(memory_.data(), chunk_emb.data(), memory_.bytes());
}

Tensor EncodedPassage::chunk_emb() const {
    return {memory_.data(), DType::f32, std::ssize(cut_->chunks()), d_enc_};
}

std::vector<float> EncodedPassage::download(Backend& backend) const {
    const Tensor c = chunk_emb();
    std::vector<float> values(static_cast<size_t>(c.size()));
    if (!values.empty()) backend.download(values.data(), c.data, c.bytes());
    return values;
}

SharedPassage::SharedPassage(const Model& model, std::string text, int32_t chunk_len, std::string_view tenant,
                             std::shared_ptr<PassageKeeper> keeper)
    : key_(passage_key(model.passage_maker(chunk_len == 0 ? model.config().chunk_len : chunk_len,
                                           keeper ? keeper->form() : EmbeddingForm::f32),
                       sha256(text), tenant)),
      chunk_len_(chunk_len == 0 ? model.config().chunk_len : chunk_len),
      keeper_(std::move(keeper)),
      text_(std::move(text)),
      bytes_(sizeof(SharedPassage) + text_.size()) {}

SharedPassage::SharedPassage(const Model& model, std::shared_ptr<const CutPassage> cut)
    : key_(passage_key(model.passage_maker(cut->chunk_len()), cut->content())),
      chunk_len_(cut->chunk_len()),
      cut_(std::move(cut)),
      bytes_(sizeof(SharedPassage) + cut_->host_bytes()) {}

SharedPassage::SharedPassage(std::shared_ptr<const EncodedPassage> encoded)
    : key_(encoded->key()),
      chunk_len_(encoded->cut()->chunk_len()),
      cut_(encoded->cut()),
      encoded_(std::move(encoded)),
      bytes_(sizeof(SharedPassage) + cut_->host_bytes() + encoded_->chunk_emb().bytes()) {}

std::shared_ptr<const CutPassage> SharedPassage::cut(const Model& model) {
    const std::lock_guard lock(mutex_);
    if (!cut_) {
        cut_ = std::make_shared<const CutPassage>(model, text_, chunk_len_);
        hold(cut_->host_bytes() - text_.size());
        std::string().swap(text_);
    }
    return cut_;
}

std::shared_ptr<const EncodedPassage> SharedPassage::encoded() const {
    const std::lock_guard lock(mutex_);
    return encoded_;
}

void SharedPassage::hold(uint64_t bytes) {
    const std::lock_guard lock(count_mutex_);
    bytes_ += bytes;
    if (counter_) *counter_ += bytes;
}

void SharedPassage::count_in(std::shared_ptr<PassageBytes> counter) {
    const std::lock_guard lock(count_mutex_);
    counter_ = std::move(counter);
    *counter_ += bytes_;
}

void SharedPassage::count_out() noexcept {
    const std::lock_guard lock(count_mutex_);
    *counter_ -= bytes_;
    counter_.reset();
}

void SharedPassage::finish_encoding(Backend& backend, const Model& model) {
    const size_t n = cut_->chunks().size() * static_cast<size_t>(model.d_enc());
    std::string record;
    if (keeper_ && n > 0) {
        std::vector<float> values(n);
        backend.download(values.data(), memory_.data(), n * sizeof(float));
        round_embeddings(keeper_->form(), values, model.d_enc());
        model.device().upload(memory_.data(), values.data(), n * sizeof(float));
        if (keeper_->takes_records())
            record = passage_record(*cut_, key_, keeper_->form(), values, model.d_enc());
    }
    encoded_ = std::make_shared<const EncodedPassage>(cut_, key_, std::move(memory_), model.d_enc());
    if (!record.empty()) keeper_->keep(key_, std::move(record));
}

int64_t encode_passages(Backend& backend, const Model& model,
                        std::span<const std::shared_ptr<SharedPassage>> passages, int64_t budget_rows,
                        Arena& arena) {
    std::vector<SharedPassage*> order;  // as given, each once
    std::set<SharedPassage*> set;
    for (const auto& passage : passages) {
        passage->cut(model);
        if (!passage->encoded() && set.insert(passage.get()).second) order.push_back(passage.get());
    }
    // Locked in the order of their addresses, whatever their order here, so that two threads cannot wait for
    // each other.
    std::vector<std::unique_lock<std::mutex>> locks;
    locks.reserve(set.size());
    for (SharedPassage* passage : set) locks.emplace_back(passage->mutex_);

    struct Part {
        SharedPassage* passage;
        int64_t first;
        int64_t n;
    };
    std::vector<Part> parts;
    std::vector<std::vector<int32_t>> sequences;
    const size_t d_bytes = static_cast<size_t>(model.d_enc()) * sizeof(float);
    int64_t rows = 0;
    for (SharedPassage* passage : order) {
        if (passage->encoded_ || (rows > 0 && rows >= budget_rows)) continue;
        const std::vector<Chunk>& chunks = passage->cut_->chunks();
        if (passage->n_encoded_ == 0 && !chunks.empty() && passage->memory_.bytes() == 0) {
            passage->memory_ = Buffer(model.device(), chunks.size() * d_bytes);
            passage->hold(passage->memory_.bytes());
        }
        Part part{passage, static_cast<int64_t>(passage->n_encoded_), 0};
        for (size_t c = passage->n_encoded_; c < chunks.size() && (rows == 0 || rows < budget_rows); ++c) {
            sequences.push_back(chunks[c].encoder_ids);
            rows += std::ssize(chunks[c].encoder_ids);
            ++part.n;
        }
        parts.push_back(part);
    }
    if (parts.empty()) return 0;

    const ArenaScope scratch(arena);
    const auto rows_of = [&](const Part& part) {
        const Tensor all{part.passage->memory_.data(), DType::f32, std::ssize(part.passage->cut_->chunks()),
                         model.d_enc()};
        return all.row_slice(part.first, part.n);
    };
    if (sequences.empty()) {
        // A passage without a chunk, or one whose last step failed.
    } else if (parts.size() == 1) {
        model.encoder().encode(backend, sequences, rows_of(parts[0]), arena);
    } else {
        const Tensor together = arena.tensor(std::ssize(sequences), model.d_enc());
        model.encoder().encode(backend, sequences, together, arena);
        int64_t begin = 0;
        for (const Part& part : parts) {
            if (part.n > 0) backend.copy(rows_of(part), together.row_slice(begin, part.n));
            begin += part.n;
        }
    }
    // Other queues may read what they find encoded.
    backend.wait();
    for (const Part& part : parts) {
        SharedPassage& passage = *part.passage;
        passage.n_encoded_ += static_cast<size_t>(part.n);
        if (passage.n_encoded_ < passage.cut_->chunks().size()) continue;
        passage.finish_encoding(backend, model);
    }
    return rows;
}

void encode_passages(Backend& backend, const Model& model,
                     std::span<const std::shared_ptr<SharedPassage>> passages, Arena& arena) {
    const auto left = [](const std::shared_ptr<SharedPassage>& passage) { return !passage->encoded(); };
    while (std::any_of(passages.begin(), passages.end(), left))
        encode_passages(backend, model, passages, INT64_MAX, arena);
}

}  // namespace refrag
