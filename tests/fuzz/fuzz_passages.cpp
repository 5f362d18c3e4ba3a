// Any bytes as a passage file. What is accepted: at least one passage; JSON's texts are valid UTF-8; plain
// text is kept byte for byte but for line ends and blank lines.
#include <vector>

#include "base/check.h"
#include "main.h"
#include "refrag/passages.h"
#include "text/unicode.h"

namespace refrag_fuzz {
namespace {

using refrag::Passage;

// The bytes that plain text keeps: all but line ends and white space.
std::string visible(std::string_view text) {
    std::string kept;
    for (const char c : text)
        if (std::string_view(" \t\r\n\v\f").find(c) == std::string_view::npos) kept.push_back(c);
    return kept;
}

void check_passages(const std::vector<Passage>& passages, std::string_view input) {
    promise(!passages.empty(), "there is a passage");
    while (input.starts_with("\xEF\xBB\xBF")) input.remove_prefix(3);
    const bool json = input[input.find_first_not_of(" \t\r\n\v\f")] == '{';
    std::string all;
    for (size_t i = 0; i < passages.size(); ++i) {
        const Passage& passage = passages[i];
        if (json) {
            for (const std::string* text : {&passage.id, &passage.title, &passage.text})
                promise(refrag::is_valid_utf8(*text), "JSON's texts are valid UTF-8");
            promise(passage.content().ends_with(passage.text), "content ends with the text");
        } else {
            promise(passage.id == std::to_string(i + 1) && passage.title.empty(), "plain text is numbered");
            promise(!visible(passage.text).empty(), "a plain passage is not blank");
            promise(passage.text.find("\n\n") == std::string::npos, "blank lines are between passages");
            all += passage.text;
        }
    }
    if (!json) promise(visible(all) == visible(input), "plain text is kept");
}

}  // namespace

void fuzz_passages(std::string_view input) {
    refused([&] { check_passages(refrag::parse_passages(input, "passages"), input); });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_passages)
