// See passage_table.h.
#include "server/passage_table.h"

namespace refrag {

bool PassageTable::put(KeptPassage passage) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = passages_.find(passage.passage.id);
    const bool is_new = at == passages_.end();
    const uint64_t bytes = bytes_ + bytes_of(passage) - (is_new ? 0 : bytes_of(at->second));
    if (bytes > max_bytes_ || (is_new && passages_.size() >= max_passages_)) return false;
    passages_.insert_or_assign(passage.passage.id, std::move(passage));
    bytes_ = bytes;
    return true;
}

std::optional<KeptPassage> PassageTable::find(std::string_view id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = passages_.find(id);
    if (at == passages_.end()) return std::nullopt;
    return at->second;
}

bool PassageTable::remove(std::string_view id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = passages_.find(id);
    if (at == passages_.end()) return false;
    bytes_ -= bytes_of(at->second);
    passages_.erase(at);
    return true;
}

std::vector<KeptPassage> PassageTable::list(std::string_view after, size_t limit) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<KeptPassage> out;
    for (auto at = passages_.upper_bound(after); at != passages_.end() && out.size() < limit; ++at)
        out.push_back(at->second);
    return out;
}

size_t PassageTable::size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return passages_.size();
}

}  // namespace refrag
