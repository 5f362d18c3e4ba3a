// See passage_cache.h.
#include "refrag/passage_cache.h"

#include <utility>

namespace refrag {

PassageCache::~PassageCache() {
    for (const auto& passage : passages_) passage->count_out();
}

std::shared_ptr<SharedPassage> PassageCache::share(const Model& model, std::string text, int32_t chunk_len,
                                                   std::string_view tenant) {
    return keep(std::make_shared<SharedPassage>(model, std::move(text), chunk_len, tenant));
}

std::shared_ptr<SharedPassage> PassageCache::share(const Model& model,
                                                   std::shared_ptr<const CutPassage> cut) {
    return keep(std::make_shared<SharedPassage>(model, std::move(cut)));
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
