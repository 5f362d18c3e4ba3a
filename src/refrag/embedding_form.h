// How chunk embeddings are kept. What is kept in a form is rounded to that form when it is made, too, so that
// a kept embedding and a fresh one are the same bit for bit; the form is part of a passage's name
// (Model::passage_maker).
//
//   f32    as the encoder computes them; 4 d bytes a row of d values
//   bf16   to nearest, ties to even; 2 d bytes
//   int8   q = round(x / s) with one scale a row, s = max |x| / 127 in fp32; 4 + d bytes
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace refrag {

enum class EmbeddingForm : uint8_t { f32, bf16, int8 };

const char* embedding_form_name(EmbeddingForm form);
// Status::usage for another word, naming those there are. `option` begins the message.
EmbeddingForm parse_embedding_form(std::string_view option, std::string_view word);

// Bytes of a row of `dim` values.
size_t embedding_row_bytes(EmbeddingForm form, int64_t dim);
// Appends rows: values [n, dim], n = values.size() / dim.
void pack_embeddings(EmbeddingForm form, std::span<const float> values, int64_t dim, std::string& out);
// The way back. `bytes` holds n rows, values [n, dim].
void unpack_embeddings(EmbeddingForm form, std::string_view bytes, int64_t dim, std::span<float> values);
// In place: what packing and unpacking make of the values.
void round_embeddings(EmbeddingForm form, std::span<float> values, int64_t dim);

}  // namespace refrag
