// The `tokenize` subcommand: options, where the text comes from, and the two ways to print.
#include "cli/tokenize.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <charconv>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "cli/common.h"
#include "io/file.h"
#include "io/gguf.h"
#include "io/json.h"
#include "io/lines.h"
#include "refrag/decoder_files.h"
#include "text/tokenizer.h"

namespace refrag {

namespace {

struct TokenizeOptions {
    std::string tokenizer_path;
    std::string model_dir;
    std::string file;
    std::string text;
    std::string decode_ids;
    bool text_given = false;
    bool decode_given = false;
    bool special = false;
    bool json = false;
    bool batch = false;
    bool batch_decode = false;
};

Tokenizer load_tokenizer(const TokenizeOptions& options) {
    REFRAG_CHECK(options.tokenizer_path.empty() != options.model_dir.empty(), Status::usage,
                 "tokenize: expected either --tokenizer or --model, found ",
                 options.model_dir.empty() ? "neither" : "both");
    if (options.tokenizer_path.empty()) return DecoderFiles(options.model_dir).tokenizer();
    if (is_gguf_file(options.tokenizer_path)) return Tokenizer::from_gguf(GgufFile(options.tokenizer_path));
    return Tokenizer::from_file(options.tokenizer_path);
}

// "1,2 3" or "[1, 2, 3]".
std::vector<int32_t> parse_ids(std::string_view text, int64_t vocab_size) {
    std::vector<int32_t> ids;
    size_t at = 0;
    while (true) {
        at = text.find_first_not_of(", \t\r\n[]", at);
        if (at == std::string_view::npos) return ids;
        const size_t end = std::min(text.find_first_of(", \t\r\n[]", at), text.size());
        const std::string_view word = text.substr(at, end - at);
        int64_t id = -1;
        const auto result = std::from_chars(word.data(), word.data() + word.size(), id);
        REFRAG_CHECK(
            result.ec == std::errc() && result.ptr == word.data() + word.size() && id >= 0 && id < vocab_size,
            Status::usage, "tokenize --decode: expected ids in [0, ", vocab_size - 1, "], found \"",
            printable(word, 40), "\"");
        ids.push_back(static_cast<int32_t>(id));
        at = end;
    }
}

std::string tokens_as_json(const Tokenizer& tokenizer, const std::vector<Token>& tokens) {
    JsonWriter json;
    json.begin_object().key("ids").begin_array();
    for (const Token& token : tokens) json.integer(token.id);
    json.end_array().key("pieces").begin_array();
    for (const Token& token : tokens) json.string(tokenizer.piece(token.id));
    json.end_array().key("offsets").begin_array();
    for (const Token& token : tokens) {
        json.begin_array()
            .integer(static_cast<int64_t>(token.begin))
            .integer(static_cast<int64_t>(token.end));
        json.end_array();
    }
    json.end_array().end_object();
    return json.text() + "\n";
}

// One token a line: id, byte range, piece.
std::string tokens_as_lines(const Tokenizer& tokenizer, const std::vector<Token>& tokens) {
    std::string out;
    for (const Token& token : tokens) {
        out += std::to_string(token.id) + "\t" + std::to_string(token.begin) + "-" +
               std::to_string(token.end) + "\t";
        out.append(tokenizer.piece(token.id)).push_back('\n');
    }
    return out;
}

// {"ids":[1,2]} of one line of --batch.
void append_ids(const std::vector<Token>& tokens, std::string& out) {
    out += "{\"ids\":[";
    std::array<char, 12> digits{};
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (i > 0) out.push_back(',');
        const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), tokens[i].id).ptr;
        out.append(digits.data(), end);
    }
    out += "]}\n";
}

std::string encode_line(const Tokenizer& tokenizer, const TokenizeOptions& options, const Json& line) {
    if (!line.is_string() && !line.is_object()) line.refuse("a string or an object with \"text\"");
    const Json text = line.is_string() ? line : line.get("text");
    const std::vector<Token> tokens = options.special ? tokenizer.encode_with_special_tokens(text.as_string())
                                                      : tokenizer.encode(text.as_string());
    if (options.json) return tokens_as_json(tokenizer, tokens);
    std::string out;
    append_ids(tokens, out);
    return out;
}

std::string decode_line(const Tokenizer& tokenizer, const TokenizeOptions& options, const Json& line) {
    std::vector<int32_t> ids(line.as_array().size());
    for (size_t i = 0; i < ids.size(); ++i)
        ids[i] = static_cast<int32_t>(line.at(i).as_int(0, tokenizer.vocab_size() - 1));
    return "{\"text\":" + json_quote(tokenizer.decode(ids, !options.special)) + "}\n";
}

// The text of --file, or of standard input.
std::string read_source(const TokenizeOptions& options) {
    return read_text(options.file.empty() ? "-" : options.file);
}

// One line of JSON out for each line of JSON in; the line's number is part of every error.
void run_batch(const TokenizeOptions& options, const Tokenizer& tokenizer) {
    constexpr size_t flush_bytes = 1u << 20;
    std::string out;
    for_each_json_line(read_source(options), input_name(options.file.empty() ? "-" : options.file),
                       [&](const Json& line, size_t) {
                           out += options.batch_decode ? decode_line(tokenizer, options, line)
                                                       : encode_line(tokenizer, options, line);
                           if (out.size() < flush_bytes) return;
                           write_stdout(out);
                           out.clear();
                       });
    write_stdout(out);
}

void run_tokenize(const TokenizeOptions& options) {
    const bool batch = options.batch || options.batch_decode;
    const int n_sources =
        (options.text_given ? 1 : 0) + (options.file.empty() ? 0 : 1) + (options.decode_given ? 1 : 0);
    REFRAG_CHECK(n_sources <= 1, Status::usage, "tokenize: expected one of TEXT, --file and --decode, found ",
                 n_sources);
    REFRAG_CHECK(
        !batch || (!options.text_given && !options.decode_given), Status::usage,
        "tokenize: --batch and --batch-decode read lines from --file or standard input: expected no ",
        options.text_given ? "TEXT" : "--decode");
    REFRAG_CHECK(!options.batch || !options.batch_decode, Status::usage,
                 "tokenize: expected one of --batch and --batch-decode, found both");
    const Tokenizer tokenizer = load_tokenizer(options);
    if (batch) return run_batch(options, tokenizer);
    if (options.decode_given) {
        const std::vector<int32_t> ids = parse_ids(options.decode_ids, tokenizer.vocab_size());
        const std::string text = tokenizer.decode(ids, !options.special);
        return write_stdout(
            options.json ? JsonWriter().begin_object().key("text").string(text).end_object().text() + "\n"
                         : text + "\n");
    }
    const std::string text = options.text_given ? options.text : read_source(options);
    const std::vector<Token> tokens =
        options.special ? tokenizer.encode_with_special_tokens(text) : tokenizer.encode(text);
    write_stdout(options.json ? tokens_as_json(tokenizer, tokens) : tokens_as_lines(tokenizer, tokens));
}

}  // namespace

void add_tokenize(CLI::App& app) {
    CLI::App* command = app.add_subcommand("tokenize", "Show the tokens of a text, or the text of tokens");
    const auto options = std::make_shared<TokenizeOptions>();
    command->add_option(
        "--tokenizer", options->tokenizer_path,
        "tokenizer.json, a GGUF file, or a directory that holds tokenizer.json or vocab.json and "
        "merges.txt");
    command->add_option("-m,--model", options->model_dir,
                        "model directory, plain decoder or GGUF file; its decoder's tokenizer is used");
    command->add_option("--file", options->file, "read the text from this file; - for standard input");
    command->add_option("--decode", options->decode_ids, "ids to turn into text: \"5,17,4\"");
    command->add_flag(
        "--special", options->special,
        "parse special tokens in the text and add the tokenizer's own; with --decode: show them");
    command->add_flag("--json", options->json,
                      "print {\"ids\", \"pieces\", \"offsets\"}; offsets are bytes, [begin, end)");
    command->add_flag(
        "--batch", options->batch,
        "read JSON Lines, each a string or {\"text\"}; print {\"ids\":[..]} for each; blank lines are "
        "passed over");
    command->add_flag("--batch-decode", options->batch_decode,
                      "read JSON Lines, each a list of ids; print {\"text\":\"..\"} for each");
    command->add_option("TEXT", options->text,
                        "the text; standard input where neither TEXT nor --file is given");
    command->final_callback([command, options] {
        options->text_given = command->count("TEXT") > 0;
        options->decode_given = command->count("--decode") > 0;
        run_tokenize(*options);
    });
}

}  // namespace refrag
