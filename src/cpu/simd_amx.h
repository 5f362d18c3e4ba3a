// What the files of AMX products share: targets and the tiles' configuration. Included by those files and by
// peaks.cpp alone.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace refrag::amx {

inline constexpr int64_t tile_row_bytes = 64;
inline constexpr int64_t tile_floats = 16 * 16;  // of a tile of sums

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

// The sums of R by P tiles, tiles 0 to 3, one behind the other.
template <int R, int P>
REFRAG_AMX inline void store_sums(float* sums) {
    _tile_stored(0, sums, tile_row_bytes);
    if constexpr (P == 2) _tile_stored(1, sums + tile_floats, tile_row_bytes);
    if constexpr (R == 2) _tile_stored(2, sums + 2 * tile_floats, tile_row_bytes);
    if constexpr (R == 2 && P == 2) _tile_stored(3, sums + 3 * tile_floats, tile_row_bytes);
}

// gemm_bf16 of so few rows and k, with vector instructions instead of tiles: bit for bit the same.
inline constexpr int64_t vector_rows = 2;
inline constexpr int64_t vector_k_tiles = 32;
void gemm_bf16_vectors(const Bf16Gemm& g);

// attend_bf16 of as few rows, of heads up to vector_dim.
inline constexpr int64_t vector_dim = 256;
void attend_bf16_vectors(const Bf16Attend& a);

}  // namespace refrag::amx
