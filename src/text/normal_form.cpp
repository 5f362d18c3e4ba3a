// Normalisation by segments: a character and the marks that may join or pass it. Segments that are their own
// normal form, nearly all, cost one look at a property and no copy.
#include "text/normal_form.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "base/check.h"
#include "text/unicode.h"

namespace refrag {

namespace {

struct Range {
    char32_t first;
    char32_t last;
};

// Where characters with a combining class or a decomposition came after Unicode 9.0 (up to 17.0), between
// those that are older. Sorted.
constexpr Range later[] = {
    {0x7FD, 0x7FD},     {0x897, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},     {0xD3B, 0xD3C},
    {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1AFF},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},
    {0xA7F1, 0xA7F4},   {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x105C0, 0x105FF}, {0x10780, 0x107BF},
    {0x10D24, 0x10E5F}, {0x10E80, 0x10FFF}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x11380, 0x113FF},
    {0x1145E, 0x1145E}, {0x11839, 0x11A99}, {0x11D42, 0x11D97}, {0x11F00, 0x11F5F}, {0x16100, 0x1613F},
    {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF6}, {0x1CCD6, 0x1CCF9}, {0x1E030, 0x1E08F}, {0x1E130, 0x1E7FF},
    {0x1F16C, 0x1F16F}, {0x1FBF0, 0x1FBF9},
};

bool is_later(char32_t code) {
    const Range* range = std::lower_bound(std::begin(later), std::end(later), code,
                                          [](const Range& r, char32_t c) { return r.last < c; });
    return range != std::end(later) && range->first <= code;
}

const utf8proc_property_t& property(char32_t code) {
    return *utf8proc_get_property(static_cast<utf8proc_int32_t>(code));
}

int combining_class(char32_t code) {
    if (code < 0x300) return 0;
    const int value = property(code).combining_class;
    return value != 0 && is_later(code) ? 0 : value;
}

// One before the first final consonant: it is in their block, but no syllable takes it (utf8proc 2.8 would).
constexpr char32_t no_final = 0x11A7;

bool is_hangul_syllable(char32_t code) {
    return code >= 0xAC00 && code <= 0xD7A3;
}

// May the character join the one before it, or change places with it?
bool extends(bool compatible, char32_t code) {
    if (code < 0x300) return false;
    if (code >= 0x1160 && code <= 0x11FF) return true;  // Hangul vowels and final consonants
    // What becomes one of those, or a kana's voiced mark, in the compatibility forms.
    if (compatible && ((code >= 0x3131 && code <= 0x318E) || (code >= 0xFF9E && code <= 0xFFDC))) return true;
    const utf8proc_property_t& p = property(code);
    if (p.combining_class == 0 && p.category != UTF8PROC_CATEGORY_MN && p.category != UTF8PROC_CATEGORY_MC)
        return false;
    return !is_later(code);
}

// Is the character, with nothing that extends it, its own normal form?
bool stands_alone(NormalForm form, char32_t code) {
    if (is_hangul_syllable(code)) return form == NormalForm::nfc || form == NormalForm::nfkc;
    return property(code).decomp_seqindex == UINT16_MAX || is_later(code);
}

class Normalizer {
  public:
    explicit Normalizer(NormalForm form)
        : composes_(form == NormalForm::nfc || form == NormalForm::nfkc),
          options_(form == NormalForm::nfkc || form == NormalForm::nfkd
                       ? UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT | UTF8PROC_STABLE
                       : UTF8PROC_DECOMPOSE | UTF8PROC_STABLE) {}

    // The normal form of one segment; valid until the next call.
    std::string_view of(std::string_view segment) {
        out_.clear();
        codes_.clear();
        for (size_t at = 0; at < segment.size();) {
            const Utf8Step step = decode_utf8(segment, at);
            at += step.bytes;
            if (is_later(step.code) || step.code == no_final) {
                finish();
                append_utf8(out_, step.code);
            } else {
                decompose(step.code);
            }
        }
        finish();
        return out_;
    }

  private:
    static constexpr int code_bits = 21;

    void decompose(char32_t code) {
        std::array<utf8proc_int32_t, 32> parts;  // the longest decomposition has 18
        int last_class = 0;
        const utf8proc_ssize_t n = utf8proc_decompose_char(
            static_cast<utf8proc_int32_t>(code), parts.data(), static_cast<utf8proc_ssize_t>(parts.size()),
            static_cast<utf8proc_option_t>(options_), &last_class);
        REFRAG_CHECK(n >= 0 && static_cast<size_t>(n) <= parts.size(), Status::runtime,
                     "utf8proc cannot decompose U+", static_cast<uint32_t>(code));
        codes_.insert(codes_.end(), parts.begin(), parts.begin() + n);
    }

    // Orders, composes and appends what was decomposed so far.
    void finish() {
        // Each one's class is looked up once and stands above its bits while marks are put in order.
        for (utf8proc_int32_t& code : codes_)
            code |= combining_class(static_cast<char32_t>(code)) << code_bits;
        const auto class_of = [](utf8proc_int32_t code) { return code >> code_bits; };
        for (size_t i = 0; i < codes_.size();) {
            size_t end = i;
            while (end < codes_.size() && class_of(codes_[end]) != 0) ++end;
            const auto by_class = [&](utf8proc_int32_t a, utf8proc_int32_t b) {
                return class_of(a) < class_of(b);
            };
            const auto first = codes_.begin() + static_cast<std::ptrdiff_t>(i);
            const auto last = codes_.begin() + static_cast<std::ptrdiff_t>(end);
            if (!std::is_sorted(first, last, by_class)) std::stable_sort(first, last, by_class);
            i = end + 1;
        }
        for (utf8proc_int32_t& code : codes_) code &= (1 << code_bits) - 1;
        size_t n = codes_.size();
        if (composes_ && n > 1)
            n = static_cast<size_t>(
                utf8proc_normalize_utf32(codes_.data(), static_cast<utf8proc_ssize_t>(n),
                                         static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE)));
        for (size_t i = 0; i < n; ++i) append_utf8(out_, static_cast<char32_t>(codes_[i]));
        codes_.clear();
    }

    bool composes_;
    int options_;
    std::vector<utf8proc_int32_t> codes_;
    std::string out_;
};

}  // namespace

void append_normal_form(NormalForm form, size_t begin, size_t end, TextEdit& edit) {
    const std::string_view text = edit.source().substr(0, end);
    const auto is_ascii = [&](size_t i) { return static_cast<unsigned char>(text[i]) < 0x80; };
    Normalizer normalizer(form);
    const bool compatible = form == NormalForm::nfkc || form == NormalForm::nfkd;
    size_t kept = begin;  // what lies before it is done
    size_t at = begin;
    while (at < end) {
        while (at + 1 < end && is_ascii(at) && is_ascii(at + 1)) ++at;
        const size_t segment = at;
        const Utf8Step step = decode_utf8(text, at);
        at += step.bytes;
        bool changes = !stands_alone(form, step.code);
        while (at < end) {
            const Utf8Step next = decode_utf8(text, at);
            if (!extends(compatible, next.code)) break;
            at += next.bytes;
            changes = true;
        }
        if (!changes) continue;
        const std::string_view source = text.substr(segment, at - segment);
        const std::string_view normal = normalizer.of(source);
        if (normal == source) continue;
        edit.keep(kept, segment);
        edit.replace(segment, at, normal);
        kept = at;
    }
    edit.keep(kept, end);
}

}  // namespace refrag
