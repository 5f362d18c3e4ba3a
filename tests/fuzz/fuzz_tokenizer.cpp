// Any bytes as tokenizer.json, and a text for what is accepted.
#include "base/check.h"
#include "main.h"
#include "tokenizer_promises.h"

namespace refrag_fuzz {

void fuzz_tokenizer(std::string_view input) {
    const size_t zero = input.find('\0');
    const std::string_view text = zero == std::string_view::npos ? input : input.substr(zero + 1);
    refused([&] {
        const Tokenizer tokenizer = Tokenizer::from_json(input.substr(0, zero), "tokenizer.json");
        check_tokenizer(tokenizer, text);
    });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_tokenizer)
