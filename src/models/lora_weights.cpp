// See lora_weights.h.
#include "models/lora_weights.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/int8.h"
#include "base/round.h"
#include "io/file.h"

namespace refrag {
namespace {

// Rows [row, row + n) of scale B A added to w [n, in_dim], one after another.
void add_rows(const LoraFactors& factors, int64_t in_dim, int64_t row, int64_t n, float* w) {
    std::vector<float> sum(static_cast<size_t>(in_dim));
    for (int64_t i = 0; i < n; ++i, w += in_dim) {
        const float* const b = factors.b.data() + (row + i) * factors.rank;
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t r = 0; r < factors.rank; ++r) {
            const float* const a = factors.a.data() + r * in_dim;
            for (int64_t j = 0; j < in_dim; ++j) sum[static_cast<size_t>(j)] += b[r] * a[j];
        }
        for (int64_t j = 0; j < in_dim; ++j) w[j] += factors.scale * sum[static_cast<size_t>(j)];
    }
}

}  // namespace

struct LoraWeights::Merged {
    StoredMatrix base;
    std::shared_ptr<const LoraFactors> factors;
    std::string place;
    std::vector<int64_t> shape;
};

LoraWeights::LoraWeights(Device& device, std::unique_ptr<StoredWeights> base, LoraAdapter adapter,
                         WeightFormat format)
    : StoredWeights(device, {}, format),
      base_(std::move(base)),
      adapter_(std::move(adapter)),
      threads_(default_threads()) {}

StoredMatrix LoraWeights::open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    auto merged = std::make_shared<Merged>();
    merged->base = base_->open_matrix(name, out_dim, in_dim);
    merged->factors = adapter_.open(name, out_dim, in_dim);
    merged->shape = {out_dim, in_dim};
    StoredMatrix stored = merged->base;
    if (merged->factors == nullptr) {
        stored.read = [this, merged, in_dim](DType dtype, int64_t row, int64_t n, void* dst) {
            merged->base.read(dtype, row, n, dst);
            const size_t row_bytes = dtype == DType::i8 ? int8_row_bytes(in_dim)
                                                        : static_cast<size_t>(in_dim) * dtype_bytes(dtype);
            add_to_digest(dst, row_bytes * static_cast<size_t>(n));
        };
        return stored;
    }
    merged->place = str(stored.place, " with the adapter ", printable(adapter_.dir()));
    REFRAG_CHECK(
        stored.kept != DType::i8, Status::bad_input, merged->place,
        ": expected dtype F32, F16 or BF16, found I8 (8 bits cannot take an adapter: merge it into the "
        "floats, then --weights int8)");
    stored.place = merged->place;
    stored.description += " and an adapter";
    stored.exact = DType::f32;
    stored.read = [this, merged](DType dtype, int64_t row, int64_t n, void* dst) {
        read_merged(*merged, dtype, row, n, dst);
    };
    return stored;
}

void LoraWeights::read_merged(const Merged& merged, DType dtype, int64_t row, int64_t n, void* dst) {
    const int64_t in_dim = merged.shape[1];
    constexpr int64_t kTaskValues = kPieceValues;
    const int64_t task_rows = std::max<int64_t>(1, kTaskValues / in_dim);
    const int64_t piece_rows = task_rows * threads_.size();
    std::vector<float> piece;
    auto* to = static_cast<std::byte*>(dst);
    for (int64_t begin = row; begin < row + n; begin += piece_rows) {
        const int64_t rows = std::min(piece_rows, row + n - begin);
        const auto n_values = static_cast<size_t>(rows * in_dim);
        piece.resize(n_values);
        merged.base.read(DType::f32, begin, rows, piece.data());
        if (merged.factors->copy != nullptr) {
            adapter_.check_copy(*merged.factors->copy, begin, rows, piece.data());
        }
        threads_.run((rows + task_rows - 1) / task_rows, [&](int64_t task) {
            const int64_t first = task * task_rows;
            add_rows(*merged.factors, in_dim, begin + first, std::min(task_rows, rows - first),
                     piece.data() + first * in_dim);
        });
        round_values(dtype, piece.data(), n_values, to);
        check_finite(merged.place, merged.shape, dtype, to, begin * in_dim, rows * in_dim);
        add_to_digest(to, n_values * dtype_bytes(dtype));
        to += n_values * dtype_bytes(dtype);
    }
}

std::vector<std::string> LoraWeights::finish(const std::vector<KnownUnused>& known_unused) const {
    adapter_.finish();
    return base_->finish(known_unused);
}

}  // namespace refrag
