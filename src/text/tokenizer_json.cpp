// Reads tokenizer.json: the document as a whole, and its model with vocabulary, merges and added tokens. The
// steps around the model are in tokenizer_steps.cpp.
#include <algorithm>
#include <array>
#include <cstdio>
#include <unordered_set>
#include <utility>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"
#include "text/byte_level.h"
#include "text/tokenizer_loader.h"

namespace refrag {

void unsupported(const Json& component, std::string_view expected) {
    const auto type = component.is_object() ? component.find("type") : std::nullopt;
    if (type && type->is_string())
        fail(Status::bad_input, component.where(), ": unsupported: expected ", expected, ", found \"",
             printable(type->as_string(), 60), "\"");
    component.refuse(expected);
}

namespace {

// A merge is "left right" in older files, ["left", "right"] in newer ones.
MergeHalves halves_of(const Json& merge) {
    if (merge.is_array() && merge.size() == 2) return {merge.at(0).as_string(), merge.at(1).as_string()};
    if (merge.is_string()) {
        const std::string_view text = merge.as_string();
        const size_t space = text.find(' ');
        if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos)
            return {text.substr(0, space), text.substr(space + 1)};
    }
    merge.refuse("two pieces, as \"left right\" or [\"left\", \"right\"]");
}

}  // namespace

Tokenizer TokenizerLoader::load(const Json& root) {
    const Json model = root.as_object().get_object("model");
    const Json vocab = model.get_object("vocab");
    const Json merges = model.get_array("merges");
    std::vector<MergeHalves> halves;
    halves.reserve(merges.size());
    for (size_t i = 0; i < merges.size(); ++i) {
        const Json merge = merges.at(i);
        if (i == 0 && merge.is_string() && merge.as_string().starts_with("#version")) continue;
        halves.push_back(halves_of(merge));
    }
    const size_t n_left_out = merges.size() - halves.size();

    auto tables = std::make_shared<Tables>();
    TokenizerLoader loader(*tables);
    root.check_keys({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                     "post_processor", "decoder", "model"});
    if (root.get_string_or("version", "1.0") != "1.0") root.get("version").refuse("\"1.0\"");
    if (const auto normalizer = root.find("normalizer")) loader.read_normalizer(*normalizer);
    loader.read_pre_tokenizer(root.get("pre_tokenizer"));
    loader.read_decoder(root.get("decoder"));
    loader.check_model(model);
    loader.read_vocab(vocab);
    if (const auto added = root.find("added_tokens")) loader.read_added_tokens(added->as_array());
    loader.index_pieces();
    const std::string unk = model.get_string_or("unk_token", "");
    loader.index_symbols(
        unk, [&] { return model.where(); }, [&] { return model.get("unk_token").where(); });
    loader.index_merges(halves, [&](size_t i) { return merges.at(i + n_left_out).where(); });
    if (loader.ignore_merges) loader.read_whole_words();
    if (const auto processor = root.find("post_processor")) loader.read_post_processor(*processor);
    return Tokenizer(std::move(tables));
}

Tokenizer TokenizerLoader::load(const TokenizerSteps& steps, const PieceList& pieces, ItemPlace piece_place,
                                std::span<const MergeHalves> merges, ItemPlace merge_place, Place file) {
    auto tables = std::make_shared<Tables>();
    TokenizerLoader loader(*tables);
    tables->normalizer = steps.normalizer;
    tables->pre_tokenizer = steps.pre_tokenizer;
    tables->decoder = steps.decoder;
    tables->bpe.fuse_unk = steps.fuse_unk;
    loader.decoder_replaces_ = steps.decoder_replaces;
    loader.byte_level = steps.byte_level;
    loader.byte_fallback = steps.byte_fallback;
    loader.ignore_merges = steps.ignore_merges;
    size_t n = 0;
    for (size_t id = 0; id < pieces.size(); ++id) {
        if (pieces[id].empty()) continue;
        loader.place(pieces[id], static_cast<int64_t>(id), [&] { return piece_place(id); });
        ++n;
    }
    loader.vocabulary_placed(n);
    for (const size_t id : steps.unused) loader.in_vocab[id] = false;
    loader.add_tokens(steps.added, [&](size_t) { return file(); });
    loader.index_pieces();
    loader.index_symbols(steps.unk_token, file, file);
    loader.index_merges(merges, merge_place);
    if (loader.ignore_merges) loader.read_whole_words();
    const auto ids_of = [&](const std::vector<std::string>& names) {
        std::vector<int32_t> ids;
        ids.reserve(names.size());
        for (const std::string& name : names) ids.push_back(tables->ids.at(name));
        return ids;
    };
    loader.wrap(ids_of(steps.template_prefix), ids_of(steps.template_suffix));
    return Tokenizer(std::move(tables));
}

void TokenizerLoader::check_model(const Json& model) {
    if (model.has("type") && model.get_string("type") != "BPE") unsupported(model, "BPE");
    model.check_keys({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                      "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
    if (model.get_number_or("dropout", 0) != 0) model.get("dropout").refuse("no dropout");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (!model.get_string_or(key, "").empty()) model.get(key).refuse("none (not supported)");
    byte_fallback = model.get_bool_or("byte_fallback", false);
    ignore_merges = model.get_bool_or("ignore_merges", false);
    tables.bpe.fuse_unk = model.get_bool_or("fuse_unk", false);
}

// Puts a piece at its id.
void TokenizerLoader::place(std::string_view piece, int64_t id, Place where) {
    if (piece.empty()) fail(Status::bad_input, where(), ": an empty piece cannot be a token");
    const auto index = static_cast<size_t>(id);
    if (index >= tables.pieces.size()) tables.pieces.resize(index + 1);
    if (!tables.pieces[index].empty())
        fail(Status::bad_input, where(), ": id ", id, " is both \"", printable(tables.pieces[index], 60),
             "\" and \"", printable(piece, 60), "\"");
    tables.pieces[index] = piece;
}

void TokenizerLoader::read_vocab(const Json& vocab) {
    if (vocab.size() == 0) vocab.refuse("at least one piece");
    tables.pieces.reserve(vocab.size());
    for (size_t i = 0; i < vocab.size(); ++i) {
        const Json id = vocab.at(i);
        place(vocab.key_at(i), id.as_int(0, max_token_id), [&] { return id.where(); });
    }
    vocabulary_placed(vocab.size());
}

// n pieces are in their places, which are the model's own.
void TokenizerLoader::vocabulary_placed(size_t n) {
    n_vocab = static_cast<int64_t>(n);
    for (const std::string& piece : tables.pieces) in_vocab.push_back(!piece.empty());
}

void TokenizerLoader::read_added_tokens(const Json& list) {
    std::vector<AddedToken> tokens;
    for (size_t i = 0; i < list.size(); ++i) {
        const Json entry = list.at(i);
        entry.check_keys({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
        AddedToken& token = tokens.emplace_back();
        token.id = static_cast<int32_t>(entry.get_int("id", 0, max_token_id));
        token.content = entry.get_string("content");
        token.single_word = entry.get_bool("single_word");
        token.lstrip = entry.get_bool("lstrip");
        token.rstrip = entry.get_bool("rstrip");
        token.normalized = entry.get_bool("normalized");
        token.special = entry.get_bool("special");
    }
    add_tokens(tokens, [&](size_t i) { return list.at(i).where(); });
}

// An added token is a piece of the vocabulary, or takes the next free id.
void TokenizerLoader::add_tokens(std::span<const AddedToken> tokens, ItemPlace where) {
    std::unordered_map<std::string, int64_t> known;
    for (size_t id = 0; id < tables.pieces.size(); ++id)
        if (!tables.pieces[id].empty()) known.emplace(tables.pieces[id], static_cast<int64_t>(id));
    std::unordered_set<std::string> seen;
    int64_t next = n_vocab;
    for (size_t i = 0; i < tokens.size(); ++i) {
        const AddedToken& token = tokens[i];
        const auto here = [&] { return where(i); };
        const auto found = known.find(token.content);
        const int64_t expected = found != known.end() ? found->second : next;
        if (token.id != expected)
            fail(Status::bad_input, here(), ": added token \"", printable(token.content, 60),
                 "\": expected id ", expected, ", found ", token.id);
        if (!seen.insert(token.content).second)
            fail(Status::bad_input, here(), ": added token \"", printable(token.content, 60),
                 "\" occurs twice");
        if (found == known.end()) {
            place(token.content, token.id, here);
            known.emplace(token.content, token.id);
            ++next;
        }
        add_token(token, here);
    }
}

// Notes an added token whose piece is in its place. A normalised one is looked for, and decoded, in the form
// the normalizer gives it.
void TokenizerLoader::add_token(AddedToken token, Place where) {
    const auto id = static_cast<size_t>(token.id);
    if (token.special) special_ids.push_back(token.id);
    if (token.normalized) {
        std::string content = normalized(token.content);
        if (content != token.content) decoded_as.emplace_back(token.id, content);
        token.content = std::move(content);
    }
    AddedTokenMatcher& matcher = token.normalized ? tables.normalized_added : tables.raw_added;
    if (!matcher.add(token))
        fail(Status::bad_input, where(), ": added token \"", printable(tables.pieces[id], 60),
             "\": expected another spelling than the tokens before it have, also after the normalizer");
}

void TokenizerLoader::index_pieces() {
    const size_t n = tables.pieces.size();
    in_vocab.resize(n, false);
    tables.special.assign(n, false);
    tables.ids.reserve(n);
    for (size_t id = 0; id < n; ++id)
        if (!tables.pieces[id].empty()) tables.ids.emplace(tables.pieces[id], static_cast<int32_t>(id));
    std::unordered_set<std::string_view> special_pieces;
    for (const int32_t id : special_ids) {
        tables.special[static_cast<size_t>(id)] = true;
        special_pieces.insert(tables.pieces[static_cast<size_t>(id)]);
    }

    // What decoding starts from: the piece, but for normalised added tokens their normal form. Special is
    // what is then spelled like a special token.
    std::vector<std::string> spellings = tables.pieces;
    for (const auto& [id, spelling] : decoded_as) spellings[static_cast<size_t>(id)] = spelling;
    tables.skipped.assign(n, false);
    tables.byte_token.assign(n, false);
    tables.bytes.resize(n);
    if (!tables.decoder.dropped_in_first.empty()) tables.first_bytes.resize(n);
    for (size_t id = 0; id < n; ++id) {
        if (spellings[id].empty()) continue;
        tables.skipped[id] = special_pieces.count(spellings[id]) > 0;
        index_spelling(id, spellings[id]);
    }
}

// The id of a piece of the model's own vocabulary; -1 where there is none.
int32_t TokenizerLoader::vocab_id(std::string_view piece) const {
    const auto found = tables.ids.find(piece);
    return found != tables.ids.end() && in_vocab[static_cast<size_t>(found->second)] ? found->second : -1;
}

// The tokens of single bytes or characters, and what stands for those that have none.
void TokenizerLoader::index_symbols(const std::string& unk, Place model, Place unk_place) {
    Bpe& bpe = tables.bpe;
    bpe.byte_level = byte_level;
    int n_missing = 0;
    if (byte_level) {
        for (int byte = 0; byte < 256; ++byte) {
            std::string piece;
            append_utf8(piece, byte_to_char(static_cast<uint8_t>(byte)));
            bpe.byte_ids[static_cast<size_t>(byte)] = vocab_id(piece);
            if (vocab_id(piece) >= 0) continue;
            ++n_missing;
            if (byte_fallback)
                fail(Status::bad_input, model(),
                     ": byte_fallback with a ByteLevel pre-tokenizer: the vocabulary has no piece \"", piece,
                     "\" for byte ", byte, ": expected one for every byte");
        }
        bpe.all_bytes = n_missing == 0;
    } else {
        for (size_t id = 0; id < tables.pieces.size(); ++id) {
            const std::string& piece = tables.pieces[id];
            if (!in_vocab[id] || piece.empty()) continue;
            const Utf8Step step = decode_utf8(piece, 0);
            if (step.bytes == piece.size()) bpe.char_ids.add(step.code, static_cast<int32_t>(id));
        }
        for (size_t byte = 0; byte < 256 && byte_fallback; ++byte) {
            std::array<char, 8> piece{};
            std::snprintf(piece.data(), piece.size(), "<0x%02X>", static_cast<unsigned>(byte));
            bpe.byte_ids[byte] = vocab_id(piece.data());
        }
    }
    if (unk.empty() || bpe.all_bytes) return;
    bpe.unk_id = vocab_id(unk);
    if (bpe.unk_id < 0)
        fail(Status::bad_input, unk_place(), ": expected a piece of the vocabulary, found \"",
             printable(unk, 60), "\"");
}

namespace {

// The token of the first or last byte or character of a piece, as Bpe starts from it; -1 where it has none.
int32_t edge_symbol(const Bpe& bpe, std::string_view piece, bool last) {
    size_t at = last ? piece.size() - 1 : 0;
    while (at > 0 && (static_cast<unsigned char>(piece[at]) & 0xC0) == 0x80) --at;
    const char32_t code = decode_utf8(piece, at).code;
    if (!bpe.byte_level) return bpe.char_ids.find(code);
    const auto byte = char_to_byte(code);
    return byte ? bpe.byte_ids[*byte] : -1;
}

}  // namespace

// `where` names a merge in messages.
void TokenizerLoader::index_merges(std::span<const MergeHalves> merges, ItemPlace where) {
    Bpe& bpe = tables.bpe;
    bpe.merges = MergeTable(merges.size());
    // A piece that may come from elsewhere than its own characters would make edge_symbol wrong.
    std::unordered_set<int32_t> irregular(bpe.byte_level ? bpe.byte_ids.end() : bpe.byte_ids.begin(),
                                          bpe.byte_ids.end());
    irregular.insert(bpe.unk_id);
    irregular.erase(-1);
    bpe.has_joints = true;
    std::unordered_set<uint64_t> joints;
    for (size_t i = 0; i < merges.size(); ++i) {
        const auto [left, right] = merges[i];
        const auto id_of = [&](std::string_view piece) {
            const int32_t id = vocab_id(piece);
            if (id < 0)
                fail(Status::bad_input, where(i), ": merges need \"", printable(piece, 60),
                     "\", which is not in the vocabulary");
            return id;
        };
        const int32_t id = id_of(std::string(left).append(right));
        const int32_t left_id = id_of(left);
        const int32_t right_id = id_of(right);
        if (!bpe.merges.add(left_id, right_id, {static_cast<uint32_t>(i), id}))
            fail(Status::bad_input, where(i), ": the merge of \"", printable(left, 60), "\" and \"",
                 printable(right, 60), "\" occurs twice");
        if (irregular.count(left_id) + irregular.count(right_id) + irregular.count(id) > 0)
            bpe.has_joints = false;
        const int32_t before = edge_symbol(bpe, left, true);
        const int32_t after = edge_symbol(bpe, right, false);
        if (before >= 0 && after >= 0)
            joints.insert(static_cast<uint64_t>(before) << 32 | static_cast<uint32_t>(after));
    }
    bpe.joints = MergeTable(joints.size());
    for (const uint64_t joint : joints)
        bpe.joints.add(static_cast<int32_t>(joint >> 32), static_cast<int32_t>(joint & UINT32_MAX), {0, 0});
}

// Every piece of the vocabulary that a word can be.
void TokenizerLoader::read_whole_words() {
    for (size_t id = 0; id < tables.pieces.size(); ++id) {
        if (!in_vocab[id]) continue;
        std::optional<std::string> word = byte_level ? spelled_bytes(tables.pieces[id]) : tables.pieces[id];
        if (word) tables.bpe.whole_words.add(*std::move(word), static_cast<int32_t>(id));
    }
}

Tokenizer Tokenizer::from_json(std::string_view json, const std::string& name) {
    return TokenizerLoader::load(Json::parse(json, name));
}

Tokenizer Tokenizer::from_pieces(const std::vector<std::string>& pieces, size_t n_special,
                                 std::span<const std::pair<std::string, std::string>> merges) {
    TokenizerSteps steps;
    steps.byte_level = steps.decoder.byte_level = true;
    steps.pre_tokenizer.emplace_back(Split{});
    for (size_t id = 0; id < n_special; ++id) {
        AddedToken& token = steps.added.emplace_back();
        token.id = static_cast<int32_t>(id);
        token.content = pieces[id];
        token.special = true;
    }
    const std::vector<MergeHalves> halves(merges.begin(), merges.end());
    return TokenizerLoader::load(
        steps, pieces, [](size_t id) { return str("piece ", id); }, halves,
        [](size_t i) { return str("merge ", i); }, [] { return std::string("vocabulary"); });
}

}  // namespace refrag
