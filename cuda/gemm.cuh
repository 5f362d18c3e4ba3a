// What gemm.cu and gemm_tiles.cu share: a few products of one x in one launch.
#pragma once

#include "device.cuh"
#include "ops/backend.h"

namespace refrag::REFRAG_CUDA {

inline constexpr int kMaxParts = 3;

// Products in tiles of 64 rows on tensor cores, for CudaOptions::deterministic. Pointers are to device
// memory.
struct TileProducts {
    struct Part {
        const void* w;           // [out_dim, stride]
        const uint16_t* scales;  // of I8: F16 [out_dim, stride / 32]
        int64_t stride;
        float* out;         // [rows, out_dim]
        const float* bias;  // [out_dim], or null
        int64_t out_dim;
        unsigned first_block;  // set by the launch
    };
    const uint16_t* x;  // [rows, x_stride], BF16 beside BF16 and I8 weights, else F16; zeros from in_dim on
    int64_t rows;
    int64_t in_dim;
    int64_t x_stride;   // a multiple of kTileDepth
    Epilogue epilogue;  // of two parts, where it is silu_mul
    int n_parts;
    Part parts[kMaxParts];
};

inline constexpr int kTileDepth = 32;  // k of a step

// weights: BF16, F16 or I8, of all parts. A row's result has the same bits in any call.
void multiply_in_tiles(const TileProducts& products, DType weights, cudaStream_t stream);

}  // namespace refrag::REFRAG_CUDA
