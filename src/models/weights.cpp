// See weights.h.
#include "models/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/int8.h"
#include "io/file.h"

namespace refrag {
namespace {

// "F32, F16 or BF16".
std::string one_of(std::initializer_list<std::string_view> words) {
    std::string text;
    for (const auto* word = words.begin(); word != words.end(); ++word) {
        text += str(word == words.begin() ? "" : word + 1 == words.end() ? " or " : ", ", *word);
    }
    return text;
}

bool matches(std::string_view name, std::string_view pattern) {
    if (pattern.starts_with('*')) return name.ends_with(pattern.substr(1));
    return name == pattern;
}

// A LayerNorm's weight and bias are gamma and beta in checkpoints converted from TensorFlow; "" for any other
// name.
std::string older_spelling(std::string_view name) {
    for (const auto& [now, before] :
         {std::pair<std::string_view, std::string_view>{".weight", ".gamma"}, {".bias", ".beta"}}) {
        if (!name.ends_with(now)) continue;
        const std::string_view owner = name.substr(0, name.size() - now.size());
        if (owner.ends_with("LayerNorm") || owner.ends_with("layer_norm")) return str(owner, before);
    }
    return "";
}

// Any stored number, widened; what is no number of ours gives NaN, which equals nothing.
double number_at(std::string_view dtype, const std::byte* at) {
    if (dtype == "I64") {
        int64_t value;
        std::memcpy(&value, at, sizeof value);
        return static_cast<double>(value);
    }
    int32_t value;
    std::memcpy(&value, at, sizeof value);
    return dtype == "I32" ? static_cast<double>(value) : std::nan("");
}

}  // namespace

WeightLoader::WeightLoader(Device& device, const std::string& path, std::string optional_prefix,
                           LoadedBytes loaded, WeightFormat format)
    : StoredWeights(device, std::move(loaded), format),
      path_(path),
      shown_(printable(path)),
      prefix_(std::move(optional_prefix)),
      files_(WeightFiles::open(path)) {
    if (prefix_.empty()) return;
    for (const TensorEntry& entry : files_.tensors()) {
        const bool twice = entry.name.starts_with(prefix_) &&
                           files_.find(std::string_view(entry.name).substr(prefix_.size())) != nullptr;
        REFRAG_CHECK(!twice, Status::bad_input, shown_, ": tensor \"", printable(entry.name),
                     "\" is there twice, with and without the prefix \"", prefix_, "\"");
    }
}

bool WeightLoader::has(std::string_view name) const {
    return lookup(name) != nullptr;
}

const TensorEntry* WeightLoader::lookup(std::string_view name) const {
    const TensorEntry* found = nullptr;
    for (const std::string& spelling : {std::string(name), older_spelling(name)}) {
        if (spelling.empty()) continue;
        const TensorEntry* entry = prefix_.empty() ? nullptr : files_.find(prefix_ + spelling);
        if (entry == nullptr) entry = files_.find(spelling);
        if (entry == nullptr) continue;
        REFRAG_CHECK(found == nullptr, Status::bad_input, shown_, ": tensors \"",
                     printable(found == nullptr ? "" : found->name), "\" and \"", printable(entry->name),
                     "\" are the same parameter: expected one of them");
        found = entry;
    }
    return found;
}

bool WeightLoader::equal(std::string_view a, std::string_view b) const {
    const TensorEntry* const one = lookup(a);
    const TensorEntry* const other = lookup(b);
    if (one == nullptr || other == nullptr || one->shape != other->shape) return false;
    if (one->dtype_name != other->dtype_name) {
        // The same values may be stored in two types.
        if (!one->dtype || !other->dtype) return false;
        const std::vector<float> left = files_.read_f32(*one);
        const std::vector<float> right = files_.read_f32(*other);
        return std::memcmp(left.data(), right.data(), left.size() * sizeof(float)) == 0;
    }
    std::vector<std::byte> left(std::min<uint64_t>(one->bytes, 1u << 20)), right(left.size());
    for (uint64_t at = 0; at < one->bytes; at += left.size()) {
        const auto n = static_cast<size_t>(std::min<uint64_t>(left.size(), one->bytes - at));
        files_.read_part(*one, at, left.data(), n);
        files_.read_part(*other, at, right.data(), n);
        if (std::memcmp(left.data(), right.data(), n) != 0) return false;
    }
    if (one->dtype_name != "I8") return true;
    return equal(str(a, "_scale"), str(b, "_scale"));
}

const TensorEntry& WeightLoader::find(std::string_view name, const std::vector<int64_t>& shape,
                                      std::initializer_list<std::string_view> dtypes) {
    const TensorEntry* const entry = lookup(name);
    REFRAG_CHECK(entry != nullptr, Status::bad_input, shown_, ": tensor \"", name,
                 "\" is missing, expected shape ", shape_text(shape));
    REFRAG_CHECK(entry->shape == shape, Status::bad_input, shown_, ": tensor \"", entry->name,
                 "\": expected shape ", shape_text(shape), ", found ", entry->shape_text());
    REFRAG_CHECK(std::find(dtypes.begin(), dtypes.end(), entry->dtype_name) != dtypes.end(),
                 Status::bad_input, shown_, ": tensor \"", printable(entry->name), "\": expected dtype ",
                 one_of(dtypes), ", found ", entry->dtype_name);
    used_.insert(entry->name);
    return *entry;
}

StoredMatrix WeightLoader::open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    const TensorEntry& entry = find(name, {out_dim, in_dim}, {"F32", "F16", "BF16", "I8"});
    if (!entry.dtype) return open_int8(entry, name, out_dim, in_dim);
    StoredMatrix stored;
    stored.place = place_of(entry);
    stored.description = str(entry.dtype_name, " ", entry.shape_text());
    stored.kept = stored.exact = *entry.dtype;
    stored.read = [this, &entry, in_dim](DType dtype, int64_t row, int64_t n, void* dst) {
        if (dtype == *entry.dtype) return read_rows(entry, in_dim, row, n, dst);
        std::vector<uint16_t> halves(static_cast<size_t>(n * in_dim));
        read_rows(entry, in_dim, row, n, halves.data());
        auto* const floats = static_cast<float*>(dst);
        for (size_t i = 0; i < halves.size(); ++i) floats[i] = value_at(*entry.dtype, halves.data(), i);
    };
    return stored;
}

void WeightLoader::read_rows(const TensorEntry& entry, int64_t in_dim, int64_t row, int64_t n, void* dst) {
    const size_t value_bytes = dtype_bytes(*entry.dtype);
    const int64_t end = (row + n) * in_dim;
    const std::string place = place_of(entry);
    for (int64_t begin = row * in_dim; begin < end; begin += kPieceValues) {
        const int64_t n_values = std::min(end - begin, kPieceValues);
        const size_t bytes = static_cast<size_t>(n_values) * value_bytes;
        files_.read_part(entry, static_cast<uint64_t>(begin) * value_bytes, dst, bytes);
        check_finite(place, entry.shape, *entry.dtype, dst, begin, n_values);
        add_to_digest(dst, bytes);
        dst = static_cast<std::byte*>(dst) + bytes;
        tell(bytes);
    }
}

// Values and scales lie in two tensors; a backend takes them row by row.
StoredMatrix WeightLoader::open_int8(const TensorEntry& entry, std::string_view name, int64_t out_dim,
                                     int64_t in_dim) {
    const int64_t groups = int8_groups(in_dim);
    const TensorEntry& scales = find(str(name, "_scale"), {out_dim, groups}, {"F16"});
    StoredMatrix stored;
    stored.place = place_of(entry);
    stored.description = str(entry.dtype_name, " ", entry.shape_text());
    stored.kept = stored.exact = DType::i8;
    stored.read = [this, &entry, &scales, out_dim, in_dim, groups, piece = std::vector<std::byte>()](
                      DType, int64_t row, int64_t n, void* dst) mutable {
        const size_t scale_bytes = static_cast<size_t>(groups) * sizeof(uint16_t);
        const auto value_bytes = static_cast<size_t>(in_dim);
        const int64_t piece_rows = std::max<int64_t>(1, kPieceValues / std::max<int64_t>(in_dim, 1));
        // Rows of values, then of scales.
        piece.resize(static_cast<size_t>(std::min(piece_rows, out_dim)) * (value_bytes + scale_bytes));
        auto* to = static_cast<std::byte*>(dst);
        for (int64_t begin = row; begin < row + n; begin += piece_rows) {
            const auto rows = static_cast<size_t>(std::min(piece_rows, row + n - begin));
            std::byte* const first_scale = piece.data() + rows * value_bytes;
            const auto at = static_cast<uint64_t>(begin);
            files_.read_part(entry, at * value_bytes, piece.data(), rows * value_bytes);
            files_.read_part(scales, at * scale_bytes, first_scale, rows * scale_bytes);
            check_scales(scales, first_scale, begin * groups, static_cast<int64_t>(rows) * groups);
            for (size_t r = 0; r < rows; ++r, to += int8_row_bytes(in_dim)) {
                std::memcpy(to, first_scale + r * scale_bytes, scale_bytes);
                std::memcpy(to + scale_bytes, piece.data() + r * value_bytes, value_bytes);
                add_to_digest(to, scale_bytes + value_bytes);
            }
            tell(rows * (value_bytes + scale_bytes));
        }
    };
    return stored;
}

StoredVector WeightLoader::open_vector(std::string_view name, int64_t n) {
    const TensorEntry& entry = find(name, {n}, {"F32", "F16", "BF16"});
    StoredVector stored{str(entry.dtype_name, " ", entry.shape_text()), files_.read_f32(entry)};
    // Widening keeps NaN and infinities.
    check_finite(place_of(entry), entry.shape, DType::f32, stored.values.data(), 0, n);
    return stored;
}

std::string WeightLoader::place_of(const TensorEntry& entry) const {
    return str(printable(files_.paths()[entry.file]), ": tensor \"", printable(entry.name), "\"");
}

void WeightLoader::check_scales(const TensorEntry& entry, const void* scales, int64_t begin,
                                int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
        const float scale = value_at(DType::f16, scales, static_cast<size_t>(i));
        if (std::isfinite(scale) && scale >= 0) continue;
        refuse_value(place_of(entry), entry.shape, "finite scales of 0 or more",
                     std::isfinite(scale) ? str(scale) : name_of_non_finite(scale), begin + i);
    }
}

void WeightLoader::check_redundant(const TensorEntry& entry, const KnownUnused& known) const {
    if (!known.is_redundant) return;
    std::vector<double> values;
    if (entry.dtype && *entry.dtype != DType::i32) {
        const std::vector<float> floats = files_.read_f32(entry);
        values.assign(floats.begin(), floats.end());
    } else {
        std::vector<std::byte> bytes(entry.bytes);
        files_.read_part(entry, 0, bytes.data(), bytes.size());
        const size_t width = entry.dtype_name == "I64" ? 8 : 4;
        for (size_t at = 0; at + width <= bytes.size(); at += width)
            values.push_back(number_at(entry.dtype_name, bytes.data() + at));
    }
    REFRAG_CHECK(static_cast<int64_t>(values.size()) == entry.n_values() && known.is_redundant(values),
                 Status::bad_input, shown_, ": tensor \"", printable(entry.name), "\" of shape ",
                 entry.shape_text(), ": expected ", known.expected, ", found other values");
}

std::vector<std::string> WeightLoader::finish(const std::vector<KnownUnused>& known_unused) const {
    std::vector<std::string> unused;
    for (const TensorEntry& entry : files_.tensors()) {
        if (used_.contains(entry.name)) continue;
        std::string_view name = entry.name;
        if (!prefix_.empty() && name.starts_with(prefix_)) name.remove_prefix(prefix_.size());
        const auto known =
            std::find_if(known_unused.begin(), known_unused.end(), [&](const KnownUnused& candidate) {
                return matches(name, candidate.name) || name == older_spelling(candidate.name);
            });
        REFRAG_CHECK(known != known_unused.end(), Status::bad_input, shown_, ": tensor \"",
                     printable(entry.name), "\" of shape ", entry.shape_text(),
                     " has no place in this network");
        check_redundant(entry, *known);
        unused.push_back(entry.name);
    }
    return unused;
}

}  // namespace refrag
