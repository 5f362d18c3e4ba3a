// See encoded_lines.h.
#include "store/encoded_lines.h"

#include <cmath>
#include <cstring>

#include "base/check.h"
#include "io/base64.h"
#include "io/file.h"
#include "refrag/passage_record.h"

namespace refrag {
namespace {

std::string bytes_of(const Json& value) {
    std::optional<std::string> bytes = base64_decode(value.as_string());
    if (!bytes) value.refuse("base64");
    return std::move(*bytes);
}

NewPassage read_passage(const Json& json, const StoreStamp& stamp, int64_t& n_chunks) {
    json.as_object().check_keys({"begin", "end", "title", "text", "record", "vector"});
    NewPassage passage;
    passage.begin = json.get_int("begin", 0);
    passage.end = json.get_int("end", passage.begin);
    passage.title = json.get_string("title");
    passage.text = json.get_string("text");
    passage.record = bytes_of(json.get("record"));
    const std::string content = passage.content();
    const Sha256Digest key = passage_key(stamp.maker, sha256(content));
    PassageRecord record;
    try {
        record = read_passage_record(passage.record, key, content, stamp.n_vocab);
    } catch (const Error& error) {
        fail(Status::bad_input, json.get("record").where(), ": ", error.message());
    }
    n_chunks += std::ssize(record.cut->chunks());
    if (record.form != stamp.form || record.d_enc != stamp.d_enc)
        json.get("record").refuse(
            str("embeddings of ", stamp.d_enc, " values in ", embedding_form_name(stamp.form)));
    const std::string vector = bytes_of(json.get("vector"));
    if (vector.size() % sizeof(float) != 0) json.get("vector").refuse("fp32 values in base64");
    passage.vector.resize(vector.size() / sizeof(float));
    std::memcpy(passage.vector.data(), vector.data(), vector.size());
    for (const float value : passage.vector)
        if (!std::isfinite(value)) json.get("vector").refuse("finite numbers");
    return passage;
}

}  // namespace

std::string encoded_line(const EncodedDocument& encoded, const Sha256Digest& maker) {
    const Document& d = encoded.document;
    JsonWriter line;
    line.begin_object();
    line.key("id").string(d.id).key("source").string(d.source).key("title").string(d.title);
    line.key("metadata").string(d.metadata);
    line.key("hash").string(d.hash.hex()).key("maker").string(maker.hex());
    line.key("passages").begin_array();
    for (const NewPassage& p : encoded.passages) {
        const auto* vector = reinterpret_cast<const char*>(p.vector.data());
        line.begin_object().key("begin").integer(p.begin).key("end").integer(p.end);
        line.key("title").string(p.title).key("text").string(p.text);
        line.key("record").string(base64_encode(p.record));
        line.key("vector").string(base64_encode({vector, p.vector.size() * sizeof(float)}));
        line.end_object();
    }
    line.end_array().end_object();
    return line.text();
}

EncodedDocument read_encoded_line(const Json& line, const StoreStamp& stamp) {
    line.as_object().check_keys({"id", "source", "title", "metadata", "hash", "maker", "passages"});
    const Sha256Digest maker = digest_of_hex(line.get("maker"));
    if (maker != stamp.maker)
        line.get("maker").refuse(str("that of ", printable(stamp.model), " with k = ", stamp.chunk_len,
                                     " in ", embedding_form_name(stamp.form), ", ", stamp.maker.hex()));
    EncodedDocument out;
    out.document.id = line.get_string("id");
    if (out.document.id.empty()) line.get("id").refuse("an id that is not empty");
    out.document.source = line.get_string("source");
    out.document.title = line.get_string("title");
    out.document.metadata = line.get_string("metadata");
    Json::parse(out.document.metadata, line.get("metadata").where()).as_object();
    out.document.hash = digest_of_hex(line.get("hash"));
    const Json passages = line.get_array("passages");
    for (size_t i = 0; i < passages.size(); ++i)
        out.passages.push_back(read_passage(passages.at(i), stamp, out.n_chunks));
    out.document.n_passages = std::ssize(out.passages);
    return out;
}

Sha256Digest digest_of_hex(const Json& value) {
    Sha256Digest digest;
    const std::string_view text = value.as_string();
    const auto digit = [&](char c) -> int {
        if (c >= '0' && c <= '9') return c - '0';
        if (c >= 'a' && c <= 'f') return c - 'a' + 10;
        value.refuse("64 hexadecimal digits");
    };
    if (text.size() != 2 * digest.bytes.size()) value.refuse("64 hexadecimal digits");
    for (size_t i = 0; i < digest.bytes.size(); ++i)
        digest.bytes[i] = static_cast<uint8_t>(digit(text[2 * i]) * 16 + digit(text[2 * i + 1]));
    return digest;
}

}  // namespace refrag
