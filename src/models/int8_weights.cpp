// See int8_weights.h.
#include "models/int8_weights.h"

#include <algorithm>
#include <vector>

#include "base/int8.h"
#include "io/file.h"

namespace refrag {
WeightFormat parse_weight_format(const std::string& option, const std::string& word) {
    if (word == "auto") return WeightFormat::as_stored;
    REFRAG_CHECK(word == "int8", Status::usage, option, ": expected auto or int8; found \"", printable(word),
                 "\"");
    return WeightFormat::int8;
}

std::unique_ptr<Matrix> make_int8_matrix(Device& device, DType dtype, int64_t out_dim, int64_t in_dim,
                                         const RowReader& read,
                                         const std::function<void(int64_t row, int64_t column)>& refuse) {
    const size_t source_bytes = static_cast<size_t>(in_dim) * dtype_bytes(dtype);
    const size_t row_bytes = int8_row_bytes(in_dim);
    const int64_t piece_rows = std::max<int64_t>(1, kPieceValues / std::max<int64_t>(in_dim, 1));
    std::vector<std::byte> piece;  // made when the first rows are asked for: there may be none
    return device.make_matrix(DType::i8, out_dim, in_dim, [&](int64_t row, int64_t n, void* dst) {
        piece.resize(static_cast<size_t>(std::min(piece_rows, out_dim)) * source_bytes);
        auto* to = static_cast<std::byte*>(dst);
        for (int64_t begin = row; begin < row + n; begin += piece_rows) {
            const int64_t rows = std::min(piece_rows, row + n - begin);
            read(begin, rows, piece.data());
            const std::byte* from = piece.data();
            for (int64_t r = 0; r < rows; ++r, from += source_bytes, to += row_bytes) {
                const int64_t done = quantize_int8_row(to, dtype, from, in_dim);
                if (done < in_dim) refuse(begin + r, done);
            }
        }
    });
}

}  // namespace refrag
