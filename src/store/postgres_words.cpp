// See postgres_words.h.
#include "store/postgres_words.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "refrag/bm25.h"
#include "store/postgres.h"

namespace refrag {
namespace {

constexpr size_t kMostWordBytes = 500;
constexpr size_t kMostPositions = 255;
constexpr size_t kMostVectorBytes = 1000000;  // of 2^20
constexpr uint16_t kLastPosition = 16383;     // further ones have this one
constexpr uint16_t kWeightA = 3 << 14;
constexpr size_t kLexemeOverhead = 4;  // its length, alignment and count of positions

}  // namespace

std::vector<std::string> index_words(std::string_view text) {
    std::vector<std::string> words;
    for (TextWord& word : words_of(text)) {
        size_t size = std::min(word.word.size(), kMostWordBytes);
        // No character is cut.
        while (size < word.word.size() && (static_cast<unsigned char>(word.word[size]) & 0xC0) == 0x80)
            --size;
        word.word.resize(size);
        words.push_back(std::move(word.word));
    }
    return words;
}

std::string word_vector(std::span<const std::string> title, std::span<const std::string> text) {
    std::unordered_map<std::string_view, std::vector<uint16_t>> positions;
    size_t bytes = 0;
    size_t position = 0;
    const auto add = [&](std::span<const std::string> stems, uint16_t weight) {
        for (const std::string& stem : stems) {
            const auto at = static_cast<uint16_t>(std::min<size_t>(++position, kLastPosition));
            const auto found = positions.find(stem);
            const size_t more =
                (found == positions.end() ? stem.size() + kLexemeOverhead : 0) + sizeof(uint16_t);
            if (bytes + more > kMostVectorBytes) continue;
            std::vector<uint16_t>& all = positions[stem];
            const bool is_last = !all.empty() && (all.back() & kLastPosition) == kLastPosition;
            if (all.size() >= kMostPositions || is_last) continue;
            all.push_back(at | weight);
            bytes += more;
        }
    };
    add(title, kWeightA);
    add(text, 0);
    std::vector<std::string_view> order;
    order.reserve(positions.size());
    for (const auto& [stem, all] : positions) order.push_back(stem);
    std::sort(order.begin(), order.end());
    std::string out;
    append_big_endian(out, static_cast<int32_t>(order.size()));
    for (const std::string_view stem : order) {
        const std::vector<uint16_t>& all = positions[stem];
        (out += stem) += '\0';
        append_big_endian(out, static_cast<int16_t>(all.size()));
        for (const uint16_t at : all) append_big_endian(out, at);
    }
    return out;
}

std::string quoted_lexeme(std::string_view stem) {
    std::string out = "'";
    for (const char c : stem) {
        if (c == '\'' || c == '\\') out += c;
        out += c;
    }
    return out + "'";
}

std::string any_of(std::span<const std::string> stems) {
    std::string query;
    for (const std::string& stem : stems) query += (query.empty() ? "" : " | ") + quoted_lexeme(stem);
    return query;
}

}  // namespace refrag
