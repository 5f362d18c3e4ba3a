// See chat_template.h.
#include "text/chat_template.h"

#include <array>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "text/unicode.h"

namespace refrag {
namespace {

constexpr uint64_t max_template_bytes = 4u << 20;

constexpr std::array<std::pair<const char*, ChatFormat>, 5> formats = {{{"plain", ChatFormat::plain},
                                                                        {"llama2", ChatFormat::llama2},
                                                                        {"llama3", ChatFormat::llama3},
                                                                        {"chatml", ChatFormat::chatml},
                                                                        {"mistral", ChatFormat::mistral}}};

// What Python's str.strip() takes off: white space, and the four separators of ASCII that \s lacks.
bool is_stripped(char32_t code) {
    return is_white_space(code) || (code >= 0x1C && code <= 0x1F);
}

struct Strip {
    bool left = true;
    bool right = true;
};

std::string_view strip(std::string_view text, Strip sides = {}) {
    size_t begin = 0;  // of what is kept
    size_t end = 0;
    bool kept = false;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        if (!is_stripped(step.code)) {
            if (!kept) begin = at;
            kept = true;
            end = at + step.bytes;
        }
        at += step.bytes;
    }
    if (!sides.left) begin = 0;
    if (!sides.right) end = text.size();
    return text.substr(begin, end > begin ? end - begin : 0);
}

// Collects a prompt part by part; what stands between two passages is tokenised as one text.
class Writer {
  public:
    explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

    // The format's own text, in which special tokens are tokens.
    void piece(std::string_view text) { add(text, true); }
    void text(std::string_view text) { add(text, false); }
    void token(std::optional<int32_t> id) {
        if (id) parts_.push_back({std::string(tokenizer_.piece(*id)), true, id});
    }
    void passage(size_t index) {
        flush();
        segments_.push_back({{}, index});
    }
    std::vector<ChatSegment> take() {
        flush();
        return std::move(segments_);
    }

  private:
    void add(std::string_view text, bool parse_special) {
        if (!text.empty()) parts_.push_back({std::string(text), parse_special, {}});
    }
    void flush() {
        if (parts_.empty()) return;
        segments_.push_back({tokenizer_.encode_parts(parts_), std::nullopt});
        parts_.clear();
    }

    const Tokenizer& tokenizer_;
    std::vector<TextPart> parts_;
    std::vector<ChatSegment> segments_;
};

// One turn's question as a user says it: before it the passages, if it is the first turn.
void add_question(Writer& out, const ChatPrompt& prompt, size_t turn, Strip sides) {
    const std::string_view question =
        turn < prompt.turns.size() ? prompt.turns[turn].question : prompt.question;
    for (size_t i = 0; turn == 0 && i < prompt.n_passages; ++i) {
        out.passage(i);
        out.piece("\n\n");
    }
    // A turn is stripped as a whole, and before the question stand the passages.
    if (turn == 0 && prompt.n_passages > 0) sides.left = false;
    if (turn < prompt.turns.size() && prompt.turns[turn].apart) {
        out.passage(prompt.n_passages + 2 * turn);
    } else {
        out.text(strip(question, sides));
    }
}

void add_answer(Writer& out, const ChatPrompt& prompt, size_t turn, bool strips) {
    if (prompt.turns[turn].apart) {
        out.passage(prompt.n_passages + 2 * turn + 1);
    } else {
        out.text(strip(prompt.turns[turn].answer, {strips, strips}));
    }
}

void write_llama2(Writer& out, const ChatPrompt& prompt, std::optional<int32_t> bos_id, int32_t eos_id) {
    for (size_t turn = 0; turn <= prompt.turns.size(); ++turn) {
        out.token(bos_id);
        out.piece("[INST] ");
        const bool has_system = turn == 0 && !prompt.system.empty();
        if (has_system) {
            out.piece("<<SYS>>\n");
            out.text(prompt.system);
            out.piece("\n<</SYS>>\n\n");
        }
        add_question(out, prompt, turn, {!has_system, true});
        out.piece(" [/INST]");
        if (turn == prompt.turns.size()) return;
        out.piece(" ");
        add_answer(out, prompt, turn, true);
        out.piece(" ");
        out.token(eos_id);
    }
}

// `control`: the brackets are control tokens, as in the vocabularies since version 2; then no space stands
// before the closing one, and the system message is in the last turn.
void write_mistral(Writer& out, const ChatPrompt& prompt, std::optional<int32_t> bos_id, int32_t eos_id,
                   bool control) {
    out.token(bos_id);
    const size_t last = prompt.turns.size();
    for (size_t turn = 0; turn <= last; ++turn) {
        out.piece("[INST] ");
        if (turn == (control ? last : 0) && !prompt.system.empty()) {
            out.text(prompt.system);
            out.piece("\n\n");
        }
        add_question(out, prompt, turn, {false, false});
        out.piece(control ? "[/INST]" : " [/INST]");
        if (turn == last) return;
        if (control) out.piece(" ");
        add_answer(out, prompt, turn, control);
        out.token(eos_id);
    }
}

// llama3 and chatml: messages of roles, all alike.
struct RoleMarks {
    const char* begin;
    const char* after_role;
    const char* end;
    bool strips;
};
constexpr RoleMarks llama3_marks = {"<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", true};
constexpr RoleMarks chatml_marks = {"<|im_start|>", "\n", "<|im_end|>\n", false};

void write_roles(Writer& out, const ChatPrompt& prompt, const RoleMarks& marks) {
    const auto begin = [&](const char* role) {
        out.piece(marks.begin);
        out.piece(role);
        out.piece(marks.after_role);
    };
    const auto stripped = [&](std::string_view text) { return marks.strips ? strip(text) : text; };
    if (!prompt.system.empty()) {
        begin("system");
        out.text(stripped(prompt.system));
        out.piece(marks.end);
    }
    for (size_t turn = 0; turn <= prompt.turns.size(); ++turn) {
        begin("user");
        add_question(out, prompt, turn, {marks.strips, marks.strips});
        out.piece(marks.end);
        begin("assistant");
        if (turn == prompt.turns.size()) return;
        add_answer(out, prompt, turn, marks.strips);
        out.piece(marks.end);
    }
}

// The literal system message of a ChatML template: "<|im_start|>system\n" with text of no expression up to
// "<|im_end|>". In Jinja's source the line feed may be escaped.
std::string literal_system(std::string_view jinja) {
    constexpr std::string_view begin = "<|im_start|>system";
    for (size_t at = jinja.find(begin); at != std::string_view::npos; at = jinja.find(begin, at + 1)) {
        std::string_view rest = jinja.substr(at + begin.size());
        if (rest.starts_with("\\n")) {
            rest.remove_prefix(2);
        } else if (rest.starts_with('\n')) {
            rest.remove_prefix(1);
        } else {
            continue;
        }
        const std::string_view said = rest.substr(0, rest.find("<|im_end|>"));
        if (said.size() < rest.size() && !said.empty() &&
            said.find_first_of("'\"{}\\") == std::string_view::npos)
            return std::string(said);
    }
    return {};
}

}  // namespace

ChatFormat parse_chat_format(const std::string& name) {
    for (const auto& [word, format] : formats) {
        if (name == word) return format;
    }
    fail(Status::usage, "chat template: expected one of ", chat_format_names(", "), "; found \"", name, "\"");
}

const char* chat_format_name(ChatFormat format) {
    for (const auto& [word, value] : formats) {
        if (value == format) return word;
    }
    return "?";
}

std::string chat_format_names(const char* separator) {
    std::string names;
    for (const auto& [word, format] : formats) names += str(names.empty() ? "" : separator, word);
    return names;
}

std::optional<ChatTemplate> recognize_chat_template(std::string_view jinja) {
    const auto has = [&](std::string_view marker) { return jinja.find(marker) != std::string_view::npos; };
    if (has("<|start_header_id|>") && has("<|eot_id|>")) return ChatTemplate{ChatFormat::llama3, {}};
    if (has("<|im_start|>") && has("<|im_end|>"))
        return ChatTemplate{ChatFormat::chatml, literal_system(jinja)};
    // Later Mistral vocabularies have no space after [INST], and a system message of its own kind.
    if (has("[INST] ") && has("[/INST]"))
        return ChatTemplate{has("<<SYS>>") ? ChatFormat::llama2 : ChatFormat::mistral, {}};
    return std::nullopt;
}

std::optional<std::string> read_chat_template(const std::string& dir) {
    const std::string jinja = path_join(dir, "chat_template.jinja");
    if (is_file(jinja)) return read_file(jinja, max_template_bytes);
    const std::string config = path_join(dir, "tokenizer_config.json");
    if (!is_file(config)) return std::nullopt;
    const std::optional<Json> found = Json::parse_file(config).as_object().find("chat_template");
    if (!found) return std::nullopt;
    if (!found->is_array()) return std::string(found->as_string());
    for (size_t i = 0; i < found->size(); ++i) {
        if (found->at(i).get_string("name") == "default") return found->at(i).get_string("template");
    }
    return std::nullopt;
}

std::optional<int32_t> end_of_turn(ChatFormat format, const Tokenizer& tokenizer) {
    if (format == ChatFormat::llama3) return tokenizer.id_of("<|eot_id|>");
    if (format == ChatFormat::chatml) return tokenizer.id_of("<|im_end|>");
    return std::nullopt;
}

std::vector<ChatSegment> chat_segments(ChatFormat format, const Tokenizer& tokenizer,
                                       const ChatPrompt& prompt, std::optional<int32_t> bos_id,
                                       int32_t eos_id) {
    Writer out(tokenizer);
    switch (format) {
        case ChatFormat::plain:
            REFRAG_DCHECK(false);
            break;
        case ChatFormat::llama2:
            write_llama2(out, prompt, bos_id, eos_id);
            break;
        case ChatFormat::llama3:
            out.token(bos_id);
            write_roles(out, prompt, llama3_marks);
            break;
        case ChatFormat::chatml:
            out.token(bos_id);
            write_roles(out, prompt, chatml_marks);
            break;
        case ChatFormat::mistral: {
            const std::optional<int32_t> mark = tokenizer.id_of("[INST]");
            write_mistral(out, prompt, bos_id, eos_id, mark && tokenizer.is_special(*mark));
            break;
        }
    }
    return out.take();
}

}  // namespace refrag
