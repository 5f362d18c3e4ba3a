// What the networks are made of, and how each describes itself once: describe() names every parameter of a
// network with its shape, its use and its place. Loading, counting and the bytes of a step are visitors of
// that description; what a row takes while it passes is told by the columns of the network's activations.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/arena.h"
#include "models/weights.h"

namespace refrag {

// y = x W^T + b.
struct Linear {
    std::unique_ptr<Matrix> weight;  // [out_dim, in_dim]
    DeviceVector bias;               // [out_dim], or empty
    Product into(Tensor out) const { return {out, weight.get(), bias.view()}; }
};

struct LayerNorm {
    DeviceVector weight, bias;  // [dim]
};

// Where a matrix is read while a network runs.
enum class Use {
    table,      // single rows of it
    every_row,  // a product with every row that passes
    some_rows,  // a product with the few rows that want it: a head, a pooler
};

// A matrix as a network describes it.
struct MatrixSpec {
    std::string name;  // in the file, as Hugging Face or we write it
    int64_t out_dim = 0;
    int64_t in_dim = 0;
    Use use = Use::every_row;
    bool may_quantize = true;  // by WeightFormat::int8
};

// Goes through a network's parameters in the order of their description. A place is where the network keeps
// the parameter; it is empty until it has been loaded.
class ParameterVisitor {
  public:
    virtual ~ParameterVisitor() = default;
    virtual void matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) = 0;
    virtual void vector(const std::string& name, int64_t n, DeviceVector& place) = 0;

    // `name`.weight and, where it has one, `name`.bias.
    void linear(const MatrixSpec& spec, Linear& place, bool has_bias = true);
    void layer_norm(const std::string& name, int64_t n, LayerNorm& place);
};

// What a loaded network has and takes.
struct Footprint {
    uint64_t parameters = 0;
    uint64_t bytes = 0;  // in the device's memory
};

// Brings every parameter from a source. Refuses what WeightSource refuses.
class LoadParameters : public ParameterVisitor {
  public:
    explicit LoadParameters(WeightSource& source)
        : source_(source), before_{source.parameters(), source.held_bytes()} {}
    void matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) override;
    void vector(const std::string& name, int64_t n, DeviceVector& place) override;
    // Of what it has brought; other networks may share the source.
    Footprint footprint() const {
        return {source_.parameters() - before_.parameters, source_.held_bytes() - before_.bytes};
    }

  private:
    WeightSource& source_;
    Footprint before_;
};

// A network's activations name their tensors, [rows, width] F32 each, in columns(), a range of
// ActivationColumn: what rows are given memory by, and what they are counted by.
template <typename Activations>
struct ActivationColumn {
    Tensor Activations::*tensor;
    int64_t width;
};
template <typename Columns, typename Activations>
void allocate(const Columns& columns, Activations& activations, Arena& arena, int64_t rows) {
    for (const auto& column : columns) activations.*column.tensor = arena.tensor(rows, column.width);
}
template <typename Columns>
int64_t floats_per_row(const Columns& columns) {
    int64_t sum = 0;
    for (const auto& column : columns) sum += column.width;
    return sum;
}

// Values of a network's parameters.
struct WeightCount {
    uint64_t matrix = 0;  // embeddings among them
    uint64_t vector = 0;
    uint64_t layer_matrix = 0;  // of `matrix`: what WeightFormat::int8 quantises
    uint64_t every_row = 0;     // of `matrix`: multiplied with every row, 2 operations a value
    uint64_t some_rows = 0;     // of `matrix`: multiplied with some rows
    WeightCount& operator+=(const WeightCount& other);
};

class CountParameters : public ParameterVisitor {
  public:
    void matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) override;
    void vector(const std::string& name, int64_t n, DeviceVector& place) override;
    const WeightCount& count() const { return count_; }

  private:
    WeightCount count_;
};

// Bytes in the device's memory of the matrices that are multiplied with: what a step of one row reads, but
// for single rows of tables.
class CountStepBytes : public ParameterVisitor {
  public:
    void matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) override;
    void vector(const std::string& /*name*/, int64_t /*n*/, DeviceVector& /*place*/) override {}
    uint64_t bytes() const { return bytes_; }

  private:
    uint64_t bytes_ = 0;
};

}  // namespace refrag
