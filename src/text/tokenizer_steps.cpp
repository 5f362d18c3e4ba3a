// Reads the steps of tokenizer.json around the model: normalizer, pre-tokenizer, decoder, post-processor.
#include <algorithm>
#include <charconv>
#include <optional>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"
#include "text/byte_level.h"
#include "text/tokenizer_loader.h"

namespace refrag {

namespace {

std::string string_type(const Json& component) {
    if (!component.is_object()) component.refuse("an object");
    return component.get_string("type");
}

// {"String": "x"}; a regular expression, which only Split knows some of, is refused with its text.
std::string literal_pattern(const Json& component) {
    const Json pattern = component.get_object("pattern");
    if (const auto regex = pattern.find("Regex"))
        regex->refuse("a String pattern (this regular expression is not supported)");
    pattern.check_keys({"String"});
    std::string text = pattern.get_string("String");
    if (text.empty()) pattern.get("String").refuse("at least one character");
    return text;
}

std::string one_character(const Json& component, const char* key) {
    std::string text = component.get_string(key);
    if (text.empty() || decode_utf8(text, 0).bytes != text.size()) component.get(key).refuse("one character");
    return text;
}

std::string replaced(std::string_view text, std::string_view pattern, std::string_view content) {
    std::string out;
    size_t at = 0;
    for (size_t found = 0; (found = text.find(pattern, at)) != std::string_view::npos;
         at = found + pattern.size())
        out.append(text.substr(at, found - at)).append(content);
    return out.append(text.substr(at));
}

// The byte that a piece "<0xNN>" spells.
std::optional<uint8_t> fallback_byte(std::string_view piece) {
    if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return std::nullopt;
    uint8_t byte = 0;
    const auto result = std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16);
    if (result.ec != std::errc() || result.ptr != piece.data() + 5) return std::nullopt;
    return byte;
}

// Metaspace, as pre-tokenizer and as decoder; `splits` is what else the pre-tokenizer does.
Rewrite read_metaspace(const Json& component, bool& splits) {
    component.check_keys({"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"});
    Rewrite step{Rewrite::Kind::metaspace};
    step.content = one_character(component, "replacement");
    const std::string scheme = component.get_string_or("prepend_scheme", "always");
    if (scheme == "always")
        step.scheme = Rewrite::Scheme::always;
    else if (scheme == "first")
        step.scheme = Rewrite::Scheme::first;
    else if (scheme == "never")
        step.scheme = Rewrite::Scheme::never;
    else
        component.get("prepend_scheme").refuse("\"always\", \"first\" or \"never\"");
    if (!component.get_bool_or("add_prefix_space", true) && step.scheme != Rewrite::Scheme::never)
        component.get("add_prefix_space").refuse("true, or \"prepend_scheme\": \"never\"");
    splits = component.get_bool_or("split", true);
    return step;
}

// Published tokenizers stay below 50.
constexpr double max_growth = 128.0;

// Bytes of a normal form for each byte of text, at most (UAX 15, "Maximum Expansion Factor").
double normal_form_growth(NormalForm form) {
    return form == NormalForm::nfkc || form == NormalForm::nfkd ? 11.0 : 3.0;
}

}  // namespace

void TokenizerLoader::grow(const Json& component, double& growth, double factor) {
    growth *= factor;
    if (growth > max_growth)
        fail(Status::bad_input, component.where(), ": the steps up to this one may make a text ", growth,
             " times as long: expected at most ", max_growth, " times");
}

void TokenizerLoader::grow_by_replacing(const Json& component, double& growth, std::string_view pattern,
                                        std::string_view content) {
    grow(component, growth,
         std::max(1.0, static_cast<double>(content.size()) / static_cast<double>(pattern.size())));
}

// ---- normalizer

void TokenizerLoader::read_normalizer(const Json& component) {
    if (string_type(component) != "Sequence") return read_normalizer_step(component);
    component.check_keys({"type", "normalizers"});
    const Json list = component.get_array("normalizers");
    for (size_t i = 0; i < list.size(); ++i) read_normalizer_step(list.at(i));
}

void TokenizerLoader::read_normalizer_step(const Json& component) {
    const std::string type = string_type(component);
    const auto form = [&](NormalForm value) {
        Rewrite step{Rewrite::Kind::normal_form};
        step.form = value;
        component.check_keys({"type"});
        grow(component, text_growth, normal_form_growth(value));
        tables.normalizer.push_back(step);
    };
    if (type == "NFC") return form(NormalForm::nfc);
    if (type == "NFD") return form(NormalForm::nfd);
    if (type == "NFKC") return form(NormalForm::nfkc);
    if (type == "NFKD") return form(NormalForm::nfkd);
    Rewrite step{Rewrite::Kind::prepend};
    if (type == "Prepend") {
        component.check_keys({"type", "prepend"});
        step.content = component.get_string("prepend");
        grow(component, text_growth, 1.0 + static_cast<double>(step.content.size()));
    } else if (type == "Replace") {
        component.check_keys({"type", "pattern", "content"});
        step.kind = Rewrite::Kind::replace;
        step.pattern = literal_pattern(component);
        step.content = component.get_string("content");
        grow_by_replacing(component, text_growth, step.pattern, step.content);
    } else if (type == "Strip") {
        component.check_keys({"type", "strip_left", "strip_right"});
        step.kind = Rewrite::Kind::strip;
        step.strip_left = component.get_bool("strip_left");
        step.strip_right = component.get_bool("strip_right");
    } else {
        unsupported(component, "NFC, NFD, NFKC, NFKD, Prepend, Replace, Strip or a Sequence of them");
    }
    tables.normalizer.push_back(step);
}

// A text as the normalizer leaves it.
std::string TokenizerLoader::normalized(std::string_view content) const {
    std::string text(content);
    for (const Rewrite& step : tables.normalizer) {
        const std::string source = std::move(text);
        TextEdit edit(source);
        if (!source.empty()) step.apply(0, source.size(), true, edit);
        text = edit.text();
    }
    return text;
}

// ---- pre-tokenizer

void TokenizerLoader::read_pre_tokenizer(const Json& component) {
    if (component.is_null()) return;
    if (string_type(component) != "Sequence") return read_pre_tokenizer_step(component);
    component.check_keys({"type", "pretokenizers"});
    const Json list = component.get_array("pretokenizers");
    for (size_t i = 0; i < list.size(); ++i) read_pre_tokenizer_step(list.at(i));
}

void TokenizerLoader::read_pre_tokenizer_step(const Json& component) {
    const std::string type = string_type(component);
    if (byte_level) unsupported(component, "nothing after ByteLevel");
    if (type == "ByteLevel") {
        component.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
        byte_level = true;
        if (component.get_bool("add_prefix_space")) {
            grow(component, text_growth, 2.0);
            tables.pre_tokenizer.emplace_back(Rewrite{Rewrite::Kind::prefix_space});
        }
        if (component.get_bool_or("use_regex", true)) tables.pre_tokenizer.emplace_back(Split{});
    } else if (type == "Split") {
        read_split(component);
    } else if (type == "Digits") {
        component.check_keys({"type", "individual_digits"});
        Split step;
        step.target = Split::Target::digit;
        step.behaviour = component.get_bool("individual_digits") ? Split::Behaviour::isolated
                                                                 : Split::Behaviour::contiguous;
        tables.pre_tokenizer.emplace_back(step);
    } else if (type == "Metaspace") {
        bool splits = true;
        const Rewrite step = read_metaspace(component, splits);
        grow(component, text_growth, 1.0 + static_cast<double>(step.content.size()));
        tables.pre_tokenizer.emplace_back(step);
        if (!splits) return;
        Split split;
        split.target = Split::Target::literal;
        split.literal = step.content;
        split.behaviour = Split::Behaviour::merged_with_next;
        tables.pre_tokenizer.emplace_back(split);
    } else {
        unsupported(component, "ByteLevel, Split, Digits, Metaspace or a Sequence of them");
    }
}

void TokenizerLoader::read_split(const Json& component) {
    component.check_keys({"type", "pattern", "behavior", "invert"});
    const std::string behaviour = component.get_string("behavior");
    const bool invert = component.get_bool("invert");
    Split step;
    if (const auto regex = component.get_object("pattern").find("Regex")) {
        component.get("pattern").check_keys({"Regex"});
        const auto pattern = word_pattern_of(regex->as_string());
        if (!pattern)
            fail(Status::bad_input, regex->where(), ": expected ", known_word_patterns(),
                 ", found the regular expression \"", printable(regex->as_string(), 400), "\"");
        step.pattern = *pattern;
        // The matches leave nothing between them, so these say the same: every match is a word.
        if (!(behaviour == "Isolated" || (behaviour == "Removed" && invert)))
            component.get("behavior").refuse("\"Isolated\", or \"Removed\" with \"invert\"");
    } else {
        step.target = Split::Target::literal;
        step.literal = literal_pattern(component);
        if (invert) component.get("invert").refuse("false");
        if (behaviour == "Isolated")
            step.behaviour = Split::Behaviour::isolated;
        else if (behaviour == "Removed")
            step.behaviour = Split::Behaviour::removed;
        else if (behaviour == "MergedWithPrevious")
            step.behaviour = Split::Behaviour::merged_with_previous;
        else if (behaviour == "MergedWithNext")
            step.behaviour = Split::Behaviour::merged_with_next;
        else if (behaviour == "Contiguous")
            step.behaviour = Split::Behaviour::contiguous;
        else
            component.get("behavior")
                .refuse("Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous");
    }
    tables.pre_tokenizer.emplace_back(step);
}

// ---- decoder

void TokenizerLoader::read_decoder(const Json& component) {
    TokenDecoder& decoder = tables.decoder;
    if (component.is_null()) {
        decoder.separator = " ";
        return;
    }
    const std::string type = string_type(component);
    if (type == "ByteLevel") {
        component.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
        decoder.byte_level = true;
    } else if (type == "Metaspace") {
        bool splits = true;
        const Rewrite step = read_metaspace(component, splits);
        decoder_replaces_.emplace_back(step.content, " ");
        if (step.scheme != Rewrite::Scheme::never) decoder.dropped_in_first = step.content;
    } else if (type == "Sequence") {
        component.check_keys({"type", "decoders"});
        read_decoder_steps(component.get_array("decoders"));
    } else {
        unsupported(component,
                    "ByteLevel, Metaspace, a Sequence of Replace, ByteFallback, Fuse and Strip, or null");
    }
}

// Any number of Replace, then ByteFallback, Fuse, Strip: each may be missing, but Strip needs Fuse before it.
void TokenizerLoader::read_decoder_steps(const Json& list) {
    const std::string_view order[] = {"Replace", "ByteFallback", "Fuse", "Strip"};
    size_t reached = 0;
    bool fused = false;
    for (size_t i = 0; i < list.size(); ++i) {
        const Json step = list.at(i);
        const std::string type = string_type(step);
        if (list.size() == 1 && (type == "ByteLevel" || type == "Metaspace")) return read_decoder(step);
        while (reached < 4 && order[reached] != type) ++reached;
        if (reached == 4 || (type == "Strip" && !fused))
            unsupported(step, "Replace, ByteFallback, Fuse and Strip, in this order");
        if (type == "Replace") {
            step.check_keys({"type", "pattern", "content"});
            decoder_replaces_.emplace_back(literal_pattern(step), step.get_string("content"));
            grow_by_replacing(step, piece_growth, decoder_replaces_.back().first,
                              decoder_replaces_.back().second);
        } else if (type == "ByteFallback") {
            tables.decoder.byte_fallback = true;
        } else if (type == "Fuse") {
            fused = true;
        } else {
            step.check_keys({"type", "content", "start", "stop"});
            if (step.get_int("stop") != 0) step.get("stop").refuse("0 (not supported)");
            tables.decoder.strip = one_character(step, "content");
            tables.decoder.n_strip = static_cast<size_t>(step.get_int("start", 0, INT32_MAX));
        }
        if (type != "Replace") ++reached;
    }
}

// Fills in what a token with this spelling stands for.
void TokenizerLoader::index_spelling(size_t id, std::string_view spelling) {
    if (tables.decoder.byte_level) {
        tables.bytes[id] = piece_to_bytes(spelling);
        return;
    }
    std::string text(spelling);
    for (const auto& [pattern, content] : decoder_replaces_) text = replaced(text, pattern, content);
    if (const std::string& dropped = tables.decoder.dropped_in_first; !dropped.empty())
        tables.first_bytes[id] = replaced(spelling, dropped, "");
    if (const auto byte = tables.decoder.byte_fallback ? fallback_byte(text) : std::nullopt) {
        tables.byte_token[id] = true;
        text.assign(1, static_cast<char>(*byte));
    }
    tables.bytes[id] = std::move(text);
}

// ---- post-processor

// The template's token, given with its id: both must agree with the vocabulary.
int32_t TokenizerLoader::template_token(const Json& where, std::string_view piece, int64_t id) const {
    const auto found = tables.ids.find(piece);
    if (found == tables.ids.end() || found->second != id)
        fail(Status::bad_input, where.where(), ": \"", printable(piece, 60), "\" with id ", id,
             ": expected the id it has in the vocabulary, found ",
             found == tables.ids.end() ? std::string("no such piece") : std::to_string(found->second));
    return found->second;
}

void TokenizerLoader::read_post_processor(const Json& component) {
    if (!component.is_object()) unsupported(component, "an object");
    const std::string type = string_type(component);
    if (type == "ByteLevel") {  // only trims offsets, and ours tile the text instead
        component.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
        return;
    }
    if (type == "RobertaProcessing" || type == "BertProcessing") {
        component.check_keys({"type", "sep", "cls", "trim_offsets", "add_prefix_space"});
        const auto pair = [&](const char* key) {
            const Json value = component.get_array(key);
            if (value.size() != 2) value.refuse("[piece, id]");
            return template_token(value, value.at(0).as_string(), value.at(1).as_int(0, max_token_id));
        };
        wrap({pair("cls")}, {pair("sep")});
    } else if (type == "TemplateProcessing") {
        read_template(component);
    } else if (type == "Sequence") {
        component.check_keys({"type", "processors"});
        const Json list = component.get_array("processors");
        for (size_t i = 0; i < list.size(); ++i) {
            if (list.at(i).is_object() && string_type(list.at(i)) == "Sequence")
                unsupported(list.at(i), "no sequence within a sequence");
            read_post_processor(list.at(i));
        }
    } else {
        unsupported(component,
                    "ByteLevel, RobertaProcessing, BertProcessing, TemplateProcessing or Sequence");
    }
}

// {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], "special_tokens": {"<s>":
// {"ids": [..]}}}
void TokenizerLoader::read_template(const Json& component) {
    component.check_keys({"type", "single", "pair", "special_tokens"});
    const Json single = component.get_array("single");
    const Json table = component.get_object("special_tokens");
    std::vector<int32_t> before;
    std::vector<int32_t> after;
    bool text_seen = false;
    for (size_t i = 0; i < single.size(); ++i) {
        const Json item = single.at(i);
        item.check_keys({"SpecialToken", "Sequence"});
        if (item.size() != 1) item.refuse("one SpecialToken or Sequence");
        if (const auto text = item.find("Sequence")) {
            if (text->get_string("id") != "A") text->get("id").refuse("\"A\"");
            if (text_seen) item.refuse("the text once");
            text_seen = true;
            continue;
        }
        const Json entry = table.get_object(item.get_object("SpecialToken").get_string("id"));
        const Json ids = entry.get_array("ids");
        const Json tokens = entry.get_array("tokens");
        if (ids.size() != tokens.size()) entry.refuse("as many ids as tokens");
        for (size_t j = 0; j < ids.size(); ++j)
            (text_seen ? after : before)
                .push_back(
                    template_token(entry, tokens.at(j).as_string(), ids.at(j).as_int(0, max_token_id)));
    }
    if (!text_seen) single.refuse("the text once");
    wrap(std::move(before), after);
}

// Puts another layer around the template so far.
void TokenizerLoader::wrap(std::vector<int32_t> before, const std::vector<int32_t>& after) {
    before.insert(before.end(), tables.template_prefix.begin(), tables.template_prefix.end());
    tables.template_prefix = std::move(before);
    tables.template_suffix.insert(tables.template_suffix.end(), after.begin(), after.end());
}

}  // namespace refrag
