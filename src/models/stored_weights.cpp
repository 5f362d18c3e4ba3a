// See stored_weights.h.
#include "models/stored_weights.h"

#include <cmath>
#include <cstring>

#include "base/finite.h"
#include "base/int8.h"

namespace refrag {
namespace {

const char* format_name(WeightFormat format) {
    return format == WeightFormat::int8 ? "int8" : "as stored";
}

}  // namespace

DeviceVector::DeviceVector(Device& device, const std::vector<float>& values)
    : buffer_(device, values.size() * sizeof(float)),
      view_{buffer_.data(), DType::f32, 1, static_cast<int64_t>(values.size())} {
    if (!values.empty()) device.upload(buffer_.data(), values.data(), buffer_.bytes());
}

std::unique_ptr<Matrix> StoredWeights::matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    return make(name, out_dim, in_dim, WeightFormat::as_stored);
}

std::unique_ptr<Matrix> StoredWeights::layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    return make(name, out_dim, in_dim, format_);
}

std::unique_ptr<Matrix> StoredWeights::make(std::string_view name, int64_t out_dim, int64_t in_dim,
                                            WeightFormat format) {
    const StoredMatrix stored = open_matrix(name, out_dim, in_dim);
    parameters_ += static_cast<uint64_t>(out_dim) * static_cast<uint64_t>(in_dim);
    add_to_digest(str(name, " ", stored.description, " ", format_name(format)));
    const auto read_as = [&](DType dtype) {
        return [&stored, dtype](int64_t row, int64_t n, void* dst) { stored.read(dtype, row, n, dst); };
    };
    std::unique_ptr<Matrix> made;
    if (format == WeightFormat::as_stored || stored.kept == DType::i8) {
        made = device_.make_matrix(stored.kept, out_dim, in_dim, read_as(stored.kept));
    } else {
        made = make_int8_matrix(device_, stored.exact, out_dim, in_dim, read_as(stored.exact),
                                [&](int64_t row, int64_t column) {
                                    fail(Status::bad_input, stored.place, ": expected values of at most ",
                                         kInt8Largest, " in size for int8 weights, found a larger one ",
                                         "at element [", row, ", ", column, "]");
                                });
    }
    held_bytes_ += made->device_bytes();
    return made;
}

DeviceVector StoredWeights::vector(std::string_view name, int64_t n) {
    const StoredVector stored = open_vector(name, n);
    parameters_ += stored.values.size();
    add_to_digest(str(name, " ", stored.description));
    add_to_digest(stored.values.data(), stored.values.size() * sizeof(float));
    held_bytes_ += stored.values.size() * sizeof(float);
    return DeviceVector(device_, stored.values);
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += str(i == 0 ? "" : ", ", shape[i]);
    return text + "]";
}

float value_at(DType dtype, const void* values, size_t i) {
    if (dtype == DType::f32) {
        float value;
        std::memcpy(&value, static_cast<const std::byte*>(values) + i * sizeof value, sizeof value);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const std::byte*>(values) + i * sizeof half, sizeof half);
    return dtype == DType::bf16 ? bf16_to_f32(half) : f16_to_f32(half);
}

const char* name_of_non_finite(float value) {
    if (std::isnan(value)) return "NaN";
    return value < 0 ? "-Infinity" : "Infinity";
}

void refuse_value(const std::string& place, const std::vector<int64_t>& shape, const char* expected,
                  const std::string& found, int64_t index) {
    std::vector<int64_t> at(shape.size());
    for (size_t axis = at.size(); axis-- > 0; index /= shape[axis]) at[axis] = index % shape[axis];
    fail(Status::bad_input, place, ": expected ", expected, ", found ", found, " at element ",
         shape_text(at));
}

void check_finite(const std::string& place, const std::vector<int64_t>& shape, DType dtype,
                  const void* values, int64_t begin, int64_t n) {
    const size_t found = first_non_finite(dtype, values, static_cast<size_t>(n));
    if (found == static_cast<size_t>(n)) return;
    const float value = value_at(dtype, values, found);
    refuse_value(place, shape, "finite values", name_of_non_finite(value),
                 begin + static_cast<int64_t>(found));
}

}  // namespace refrag
