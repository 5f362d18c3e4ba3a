// See weights.h.
#include "models/weights.h"

#include <algorithm>

#include "io/file.h"

namespace refrag {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += str(i == 0 ? "" : ", ", shape[i]);
    return text + "]";
}

bool matches(std::string_view name, std::string_view pattern) {
    if (pattern.starts_with('*')) return name.ends_with(pattern.substr(1));
    return name == pattern;
}

}  // namespace

DeviceVector::DeviceVector(Backend& backend, const std::vector<float>& values)
    : buffer_(backend, values.size() * sizeof(float)),
      view_{buffer_.data(), DType::f32, 1, static_cast<int64_t>(values.size())} {
    if (!values.empty()) backend.upload(buffer_.data(), values.data(), buffer_.bytes());
}

WeightLoader::WeightLoader(Backend& backend, const std::string& path, std::string optional_prefix)
    : backend_(backend), path_(path), prefix_(std::move(optional_prefix)), files_(WeightFiles::open(path)) {
    if (prefix_.empty()) return;
    for (const TensorEntry& entry : files_.tensors()) {
        const bool twice = entry.name.starts_with(prefix_) &&
                           files_.find(std::string_view(entry.name).substr(prefix_.size())) != nullptr;
        REFRAG_CHECK(!twice, Status::bad_input, path_, ": tensor \"", printable(entry.name),
                     "\" is there twice, with and without the prefix \"", prefix_, "\"");
    }
}

bool WeightLoader::has(std::string_view name) const {
    return files_.find(name) != nullptr ||
           (!prefix_.empty() && files_.find(prefix_ + std::string(name)) != nullptr);
}

const TensorEntry& WeightLoader::find(std::string_view name, const std::vector<int64_t>& shape) {
    const TensorEntry* entry = files_.find(prefix_ + std::string(name));
    if (entry == nullptr) entry = files_.find(name);
    REFRAG_CHECK(entry != nullptr, Status::bad_input, path_, ": tensor \"", name,
                 "\" is missing, expected shape ", shape_text(shape));
    REFRAG_CHECK(entry->shape == shape, Status::bad_input, path_, ": tensor \"", entry->name,
                 "\": expected shape ", shape_text(shape), ", found ", entry->shape_text());
    REFRAG_CHECK(entry->dtype.has_value() && *entry->dtype != DType::i32, Status::bad_input, path_,
                 ": tensor \"", entry->name, "\": expected dtype F32, F16 or BF16, found ",
                 entry->dtype_name);
    used_.insert(entry->name);
    parameters_ += static_cast<uint64_t>(entry->n_values());
    return *entry;
}

std::unique_ptr<Matrix> WeightLoader::matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    const TensorEntry& entry = find(name, {out_dim, in_dim});
    const uint64_t row_bytes = static_cast<uint64_t>(in_dim) * dtype_bytes(*entry.dtype);
    return backend_.make_matrix(*entry.dtype, out_dim, in_dim, [&](int64_t row, int64_t n, void* dst) {
        files_.read_part(entry, static_cast<uint64_t>(row) * row_bytes, dst,
                         static_cast<size_t>(n) * row_bytes);
    });
}

DeviceVector WeightLoader::vector(std::string_view name, int64_t n) {
    return DeviceVector(backend_, files_.read_f32(find(name, {n})));
}

std::vector<std::string> WeightLoader::finish(const std::vector<std::string>& known_unused) const {
    std::vector<std::string> unused;
    for (const TensorEntry& entry : files_.tensors()) {
        if (used_.contains(entry.name)) continue;
        std::string_view name = entry.name;
        if (!prefix_.empty() && name.starts_with(prefix_)) name.remove_prefix(prefix_.size());
        const bool known = std::any_of(known_unused.begin(), known_unused.end(),
                                       [&](const std::string& pattern) { return matches(name, pattern); });
        REFRAG_CHECK(known, Status::bad_input, path_, ": tensor \"", printable(entry.name), "\" of shape ",
                     entry.shape_text(), " has no place in this network");
        unused.push_back(entry.name);
    }
    return unused;
}

}  // namespace refrag
