// The conversations that instruct models were trained on: which format a model's files ask for, and a prompt
// in it. No Jinja is run: a file's template is recognised by its markers, and the formats are written here.
// For the published templates the ids are those of `transformers`' apply_chat_template with
// add_generation_prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace refrag {

enum class ChatFormat {
    plain,    // no conversation: "Question: ...\nAnswer:" after the passages
    llama2,   // [INST] <<SYS>>\n...\n<</SYS>>\n\n ... [/INST]
    llama3,   // <|start_header_id|>user<|end_header_id|>\n\n ... <|eot_id|>
    chatml,   // <|im_start|>user\n ... <|im_end|>\n
    mistral,  // [INST] ... [/INST], as text or as control tokens, whichever the vocabulary has
};

// "plain", "llama2", ... Status::usage naming the allowed words otherwise.
ChatFormat parse_chat_format(const std::string& name);
const char* chat_format_name(ChatFormat format);
std::string chat_format_names(const char* separator);

// What a template's text asks for.
struct ChatTemplate {
    ChatFormat format = ChatFormat::plain;
    std::string system;  // what it says by itself where a conversation has no system message; chatml alone
};

// By the template's markers; none where they are of no format above.
std::optional<ChatTemplate> recognize_chat_template(std::string_view jinja);

// The template of a Hugging Face directory: chat_template.jinja, or tokenizer_config.json's "chat_template"
// (a string, or a list of named ones, of which the "default"). None where there is none.
std::optional<std::string> read_chat_template(const std::string& dir);

// The token that ends a turn in this format, where it is another than the end of a text.
std::optional<int32_t> end_of_turn(ChatFormat format, const Tokenizer& tokenizer);

// An earlier question with its answer.
struct ChatTurn {
    std::string_view question;
    std::string_view answer;
    // Question and answer are not read as text: in the turn's place stand segments like a passage's, numbered
    // n_passages + 2 * turn and one more.
    bool apart = false;
};

// What a prompt is made of. Nothing in these texts is a special token, whatever it spells.
struct ChatPrompt {
    std::string_view system;          // empty: no system message
    size_t n_passages = 0;            // they stand in the first user turn, before its question
    std::span<const ChatTurn> turns;  // oldest first
    std::string_view question;
};

// Ids, or the place of a passage.
struct ChatSegment {
    std::vector<int32_t> ids;
    std::optional<size_t> passage;  // 0, 1, ... in this order; `ids` are empty then
};

// The prompt in a format that is not plain. A blank line follows each passage. Ids between two passages (or
// the prompt's ends) are tokenised as one text, special tokens being found in the format's own parts alone.
// bos_id: comes first, where given, and where the format has it; eos_id: ends an answer in llama2 and
// mistral.
std::vector<ChatSegment> chat_segments(ChatFormat format, const Tokenizer& tokenizer,
                                       const ChatPrompt& prompt, std::optional<int32_t> bos_id,
                                       int32_t eos_id);

}  // namespace refrag
