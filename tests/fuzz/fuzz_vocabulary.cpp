// A tokenizer in the older form: five files one after another with zero bytes between, then a text. They are
// vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json and added_tokens.json; an empty one
// of the last three is not there.
#include "base/check.h"
#include "main.h"
#include "tokenizer_promises.h"

namespace refrag_fuzz {

void fuzz_vocabulary(std::string_view input) {
    static const ScratchDir scratch;
    const auto next = [&] {
        const size_t zero = input.find('\0');
        const std::string_view part = input.substr(0, zero);
        input.remove_prefix(zero == std::string_view::npos ? input.size() : zero + 1);
        return part;
    };
    scratch.write("vocab.json", next());
    scratch.write("merges.txt", next());
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}) {
        const std::string_view part = next();
        if (part.empty()) {
            scratch.remove(name);
        } else {
            scratch.write(name, part);
        }
    }
    refused([&] { check_tokenizer(Tokenizer::from_file(scratch.path()), input); });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_vocabulary)
