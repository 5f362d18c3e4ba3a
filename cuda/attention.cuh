// Attention on a GPU: what its kernels are given, and the functions that launch them. The op itself
// (CudaBackend::attention) and the plain kernel, which is the definition, are in attention.cu.
//
// A KV page, in every dtype: K [32, head_dim], then V [32, head_dim], row-major.
#pragma once

#include "device.cuh"
#include "ops/backend.h"

namespace refrag::REFRAG_CUDA {

// The sequence that row r of a batch belongs to: the last that begins at or before it.
__device__ __forceinline__ int32_t sequence_of(const int32_t* row_begin, int32_t n_seq, int32_t r) {
    int32_t s = 0, end = n_seq;
    while (end - s > 1) {
        const int32_t middle = (s + end) / 2;
        if (row_begin[middle] <= r)
            s = middle;
        else
            end = middle;
    }
    return s;
}

// The op's arguments, passed to kernels by value. Pointers are to device memory.
struct AttentionArgs {
    float* out;      // [n_rows, n_heads * head_dim]
    const float* q;  // [n_rows, n_heads * head_dim]
    const float* k;  // [n_rows, n_kv_heads * head_dim]
    const float* v;  // [n_rows, n_kv_heads * head_dim]
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    float scale;
    int32_t window;  // entries that a cached row sees, its own among them; 0: all
    // See Batch.
    int32_t n_seq;
    int32_t max_rows;
    int32_t max_entries;
    const int32_t* row_begin;  // [n_seq + 1]
    const int32_t* slot;       // [n_seq]; -1: no cache, bidirectional
    // See KvView; null where no sequence has a cache.
    const void* pages;
    const int32_t* length;      // [n_slots, n_layers, n_kv_heads], the call's own rows counted
    const int32_t* page_table;  // [n_slots, n_layers, n_kv_heads, max_pages]
    int32_t n_layers;
    int32_t layer;
    int32_t max_pages;

    __host__ __device__ int32_t group() const { return n_heads / n_kv_heads; }
    // The first entry that a cached row sees which sees itself as entry `own`.
    __host__ __device__ int32_t first_seen(int32_t own) const {
        return window == 0 || own + 1 < window ? 0 : own + 1 - window;
    }
    // Of (slot, layer, KV head), for `length` and the rows of `page_table`.
    __host__ __device__ int64_t head(int32_t s, int32_t kv_head) const {
        return (static_cast<int64_t>(s) * n_layers + layer) * n_kv_heads + kv_head;
    }
};

// The sequences with a cache, of at least `least_rows` rows (others are left alone): tiles of query rows on
// tensor cores, a running softmax over tiles of entries. kv: BF16 or F16. head_dim: see prefill_supports.
bool prefill_supports(int32_t head_dim);
void attention_prefill(const AttentionArgs& args, DType kv, int32_t least_rows, cudaStream_t stream);

// The sequences with a cache and exactly one row: split over the entries, a KV head's whole group of queries
// at once, splits joined by log-sum-exp. kv: F32, BF16 or F16; any head_dim that decode_supports.
// scratch: decode_scratch_floats(args) floats of device memory.
bool decode_supports(int32_t head_dim, int32_t group);
int64_t decode_scratch_floats(const AttentionArgs& args);
void attention_decode(const AttentionArgs& args, DType kv, float* scratch, cudaStream_t stream);

// The sequences without a cache (others are left alone), computed in BF16 or F16 (`rounding`) from q, k and
// v: one launch for any number of short sequences.
bool encoder_supports(int32_t head_dim);
void attention_encoder(const AttentionArgs& args, DType rounding, cudaStream_t stream);

// In fp32 throughout, for what the kernels above do not take: sequences with a cache (kv: F32, BF16 or F16)
// of at least `least_rows` rows; sequences without one. Others are left alone. head_dim up to 256.
bool fp32_supports(int32_t head_dim);
void attention_fp32(const AttentionArgs& args, DType kv, int32_t least_rows, cudaStream_t stream);
void attention_fp32_uncached(const AttentionArgs& args, cudaStream_t stream);

// The definition: any dtype of the cache, any head_dim, any sequence of which `wanted` is true.
enum class Wanted { all, cached, uncached };
void attention_plain(const AttentionArgs& args, DType kv, Wanted wanted, int32_t n_rows, cudaStream_t stream);

}  // namespace refrag::REFRAG_CUDA
