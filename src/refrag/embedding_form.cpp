// See embedding_form.h.
#include "refrag/embedding_form.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/dtype.h"
#include "io/file.h"

namespace refrag {
namespace {

constexpr std::array kForms = {EmbeddingForm::f32, EmbeddingForm::bf16, EmbeddingForm::int8};

// Of a row with a NaN or an infinity the scale is NaN, and so is every value that comes back.
float row_scale(std::span<const float> row) {
    float largest = 0.0f;
    bool finite = true;
    for (const float value : row) {
        finite = finite && std::isfinite(value);
        largest = std::max(largest, std::abs(value));
    }
    return finite ? largest / 127.0f : std::nanf("");
}

void pack_int8_row(std::span<const float> row, char* out) {
    const float scale = row_scale(row);
    std::memcpy(out, &scale, sizeof scale);
    for (size_t i = 0; i < row.size(); ++i) {
        // Where max |x| is subnormal the quotient may pass 127.
        const float q = scale > 0.0f ? std::clamp(std::nearbyint(row[i] / scale), -127.0f, 127.0f) : 0.0f;
        out[sizeof scale + i] = static_cast<char>(static_cast<int8_t>(q));
    }
}

void unpack_int8_row(const char* in, std::span<float> row) {
    float scale = 0.0f;
    std::memcpy(&scale, in, sizeof scale);
    for (size_t i = 0; i < row.size(); ++i)
        row[i] = static_cast<float>(static_cast<int8_t>(in[sizeof scale + i])) * scale;
}

size_t rows_of(std::span<const float> values, int64_t dim) {
    REFRAG_DCHECK(dim > 0 ? std::ssize(values) % dim == 0 : values.empty());
    return dim > 0 ? values.size() / static_cast<size_t>(dim) : 0;
}

}  // namespace

const char* embedding_form_name(EmbeddingForm form) {
    switch (form) {
        case EmbeddingForm::f32:
            return "f32";
        case EmbeddingForm::bf16:
            return "bf16";
        case EmbeddingForm::int8:
            return "int8";
    }
    return "?";
}

EmbeddingForm parse_embedding_form(std::string_view option, std::string_view word) {
    std::string known;
    for (const EmbeddingForm form : kForms) {
        if (word == embedding_form_name(form)) return form;
        known += str(known.empty() ? "" : ", ", embedding_form_name(form));
    }
    fail(Status::usage, option, ": expected one of ", known, ", found \"", printable(word, 40), "\"");
}

size_t embedding_row_bytes(EmbeddingForm form, int64_t dim) {
    const auto n = static_cast<size_t>(dim);
    if (n == 0) return 0;
    return form == EmbeddingForm::f32 ? 4 * n : form == EmbeddingForm::bf16 ? 2 * n : sizeof(float) + n;
}

void pack_embeddings(EmbeddingForm form, std::span<const float> values, int64_t dim, std::string& out) {
    const size_t n_rows = rows_of(values, dim);
    const size_t row_bytes = embedding_row_bytes(form, dim);
    const size_t begin = out.size();
    out.resize(begin + n_rows * row_bytes);
    for (size_t r = 0; r < n_rows; ++r) {
        const auto row = values.subspan(r * static_cast<size_t>(dim), static_cast<size_t>(dim));
        char* to = out.data() + begin + r * row_bytes;
        if (form == EmbeddingForm::f32) std::memcpy(to, row.data(), row_bytes);
        if (form == EmbeddingForm::int8) pack_int8_row(row, to);
        if (form != EmbeddingForm::bf16) continue;
        for (size_t i = 0; i < row.size(); ++i) {
            const uint16_t half = f32_to_bf16(row[i]);
            std::memcpy(to + 2 * i, &half, sizeof half);
        }
    }
}

void unpack_embeddings(EmbeddingForm form, std::string_view bytes, int64_t dim, std::span<float> values) {
    const size_t n_rows = rows_of(values, dim);
    const size_t row_bytes = embedding_row_bytes(form, dim);
    REFRAG_DCHECK(bytes.size() == n_rows * row_bytes);
    for (size_t r = 0; r < n_rows; ++r) {
        const auto row = values.subspan(r * static_cast<size_t>(dim), static_cast<size_t>(dim));
        const char* from = bytes.data() + r * row_bytes;
        if (form == EmbeddingForm::f32) std::memcpy(row.data(), from, row_bytes);
        if (form == EmbeddingForm::int8) unpack_int8_row(from, row);
        if (form != EmbeddingForm::bf16) continue;
        for (size_t i = 0; i < row.size(); ++i) {
            uint16_t half = 0;
            std::memcpy(&half, from + 2 * i, sizeof half);
            row[i] = bf16_to_f32(half);
        }
    }
}

void round_embeddings(EmbeddingForm form, std::span<float> values, int64_t dim) {
    if (form == EmbeddingForm::f32) return;
    std::string bytes;
    pack_embeddings(form, values, dim, bytes);
    unpack_embeddings(form, bytes, dim, values);
}

}  // namespace refrag
