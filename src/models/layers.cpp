// See layers.h.
#include "models/layers.h"

namespace refrag {
namespace {

uint64_t values(const MatrixSpec& spec) {
    return static_cast<uint64_t>(spec.out_dim) * static_cast<uint64_t>(spec.in_dim);
}

}  // namespace

void ParameterVisitor::linear(const MatrixSpec& spec, Linear& place, bool has_bias) {
    MatrixSpec weight = spec;
    weight.name += ".weight";
    matrix(weight, place.weight);
    if (has_bias) vector(spec.name + ".bias", spec.out_dim, place.bias);
}

void ParameterVisitor::layer_norm(const std::string& name, int64_t n, LayerNorm& place) {
    vector(name + ".weight", n, place.weight);
    vector(name + ".bias", n, place.bias);
}

void LoadParameters::matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) {
    place = spec.may_quantize ? source_.layer_matrix(spec.name, spec.out_dim, spec.in_dim)
                              : source_.matrix(spec.name, spec.out_dim, spec.in_dim);
}

void LoadParameters::vector(const std::string& name, int64_t n, DeviceVector& place) {
    place = source_.vector(name, n);
}

WeightCount& WeightCount::operator+=(const WeightCount& other) {
    matrix += other.matrix;
    vector += other.vector;
    layer_matrix += other.layer_matrix;
    every_row += other.every_row;
    some_rows += other.some_rows;
    return *this;
}

void CountParameters::matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& /*place*/) {
    count_.matrix += values(spec);
    if (spec.may_quantize) count_.layer_matrix += values(spec);
    if (spec.use == Use::every_row) count_.every_row += values(spec);
    if (spec.use == Use::some_rows) count_.some_rows += values(spec);
}

void CountParameters::vector(const std::string& /*name*/, int64_t n, DeviceVector& /*place*/) {
    count_.vector += static_cast<uint64_t>(n);
}

void CountStepBytes::matrix(const MatrixSpec& spec, std::unique_ptr<Matrix>& place) {
    if (spec.use != Use::table) bytes_ += place->device_bytes();
}

}  // namespace refrag
