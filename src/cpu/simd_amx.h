// What the files of AMX products share: targets and the tiles' configuration. Included by those files only.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace refrag::amx {

inline constexpr int64_t tile_row_bytes = 64;

// All eight tiles: 16 rows of 64 bytes. In memory as a whole, since the intrinsic tells the compiler of its
// first bytes only.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig whole_tiles;

// gemm_bf16 of so few rows and k, with vector instructions instead of tiles: bit for bit the same.
inline constexpr int64_t vector_rows = 2;
inline constexpr int64_t vector_k_tiles = 32;
void gemm_bf16_vectors(const Bf16Gemm& g);

// attend_bf16 of as few rows, of heads up to vector_dim.
inline constexpr int64_t vector_dim = 256;
void attend_bf16_vectors(const Bf16Attend& a);

}  // namespace refrag::amx
