// See passage_cache.h.
#include "refrag/passage_cache.h"

#include <optional>
#include <utility>

#include "refrag/passage_record.h"

namespace refrag {
namespace {

std::shared_ptr<const EncodedPassage> encoded_passage(const Model& model, const Sha256Digest& key,
                                                      std::string text, std::string_view record) {
    PassageRecord kept = read_passage_record(record, key, std::move(text), model.tokenizer().vocab_size());
    REFRAG_CHECK(kept.d_enc == model.d_enc(), Status::bad_input, "expected embeddings of ", model.d_enc(),
                 " values, found ", kept.d_enc);
    return std::make_shared<const EncodedPassage>(model, std::move(kept.cut), key, kept.chunk_emb);
}

}  // namespace

PassageCache::~PassageCache() {
    for (const auto& passage : passages_) passage->count_out();
}

std::shared_ptr<SharedPassage> PassageCache::share(const Model& model, std::string text, int32_t chunk_len,
                                                   std::string_view tenant) {
    // Without an encoder there is nothing that a keeper could spare.
    const auto& keeper = model.has_encoder() ? keeper_ : nullptr;
    auto passage = std::make_shared<SharedPassage>(model, text, chunk_len, tenant, keeper);
    if (auto here = find(passage->key())) return here;
    if (keeper) {
        if (const std::optional<std::string> record = keeper->find(passage->key()))
            passage = from_keeper(model, std::move(passage), std::move(text), *record);
    }
    return keep(std::move(passage));
}

std::vector<std::shared_ptr<SharedPassage>> PassageCache::share_all(const Model& model,
                                                                    std::vector<std::string> texts,
                                                                    int32_t chunk_len) {
    const auto& keeper = model.has_encoder() ? keeper_ : nullptr;
    std::vector<std::shared_ptr<SharedPassage>> shared;
    std::vector<size_t> missing;
    std::vector<Sha256Digest> keys;
    for (size_t i = 0; i < texts.size(); ++i) {
        auto passage =
            std::make_shared<SharedPassage>(model, texts[i], chunk_len, std::string_view(), keeper);
        auto here = find(passage->key());
        if (!here) {
            missing.push_back(i);
            keys.push_back(passage->key());
        }
        shared.push_back(here ? std::move(here) : std::move(passage));
    }
    std::vector<std::optional<std::string>> records(missing.size());
    if (keeper && !keys.empty()) records = keeper->find_all(keys);
    for (size_t m = 0; m < missing.size(); ++m) {
        std::shared_ptr<SharedPassage>& passage = shared[missing[m]];
        if (records[m])
            passage = from_keeper(model, std::move(passage), std::move(texts[missing[m]]), *records[m]);
        passage = keep(std::move(passage));
    }
    return shared;
}

// The passage encoded, as the keeper's record has it; unchanged where the record is no good.
std::shared_ptr<SharedPassage> PassageCache::from_keeper(const Model& model,
                                                         std::shared_ptr<SharedPassage> passage,
                                                         std::string text, std::string_view record) {
    try {
        return std::make_shared<SharedPassage>(
            encoded_passage(model, passage->key(), std::move(text), record));
    } catch (const Error& error) {
        if (error.status() != Status::bad_input) throw;
        keeper_->forget(passage->key());
    }
    return passage;
}

std::shared_ptr<SharedPassage> PassageCache::share(const Model& model, std::string text, int32_t chunk_len,
                                                   EmbeddingForm form, std::string_view record) {
    const int32_t k = chunk_len == 0 ? model.config().chunk_len : chunk_len;
    const Sha256Digest key = passage_key(model.passage_maker(k, form), sha256(text));
    if (auto here = find(key)) return here;
    if (!model.has_encoder()) {
        PassageRecord kept =
            read_passage_record(record, key, std::move(text), model.tokenizer().vocab_size());
        return keep(std::make_shared<SharedPassage>(model, std::move(kept.cut)));
    }
    return keep(std::make_shared<SharedPassage>(encoded_passage(model, key, std::move(text), record)));
}

std::shared_ptr<SharedPassage> PassageCache::share(const Model& model,
                                                   std::shared_ptr<const CutPassage> cut) {
    return keep(std::make_shared<SharedPassage>(model, std::move(cut)));
}

std::shared_ptr<SharedPassage> PassageCache::find(const Sha256Digest& key) {
    const std::lock_guard lock(mutex_);
    const auto found = places_.find(key);
    if (found == places_.end()) return nullptr;
    passages_.splice(passages_.begin(), passages_, found->second);
    return passages_.front();
}

std::shared_ptr<SharedPassage> PassageCache::keep(std::shared_ptr<SharedPassage> passage) {
    const std::lock_guard lock(mutex_);
    const auto found = places_.find(passage->key());
    if (found != places_.end()) {
        passages_.splice(passages_.begin(), passages_, found->second);
        return passages_.front();
    }
    while (!passages_.empty() && *bytes_ > max_bytes_) {
        passages_.back()->count_out();
        places_.erase(passages_.back()->key());
        passages_.pop_back();
    }
    passages_.push_front(passage);
    try {
        places_.emplace(passage->key(), passages_.begin());
    } catch (...) {
        passages_.pop_front();
        throw;
    }
    passage->count_in(bytes_);
    return passage;
}

size_t PassageCache::size() const {
    const std::lock_guard lock(mutex_);
    return passages_.size();
}

}  // namespace refrag
