// The format's rules, in the order in which a file is checked: length field, header bytes, JSON, entries one
// by one, then all ranges together. One message a rule.
#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "base/check.h"
#include "io/json.h"

namespace refrag {

namespace {

constexpr uint64_t max_header_bytes = 100'000'000;
constexpr uint64_t length_field_bytes = 8;
constexpr uint64_t max_index_bytes = 100'000'000;
constexpr size_t max_rank = 64;

struct StoredType {
    std::string_view name;
    uint32_t bits;
};

// Every type the format knows.
constexpr std::array<StoredType, 22> stored_types = {{
    {"F32", 32},        {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"I64", 64},    {"BOOL", 8},
    {"U8", 8},          {"I8", 8},      {"I16", 16},    {"U16", 16},    {"U32", 32},    {"U64", 64},
    {"F64", 64},        {"C64", 64},    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
}};

std::optional<DType> computable(std::string_view name) {
    if (name == "F32") return DType::f32;
    if (name == "F16") return DType::f16;
    if (name == "BF16") return DType::bf16;
    if (name == "I32") return DType::i32;
    return std::nullopt;
}

// a * b, or false where it does not fit.
bool multiply(uint64_t a, uint64_t b, uint64_t& product) {
    return !__builtin_mul_overflow(a, b, &product);
}

std::string tensor_text(std::string_view name) {
    return str("tensor \"", printable(name, 120), "\"");
}

// Reads one header entry and checks that shape, dtype and range agree. `data_bytes` is the size of the data
// part.
TensorEntry parse_entry(std::string_view name, const Json& value, const std::string& path,
                        uint64_t data_bytes, uint64_t data_begin) {
    TensorEntry entry;
    entry.name = name;
    const auto bad = [&](const auto&... parts) {
        fail(Status::bad_input, path, ": ", tensor_text(name), ": ", parts...);
    };

    if (!value.is_object())
        bad("expected an object with dtype, shape and data_offsets, found ", value.kind_name());
    value.check_keys({"dtype", "shape", "data_offsets"});

    entry.dtype_name = value.get_string("dtype");
    const auto type = std::find_if(stored_types.begin(), stored_types.end(),
                                   [&](const StoredType& known) { return known.name == entry.dtype_name; });
    if (type == stored_types.end()) bad("unknown dtype \"", printable(entry.dtype_name, 40), "\"");
    entry.dtype = computable(entry.dtype_name);

    const Json shape = value.get_array("shape");
    if (shape.size() > max_rank) bad("expected at most ", max_rank, " dimensions, found ", shape.size());
    uint64_t n_values = 1;
    bool fits = true;
    for (size_t i = 0; i < shape.size(); ++i) {
        const int64_t extent = shape.at(i).as_int(0);
        entry.shape.push_back(extent);
        fits = fits && multiply(n_values, static_cast<uint64_t>(extent), n_values);
    }
    uint64_t n_bits = 0;
    fits = fits && multiply(n_values, type->bits, n_bits);
    // An empty tensor beside a huge extent is still refused where the product overflows on the way to 0.
    if (!fits) bad("the size of shape ", entry.shape_text(), " with dtype ", entry.dtype_name, " overflows");
    if (n_bits % 8 != 0)
        bad("shape ", entry.shape_text(), " with dtype ", entry.dtype_name, " does not fill whole bytes");

    const Json offsets = value.get_array("data_offsets");
    if (offsets.size() != 2) bad("expected 2 data_offsets, found ", offsets.size());
    const auto begin = static_cast<uint64_t>(offsets.at(0).as_int(0));
    const auto end = static_cast<uint64_t>(offsets.at(1).as_int(0));
    if (begin > end) bad("data_offsets [", begin, ", ", end, "] end before they begin");
    if (end > data_bytes)
        bad("data_offsets [", begin, ", ", end, "] pass the end of the data, which has ", data_bytes,
            " bytes");
    entry.bytes = end - begin;
    if (entry.bytes != n_bits / 8)
        bad("shape ", entry.shape_text(), " with dtype ", entry.dtype_name, " needs ", n_bits / 8,
            " bytes, data_offsets give ", entry.bytes);
    entry.offset = data_begin + begin;
    return entry;
}

std::map<std::string, std::string> parse_metadata(const Json& value, const std::string& path) {
    std::map<std::string, std::string> metadata;
    REFRAG_CHECK(value.is_object(), Status::bad_input, path,
                 ": __metadata__: expected an object of strings, found ", value.kind_name());
    for (size_t i = 0; i < value.size(); ++i) {
        REFRAG_CHECK(value.at(i).is_string(), Status::bad_input, path, ": __metadata__: key \"",
                     printable(value.key_at(i), 100), "\": expected a string, found ",
                     value.at(i).kind_name());
        metadata.emplace(value.key_at(i), value.at(i).as_string());
    }
    return metadata;
}

// Sorted by place, the ranges must follow one another from the first byte of the data to the file's last.
void check_ranges(const std::vector<TensorEntry>& sorted, const std::string& path, uint64_t data_begin,
                  uint64_t file_bytes) {
    uint64_t expected = data_begin;
    const TensorEntry* previous = nullptr;
    for (const TensorEntry& entry : sorted) {
        const auto neighbours = [&] {
            return previous == nullptr ? tensor_text(entry.name)
                                       : tensor_text(previous->name) + " and " + tensor_text(entry.name);
        };
        REFRAG_CHECK(entry.offset >= expected, Status::bad_input, path, ": ", neighbours(),
                     ": overlapping data_offsets: expected ", expected - data_begin, ", found ",
                     entry.offset - data_begin);
        REFRAG_CHECK(entry.offset == expected, Status::bad_input, path, ": ", neighbours(),
                     ": a hole in the data: expected data_offsets to go on at ", expected - data_begin,
                     ", found ", entry.offset - data_begin);
        expected = entry.offset + entry.bytes;
        previous = &entry;
    }
    REFRAG_CHECK(expected == file_bytes, Status::bad_input, path, ": the tensors end at byte ", expected,
                 " but the file has ", file_bytes, " bytes");
}

}  // namespace

int64_t TensorEntry::n_values() const {
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    return n;
}

std::string TensorEntry::shape_text() const {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += str(i == 0 ? "" : ", ", shape[i]);
    return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
    const std::string shown = printable(path);
    const auto check = [&](bool ok, const auto&... parts) {
        if (!ok) fail(Status::bad_input, shown, ": ", parts...);
    };
    check(file_.size() >= length_field_bytes,
          "expected at least 8 bytes of safetensors header length, found ", file_.size());
    std::array<unsigned char, length_field_bytes> field{};
    file_.read_at(0, field.data(), field.size());
    uint64_t header_bytes = 0;
    for (size_t i = 0; i < field.size(); ++i) header_bytes |= static_cast<uint64_t>(field[i]) << (8 * i);
    check(header_bytes <= max_header_bytes, "the safetensors header is too long: expected at most ",
          max_header_bytes, " bytes, found ", header_bytes);
    const uint64_t data_begin = length_field_bytes + header_bytes;
    check(data_begin <= file_.size(), "the safetensors header passes the end of the file: it needs ",
          data_begin, " bytes, the file has ", file_.size());

    std::string header(static_cast<size_t>(header_bytes), '\0');
    file_.read_at(length_field_bytes, header.data(), header.size());
    check(!header.empty() && header.front() == '{', "expected the safetensors header to begin with '{'",
          header.empty() ? std::string(", found an empty one")
                         : str(", found '", printable(header.substr(0, 1)), "'"));
    const Json root = Json::parse(header, str(path, " (header)")).as_object();
    // JSON lets any white space follow; the format pads with spaces alone.
    const char last = header[header.find_last_not_of(' ')];
    check(last == '}', "expected the safetensors header to end with '}' and spaces, found '",
          printable(std::string_view(&last, 1)), "'");

    tensors_.reserve(root.size());
    for (size_t i = 0; i < root.size(); ++i) {
        const std::string_view name = root.key_at(i);
        if (name == "__metadata__")
            metadata_ = parse_metadata(root.at(i), shown);
        else
            tensors_.push_back(parse_entry(name, root.at(i), shown, file_.size() - data_begin, data_begin));
    }
    // By place; an empty tensor shares its begin with its successor and comes first.
    std::sort(tensors_.begin(), tensors_.end(), [](const TensorEntry& a, const TensorEntry& b) {
        if (a.offset != b.offset) return a.offset < b.offset;
        if (a.bytes != b.bytes) return a.bytes < b.bytes;
        return a.name < b.name;
    });
    check_ranges(tensors_, shown, data_begin, file_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) by_name_.emplace(tensors_[i].name, i);
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
    const auto found = by_name_.find(std::string(name));
    return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

void SafetensorsFile::read(const TensorEntry& entry, uint64_t skip, void* destination, size_t bytes) const {
    REFRAG_CHECK(skip <= entry.bytes && bytes <= entry.bytes - skip, Status::runtime, printable(path()), ": ",
                 tensor_text(entry.name), ": cannot read ", bytes, " bytes at ", skip, ": it has ",
                 entry.bytes, " bytes");
    file_.read_at(entry.offset + skip, destination, bytes);
}

namespace {

constexpr const char* single_name = "model.safetensors";
constexpr const char* index_name = "model.safetensors.index.json";

bool is_plain_file_name(std::string_view name) {
    return !name.empty() && name != "." && name != ".." && name.find('/') == std::string_view::npos &&
           name.find('\\') == std::string_view::npos && name.find('\0') == std::string_view::npos;
}

}  // namespace

WeightFiles WeightFiles::open(const std::string& path) {
    WeightFiles weights;
    weights.name_ = path;
    if (!is_directory(path)) {
        weights.add_file(SafetensorsFile(path));
        weights.finish();
        return weights;
    }

    const std::string single = path_join(path, single_name);
    const std::string index_path = path_join(path, index_name);
    const bool has_single = is_file(single);
    const bool has_index = is_file(index_path);
    REFRAG_CHECK(has_single || has_index, Status::bad_input, printable(path), ": expected ", single_name,
                 " or ", index_name, " in it, found neither");
    if (!has_index) {
        weights.add_file(SafetensorsFile(single));
        weights.finish();
        return weights;
    }

    const Json index = Json::parse_file(index_path, max_index_bytes);
    const Json map = index.get_object("weight_map");
    REFRAG_CHECK(map.size() > 0, Status::bad_input, printable(index_path), ": weight_map names no tensor");
    std::map<std::string, size_t> shards;  // name -> index into files_
    for (size_t i = 0; i < map.size(); ++i) {
        const std::string shard(map.at(i).as_string());
        if (!is_plain_file_name(shard)) map.at(i).refuse("a plain file name within the directory");
        if (shards.emplace(shard, shards.size()).second) {
            shards[shard] = weights.files_.size();
            weights.add_file(SafetensorsFile(path_join(path, shard)));
        }
    }
    REFRAG_CHECK(!has_single || shards.count(single_name) == 1, Status::bad_input, printable(path),
                 ": expected either ", single_name, " or ", index_name, " in it, found both");

    // What the index promises is in that shard. It decides which of a shard's tensors count: others are
    // strays.
    std::unordered_map<std::string_view, size_t> promised;
    for (size_t i = 0; i < map.size(); ++i) {
        const std::string_view name = map.key_at(i);
        const std::string shard(map.at(i).as_string());
        promised.emplace(name, shards.at(shard));
        REFRAG_CHECK(weights.files_[shards.at(shard)].find(name) != nullptr, Status::bad_input,
                     printable(index_path), ": weight_map puts ", tensor_text(name), " into ",
                     printable(shard), ", which does not hold it");
    }
    std::erase_if(weights.tensors_, [&](const TensorEntry& entry) {
        const auto place = promised.find(entry.name);
        return place == promised.end() || place->second != entry.file;
    });
    weights.finish();
    return weights;
}

void WeightFiles::add_file(SafetensorsFile file) {
    for (TensorEntry entry : file.tensors()) {
        entry.file = files_.size();
        tensors_.push_back(std::move(entry));
    }
    paths_.push_back(file.path());
    files_.push_back(std::move(file));
}

void WeightFiles::finish() {
    std::sort(tensors_.begin(), tensors_.end(),
              [](const TensorEntry& a, const TensorEntry& b) { return a.name < b.name; });
    const auto twice =
        std::adjacent_find(tensors_.begin(), tensors_.end(),
                           [](const TensorEntry& a, const TensorEntry& b) { return a.name == b.name; });
    if (twice != tensors_.end())
        fail(Status::bad_input, printable(name_), ": ", tensor_text(twice->name),
             " is in two shards: ", printable(path_name(paths_[twice->file])), " and ",
             printable(path_name(paths_[(twice + 1)->file])));
}

const TensorEntry* WeightFiles::find(std::string_view name) const {
    const auto found =
        std::lower_bound(tensors_.begin(), tensors_.end(), name,
                         [](const TensorEntry& entry, std::string_view key) { return entry.name < key; });
    return found != tensors_.end() && found->name == name ? &*found : nullptr;
}

const TensorEntry& WeightFiles::get(std::string_view name) const {
    const TensorEntry* entry = find(name);
    if (entry == nullptr)
        fail(Status::bad_input, printable(name_), ": expected ", tensor_text(name), ", found none");
    return *entry;
}

void WeightFiles::read(const TensorEntry& entry, void* destination, size_t destination_bytes) const {
    REFRAG_CHECK(destination_bytes == entry.bytes, Status::runtime, printable(name_), ": ",
                 tensor_text(entry.name), ": has ", entry.bytes, " bytes, its place has ", destination_bytes);
    read_part(entry, 0, destination, destination_bytes);
}

void WeightFiles::read_part(const TensorEntry& entry, uint64_t skip, void* destination, size_t bytes) const {
    files_.at(entry.file).read(entry, skip, destination, bytes);
}

std::vector<float> WeightFiles::read_f32(const TensorEntry& entry) const {
    std::vector<float> values(static_cast<size_t>(entry.n_values()));
    read_f32(entry, values.data(), values.size());
    return values;
}

void WeightFiles::read_f32(const TensorEntry& entry, float* destination, size_t n_destination) const {
    const std::string what = str(printable(paths_.at(entry.file)), ": ", tensor_text(entry.name));
    REFRAG_CHECK(entry.dtype && *entry.dtype != DType::i32, Status::bad_input, what,
                 ": expected dtype F32, F16 or BF16, found ", entry.dtype_name);
    REFRAG_CHECK(n_destination == static_cast<size_t>(entry.n_values()), Status::runtime, what, ": has ",
                 entry.n_values(), " values, its place has ", n_destination);
    if (*entry.dtype == DType::f32) return read(entry, destination, n_destination * sizeof(float));

    constexpr size_t piece_values = size_t{1} << 16;
    std::vector<uint16_t> piece(std::min(piece_values, n_destination));
    for (size_t done = 0; done < n_destination; done += piece.size()) {
        const size_t n = std::min(piece.size(), n_destination - done);
        read_part(entry, done * 2, piece.data(), n * 2);
        for (size_t i = 0; i < n; ++i)
            destination[done + i] =
                *entry.dtype == DType::bf16 ? bf16_to_f32(piece[i]) : f16_to_f32(piece[i]);
    }
}

}  // namespace refrag
