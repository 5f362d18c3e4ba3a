// From ids back to text. There is one way, the stream's; decoding a whole list is a stream that ends at once.
#include "text/tokenizer.h"
#include "text/tokenizer_tables.h"
#include "text/unicode.h"

namespace refrag {

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
    StreamDecoder stream(*this, skip_special_tokens);
    std::string text;
    for (const int32_t id : ids) text += stream.push(id);
    return text + stream.flush();
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens, bool continues_text)
    : tokenizer_(std::move(tokenizer)),
      skip_special_tokens_(skip_special_tokens),
      is_first_(!continues_text),
      n_to_strip_(continues_text ? 0 : tokenizer_.tables_->decoder.n_strip) {}

void StreamDecoder::push(int32_t id, std::string& out) {
    const Tokenizer::Tables& tables = *tokenizer_.tables_;
    const auto index = static_cast<size_t>(id);
    if (!tables.has_piece(id) || (skip_special_tokens_ && tables.skipped[index])) return;
    const std::string& bytes = tables.bytes[index];
    if (tables.decoder.byte_level) {
        held_.append(bytes);
        // Only a sequence that the next bytes may complete is held back; it can only be the last one.
        size_t decided = held_.size();
        for (size_t at = held_.size() > 3 ? held_.size() - 3 : 0; at < held_.size(); ++at) {
            const auto lead = static_cast<unsigned char>(held_[at]);
            if (lead >= 0xC2 && decode_utf8(held_, at).cut) {
                decided = at;
                break;
            }
        }
        append_valid_utf8(out, std::string_view(held_).substr(0, decided));
        held_.erase(0, decided);
        return;
    }
    if (!is_first_ && !tables.decoder.separator.empty()) emit(tables.decoder.separator, out);
    if (tables.decoder.byte_fallback && tables.byte_token[index]) {
        push_byte(bytes[0], out);
    } else {
        end_run(out);
        emit(is_first_ && !tables.decoder.dropped_in_first.empty() ? tables.first_bytes[index] : bytes, out);
    }
    is_first_ = false;
}

std::string StreamDecoder::flush() {
    std::string out;
    if (tokenizer_.tables_->decoder.byte_level) {
        out = replace_invalid_utf8(held_);
        held_.clear();
    } else {
        end_run(out);
    }
    is_first_ = true;
    n_to_strip_ = tokenizer_.tables_->decoder.n_strip;
    return out;
}

// Appends text to the output, less what falls off its front.
void StreamDecoder::emit(std::string_view text, std::string& out) {
    const std::string_view strip = tokenizer_.tables_->decoder.strip;
    while (n_to_strip_ > 0 && !text.empty()) {
        if (!text.starts_with(strip)) {
            n_to_strip_ = 0;
            break;
        }
        text.remove_prefix(strip.size());
        --n_to_strip_;
    }
    out.append(text);
}

void StreamDecoder::push_byte(char byte, std::string& out) {
    held_.push_back(byte);
    while (!is_broken_ && n_valid_ < held_.size()) {
        const Utf8Step step = decode_utf8(held_, n_valid_);
        if (step.cut) return;  // the next byte may complete it
        if (step.valid)
            n_valid_ += step.bytes;
        else
            is_broken_ = true;
    }
    if (!is_broken_) return;
    for (size_t i = 0; i < held_.size(); ++i) emit("\xEF\xBF\xBD", out);
    held_.clear();
    n_valid_ = 0;
}

void StreamDecoder::end_run(std::string& out) {
    if (n_valid_ == held_.size()) {
        emit(held_, out);
    } else {
        for (size_t i = 0; i < held_.size(); ++i) emit("\xEF\xBF\xBD", out);
    }
    held_.clear();
    n_valid_ = 0;
    is_broken_ = false;
}

}  // namespace refrag
