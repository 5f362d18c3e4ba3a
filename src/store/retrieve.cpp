// See retrieve.h.
#include "store/retrieve.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "base/check.h"
#include "base/dtype.h"
#include "io/file.h"
#include "refrag/bm25.h"
#include "refrag/passage.h"

namespace refrag {
namespace {

constexpr std::array kRetrievals = {Retrieval::words, Retrieval::dense, Retrieval::both};

bool better(const Found& a, const Found& b) {
    return a.score != b.score ? a.score > b.score : a.n < b.n;
}

void keep_best(std::vector<Found>& found, int64_t limit) {
    const size_t n = std::min(found.size(), static_cast<size_t>(std::max<int64_t>(limit, 0)));
    std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(n), found.end(), better);
    found.resize(n);
}

std::string key_of(const Filter& filter) {
    std::string key;
    for (const Condition& condition : filter) {
        for (const std::string& name : condition.key) key += name + '\0';
        key += str(static_cast<int>(condition.op), ' ', condition.value.index(), ' ');
        if (const auto* text = std::get_if<std::string>(&condition.value)) key += *text;
        if (const auto* number = std::get_if<double>(&condition.value)) key += str(*number);
        if (const auto* truth = std::get_if<bool>(&condition.value)) key += *truth ? "1" : "0";
        key += '\1';
    }
    return key;
}

}  // namespace

const char* retrieval_name(Retrieval retrieval) {
    switch (retrieval) {
        case Retrieval::words:
            return "bm25";
        case Retrieval::dense:
            return "dense";
        case Retrieval::both:
            return "both";
    }
    return "?";
}

Retrieval parse_retrieval(std::string_view option, std::string_view word) {
    for (const Retrieval retrieval : kRetrievals)
        if (word == retrieval_name(retrieval)) return retrieval;
    fail(Status::usage, option, ": expected bm25, dense or both, found \"", printable(word, 40), "\"");
}

void make_unit(std::vector<float>& vector) {
    double squares = 0.0;
    for (const float value : vector) squares += static_cast<double>(value) * static_cast<double>(value);
    const double scale = squares > 0.0 ? 1.0 / std::sqrt(squares) : 0.0;
    for (float& value : vector) value = static_cast<float>(static_cast<double>(value) * scale);
}

std::vector<float> mean_direction(std::span<const float> rows, int64_t dim) {
    if (rows.empty() || dim == 0) return {};
    std::vector<double> sum(static_cast<size_t>(dim));
    for (size_t i = 0; i < rows.size(); ++i) sum[i % sum.size()] += static_cast<double>(rows[i]);
    std::vector<float> mean(sum.size());
    for (size_t i = 0; i < sum.size(); ++i) mean[i] = static_cast<float>(sum[i]);
    make_unit(mean);
    return mean;
}

std::vector<float> question_vector(Backend& backend, const Model& model, std::string_view question,
                                   int32_t chunk_len, Arena& arena) {
    model.require_encoder();
    const auto passage = std::make_shared<SharedPassage>(model, std::string(question), chunk_len);
    encode_passages(backend, model, std::vector{passage}, arena);
    return mean_direction(passage->encoded()->download(backend), model.d_enc());
}

// Sixteen sums side by side, so that a compiler makes vector instructions of it without changing the order.
float dot_bf16(const float* query, const uint16_t* row, size_t dim) {
    constexpr size_t kLanes = 16;
    std::array<float, kLanes> sums{};
    size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
        for (size_t lane = 0; lane < kLanes; ++lane)
            sums[lane] += query[i + lane] * bf16_to_f32(row[i + lane]);
    for (; i < dim; ++i) sums[i % kLanes] += query[i] * bf16_to_f32(row[i]);
    for (size_t half = kLanes / 2; half > 0; half /= 2)
        for (size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

void VectorIndex::load(PassageStore& store, const Filter& filter, size_t dim) {
    const int64_t version = store.version();
    std::string key = key_of(filter);
    if (loaded_ && version == version_ && dim == dim_ && key == filter_key_) return;
    loaded_ = false;
    numbers_.clear();
    values_.clear();
    store.for_each_vector(filter, [&](int64_t n, std::span<const uint16_t> vector) {
        if (vector.size() != dim) return;
        numbers_.push_back(n);
        values_.insert(values_.end(), vector.begin(), vector.end());
    });
    dim_ = dim;
    version_ = version;
    filter_key_ = std::move(key);
    loaded_ = true;
}

std::vector<Found> VectorIndex::search(PassageStore& store, const Filter& filter,
                                       const std::vector<float>& query, int64_t limit) {
    load(store, filter, query.size());
    std::vector<Found> found(numbers_.size());
    for (size_t i = 0; i < numbers_.size(); ++i) {
        const float score = dot_bf16(query.data(), values_.data() + i * dim_, dim_);
        // What a flipped bit made no number of comes last.
        found[i] = {numbers_[i], std::isfinite(score) ? static_cast<double>(score) : -1e30};
    }
    keep_best(found, limit);
    return found;
}

std::vector<Found> fuse(const std::vector<std::vector<Found>>& lists, int64_t limit) {
    constexpr double kConstant = 60.0;
    std::map<int64_t, double> scores;
    for (const std::vector<Found>& list : lists)
        for (size_t rank = 0; rank < list.size(); ++rank)
            scores[list[rank].n] += 1.0 / (kConstant + static_cast<double>(rank + 1));
    std::vector<Found> fused;
    fused.reserve(scores.size());
    for (const auto& [n, score] : scores) fused.push_back({n, score});
    keep_best(fused, limit);
    return fused;
}

std::vector<Found> retrieve(PassageStore& store, VectorIndex& vectors, std::string_view question,
                            const std::vector<float>& query, const RetrieveOptions& options) {
    const bool alone = options.retrieval != Retrieval::both;
    const int64_t limit = alone ? options.top : std::max(options.top, options.candidates);
    std::vector<std::vector<Found>> lists;
    if (options.retrieval != Retrieval::dense) {
        std::vector<std::string> words;
        for (TextWord& word : words_of(question)) words.push_back(std::move(word.word));
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        lists.push_back(store.search_words(words, limit, options.filter));
    }
    if (options.retrieval != Retrieval::words && !query.empty())
        lists.push_back(vectors.search(store, options.filter, query, limit));
    if (lists.size() == 1) {
        keep_best(lists.front(), options.top);
        return lists.front();
    }
    return fuse(lists, options.top);
}

}  // namespace refrag
