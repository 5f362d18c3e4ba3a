// The format's rules in the order in which a file is read: magic, version, counts, metadata, the tensors'
// table, then all ranges together. Every count is held against the bytes that are left before memory is taken
// for it.
#include "io/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/check.h"

namespace refrag {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr int64_t kDefaultAlignment = 32;
constexpr size_t kMaxKeyBytes = 65535;
constexpr size_t kMaxNameBytes = 255;
constexpr size_t kMaxTextBytes = size_t{64} << 20;
constexpr uint64_t kMaxListItems = uint64_t{1} << 24;
constexpr uint32_t kMaxDimensions = 4;
// The least that a metadata pair and a table entry take: lengths, one byte of name, type and value; lengths,
// one byte of name, number of dimensions, one extent, type and offset.
constexpr uint64_t kLeastPairBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kLeastTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;

enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, truth, text, list, u64, i64, f64 };
constexpr uint32_t kValueTypes = 13;

uint64_t value_bytes(ValueType type) {
    switch (type) {
        case ValueType::u8:
        case ValueType::i8:
        case ValueType::truth:
            return 1;
        case ValueType::u16:
        case ValueType::i16:
            return 2;
        case ValueType::u32:
        case ValueType::i32:
        case ValueType::f32:
            return 4;
        case ValueType::text:  // its length alone
        case ValueType::u64:
        case ValueType::i64:
        case ValueType::f64:
            return 8;
        case ValueType::list:
            return 12;
    }
    return 1;
}

std::string quoted_tensor(std::string_view name) {
    return str("tensor \"", printable(name, 120), "\"");
}

// Reads a file from its beginning, in pieces.
class Reader {
  public:
    explicit Reader(const File& file) : file_(file), shown_(printable(file.path())) {}

    uint64_t position() const { return position_; }
    uint64_t left() const { return file_.size() - position_; }

    template <typename... Parts>
    [[noreturn]] void bad(const Parts&... parts) const {
        fail(Status::bad_input, shown_, ": ", parts...);
    }

    void bytes(void* to, size_t n, const std::string& what) {
        if (n > left())
            bad("the file ends within ", what, ": expected ", n, " bytes at ", position_, ", found ", left());
        auto* at = static_cast<char*>(to);
        while (n > 0) {
            if (position_ < begin_ || position_ >= begin_ + buffer_.size()) {
                begin_ = position_;
                buffer_.resize(static_cast<size_t>(std::min<uint64_t>(kPieceBytes, left())));
                file_.read_at(begin_, buffer_.data(), buffer_.size());
            }
            const auto within = static_cast<size_t>(position_ - begin_);
            const size_t take = std::min(n, buffer_.size() - within);
            std::memcpy(at, buffer_.data() + within, take);
            at += take;
            n -= take;
            position_ += take;
        }
    }

    template <typename T>
    T number(const std::string& what) {
        std::array<unsigned char, sizeof(T)> field{};
        bytes(field.data(), field.size(), what);
        uint64_t bits = 0;
        for (size_t i = 0; i < field.size(); ++i) bits |= static_cast<uint64_t>(field[i]) << (8 * i);
        if constexpr (std::is_same_v<T, float>) {
            return std::bit_cast<float>(static_cast<uint32_t>(bits));
        } else if constexpr (std::is_same_v<T, double>) {
            return std::bit_cast<double>(bits);
        } else {
            return static_cast<T>(bits);
        }
    }

    std::string text(size_t most, const std::string& what) {
        const auto n = number<uint64_t>(what);
        if (n > left()) bad(what, " passes the end of the file: expected ", n, " bytes, found ", left());
        if (n > most) bad(what, ": expected at most ", most, " bytes, found ", n);
        std::string text(static_cast<size_t>(n), '\0');
        bytes(text.data(), text.size(), what);
        return text;
    }

  private:
    static constexpr size_t kPieceBytes = size_t{1} << 16;
    const File& file_;
    std::string shown_;
    uint64_t position_ = 0;
    uint64_t begin_ = 0;  // where buffer_ lies in the file
    std::string buffer_;
};

ValueType read_type(Reader& in, const std::string& what) {
    const auto type = in.number<uint32_t>(what);
    if (type >= kValueTypes)
        in.bad(what, ": expected a value type of 0 to ", kValueTypes - 1, ", found ", type);
    return static_cast<ValueType>(type);
}

int64_t read_integer(Reader& in, ValueType type, const std::string& what) {
    switch (type) {
        case ValueType::u8:
            return in.number<uint8_t>(what);
        case ValueType::i8:
            return in.number<int8_t>(what);
        case ValueType::u16:
            return in.number<uint16_t>(what);
        case ValueType::i16:
            return in.number<int16_t>(what);
        case ValueType::u32:
            return in.number<uint32_t>(what);
        case ValueType::i32:
            return in.number<int32_t>(what);
        case ValueType::i64:
            return in.number<int64_t>(what);
        default: {
            const auto value = in.number<uint64_t>(what);
            if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
                in.bad(what, ": expected at most ", std::numeric_limits<int64_t>::max(), ", found ", value);
            return static_cast<int64_t>(value);
        }
    }
}

bool read_truth(Reader& in, const std::string& what) {
    const auto value = in.number<uint8_t>(what);
    if (value > 1) in.bad(what, ": expected a truth value of 0 or 1, found ", int{value});
    return value == 1;
}

GgufList read_list(Reader& in, const std::string& what) {
    const ValueType type = read_type(in, what);
    if (type == ValueType::list) in.bad(what, ": expected a list of plain values, found a list of lists");
    const auto n = in.number<uint64_t>(what);
    if (n > in.left() / value_bytes(type))
        in.bad(what, ": a list of ", n, " items passes the end of the file, which has ", in.left(),
               " bytes left");
    if (n > kMaxListItems) in.bad(what, ": expected at most ", kMaxListItems, " items, found ", n);
    GgufList list;
    const auto size = static_cast<size_t>(n);
    switch (type) {
        case ValueType::f32:
        case ValueType::f64:
            list.kind = GgufList::Kind::reals;
            list.reals.reserve(size);
            for (size_t i = 0; i < size; ++i)
                list.reals.push_back(type == ValueType::f32 ? static_cast<double>(in.number<float>(what))
                                                            : in.number<double>(what));
            break;
        case ValueType::truth:
            list.kind = GgufList::Kind::truths;
            list.truths.reserve(size);
            for (size_t i = 0; i < size; ++i) list.truths.push_back(read_truth(in, what));
            break;
        case ValueType::text:
            list.kind = GgufList::Kind::texts;
            list.texts.reserve(size);
            for (size_t i = 0; i < size; ++i) list.texts.push_back(in.text(kMaxTextBytes, what));
            break;
        default:
            list.integers.reserve(size);
            for (size_t i = 0; i < size; ++i) list.integers.push_back(read_integer(in, type, what));
            break;
    }
    return list;
}

GgufValue read_value(Reader& in, const std::string& what) {
    const ValueType type = read_type(in, what);
    switch (type) {
        case ValueType::f32:
            return static_cast<double>(in.number<float>(what));
        case ValueType::f64:
            return in.number<double>(what);
        case ValueType::truth:
            return read_truth(in, what);
        case ValueType::text:
            return in.text(kMaxTextBytes, what);
        case ValueType::list:
            return read_list(in, what);
        default:
            return read_integer(in, type, what);
    }
}

// One entry of the table; its offset still counts from the first byte of the data.
GgufTensor read_entry(Reader& in, uint64_t index) {
    GgufTensor tensor;
    tensor.name = in.text(kMaxNameBytes, str("the name of tensor ", index));
    const std::string what = quoted_tensor(tensor.name);
    if (tensor.name.empty()) in.bad("tensor ", index, ": expected a name, found an empty one");
    const auto n_dimensions = in.number<uint32_t>(what);
    if (n_dimensions < 1 || n_dimensions > kMaxDimensions)
        in.bad(what, ": expected 1 to ", kMaxDimensions, " dimensions, found ", n_dimensions);
    uint64_t n_values = 1;
    for (uint32_t i = 0; i < n_dimensions; ++i) {
        const auto extent = in.number<uint64_t>(what);
        // Every value takes at least half a byte.
        if (extent > uint64_t{1} << 62 || __builtin_mul_overflow(n_values, extent, &n_values) ||
            n_values > uint64_t{1} << 62)
            in.bad(what, ": the size of its shape overflows");
        tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(extent));
    }
    const auto id = in.number<uint32_t>(what);
    const GgufTypeInfo* type = find_gguf_type(id);
    if (type == nullptr)
        in.bad(what,
               ": expected type F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K, found ",
               gguf_type_name(id));
    tensor.type = type->type;
    const int64_t columns = tensor.shape.back();
    if (columns % type->block_values != 0)
        in.bad(what, ": expected rows of a multiple of ", type->block_values, " values for ", type->name,
               ", found shape ", tensor.shape_text());
    uint64_t bytes = 0;
    if (__builtin_mul_overflow(n_values / static_cast<uint64_t>(type->block_values), type->block_bytes,
                               &bytes))
        in.bad(what, ": the size of its shape overflows");
    tensor.bytes = bytes;
    tensor.offset = in.number<uint64_t>(what);
    return tensor;
}

const char* kind_of(const GgufValue& value) {
    static constexpr const char* scalars[] = {"an integer", "a real number", "a truth value", "a text"};
    static constexpr const char* lists[] = {"a list of integers", "a list of real numbers",
                                            "a list of truth values", "a list of texts"};
    if (const auto* list = std::get_if<GgufList>(&value)) return lists[static_cast<size_t>(list->kind)];
    return scalars[value.index()];
}

std::string shown_value(const GgufValue& value) {
    if (const auto* integer = std::get_if<int64_t>(&value)) return str(*integer);
    if (const auto* real = std::get_if<double>(&value)) return str(*real);
    if (const auto* truth = std::get_if<bool>(&value)) return *truth ? "true" : "false";
    if (const auto* text = std::get_if<std::string>(&value)) return str('"', printable(*text, 60), '"');
    return str(kind_of(value), " with ", std::get<GgufList>(value).size(), " items");
}

}  // namespace

size_t GgufList::size() const {
    switch (kind) {
        case Kind::integers:
            return integers.size();
        case Kind::reals:
            return reals.size();
        case Kind::truths:
            return truths.size();
        case Kind::texts:
            return texts.size();
    }
    return 0;
}

int64_t GgufTensor::n_values() const {
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    return n;
}

std::string GgufTensor::shape_text() const {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += str(i == 0 ? "" : ", ", shape[i]);
    return text + "]";
}

GgufFile::GgufFile(const std::string& path) : file_(path) {
    Reader in(file_);
    std::array<char, 4> magic{};
    in.bytes(magic.data(), magic.size(), "the file's first four bytes");
    if (std::string_view(magic.data(), magic.size()) != kMagic)
        in.bad("expected a GGUF file, which begins with \"GGUF\", found \"",
               printable(std::string_view(magic.data(), magic.size())), "\"");
    const auto version = in.number<uint32_t>("the version");
    if (version > 0 && (version & 0xffffu) == 0)
        in.bad("expected a little-endian GGUF file, found a big-endian one");
    if (version != 2 && version != 3) in.bad("GGUF version: expected 2 or 3, found ", version);
    const auto n_tensors = in.number<uint64_t>("the number of tensors");
    const auto n_pairs = in.number<uint64_t>("the number of metadata");
    if (n_pairs > in.left() / kLeastPairBytes)
        in.bad("metadata: ", n_pairs, " keys pass the end of the file, which has ", in.left(), " bytes left");
    if (n_tensors > in.left() / kLeastTensorBytes)
        in.bad("tensors: a table of ", n_tensors, " passes the end of the file, which has ", in.left(),
               " bytes left");

    for (uint64_t i = 0; i < n_pairs; ++i) {
        std::string key = in.text(kMaxKeyBytes, str("the name of key ", i));
        if (key.empty()) in.bad("key ", i, ": expected a name, found an empty one");
        GgufValue value = read_value(in, str("key \"", printable(key, 120), "\""));
        const auto [at, is_new] = metadata_.emplace(std::move(key), std::move(value));
        if (!is_new) in.bad("key \"", printable(at->first, 120), "\" stands there twice");
    }
    int64_t alignment = kDefaultAlignment;
    if (has("general.alignment")) alignment = integer("general.alignment", 8, 1 << 20);
    if ((alignment & (alignment - 1)) != 0) refuse("general.alignment", "a power of 2");

    for (uint64_t i = 0; i < n_tensors; ++i) tensors_.push_back(read_entry(in, i));

    header_bytes_ = in.position();

    // By place, the ranges follow one another, each at the next multiple of the alignment.
    const auto aligned = [&](uint64_t at) {
        const auto unit = static_cast<uint64_t>(alignment);
        return (at + unit - 1) / unit * unit;  // `at` is at most the file's size
    };
    std::sort(tensors_.begin(), tensors_.end(), [](const GgufTensor& a, const GgufTensor& b) {
        if (a.offset != b.offset) return a.offset < b.offset;
        if (a.bytes != b.bytes) return a.bytes < b.bytes;
        return a.name < b.name;
    });
    const uint64_t data_begin = aligned(in.position());
    uint64_t end = 0;  // of the tensor before, from data_begin
    for (size_t i = 0; i < tensors_.size(); ++i) {
        GgufTensor& tensor = tensors_[i];
        const std::string what = quoted_tensor(tensor.name);
        if (tensor.offset % static_cast<uint64_t>(alignment) != 0)
            in.bad(what, ": expected an offset that is a multiple of ", alignment, ", found ", tensor.offset);
        if (tensor.offset != aligned(end))
            in.bad(what, ": expected its data at offset ", aligned(end), ", found ", tensor.offset,
                   tensor.offset < end ? ": it overlaps the tensor before" : ": a hole in the data");
        const uint64_t data_bytes = file_.size() - std::min(file_.size(), data_begin);
        if (data_begin > file_.size() || tensor.offset > data_bytes ||
            tensor.bytes > data_bytes - tensor.offset)
            in.bad(what, ": its ", tensor.bytes, " bytes at offset ", tensor.offset,
                   " pass the end of the file, which has ", data_bytes, " bytes of data");
        end = tensor.offset + tensor.bytes;
        tensor.offset += data_begin;
        if (!by_name_.emplace(tensor.name, i).second) in.bad(what, " is there twice");
    }
    const uint64_t last = tensors_.empty() ? in.position() : data_begin + end;
    if (file_.size() > aligned(last))
        in.bad("the tensors end at byte ", last, " but the file has ", file_.size(), " bytes");
}

const GgufTensor* GgufFile::find(std::string_view name) const {
    const auto found = by_name_.find(std::string(name));
    return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::vector<std::string> GgufFile::keys() const {
    std::vector<std::string> names;
    for (const auto& [key, value] : metadata_) names.push_back(key);
    std::sort(names.begin(), names.end());
    return names;
}

const GgufValue* GgufFile::value(std::string_view key) const {
    const auto found = metadata_.find(std::string(key));
    return found == metadata_.end() ? nullptr : &found->second;
}

void GgufFile::refuse(std::string_view key, const std::string& expected) const {
    const GgufValue* found = value(key);
    fail(Status::bad_input, printable(path()), ": key \"", printable(key, 120), "\": expected ", expected,
         ", found ", found == nullptr ? std::string("none") : shown_value(*found));
}

template <typename T>
const T& GgufFile::typed(std::string_view key, const char* expected) const {
    const GgufValue* found = value(key);
    const T* typed_value = found == nullptr ? nullptr : std::get_if<T>(found);
    if (typed_value == nullptr) refuse(key, expected);
    return *typed_value;
}

const std::string& GgufFile::text(std::string_view key) const {
    return typed<std::string>(key, "a text");
}

int64_t GgufFile::integer(std::string_view key, int64_t least, int64_t most) const {
    const std::string expected = str("an integer of ", least, " to ", most);
    const auto found = typed<int64_t>(key, expected.c_str());
    if (found < least || found > most) refuse(key, expected);
    return found;
}

double GgufFile::real(std::string_view key) const {
    const auto found = typed<double>(key, "a real number");
    if (!std::isfinite(found)) refuse(key, "a finite number");
    return found;
}

bool GgufFile::truth(std::string_view key) const {
    return typed<bool>(key, "a truth value");
}

const std::vector<std::string>& GgufFile::texts(std::string_view key) const {
    const auto& list = typed<GgufList>(key, "a list of texts");
    if (list.kind != GgufList::Kind::texts) refuse(key, "a list of texts");
    return list.texts;
}

const std::vector<int64_t>& GgufFile::integers(std::string_view key) const {
    const auto& list = typed<GgufList>(key, "a list of integers");
    if (list.kind != GgufList::Kind::integers) refuse(key, "a list of integers");
    return list.integers;
}

std::optional<std::vector<double>> GgufFile::reals_if_any(std::string_view key) const {
    if (!has(key)) return std::nullopt;
    const auto& list = typed<GgufList>(key, "a list of real numbers");
    if (list.kind != GgufList::Kind::reals) refuse(key, "a list of real numbers");
    return list.reals;
}

Sha256Digest GgufFile::header_digest() const {
    Sha256 hash;
    std::vector<char> piece(size_t{1} << 16);
    for (uint64_t at = 0; at < header_bytes_; at += piece.size()) {
        const auto n = static_cast<size_t>(std::min<uint64_t>(piece.size(), header_bytes_ - at));
        file_.read_at(at, piece.data(), n);
        hash.add(piece.data(), n);
    }
    return hash.digest();
}

void GgufFile::read_rows(const GgufTensor& tensor, int64_t row, int64_t n, float* destination) const {
    const int64_t columns = tensor.shape.back();
    const int64_t rows = columns == 0 ? 0 : tensor.n_values() / columns;
    REFRAG_CHECK(row >= 0 && n >= 0 && row <= rows && n <= rows - row, Status::runtime, printable(path()),
                 ": ", quoted_tensor(tensor.name), ": cannot read rows ", row, " to ", row + n, " of ", rows);
    const GgufTypeInfo& type = gguf_type_info(tensor.type);
    const auto row_blocks = static_cast<size_t>(columns / type.block_values);
    constexpr size_t kPieceBytes = size_t{1} << 16;
    const size_t piece_blocks = std::max<size_t>(1, kPieceBytes / type.block_bytes);
    std::vector<char> piece;
    size_t left = row_blocks * static_cast<size_t>(n);
    uint64_t offset = tensor.offset + static_cast<uint64_t>(row) * row_blocks * type.block_bytes;
    while (left > 0) {
        const size_t blocks = std::min(left, piece_blocks);
        piece.resize(blocks * type.block_bytes);
        file_.read_at(offset, piece.data(), piece.size());
        decode_gguf_blocks(tensor.type, piece.data(), blocks, destination);
        destination += blocks * static_cast<size_t>(type.block_values);
        offset += piece.size();
        left -= blocks;
    }
}

bool is_gguf_file(const std::string& path) {
    if (!is_file(path)) return false;
    const File file(path);
    std::array<char, 4> magic{};
    if (file.size() < magic.size()) return false;
    file.read_at(0, magic.data(), magic.size());
    return std::string_view(magic.data(), magic.size()) == kMagic;
}

}  // namespace refrag
