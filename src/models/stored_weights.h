// What sources that read files share: they open a tensor by a network's name for it, and what is opened
// becomes a device's matrix here, in the format that was asked for. Values are checked by who opens them:
// a NaN or an infinity is refused with its place.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "models/int8_weights.h"
#include "models/weight_source.h"

namespace refrag {

// A matrix as a file holds it, named in messages by `place`: FILE: tensor "NAME".
struct StoredMatrix {
    std::string place;
    std::string description;  // type and shape, for a digest: "BF16 [2, 3]"
    // How a device keeps it: F32, F16 or BF16; or I8, where the file has 8 bits with scales.
    DType kept = DType::f32;
    // Of `kept` and F32 the smaller one that holds its values without rounding; what 8 bits are made of.
    DType exact = DType::f32;
    // Rows [row, row + n) as RowReader has them, in `dtype`: `kept` or, unless that is I8, F32.
    std::function<void(DType dtype, int64_t row, int64_t n, void* dst)> read;
};

struct StoredVector {
    std::string description;
    std::vector<float> values;
};

class StoredWeights : public WeightSource {
  public:
    StoredWeights(Device& device, LoadedBytes loaded, WeightFormat format)
        : device_(device), loaded_(std::move(loaded)), format_(format) {}

    // The tensor of this name, which must be there in this shape, counted as used. The source outlives what
    // it gives.
    virtual StoredMatrix open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) = 0;
    virtual StoredVector open_vector(std::string_view name, int64_t n) = 0;

    std::unique_ptr<Matrix> matrix(std::string_view name, int64_t out_dim, int64_t in_dim) final;
    std::unique_ptr<Matrix> layer_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) final;
    DeviceVector vector(std::string_view name, int64_t n) final;
    uint64_t parameters() const final { return parameters_; }
    uint64_t held_bytes() const final { return held_bytes_; }

  protected:
    void tell(uint64_t bytes) const {
        if (loaded_) loaded_(bytes);
    }

  private:
    std::unique_ptr<Matrix> make(std::string_view name, int64_t out_dim, int64_t in_dim, WeightFormat format);

    Device& device_;
    LoadedBytes loaded_;
    WeightFormat format_;
    uint64_t parameters_ = 0;
    uint64_t held_bytes_ = 0;
};

// "[2, 3]".
std::string shape_text(const std::vector<int64_t>& shape);

// "PLACE: expected EXPECTED, found FOUND at element [i, j]", where `index` counts through the shape.
[[noreturn]] void refuse_value(const std::string& place, const std::vector<int64_t>& shape,
                               const char* expected, const std::string& found, int64_t index);
// Refuses a NaN or an infinity among n values of `dtype`, the first of which is the tensor's element `begin`.
void check_finite(const std::string& place, const std::vector<int64_t>& shape, DType dtype,
                  const void* values, int64_t begin, int64_t n);
// Value i of n stored ones, widened.
float value_at(DType dtype, const void* values, size_t i);
// "NaN", "Infinity" or "-Infinity".
const char* name_of_non_finite(float value);

}  // namespace refrag
