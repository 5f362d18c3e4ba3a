// Parses with nlohmann's SAX parser, which keeps its nesting on the heap, into one flat array of nodes; the
// limits (depth, duplicate keys, size) are enforced while the events come in. Nothing here recurses on the
// input.
#include "io/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"

namespace refrag {

namespace {

constexpr size_t max_depth = 64;
constexpr size_t max_nodes = size_t{1} << 23;  // several times the largest tokenizer.json; 200 MB of nodes
constexpr uint64_t max_document_bytes = 0xFFFF'0000;  // string places are 32 bits wide

// A piece of the document's string pool.
struct Text {
    uint32_t begin = 0;
    uint32_t bytes = 0;
};

// A container's part of Document::children.
struct Range {
    uint32_t first;
    uint32_t count;
};

struct Node {
    Json::Kind kind = Json::Kind::null;
    uint32_t parent = 0;
    Text key;  // the member's name where the parent is an object
    union {
        bool boolean;
        int64_t integer;
        Text text;  // a string; a number that is no int64, as it is written
        Range range;
    };
    Node() : integer(0) {}
};

std::string key_text(std::string_view key) {
    return printable(key, 100);
}

// Of a number that the parser has accepted. What is too small for a double is 0.
double double_of(std::string_view written) {
    double value = 0.0;
    std::from_chars(written.data(), written.data() + written.size(), value);
    return value;
}

}  // namespace

struct Json::Document {
    std::string name;
    std::vector<Node> nodes;         // nodes[0] is the root
    std::vector<uint32_t> children;  // of every array and object, each one's together, in the file's order
    std::string pool;                // bytes of all strings and keys

    std::string_view view(Text text) const { return std::string_view(pool).substr(text.begin, text.bytes); }
};

// Receives the parser's events and builds the document.
struct Json::Builder : nlohmann::json_sax<nlohmann::json> {
    explicit Builder(Document& target) : document(target) {}

    Document& document;
    std::vector<uint32_t> open;     // containers not closed yet, outermost first
    std::vector<size_t> first;      // where each one's children begin in `pending`
    std::vector<uint32_t> pending;  // children of the open containers
    Text next_key;
    std::string error;  // why parsing stopped

    Text store(std::string_view text) {
        const Text place{static_cast<uint32_t>(document.pool.size()), static_cast<uint32_t>(text.size())};
        document.pool.append(text);
        return place;
    }

    // Throws where the document holds more values than any real one: 100 MB of "[0,0,..." must not fill the
    // memory.
    uint32_t add(Kind kind) {
        const auto index = static_cast<uint32_t>(document.nodes.size());
        REFRAG_CHECK(index < max_nodes, Status::bad_input, document.name, ": expected at most ", max_nodes,
                     " JSON values, found more");
        Node& node = document.nodes.emplace_back();
        node.kind = kind;
        node.parent = open.empty() ? 0 : open.back();
        node.key = next_key;
        next_key = {};
        if (!open.empty()) pending.push_back(index);
        return index;
    }
    Node& add_node(Kind kind) { return document.nodes[add(kind)]; }

    bool begin(Kind kind) {
        if (open.size() >= max_depth) {
            error = str("expected at most ", max_depth, " levels of nesting, found more");
            return false;
        }
        const uint32_t index = add(kind);
        open.push_back(index);
        first.push_back(pending.size());
        return true;
    }

    bool end() {
        const uint32_t index = open.back();
        Node& node = document.nodes[index];
        node.range.first = static_cast<uint32_t>(document.children.size());
        node.range.count = static_cast<uint32_t>(pending.size() - first.back());
        document.children.insert(document.children.end(),
                                 pending.begin() + static_cast<std::ptrdiff_t>(first.back()), pending.end());
        pending.resize(first.back());
        open.pop_back();
        first.pop_back();
        return node.kind != Kind::object || keys_differ(node);
    }

    bool keys_differ(const Node& object) {
        std::vector<std::string_view> keys(object.range.count);
        for (uint32_t i = 0; i < object.range.count; ++i)
            keys[i] = document.view(document.nodes[document.children[object.range.first + i]].key);
        std::sort(keys.begin(), keys.end());
        const auto twice = std::adjacent_find(keys.begin(), keys.end());
        if (twice == keys.end()) return true;
        error = str("key \"", key_text(*twice), "\" occurs twice in one object");
        return false;
    }

    bool null() override {
        add(Kind::null);
        return true;
    }
    bool boolean(bool value) override {
        add_node(Kind::boolean).boolean = value;
        return true;
    }
    bool number_integer(number_integer_t value) override {
        add_node(Kind::integer).integer = value;
        return true;
    }
    bool number_unsigned(number_unsigned_t value) override {
        if (value > static_cast<number_unsigned_t>(max_int)) return number(std::to_string(value));
        add_node(Kind::integer).integer = static_cast<int64_t>(value);
        return true;
    }
    bool number_float(number_float_t, const string_t& written) override { return number(written); }
    bool number(std::string_view written) {
        const Text text = store(written);
        add_node(Kind::number).text = text;
        return true;
    }
    bool string(string_t& value) override {
        const Text text = store(value);
        add_node(Kind::string).text = text;
        return true;
    }
    bool binary(binary_t&) override { return false; }  // not a part of JSON text
    bool key(string_t& value) override {
        next_key = store(value);
        return true;
    }
    bool start_object(size_t) override { return begin(Kind::object); }
    bool end_object() override { return end(); }
    bool start_array(size_t) override { return begin(Kind::array); }
    bool end_array() override { return end(); }

    bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& cause) override {
        error = str("not valid JSON at byte ", position, ": ", reason(cause.what()));
        return false;
    }

    // The library's message without its own prefix and without the text it read last, which may be the whole
    // file.
    static std::string reason(std::string_view what) {
        const size_t column = what.find(", column ");
        const size_t colon = what.find(": ", column == std::string_view::npos ? 0 : column);
        if (colon != std::string_view::npos) what.remove_prefix(colon + 2);
        std::string text(what);
        const size_t last_read = text.find("; last read: '");
        if (last_read != std::string::npos) {
            const size_t close = text.rfind('\'');
            text.erase(last_read, close == std::string::npos || close < last_read + 14
                                      ? std::string::npos
                                      : close + 1 - last_read);
        }
        return printable(text);
    }
};

Json Json::parse(std::string_view text, const std::string& name) {
    REFRAG_CHECK(text.size() <= max_document_bytes, Status::bad_input, printable(name), ": expected at most ",
                 max_document_bytes, " bytes of JSON, found ", text.size());
    auto document = std::make_shared<Document>();
    document->name = printable(name);
    // The library takes a zero byte for the end of the text and would let anything follow it.
    const size_t zero = text.find('\0');
    REFRAG_CHECK(zero == std::string_view::npos, Status::bad_input, document->name,
                 ": not valid JSON at byte ", zero, ": a zero byte");
    Builder builder(*document);
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder))
        fail(Status::bad_input, document->name, ": ",
             builder.error.empty() ? "not valid JSON" : builder.error);
    return Json(std::move(document), 0);
}

Json Json::parse_file(const std::string& path, uint64_t max_bytes) {
    return parse(read_file(path, max_bytes), path);
}

Json::Kind Json::kind() const {
    return document_->nodes[node_].kind;
}

const char* Json::kind_name() const {
    switch (kind()) {
        case Kind::null:
            return "null";
        case Kind::boolean:
            return "a boolean";
        case Kind::integer:
            return "an integer";
        case Kind::number:
            return "a number";
        case Kind::string:
            return "a string";
        case Kind::array:
            return "an array";
        case Kind::object:
            return "an object";
    }
    return "?";
}

const std::string& Json::name() const {
    return document_->name;
}

std::string Json::where() const {
    std::vector<uint32_t> chain;  // from this value up to the one below the root
    for (uint32_t node = node_; node != 0; node = document_->nodes[node].parent) chain.push_back(node);
    if (chain.empty()) return document_->name;
    std::string path;
    for (auto it = chain.rbegin(); it != chain.rend(); ++it) {
        const Node& node = document_->nodes[*it];
        const Node& parent = document_->nodes[node.parent];
        if (parent.kind == Kind::object) {
            if (!path.empty()) path.push_back('.');
            path += key_text(document_->view(node.key));
        } else {
            const auto begin = document_->children.begin() + parent.range.first;
            path += str("[", std::find(begin, begin + parent.range.count, *it) - begin, "]");
        }
    }
    if (path.size() > 300) path.replace(0, path.size() - 300, "...");
    return str(document_->name, ": key \"", printable(path, 400), "\"");
}

std::string Json::describe() const {
    const Node& node = document_->nodes[node_];
    switch (node.kind) {
        case Kind::boolean:
            return node.boolean ? "true" : "false";
        case Kind::integer:
            return std::to_string(node.integer);
        case Kind::number:
            return printable(document_->view(node.text), 60);
        case Kind::string:
            return str("\"", printable(document_->view(node.text), 60), "\"");
        case Kind::array:
            return str("an array of ", node.range.count);
        case Kind::null:
        case Kind::object:
            break;
    }
    return kind_name();
}

void Json::refuse(std::string_view expected) const {
    fail(Status::bad_input, where(), ": expected ", expected, ", found ", describe());
}

int64_t Json::as_int(int64_t min, int64_t max) const {
    const Node& node = document_->nodes[node_];
    if (node.kind == Kind::integer && node.integer >= min && node.integer <= max) return node.integer;
    if (min == min_int && max == max_int) refuse("an integer");
    if (max == max_int) refuse(str("an integer >= ", min));
    refuse(str("an integer in [", min, ", ", max, "]"));
}

double Json::as_number(double min, double max) const {
    const Node& node = document_->nodes[node_];
    if (is_number()) {
        const double value = node.kind == Kind::integer ? static_cast<double>(node.integer)
                                                        : double_of(document_->view(node.text));
        if (value >= min && value <= max) return value;
    }
    if (min == -max_number && max == max_number) refuse("a number");
    if (max == max_number) refuse(str("a number >= ", min));
    refuse(str("a number in [", min, ", ", max, "]"));
}

std::string_view Json::as_string() const {
    if (!is_string()) refuse("a string");
    return document_->view(document_->nodes[node_].text);
}

bool Json::as_bool() const {
    if (!is_bool()) refuse("true or false");
    return document_->nodes[node_].boolean;
}

const Json& Json::as_object() const {
    if (!is_object()) refuse("an object");
    return *this;
}

const Json& Json::as_array() const {
    if (!is_array()) refuse("an array");
    return *this;
}

size_t Json::size() const {
    if (!is_array() && !is_object()) refuse("an array or an object");
    return document_->nodes[node_].range.count;
}

Json Json::at(size_t index) const {
    REFRAG_CHECK(index < size(), Status::bad_input, where(), ": has ", size(), " elements, none at ", index);
    return Json(document_, document_->children[document_->nodes[node_].range.first + index]);
}

std::string_view Json::key_at(size_t index) const {
    as_object();
    return document_->view(document_->nodes[at(index).node_].key);
}

std::optional<uint32_t> Json::find_node(std::string_view key) const {
    as_object();
    const auto& range = document_->nodes[node_].range;
    for (uint32_t i = range.first; i < range.first + range.count; ++i) {
        const uint32_t child = document_->children[i];
        if (document_->view(document_->nodes[child].key) == key) return child;
    }
    return std::nullopt;
}

bool Json::has(std::string_view key) const {
    return find_node(key).has_value();
}

std::optional<Json> Json::find(std::string_view key) const {
    const auto node = find_node(key);
    if (!node || document_->nodes[*node].kind == Kind::null) return std::nullopt;
    return Json(document_, *node);
}

Json Json::get(std::string_view key) const {
    const auto node = find_node(key);
    if (!node) fail(Status::bad_input, where(), ": expected the key \"", key_text(key), "\", found none");
    return Json(document_, *node);
}

int64_t Json::get_int(std::string_view key, int64_t min, int64_t max) const {
    return get(key).as_int(min, max);
}

double Json::get_number(std::string_view key, double min, double max) const {
    return get(key).as_number(min, max);
}

std::string Json::get_string(std::string_view key) const {
    return std::string(get(key).as_string());
}

bool Json::get_bool(std::string_view key) const {
    return get(key).as_bool();
}

Json Json::get_object(std::string_view key) const {
    return get(key).as_object();
}

Json Json::get_array(std::string_view key) const {
    return get(key).as_array();
}

int64_t Json::get_int_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const {
    const auto value = find(key);
    return value ? value->as_int(min, max) : fallback;
}

double Json::get_number_or(std::string_view key, double fallback, double min, double max) const {
    const auto value = find(key);
    return value ? value->as_number(min, max) : fallback;
}

std::string Json::get_string_or(std::string_view key, std::string_view fallback) const {
    const auto value = find(key);
    return std::string(value ? value->as_string() : fallback);
}

bool Json::get_bool_or(std::string_view key, bool fallback) const {
    const auto value = find(key);
    return value ? value->as_bool() : fallback;
}

std::optional<JsonId> Json::find_id() const {
    const auto id = find("id");
    if (!id) return std::nullopt;
    if (id->is_string()) return std::string(id->as_string());
    if (id->is_int()) return id->as_int();
    if (id->is_number()) {
        constexpr double largest = 9007199254740992.0;  // every whole number up to here has its own double
        const double value = id->as_number();
        if (value == std::floor(value)) {
            if (std::abs(value) <= largest) return static_cast<int64_t>(value);
            id->refuse("a string or an integer below 2^63 (2^53 with a fraction or exponent)");
        }
    }
    id->refuse("a string or an integer");
}

std::string id_text(const JsonId& id) {
    const auto* number = std::get_if<int64_t>(&id);
    return number != nullptr ? std::to_string(*number) : std::get<std::string>(id);
}

void Json::check_keys(std::initializer_list<std::string_view> allowed) const {
    check_keys(std::span<const std::string_view>(allowed.begin(), allowed.size()));
}

void Json::check_keys(std::span<const std::string_view> allowed) const {
    as_object();
    for (size_t i = 0; i < size(); ++i) {
        const std::string_view key = key_at(i);
        if (std::find(allowed.begin(), allowed.end(), key) != allowed.end()) continue;
        std::string list;
        for (const std::string_view name : allowed) list += str(list.empty() ? "" : ", ", name);
        fail(Status::bad_input, where(), ": unknown key \"", key_text(key), "\", expected one of: ", list);
    }
}

}  // namespace refrag
