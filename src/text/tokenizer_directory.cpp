// A tokenizer in the older form, vocab.json and merges.txt: GPT-2, RoBERTa and Qwen 2 as `transformers`
// builds them. The files say less than tokenizer.json does; what they leave out is written down here.
#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/check.h"
#include "io/file.h"
#include "io/lines.h"
#include "text/tokenizer_loader.h"

namespace refrag {

namespace {

// The tokens with a role, in the order in which they are added.
constexpr const char* roles[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                 "pad_token", "cls_token", "mask_token"};

struct Family {
    const char* tokenizer_class;
    const char* model_type;
    const char* defaults[std::size(roles)];  // null: none
    bool has_template;                       // <cls> text <sep>, whatever add_bos_token says
    bool is_nfc;                             // the text is brought to NFC
    WordPattern words;
};

constexpr const char* end_of_text = "<|endoftext|>";
constexpr Family families[] = {
    {"GPT2Tokenizer",
     "gpt2",
     {end_of_text, end_of_text, end_of_text, nullptr, nullptr, nullptr, nullptr},
     false,
     false,
     WordPattern::gpt2},
    {"RobertaTokenizer",
     "roberta",
     {"<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"},
     true,
     false,
     WordPattern::gpt2},
    {"Qwen2Tokenizer",
     "qwen2",
     {nullptr, end_of_text, end_of_text, nullptr, end_of_text, nullptr, nullptr},
     false,
     true,
     WordPattern::qwen2},
};

Json read_object(const std::string& path) {
    return is_file(path) ? Json::parse_file(path, max_tokenizer_bytes).as_object() : Json::parse("{}", path);
}

// By the class's name, else the network's type, else the special tokens of the vocabulary.
const Family& find_family(const std::string& directory, const Json& config, const Json& vocab) {
    const auto find = [](std::string_view name, const char* Family::*key) {
        return std::find_if(std::begin(families), std::end(families),
                            [&](const Family& family) { return name == family.*key; });
    };
    std::string name = config.get_string_or("tokenizer_class", "");
    if (name.ends_with("Fast")) name.resize(name.size() - 4);
    // Names that say nothing of the family: transformers 5 and 4 write them for any.
    const bool any_family = name == "TokenizersBackend" || name == "PreTrainedTokenizer";
    if (!name.empty() && !any_family) {
        const Family* const family = find(name, &Family::tokenizer_class);
        if (family == std::end(families))
            config.get("tokenizer_class").refuse("GPT2Tokenizer, RobertaTokenizer or Qwen2Tokenizer");
        return *family;
    }
    const Json network = read_object(path_join(directory, "config.json"));
    const Family* const family = find(network.get_string_or("model_type", ""), &Family::model_type);
    if (family != std::end(families)) return *family;
    if (vocab.has("<s>") && vocab.has("</s>") && vocab.has("<mask>")) return families[1];
    return families[0];
}

AddedToken plain_special(std::string_view content) {
    AddedToken token;
    token.content = content;
    token.special = true;
    return token;
}

// A string, or an object with the flags.
AddedToken token_of(const Json& value) {
    if (value.is_string()) return plain_special(value.as_string());
    AddedToken token = plain_special(value.get_string("content"));
    token.lstrip = value.get_bool_or("lstrip", false);
    token.rstrip = value.get_bool_or("rstrip", false);
    token.single_word = value.get_bool_or("single_word", false);
    token.normalized = value.get_bool_or("normalized", true);
    return token;
}

// Every added token with its id and flags.
class AddedTokens {
  public:
    explicit AddedTokens(const Json& vocab) : next_(static_cast<int64_t>(vocab.size())) {
        for (size_t i = 0; i < vocab.size(); ++i)
            ids_.emplace(vocab.key_at(i), static_cast<int32_t>(vocab.at(i).as_int(0, max_token_id)));
    }
    // A later token with the same content changes the flags alone. Gives the id.
    int32_t put(AddedToken token) {
        const auto [place, is_new] = ids_.try_emplace(token.content, static_cast<int32_t>(next_));
        if (is_new) ++next_;
        token.id = place->second;
        tokens_[token.id] = token;
        return token.id;
    }
    const std::map<int32_t, AddedToken>& tokens() const { return tokens_; }

  private:
    std::unordered_map<std::string, int32_t> ids_;
    std::map<int32_t, AddedToken> tokens_;
    int64_t next_;
};

void put_at(AddedTokens& added, const AddedToken& token, int64_t id, const Json& where) {
    const int32_t found = added.put(token);
    if (found != id)
        fail(Status::bad_input, where.where(), ": added token \"", printable(token.content, 60),
             "\": expected id ", found, ", found ", id);
}

// tokenizer_config.json, or where it does not list the added tokens, special_tokens_map.json before it.
class Settings {
  public:
    explicit Settings(const std::string& directory)
        : config(read_object(path_join(directory, "tokenizer_config.json"))),
          map_(read_object(path_join(directory, "special_tokens_map.json"))),
          added_(read_object(path_join(directory, "added_tokens.json"))) {}

    const Json config;

    // The tokens with a role by its name, and all added tokens in their order.
    std::map<std::string, std::string> read(const Family& family, AddedTokens& added) const {
        std::map<std::string, AddedToken> named;
        for (size_t i = 0; i < std::size(roles); ++i) {
            if (const auto value = find(roles[i]))
                named[roles[i]] = token_of(*value);
            else if (!config.has(roles[i]) && family.defaults[i] != nullptr)
                named[roles[i]] = plain_special(family.defaults[i]);
        }
        const std::map<std::string, AddedToken> listed = put_listed(named, added);
        std::map<std::string, std::string> contents;
        for (const char* role : roles) {
            const auto found = named.find(role);
            if (found == named.end()) continue;
            const auto same = listed.find(found->second.content);
            AddedToken token = same == listed.end() ? found->second : same->second;
            token.special = true;
            contents[role] = token.content;
            added.put(token);
        }
        // transformers 4 writes lists and {"name": token}, 5 lists and the names apart.
        for (const char* key :
             {"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"}) {
            const auto tokens = find(key);
            if (!tokens) continue;
            if (!tokens->is_array() && !tokens->is_object())
                tokens->refuse("a list of tokens, or an object of them by name");
            for (size_t i = 0; i < tokens->size(); ++i) added.put(token_of(tokens->at(i)));
        }
        return contents;
    }

  private:
    bool lists_tokens() const { return config.find("added_tokens_decoder").has_value(); }

    std::optional<Json> find(const char* key) const {
        const auto value = lists_tokens() ? std::nullopt : map_.find(key);
        return value ? value : config.find(key);
    }

    // The tokens that are listed with their ids, by content.
    std::map<std::string, AddedToken> put_listed(const std::map<std::string, AddedToken>& named,
                                                 AddedTokens& added) const {
        std::map<int64_t, std::pair<AddedToken, Json>> by_id;
        if (lists_tokens()) {
            const Json list = config.get_object("added_tokens_decoder");
            for (size_t i = 0; i < list.size(); ++i) {
                AddedToken token = token_of(list.at(i).as_object());
                token.special = list.at(i).get_bool_or("special", false);
                const std::string key(list.key_at(i));
                const bool is_number = !key.empty() && key.size() < 8 &&
                                       key.find_first_not_of("0123456789") == std::string::npos;
                if (!is_number) list.at(i).refuse("an id as key");
                by_id.emplace(std::stoll(key), std::pair(token, list.at(i)));
            }
        } else {
            std::set<std::string> special;
            for (const auto& [role, token] : named) special.insert(token.content);
            for (size_t i = 0; i < added_.size(); ++i) {
                AddedToken token = plain_special(added_.key_at(i));
                token.special = special.count(token.content) > 0;
                token.normalized = !token.special;
                by_id.emplace(added_.at(i).as_int(0, max_token_id), std::pair(token, added_.at(i)));
            }
        }
        std::map<std::string, AddedToken> listed;
        for (const auto& [id, entry] : by_id) {
            put_at(added, entry.first, id, entry.second);
            listed.emplace(entry.first.content, entry.first);
        }
        return listed;
    }

    Json map_;
    Json added_;
};

// "left right" a line; blank lines and those that begin with "#version" are passed over.
void read_lines(std::string_view text, const std::string& path, std::vector<MergeHalves>& merges,
                std::vector<size_t>& line_numbers) {
    Lines lines(text);
    std::string_view line;
    while (lines.next(line)) {
        if (is_blank(line) || line.starts_with("#version")) continue;
        const size_t space = line.find(' ');
        if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos)
            fail(Status::bad_input, printable(path), ":", lines.number(),
                 ": expected two pieces with a space between, found \"", printable(line, 60), "\"");
        merges.emplace_back(line.substr(0, space), line.substr(space + 1));
        line_numbers.push_back(lines.number());
    }
}

// vocab.json's pieces by id; places[id]: where the piece stands in it.
PieceList pieces_of(const Json& vocab, std::vector<size_t>& places) {
    if (vocab.size() == 0) vocab.refuse("at least one piece");
    PieceList pieces;
    for (size_t i = 0; i < vocab.size(); ++i) {
        const Json value = vocab.at(i);
        const auto id = static_cast<size_t>(value.as_int(0, max_token_id));
        if (id >= pieces.size()) {
            pieces.resize(id + 1);
            places.resize(id + 1);
        }
        const std::string_view piece = vocab.key_at(i);
        if (piece.empty()) fail(Status::bad_input, value.where(), ": an empty piece cannot be a token");
        if (!pieces[id].empty())
            fail(Status::bad_input, value.where(), ": id ", id, " is both \"", printable(pieces[id], 60),
                 "\" and \"", printable(piece, 60), "\"");
        pieces[id] = piece;
        places[id] = i;
    }
    return pieces;
}

}  // namespace

Tokenizer TokenizerLoader::load_directory(const std::string& directory) {
    const std::string vocab_path = path_join(directory, "vocab.json");
    const std::string merges_path = path_join(directory, "merges.txt");
    REFRAG_CHECK(is_file(vocab_path) && is_file(merges_path), Status::bad_input, printable(directory),
                 ": expected tokenizer.json, or vocab.json and merges.txt; found ",
                 is_file(vocab_path)    ? "vocab.json alone"
                 : is_file(merges_path) ? "merges.txt alone"
                                        : "none of them");
    const Json vocab = Json::parse_file(vocab_path, max_tokenizer_bytes).as_object();
    const Settings settings(directory);
    const Family& family = find_family(directory, settings.config, vocab);
    AddedTokens added(vocab);
    const std::map<std::string, std::string> named = settings.read(family, added);

    TokenizerSteps steps;
    for (const auto& [id, token] : added.tokens()) steps.added.push_back(token);
    const auto piece_of = [&](const char* role) {
        const auto found = named.find(role);
        if (found == named.end())
            fail(Status::bad_input, settings.config.where(), ": a ", family.tokenizer_class, " needs a ",
                 role);
        return found->second;
    };
    const auto wants = [&](const char* key) { return settings.config.get_bool_or(key, false); };
    if (family.has_template) {
        steps.template_prefix = {piece_of("cls_token")};
        steps.template_suffix = {piece_of("sep_token")};
    } else {
        if (wants("add_bos_token")) steps.template_prefix = {piece_of("bos_token")};
        if (wants("add_eos_token")) steps.template_suffix = {piece_of("eos_token")};
    }
    if (family.is_nfc) steps.normalizer.emplace_back();
    Split words;
    words.pattern = family.words;
    steps.pre_tokenizer.emplace_back(words);
    if (wants("add_prefix_space")) {
        // GPT-2's words are ByteLevel's own, found after its space; others are cut before it.
        const auto at =
            family.words == WordPattern::gpt2 ? steps.pre_tokenizer.begin() : steps.pre_tokenizer.end();
        steps.pre_tokenizer.insert(at, Rewrite{Rewrite::Kind::prefix_space});
    }
    steps.byte_level = steps.decoder.byte_level = true;

    std::vector<size_t> places;  // in `vocab`, by id
    const PieceList pieces = pieces_of(vocab, places);
    const std::string merges_text = read_file(merges_path, max_tokenizer_bytes);
    std::vector<MergeHalves> merges;
    std::vector<size_t> line_numbers;
    read_lines(merges_text, merges_path, merges, line_numbers);
    return load(
        steps, pieces, [&](size_t id) { return vocab.at(places[id]).where(); }, merges,
        [&](size_t i) { return str(printable(merges_path), ":", line_numbers[i]); },
        [&] { return printable(directory); });
}

Tokenizer Tokenizer::from_file(const std::string& path) {
    if (!is_directory(path)) return TokenizerLoader::load(Json::parse_file(path, max_tokenizer_bytes));
    const std::string file = path_join(path, "tokenizer.json");
    if (is_file(file)) return TokenizerLoader::load(Json::parse_file(file, max_tokenizer_bytes));
    return TokenizerLoader::load_directory(path);
}

}  // namespace refrag
