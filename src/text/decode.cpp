// From ids back to text: the bytes of the pieces one after another, malformed stretches as U+FFFD. Whole or
// as a stream.
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace refrag {

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
    std::string bytes;
    for (const int32_t id : ids)
        if (!skip_special_tokens || !is_special(id)) bytes.append(token_bytes(id));
    return is_valid_utf8(bytes) ? bytes : replace_invalid_utf8(bytes);
}

std::string StreamDecoder::push(int32_t id) {
    if (skip_special_tokens_ && tokenizer_.is_special(id)) return "";
    held_.append(tokenizer_.token_bytes(id));

    // Only a sequence that the next bytes may complete is held back; it can only be the last one.
    size_t decided = held_.size();
    for (size_t at = held_.size() > 3 ? held_.size() - 3 : 0; at < held_.size(); ++at) {
        const auto lead = static_cast<unsigned char>(held_[at]);
        if (lead >= 0xC2 && decode_utf8(held_, at).cut) {
            decided = at;
            break;
        }
    }
    std::string text = replace_invalid_utf8(std::string_view(held_).substr(0, decided));
    held_.erase(0, decided);
    return text;
}

std::string StreamDecoder::flush() {
    std::string text = replace_invalid_utf8(held_);
    held_.clear();
    return text;
}

}  // namespace refrag
