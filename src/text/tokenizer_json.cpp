// Reads tokenizer.json into a Tokenizer's tables. A file is a list of components (normalizer, pre-tokenizer,
// model, post-processor, decoder); each is either understood exactly or refused by its name.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"
#include "io/json.h"
#include "text/byte_level.h"
#include "text/tokenizer.h"
#include "text/tokenizer_tables.h"

namespace refrag {

namespace {

constexpr uint64_t max_tokenizer_bytes = 256u << 20;
constexpr int64_t max_id = (1 << 22) - 1;

// "component: expected X, found Y" for a component that the runtime does not do.
[[noreturn]] void unsupported(const Json& component, std::string_view expected) {
    const auto type = component.is_object() ? component.find("type") : std::nullopt;
    if (type && type->is_string())
        fail(Status::bad_input, component.where(), ": unsupported: expected ", expected, ", found \"",
             printable(type->as_string(), 60), "\"");
    component.refuse(expected);
}

std::string type_of(const Json& component) {
    return component.get_string("type");
}

}  // namespace

// Fills the tables from the document, component by component.
struct TokenizerLoader {
    using Tables = Tokenizer::Tables;
    Tables& tables;

    static Tokenizer load(const Json& root) {
        auto tables = std::make_shared<Tables>();
        TokenizerLoader loader{*tables};
        root.as_object().check_keys({"version", "truncation", "padding", "added_tokens", "normalizer",
                                     "pre_tokenizer", "post_processor", "decoder", "model"});
        if (root.get_string_or("version", "1.0") != "1.0") root.get("version").refuse("\"1.0\"");
        if (const auto normalizer = root.find("normalizer")) loader.read_normalizer(*normalizer);
        loader.read_pre_tokenizer(root.get("pre_tokenizer"));
        loader.read_decoder(root.get("decoder"));
        const Json model = root.get_object("model");
        loader.check_model(model);
        loader.read_vocab(model.get_object("vocab"));
        if (const auto added = root.find("added_tokens")) loader.read_added_tokens(added->as_array());
        loader.index_pieces();
        loader.read_byte_ids(model);
        loader.read_merges(model.get_array("merges"));
        if (const auto processor = root.find("post_processor")) loader.read_post_processor(*processor);
        return Tokenizer(std::move(tables));
    }

    void read_normalizer(const Json& normalizer) {
        if (type_of(normalizer) == "Sequence" && normalizer.get_array("normalizers").size() == 0) return;
        unsupported(normalizer, "no normalizer");
    }

    void read_pre_tokenizer(const Json& component) {
        if (!component.is_object() || type_of(component) != "ByteLevel") unsupported(component, "ByteLevel");
        component.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
        tables.add_prefix_space = component.get_bool("add_prefix_space");
        tables.pattern = component.get_bool_or("use_regex", true) ? WordPattern::gpt2 : WordPattern::whole;
    }

    void read_decoder(const Json& component) {
        if (!component.is_object() || type_of(component) != "ByteLevel") unsupported(component, "ByteLevel");
        component.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    }

    void check_model(const Json& model) {
        if (model.has("type") && type_of(model) != "BPE") unsupported(model, "BPE");
        model.check_keys({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                          "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
        if (model.get_number_or("dropout", 0) != 0) model.get("dropout").refuse("no dropout");
        for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
            if (!model.get_string_or(key, "").empty()) model.get(key).refuse("none (not supported)");
        for (const char* key : {"byte_fallback", "ignore_merges"})
            if (model.get_bool_or(key, false)) model.get(key).refuse("false (not supported)");
        // unk_token and fuse_unk never matter: read_byte_ids makes sure that every byte has a token.
        model.get_string_or("unk_token", "");
        model.get_bool_or("fuse_unk", false);
    }

    // Puts a piece at its id.
    void place(std::string_view piece, int64_t id, const Json& where) {
        if (piece.empty()) fail(Status::bad_input, where.where(), ": an empty piece cannot be a token");
        const auto index = static_cast<size_t>(id);
        if (index >= tables.pieces.size()) tables.pieces.resize(index + 1);
        if (!tables.pieces[index].empty())
            fail(Status::bad_input, where.where(), ": id ", id, " is both \"",
                 printable(tables.pieces[index], 60), "\" and \"", printable(piece, 60), "\"");
        tables.pieces[index] = piece;
    }

    void read_vocab(const Json& vocab) {
        if (vocab.size() == 0) vocab.refuse("at least one piece");
        tables.pieces.reserve(vocab.size());
        for (size_t i = 0; i < vocab.size(); ++i) {
            const Json id = vocab.at(i);
            place(vocab.key_at(i), id.as_int(0, max_id), id);
        }
        n_vocab = static_cast<int64_t>(vocab.size());
    }
    int64_t n_vocab = 0;

    // An added token is a piece of the vocabulary, or takes the next free id.
    void read_added_tokens(const Json& list) {
        std::unordered_map<std::string, int64_t> known;
        for (size_t id = 0; id < tables.pieces.size(); ++id)
            if (!tables.pieces[id].empty()) known.emplace(tables.pieces[id], static_cast<int64_t>(id));
        std::unordered_set<std::string> seen;
        int64_t highest = -1;
        tables.special.assign(tables.pieces.size(), false);
        for (size_t i = 0; i < list.size(); ++i) {
            const Json entry = list.at(i);
            entry.check_keys({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
            AddedToken token;
            token.id = static_cast<int32_t>(entry.get_int("id", 0, max_id));
            token.content = entry.get_string("content");
            token.single_word = entry.get_bool("single_word");
            token.lstrip = entry.get_bool("lstrip");
            token.rstrip = entry.get_bool("rstrip");
            token.normalized = entry.get_bool("normalized");
            token.special = entry.get_bool("special");

            const auto found = known.find(token.content);
            const int64_t expected = found != known.end() ? found->second : std::max(n_vocab, highest + 1);
            if (token.id != expected)
                fail(Status::bad_input, entry.where(), ": added token \"", printable(token.content, 60),
                     "\": expected id ", expected, ", found ", token.id);
            if (!seen.insert(token.content).second)
                fail(Status::bad_input, entry.where(), ": added token \"", printable(token.content, 60),
                     "\" occurs twice");
            if (found == known.end()) {
                place(token.content, token.id, entry);
                known.emplace(token.content, token.id);
                tables.special.resize(tables.pieces.size(), false);
            }
            highest = std::max<int64_t>(highest, token.id);
            if (token.special) tables.special[static_cast<size_t>(token.id)] = true;
            (token.normalized ? tables.normalized_added : tables.raw_added).add(token);
        }
    }

    void index_pieces() {
        tables.special.resize(tables.pieces.size(), false);
        tables.bytes.resize(tables.pieces.size());
        tables.ids.reserve(tables.pieces.size());
        for (size_t id = 0; id < tables.pieces.size(); ++id) {
            if (tables.pieces[id].empty()) continue;
            tables.ids.emplace(tables.pieces[id], static_cast<int32_t>(id));
            tables.bytes[id] = piece_to_bytes(tables.pieces[id]);
        }
    }

    void read_byte_ids(const Json& model) {
        for (int byte = 0; byte < 256; ++byte) {
            std::string piece;
            append_utf8(piece, byte_to_char(static_cast<uint8_t>(byte)));
            const auto found = tables.ids.find(piece);
            if (found == tables.ids.end())
                fail(Status::bad_input, model.where(), ": the vocabulary has no piece \"", piece,
                     "\" for byte ", byte, ": expected one for every byte");
            tables.bpe.byte_ids[static_cast<size_t>(byte)] = found->second;
        }
    }

    // A merge is "left right" in older files, ["left", "right"] in newer ones.
    static std::pair<std::string_view, std::string_view> halves(const Json& merge) {
        if (merge.is_array() && merge.size() == 2) return {merge.at(0).as_string(), merge.at(1).as_string()};
        if (merge.is_string()) {
            const std::string_view text = merge.as_string();
            const size_t space = text.find(' ');
            if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos)
                return {text.substr(0, space), text.substr(space + 1)};
        }
        merge.refuse("two pieces, as \"left right\" or [\"left\", \"right\"]");
    }

    void read_merges(const Json& merges) {
        tables.bpe.merges = MergeTable(merges.size());
        uint32_t rank = 0;
        for (size_t i = 0; i < merges.size(); ++i) {
            const Json merge = merges.at(i);
            if (i == 0 && merge.is_string() && merge.as_string().starts_with("#version")) continue;
            const auto [left, right] = halves(merge);
            const auto id_of = [&](std::string_view piece) {
                const auto found = tables.ids.find(piece);
                if (found == tables.ids.end())
                    fail(Status::bad_input, merge.where(), ": merges need \"", printable(piece, 60),
                         "\", which is not in the vocabulary");
                return found->second;
            };
            const int32_t id = id_of(std::string(left).append(right));
            if (!tables.bpe.merges.add(id_of(left), id_of(right), {rank++, id}))
                fail(Status::bad_input, merge.where(), ": the merge of \"", printable(left, 60), "\" and \"",
                     printable(right, 60), "\" occurs twice");
        }
    }

    // The template's token, given with its id: both must agree with the vocabulary.
    int32_t template_token(const Json& where, std::string_view piece, int64_t id) {
        const auto found = tables.ids.find(piece);
        if (found == tables.ids.end() || found->second != id)
            fail(Status::bad_input, where.where(), ": \"", printable(piece, 60), "\" with id ", id,
                 ": expected the id it has in the vocabulary, found ",
                 found == tables.ids.end() ? std::string("no such piece") : std::to_string(found->second));
        return found->second;
    }

    void read_post_processor(const Json& component) {
        if (!component.is_object()) unsupported(component, "an object");
        const std::string type = type_of(component);
        if (type == "ByteLevel") return;  // only trims offsets, and ours tile the text instead
        if (type == "RobertaProcessing" || type == "BertProcessing") {
            const auto pair = [&](const char* key) {
                const Json value = component.get_array(key);
                if (value.size() != 2) value.refuse("[piece, id]");
                return template_token(value, value.at(0).as_string(), value.at(1).as_int(0, max_id));
            };
            wrap({pair("cls")}, {pair("sep")});
        } else if (type == "TemplateProcessing") {
            read_template(component);
        } else if (type == "Sequence") {
            const Json list = component.get_array("processors");
            for (size_t i = 0; i < list.size(); ++i) {
                if (list.at(i).is_object() && type_of(list.at(i)) == "Sequence")
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
    void read_template(const Json& component) {
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
                    .push_back(template_token(entry, tokens.at(j).as_string(), ids.at(j).as_int(0, max_id)));
        }
        if (!text_seen) single.refuse("the text once");
        wrap(std::move(before), std::move(after));
    }

    // Puts another layer around the template so far.
    void wrap(std::vector<int32_t> before, const std::vector<int32_t>& after) {
        before.insert(before.end(), tables.template_prefix.begin(), tables.template_prefix.end());
        tables.template_prefix = std::move(before);
        tables.template_suffix.insert(tables.template_suffix.end(), after.begin(), after.end());
    }
};

Tokenizer Tokenizer::from_file(const std::string& path) {
    return TokenizerLoader::load(Json::parse_file(path, max_tokenizer_bytes));
}

Tokenizer Tokenizer::from_json(std::string_view json, const std::string& name) {
    return TokenizerLoader::load(Json::parse(json, name));
}

}  // namespace refrag
