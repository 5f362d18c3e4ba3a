// Encoding: clean the bytes, cut out added tokens, normalise and cut the rest into words, merge each word's
// symbols, and carry every token's place back to the original bytes.
#include "text/tokenizer.h"

#include <algorithm>
#include <deque>

#include "base/check.h"
#include "text/tokenizer_tables.h"
#include "text/unicode.h"

namespace refrag {

namespace {

// How many tokens to make room for: seldom too few, since growing by copies would cost most for long texts.
size_t expected_tokens(std::string_view text) {
    return text.size() / 3 + 2;
}

}  // namespace

// A text on its way: the original, cleaned, then rewritten step by step; each form keeps the way back to the
// one before. The spans lie in the latest form.
class Tokenizer::Passage {
  public:
    explicit Passage(std::string_view original) : clean_(original), text_(clean_.text()) {
        if (!text_.empty()) spans_.push_back({0, text_.size(), -1});
    }

    // Cuts out the first pass's added tokens, part by part; the parts' texts are valid UTF-8 and together the
    // original. The rest of neighbouring parts is one stretch again.
    void cut_out_of_parts(const AddedTokenMatcher& matcher, std::span<const TextPart> parts) {
        std::vector<TextSpan> found;
        size_t begin = 0;
        for (const TextPart& part : parts) {
            const size_t end = begin + part.text.size();
            if (part.id)
                found.push_back({begin, end, *part.id});
            else if (begin < end)
                matcher.split(text_, begin, end, part.parse_special, found);
            begin = end;
        }
        spans_.clear();
        for (const TextSpan& span : found) {
            if (span.id < 0 && !spans_.empty() && spans_.back().id < 0)
                spans_.back().end = span.end;
            else
                spans_.push_back(span);
        }
    }

    std::string_view text() const { return text_; }
    const std::vector<TextSpan>& spans() const { return spans_; }

    void cut_out(const AddedTokenMatcher& matcher, bool parse_special) {
        if (matcher.empty()) return;
        for_each_plain([&](const TextSpan& span, std::vector<TextSpan>& out) {
            matcher.split(text_, span.begin, span.end, parse_special, out);
        });
    }

    void rewrite(const Rewrite& step) {
        if (!step.may_change(text_)) return;
        TextEdit& edit = forms_.emplace_back(text_);
        std::vector<TextSpan> spans;
        for (const TextSpan& span : spans_) {
            const size_t begin = edit.text().size();
            if (span.id >= 0)
                edit.keep(span.begin, span.end);
            else
                step.apply(span.begin, span.end, original_begin(span.begin) == 0, edit);
            if (begin < edit.text().size()) spans.push_back({begin, edit.text().size(), span.id});
        }
        spans_.swap(spans);
        text_ = edit.text();
    }

    void cut(const Split& step) {
        for_each_plain([&](const TextSpan& span, std::vector<TextSpan>& out) {
            for_each_piece(step, span, [&](size_t begin, size_t end) { out.push_back({begin, end, -1}); });
        });
    }

    template <typename Use>
    void for_each_piece(const Split& step, const TextSpan& span, Use&& use) const {
        const std::string_view text = text_.substr(0, span.end);
        bool removed = false;
        for (size_t at = span.begin; at < span.end;) {
            const size_t end = step.piece_end(text, at, removed);
            if (!removed) use(at, end);
            at = end;
        }
    }

    // Turns places in the latest form into places in the original, each token beginning where the one before
    // ended and the last one ending with the text.
    void place(std::vector<Token>& tokens) const {
        std::vector<size_t> hints(forms_.size() + 1, 0);
        size_t begin = 0;
        for (Token& token : tokens) {
            size_t end = token.end;
            for (size_t i = forms_.size(); i-- > 0;) end = forms_[i].map().source_position(end, hints[i + 1]);
            end = clean_.original_position(end, hints[0]);
            token.begin = begin;
            token.end = std::max(begin, end);
            begin = token.end;
        }
    }

  private:
    template <typename Cut>
    void for_each_plain(Cut&& cut_span) {
        std::vector<TextSpan> spans;
        for (const TextSpan& span : spans_) {
            if (span.id >= 0)
                spans.push_back(span);
            else
                cut_span(span, spans);
        }
        spans_.swap(spans);
    }

    // Where the character at `at` comes from, in the clean text.
    size_t original_begin(size_t at) const {
        // The newest form is still being made.
        for (size_t i = forms_.size() - 1; i-- > 0;) at = forms_[i].map().source_begin(at);
        return at;
    }

    CleanText clean_;
    std::deque<TextEdit> forms_;  // texts in it stay where they are
    std::string_view text_;
    std::vector<TextSpan> spans_;
};

// Runs the passage through the file's steps up to words, and those through BPE. Emit takes every token's id
// and place in the passage's latest form.
template <typename Emit>
void Tokenizer::encode_passage(Passage& passage, bool parse_special, Emit&& emit) const {
    passage.cut_out(tables_->raw_added, parse_special);
    encode_cut(passage, parse_special, emit);
}

// The same once the first pass's added tokens are cut out.
template <typename Emit>
void Tokenizer::encode_cut(Passage& passage, bool parse_special, Emit&& emit) const {
    for (const Rewrite& step : tables_->normalizer) passage.rewrite(step);
    passage.cut_out(tables_->normalized_added, parse_special);

    // The last cut goes straight to BPE, word by word.
    const Split* last_cut = nullptr;
    for (const auto& step : tables_->pre_tokenizer) {
        if (last_cut != nullptr) passage.cut(*last_cut);
        last_cut = std::get_if<Split>(&step);
        if (const auto* rewrite = std::get_if<Rewrite>(&step)) passage.rewrite(*rewrite);
    }

    std::vector<BpePiece> scratch;
    size_t at = 0;
    const Bpe::Emit emit_pieces = [&](std::span<const BpePiece> pieces) {
        for (const BpePiece& piece : pieces) {
            emit(piece.id, at, at + piece.bytes);
            at += piece.bytes;
        }
    };
    const auto encode_word = [&](size_t begin, size_t end) {
        at = begin;
        tables_->bpe.encode(passage.text().substr(begin, end - begin), scratch, emit_pieces);
    };
    for (const TextSpan& span : passage.spans()) {
        if (span.id >= 0)
            emit(span.id, span.begin, span.end);
        else if (last_cut != nullptr)
            passage.for_each_piece(*last_cut, span, encode_word);
        else
            encode_word(span.begin, span.end);
    }
}

std::vector<Token> Tokenizer::encode(std::string_view text, bool parse_special) const {
    Passage passage(text);
    std::vector<Token> tokens;
    tokens.reserve(expected_tokens(text));
    encode_passage(passage, parse_special, [&](int32_t id, size_t begin, size_t end) {
        tokens.push_back({id, begin, end});
    });
    passage.place(tokens);
    if (!tokens.empty()) tokens.back().end = text.size();
    return tokens;
}

std::vector<int32_t> Tokenizer::encode_ids(std::string_view text, bool parse_special) const {
    Passage passage(text);
    std::vector<int32_t> ids;
    ids.reserve(expected_tokens(text));
    encode_passage(passage, parse_special, [&](int32_t id, size_t, size_t) { ids.push_back(id); });
    return ids;
}

std::vector<int32_t> Tokenizer::encode_parts(std::span<const TextPart> parts) const {
    std::vector<TextPart> clean;  // each by itself, so that their borders stay where they are
    std::string text;
    for (const TextPart& part : parts) {
        clean.push_back({replace_invalid_utf8(part.text), part.parse_special, part.id});
        text += clean.back().text;
    }
    Passage passage(text);
    std::vector<int32_t> ids;
    ids.reserve(expected_tokens(text));
    passage.cut_out_of_parts(tables_->raw_added, clean);
    encode_cut(passage, false, [&](int32_t id, size_t, size_t) { ids.push_back(id); });
    return ids;
}

std::vector<Token> Tokenizer::encode_with_special_tokens(std::string_view text) const {
    std::vector<Token> tokens;
    for (const int32_t id : tables_->template_prefix) tokens.push_back({id, 0, 0});
    const std::vector<Token> inner = encode(text, true);
    tokens.insert(tokens.end(), inner.begin(), inner.end());
    for (const int32_t id : tables_->template_suffix) tokens.push_back({id, text.size(), text.size()});
    return tokens;
}

int64_t Tokenizer::vocab_size() const {
    return static_cast<int64_t>(tables_->pieces.size());
}

std::string_view Tokenizer::piece(int32_t id) const {
    return tables_->has_piece(id) ? std::string_view(tables_->pieces[static_cast<size_t>(id)])
                                  : std::string_view();
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
    return tables_->has_piece(id) ? std::string_view(tables_->bytes[static_cast<size_t>(id)])
                                  : std::string_view();
}

std::optional<int32_t> Tokenizer::id_of(std::string_view piece) const {
    const auto found = tables_->ids.find(piece);
    if (found == tables_->ids.end()) return std::nullopt;
    return found->second;
}

bool Tokenizer::is_special(int32_t id) const {
    return tables_->has_piece(id) && tables_->special[static_cast<size_t>(id)];
}

std::span<const int32_t> Tokenizer::template_prefix() const {
    return tables_->template_prefix;
}

std::span<const int32_t> Tokenizer::template_suffix() const {
    return tables_->template_suffix;
}

}  // namespace refrag
