// text/bpe alone, with rules made for the purpose: long words, which are merged in windows, against a plain
// reference; windows that do not join; memory that runs out. Real vocabularies are in test_tokenizer.cpp and
// test_real_tokenizers.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "base/utf8.h"
#include "failing.h"
#include "text/bpe.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Random = std::mt19937;

size_t below(Random& random, size_t n) {
    return random() % n;
}

struct Rule {
    int32_t left;
    int32_t right;
    Merge merge;
};

// A token as tests compare it.
struct Span {
    int32_t id;
    uint32_t bytes;
    bool operator==(const Span&) const = default;
};

std::vector<Span> encode(const Bpe& bpe, std::string_view word) {
    std::vector<BpePiece> scratch;
    std::vector<Span> tokens;
    bpe.encode(word, scratch, [&](std::span<const BpePiece> pieces) {
        for (const BpePiece& piece : pieces) tokens.push_back({piece.id, piece.bytes});
    });
    return tokens;
}

// Letters of one to four bytes; their ids are their places here.
constexpr char32_t letters[] = {U'a', U'\u00E9', U'\u4E2D', U'\U0001F600'};

using Word = std::vector<int32_t>;  // ids of letters

std::string text_of(const Word& word) {
    std::string text;
    for (const int32_t id : word) append_utf8(text, letters[id]);
    return text;
}

Bpe with_rules(const std::vector<Rule>& rules) {
    Bpe bpe;
    bpe.byte_level = false;
    for (size_t i = 0; i < std::size(letters); ++i) bpe.char_ids.add(letters[i], static_cast<int32_t>(i));
    bpe.merges = MergeTable(rules.size());
    for (const Rule& rule : rules) bpe.merges.add(rule.left, rule.right, rule.merge);
    return bpe;
}

// The definition, word for word: over and over, of all neighbours that have a rule, those with the lowest
// rank, and the leftmost of them.
std::vector<Span> plain_encode(const std::vector<Rule>& rules, const Word& word) {
    constexpr size_t max_ids = 64;
    std::vector<Merge> table(max_ids * max_ids, Merge{no_rank, -1});
    const auto cell = [&](int32_t left, int32_t right) -> Merge& {
        return table[static_cast<size_t>(left) * max_ids + static_cast<size_t>(right)];
    };
    for (const Rule& rule : rules) {
        REQUIRE(std::max({rule.left, rule.right, rule.merge.id}) < int32_t{max_ids});
        cell(rule.left, rule.right) = rule.merge;
    }
    std::vector<Span> tokens;
    for (const int32_t id : word) tokens.push_back({id, static_cast<uint32_t>(id) + 1});
    while (true) {
        Merge best{no_rank, -1};
        size_t where = 0;
        for (size_t i = 0; i + 1 < tokens.size(); ++i) {
            const Merge& merge = cell(tokens[i].id, tokens[i + 1].id);
            if (merge.rank < best.rank) {
                best = merge;
                where = i;
            }
        }
        if (best.rank == no_rank) return tokens;
        tokens[where] = {best.id, tokens[where].bytes + tokens[where + 1].bytes};
        tokens.erase(tokens.begin() + static_cast<ptrdiff_t>(where) + 1);
    }
}

// Rules in random order, so that many a product's rule comes before those that make its parts. `by_text`:
// what two symbols become is named by its letters, as in a vocabulary, so that several pairs may become the
// same; otherwise by chance, even one of the two themselves.
std::vector<Rule> random_rules(Random& random, size_t n_letters, size_t n_rules, bool by_text) {
    std::vector<Word> ids;  // what each id is
    for (size_t i = 0; i < std::size(letters); ++i) ids.push_back({static_cast<int32_t>(i)});
    const auto random_id = [&] {
        const size_t i = below(random, n_letters + ids.size() - std::size(letters));
        return i < n_letters ? i : i - n_letters + std::size(letters);
    };
    std::vector<Rule> rules;
    for (size_t tries = 0; rules.size() < n_rules && tries < 10 * n_rules; ++tries) {
        const size_t left = random_id();
        const size_t right = random_id();
        const bool known = std::any_of(rules.begin(), rules.end(), [&](const Rule& rule) {
            return rule.left == static_cast<int32_t>(left) && rule.right == static_cast<int32_t>(right);
        });
        if (known) continue;
        Word text = ids[left];
        text.insert(text.end(), ids[right].begin(), ids[right].end());
        size_t id = by_text ? static_cast<size_t>(std::find(ids.begin(), ids.end(), text) - ids.begin())
                            : below(random, ids.size() + 1);
        if (id == ids.size()) ids.push_back(text);
        rules.push_back({static_cast<int32_t>(left),
                         static_cast<int32_t>(right),
                         {static_cast<uint32_t>(rules.size()), static_cast<int32_t>(id)}});
    }
    std::vector<uint32_t> ranks;
    for (const Rule& rule : rules) ranks.push_back(rule.merge.rank);
    std::shuffle(ranks.begin(), ranks.end(), random);
    for (size_t i = 0; i < rules.size(); ++i) rules[i].merge.rank = ranks[i];
    return rules;
}

// Letters by chance, or a few of them over and over, with a slip now and then.
Word random_word(Random& random, size_t n_letters, size_t length) {
    const auto random_letter = [&] { return static_cast<int32_t>(below(random, n_letters)); };
    const size_t period = below(random, 3) == 0 ? length : 1 + below(random, 7);
    const size_t slips = below(random, 2) * length / 40;
    Word word;
    for (size_t i = 0; i < length; ++i) word.push_back(i < period ? random_letter() : word[i - period]);
    for (size_t i = 0; i < slips; ++i) word[below(random, length)] = random_letter();
    return word;
}

// s0 s1 s2 ... all different, with a rule for each neighbouring two, the rightmost first. So tokens are two
// symbols each, counted from the right end, and one more symbol there changes all of them.
class Chain {
  public:
    explicit Chain(size_t n) : n_(n) {
        bpe_.byte_level = false;
        bpe_.merges = MergeTable(n);
        for (size_t i = 0; i < n; ++i) {
            bpe_.char_ids.add(code(i), id(i));
            if (i > 0) bpe_.merges.add(id(i - 1), id(i), {static_cast<uint32_t>(n - i), id(n + i)});
        }
    }
    Bpe& bpe() { return bpe_; }
    std::string word(size_t length) const {
        std::string word;
        for (size_t i = 0; i < length; ++i) append_utf8(word, code(i));
        return word;
    }
    std::vector<Span> expected(size_t length) const {
        std::vector<Span> tokens;
        if (length % 2 == 1) tokens.push_back({id(0), 4});
        for (size_t i = length % 2 + 1; i < length; i += 2) tokens.push_back({id(n_ + i), 8});
        return tokens;
    }

  private:
    static char32_t code(size_t i) { return static_cast<char32_t>(0x10000 + i); }
    static int32_t id(size_t i) { return static_cast<int32_t>(i); }
    size_t n_;
    Bpe bpe_;
};

}  // namespace

TEST_CASE("bpe: words of every length, with any rules, are merged as the definition says") {
    // Up to 48 symbols a word is merged by scanning, beyond that in windows: small ones here, so that words
    // of a few hundred symbols have many borders, and lengths close to a border.
    struct Sizes {
        size_t advance;
        size_t overlap;
    };
    size_t merged = 0;
    size_t improper = 0;
    constexpr uint32_t n_seeds = 6000;
    for (uint32_t seed = 0; seed < n_seeds; ++seed) {
        Random random(seed);
        const size_t n_letters = 1 + below(random, 4);
        const std::vector<Rule> rules =
            random_rules(random, n_letters, 1 + below(random, 14), below(random, 2) == 0);
        Bpe bpe = with_rules(rules);
        constexpr Sizes sizes[] = {{1, 1}, {3, 2}, {7, 1}, {16, 4}, {33, 12}, {64, 64}, {5, 40}, {100, 10}};
        const Sizes size = sizes[seed % std::size(sizes)];
        bpe.window_advance = size.advance;
        bpe.window_overlap = size.overlap;
        const size_t borders = 1 + below(random, 200 / size.advance + 2);
        const size_t around[] = {0, 1, 2, size.overlap, size.advance - 1, below(random, 250)};
        const size_t length = borders * size.advance + around[below(random, std::size(around))];
        const Word word = random_word(random, n_letters, length);
        CAPTURE(seed);
        CAPTURE(length);
        const std::vector<Span> expected = plain_encode(rules, word);
        REQUIRE(encode(bpe, text_of(word)) == expected);
        merged += expected.size() < length ? 1 : 0;
        for (const Rule& a : rules)
            for (const Rule& b : rules)
                improper += (b.left == a.merge.id || b.right == a.merge.id) && b.merge.rank < a.merge.rank;
    }
    // Most have something to merge, and rules that come before those which make their parts.
    CHECK(merged > n_seeds / 2);
    CHECK(improper > n_seeds);
}

TEST_CASE("bpe: windows of the usual size give what one window gives") {
    // One window is the definition's (the test above); here are words too long for that.
    for (uint32_t seed = 0; seed < 24; ++seed) {
        Random random(seed);
        const size_t n_letters = 1 + below(random, 4);
        const std::vector<Rule> rules = random_rules(random, n_letters, 4 + below(random, 12), seed % 2 == 0);
        const Bpe bpe = with_rules(rules);
        Bpe one_window = bpe;
        one_window.window_advance = SIZE_MAX / 4;
        const size_t borders = 1 + seed % 3;
        const size_t around[] = {0, 1, bpe.window_overlap, bpe.window_overlap + 1, bpe.window_advance - 1};
        const size_t length = borders * bpe.window_advance + around[seed % std::size(around)];
        const std::string word = text_of(random_word(random, n_letters, length));
        CAPTURE(seed);
        CAPTURE(length);
        REQUIRE(encode(bpe, word) == encode(one_window, word));
    }
}

TEST_CASE("bpe: where one more symbol changes every token, windows are begun as far back as it takes") {
    SUBCASE("windows of the usual size") {
        // Windows end after an even number of symbols, an odd word's last window excepted: that one changes
        // all that was done, more than 32768 symbols back.
        Chain chain(50'000);
        REQUIRE(chain.bpe().window_advance < 20'000);
        for (const size_t length : {40'000, 40'001, 49'151, 49'152, 49'153, 50'000}) {
            CAPTURE(length);
            CHECK(encode(chain.bpe(), chain.word(length)) == chain.expected(length));
        }
    }
    SUBCASE("small windows that end now after an odd, now after an even number") {
        Chain chain(400);
        for (const size_t advance : {1, 2, 17, 64})
            for (const size_t overlap : {1, 2, 5, 90}) {
                chain.bpe().window_advance = advance;
                chain.bpe().window_overlap = overlap;
                for (size_t length = 49; length <= 400; length += 1 + length / 50) {
                    CAPTURE(advance);
                    CAPTURE(overlap);
                    CAPTURE(length);
                    REQUIRE(encode(chain.bpe(), chain.word(length)) == chain.expected(length));
                }
            }
    }
}

TEST_CASE("bpe: memory that runs out in a long word is an error, leaks nothing, and the next word is right") {
    Chain chain(400);
    chain.bpe().window_advance = 17;
    chain.bpe().window_overlap = 2;
    const std::string word = chain.word(399);
    const std::vector<Span> expected = chain.expected(399);
    REQUIRE(encode(chain.bpe(), word) == expected);  // and what a first call allocates once is there
    bool done = false;
    int64_t n = 0;
    while (!done) {
        const int64_t live = live_allocations();
        bool out_of_memory = false;
        FailingMemory memory(++n);
        try {
            encode(chain.bpe(), word);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
        memory.disarm();
        done = memory.asked() < n;
        CAPTURE(n);
        REQUIRE(out_of_memory == !done);
        REQUIRE(live_allocations() == live);
        REQUIRE(encode(chain.bpe(), word) == expected);
    }
    CHECK(n > 20);
}
