// Rotary positions and the KV cache's writes on a GPU.
//
// kv_append raises a head's length when its rows are written. Whoever writes needs the old length, so either
// one block does all of a head's work, or a kernel of its own raises the lengths afterwards.
#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 128;
// Up to so many rows of a sequence one block for each KV head does everything: rotates, appends, raises.
constexpr int32_t kFewRows = 16;

struct Append {
    float* q;
    float* k;
    const float* v;
    const float* cos_sin;  // null: k is rotated already, and q is left alone
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    const int32_t* row_begin;
    const int32_t* slot;
    void* pages;
    DType dtype;
    int32_t* length;
    const int32_t* page_table;
    int32_t n_layers;
    int32_t layer;
    int32_t max_pages;

    __device__ int64_t head(int32_t s, int32_t kv_head) const {
        return (static_cast<int64_t>(s) * n_layers + layer) * n_kv_heads + kv_head;
    }
};

// One pair of a head, x at its first element. The roundings are written out: two kernels rotate, by the
// number of rows, and must give the same bits.
__device__ __forceinline__ void rotate(float* x, const float* cos_sin, int64_t m, int64_t half) {
    const float first = x[m], second = x[half + m];
    const float c = cos_sin[m], s = cos_sin[half + m];
    x[m] = __fmaf_rn(first, c, -__fmul_rn(second, s));
    x[half + m] = __fmaf_rn(second, c, __fmul_rn(first, s));
}

__device__ __forceinline__ void store(void* pages, DType dtype, int64_t at, float x) {
    if (dtype == DType::f32)
        static_cast<float*>(pages)[at] = x;
    else if (dtype == DType::bf16)
        static_cast<uint16_t*>(pages)[at] = round_bf16(x);
    else
        static_cast<uint16_t*>(pages)[at] = round_f16(x);
}

// K and V of row r of the batch become entry e of a head.
__device__ __forceinline__ void append_row(const Append& a, int64_t head, int32_t kv_head, int64_t r,
                                           int64_t e) {
    const int64_t page = a.page_table[head * a.max_pages + e / kPageEntries];
    const int64_t to = (page * 2 * kPageEntries + e % kPageEntries) * a.head_dim;
    const int64_t from = (r * a.n_kv_heads + kv_head) * a.head_dim;
    for (int64_t d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        store(a.pages, a.dtype, to + d, a.k[from + d]);
        store(a.pages, a.dtype, to + int64_t{kPageEntries} * a.head_dim + d, a.v[from + d]);
    }
}

// Mapping: a block for each row. The angle is the product rounded to fp32; sine and cosine reduce angles of
// any size.
__global__ void rope_table_kernel(float* cos_sin, const float* position, const float* inv_freq,
                                  int64_t half) {
    float* const row = cos_sin + blockIdx.x * 2 * half;
    for (int64_t m = threadIdx.x; m < half; m += blockDim.x) {
        const float angle = __fmul_rn(position[blockIdx.x], inv_freq[m]);
        row[m] = cosf(angle);
        row[half + m] = sinf(angle);
    }
}

// Mapping: a block for each row, its threads over the pairs of all heads. Bound by: memory.
__global__ void rope_kernel(float* x, const float* cos_sin, int64_t cols, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    float* const row = x + blockIdx.x * cols;
    for (int64_t i = threadIdx.x; i < cols / 2; i += blockDim.x) {
        rotate(row + i / half * head_dim, cos_sin + blockIdx.x * head_dim, i % half, half);
    }
}

// Mapping: block (row of the batch, KV head). Lengths are raised by raise_lengths_kernel. Bound by: memory.
__global__ void append_kernel(Append a, int32_t n_seq) {
    const int32_t r = static_cast<int32_t>(blockIdx.x), kv_head = static_cast<int32_t>(blockIdx.y);
    const int32_t s = sequence_of(a.row_begin, n_seq, r);
    if (a.slot[s] < 0) return;
    const int64_t head = a.head(a.slot[s], kv_head);
    append_row(a, head, kv_head, r, a.length[head] + r - a.row_begin[s]);
}

// Mapping: block (sequence), a thread for each KV head.
__global__ void raise_lengths_kernel(Append a) {
    const int32_t s = static_cast<int32_t>(blockIdx.x);
    if (a.slot[s] < 0) return;
    for (int32_t h = static_cast<int32_t>(threadIdx.x); h < a.n_kv_heads;
         h += static_cast<int32_t>(blockDim.x)) {
        a.length[a.head(a.slot[s], h)] += a.row_begin[s + 1] - a.row_begin[s];
    }
}

// Mapping: block (sequence, KV head): its rows of K and of the queries that read it. Bound by: latency, for a
// decode step has one row.
__global__ void rope_append_few_kernel(Append a) {
    const int32_t s = static_cast<int32_t>(blockIdx.x), kv_head = static_cast<int32_t>(blockIdx.y);
    const int64_t dim = a.head_dim, half = dim / 2, group = a.n_heads / a.n_kv_heads;
    const int64_t begin = a.row_begin[s], rows = a.row_begin[s + 1] - begin;
    if (a.cos_sin != nullptr) {
        for (int64_t i = threadIdx.x; i < rows * (group + 1) * half; i += blockDim.x) {
            const int64_t r = begin + i / ((group + 1) * half), h = i / half % (group + 1);
            float* const x = h < group ? a.q + (r * a.n_heads + kv_head * group + h) * dim
                                       : a.k + (r * a.n_kv_heads + kv_head) * dim;
            rotate(x, a.cos_sin + r * dim, i % half, half);
        }
    }
    if (a.slot[s] < 0) return;
    __syncthreads();  // k is read by other threads than rotated it
    const int64_t head = a.head(a.slot[s], kv_head);
    const int64_t held = a.length[head];
    for (int64_t r = 0; r < rows; ++r) append_row(a, head, kv_head, begin + r, held + r);
    __syncthreads();  // all have read the length
    if (threadIdx.x == 0) a.length[head] = static_cast<int32_t>(held + rows);
}

Append append_of(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin,
                 const Batch& batch) {
    REFRAG_DCHECK(k.cols == static_cast<int64_t>(kv.n_kv_heads) * kv.head_dim && v.cols == k.cols);
    REFRAG_DCHECK(k.rows == batch.n_rows && v.rows == batch.n_rows);
    Append a{};
    a.q = q.empty() ? nullptr : q.f32();
    a.k = k.f32();
    a.v = v.f32();
    a.cos_sin = cos_sin.empty() ? nullptr : cos_sin.f32();
    a.n_kv_heads = kv.n_kv_heads;
    a.n_heads = q.empty() ? kv.n_kv_heads : static_cast<int32_t>(q.cols / kv.head_dim);
    a.head_dim = kv.head_dim;
    a.row_begin = batch.row_begin;
    a.slot = batch.slot;
    a.pages = kv.pages;
    a.dtype = kv.dtype;
    a.length = kv.length;
    a.page_table = kv.page_table;
    a.n_layers = kv.n_layers;
    a.layer = layer;
    a.max_pages = kv.max_pages;
    return a;
}

}  // namespace

void CudaBackend::rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) {
    const int64_t half = cos_sin.cols / 2;
    REFRAG_DCHECK(inv_freq.size() == half && cos_sin.cols % 2 == 0);
    if (cos_sin.empty()) return;
    CUDA_CHECK(launch(rope_table_kernel, dim3(static_cast<unsigned>(cos_sin.rows)), dim3(kWarp), 0, stream(),
                      cos_sin.f32(), position, inv_freq.f32(), half));
}

void CudaBackend::rope(Tensor x, Tensor cos_sin) {
    REFRAG_DCHECK(x.rows == cos_sin.rows && (cos_sin.cols == 0 || x.cols % cos_sin.cols == 0));
    if (x.empty()) return;
    CUDA_CHECK(launch(rope_kernel, dim3(static_cast<unsigned>(x.rows)), dim3(kThreads), 0, stream(), x.f32(),
                      cos_sin.f32(), x.cols, cos_sin.cols));
}

DType CudaDevice::kv_dtype(DType weights, int32_t head_dim) const {
    if (head_dim % 8 != 0 || weights == DType::f32) return DType::f32;
    return weights == DType::f16 ? DType::f16 : DType::bf16;
}

void CudaBackend::kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) {
    if (batch.n_rows == 0) return;
    const Append a = append_of(kv, layer, Tensor{}, k, v, Tensor{}, batch);
    const auto heads = static_cast<unsigned>(kv.n_kv_heads), n_seq = static_cast<unsigned>(batch.n_seq);
    if (batch.max_rows <= kFewRows) {
        CUDA_CHECK(launch(rope_append_few_kernel, dim3(n_seq, heads), dim3(kThreads), 0, stream(), a));
        return;
    }
    CUDA_CHECK(launch(append_kernel, dim3(static_cast<unsigned>(batch.n_rows), heads), dim3(kThreads), 0,
                      stream(), a, batch.n_seq));
    CUDA_CHECK(launch(raise_lengths_kernel, dim3(n_seq), dim3(kWarp), 0, stream(), a));
}

void CudaBackend::rope_kv_append(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v,
                                 Tensor cos_sin, const Batch& batch) {
    if (batch.n_rows == 0) return;
    if (batch.max_rows > kFewRows) return Backend::rope_kv_append(kv, layer, q, k, v, cos_sin, batch);
    CUDA_CHECK(launch(rope_append_few_kernel,
                      dim3(static_cast<unsigned>(batch.n_seq), static_cast<unsigned>(kv.n_kv_heads)),
                      dim3(kThreads), 0, stream(), append_of(kv, layer, q, k, v, cos_sin, batch)));
}

}  // namespace refrag::REFRAG_CUDA
