// The attention op on a GPU: which kernels a batch goes to, and the plain kernel, which reads like the
// formula and takes every dtype, head_dim and kind of sequence. The fast ones are in attention_prefill.cu,
// attention_decode.cu, attention_encoder.cu and attention_fp32.cu; they leave head_dims above 256 to it.
#include "attention.cuh"

#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlockEntries = 128;

__device__ __forceinline__ float element(const void* pages, DType dtype, int64_t at) {
    if (dtype == DType::f32) return static_cast<const float*>(pages)[at];
    const uint16_t bits = static_cast<const uint16_t*>(pages)[at];
    return dtype == DType::bf16 ? widen_bf16(bits) : widen_f16(bits);
}

// out = softmax(q K^T * scale) V for one row and head, the softmax running over blocks of entries:
//   m' = max(m, max s);  p = exp(s - m');  l = l exp(m - m') + sum p;  acc = acc exp(m - m') + p V.
// Mapping: block (row, query head). A score is a thread's own sum, ascending; V's sums are a thread's own for
// each dimension. Reduction order: blocks of 128 entries in order; within one, the sum of p by warps.
// Shared memory bytes: 4 * (head_dim + 128) dynamic, 4 * 8 static. Bound by: nothing that matters.
__global__ void attention_plain_kernel(AttentionArgs a, DType kv, Wanted wanted) {
    const int32_t r = static_cast<int32_t>(blockIdx.x), h = static_cast<int32_t>(blockIdx.y);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int32_t s = sequence_of(a.row_begin, a.n_seq, r);
    const bool cached = a.slot[s] >= 0;
    if ((wanted == Wanted::cached && !cached) || (wanted == Wanted::uncached && cached)) return;
    const int64_t dim = a.head_dim, kv_head = h / a.group();
    const int64_t head = cached ? a.head(a.slot[s], static_cast<int32_t>(kv_head)) : 0;
    const int64_t rows = a.row_begin[s + 1] - a.row_begin[s];
    const int64_t entries = cached ? a.length[head] - rows + (r - a.row_begin[s]) + 1 : rows;
    const int64_t hidden = cached ? a.first_seen(static_cast<int32_t>(entries - 1)) : 0;
    // Element d of K (or V) of an entry.
    const auto at = [&](const float* own, int64_t offset, int64_t e, int64_t d) {
        if (!cached) return own[((a.row_begin[s] + e) * a.n_kv_heads + kv_head) * dim + d];
        const int64_t page = a.page_table[head * a.max_pages + e / kPageEntries];
        return element(a.pages, kv, (page * 2 * kPageEntries + offset + e % kPageEntries) * dim + d);
    };

    float* const q = dynamic_shared<float>();  // [dim]
    float* const p = q + dim;                  // [kBlockEntries]
    REFRAG_SHARED(float, of_warp, kWarps);
    const float* const query = a.q + (static_cast<int64_t>(r) * a.n_heads + h) * dim;
    for (int64_t d = threadIdx.x; d < dim; d += kThreads) q[d] = query[d];
    __syncthreads();

    constexpr int kMaxOwned = 8;  // dimensions of a thread: head_dim <= kMaxOwned * kThreads
    float acc[kMaxOwned] = {};
    float m = -INFINITY, l = 0.0f;
    for (int64_t first = hidden / kBlockEntries * kBlockEntries; first < entries; first += kBlockEntries) {
        const int64_t e = first + threadIdx.x;
        float score = -INFINITY;
        const bool sees = e >= hidden && e < entries;
        if (sees) {
            float sum = 0.0f;
            for (int64_t d = 0; d < dim; ++d) sum += q[d] * at(a.k, 0, e, d);
            score = sum * a.scale;
        }
        float largest = warp_max(score);
        if (lane == 0) of_warp[warp] = largest;
        __syncthreads();
        largest = m;
        for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, of_warp[w]);
        // While all scores are -inf, subtracting their maximum would make NaN of what may still become
        // finite.
        const float shift = largest == -INFINITY ? 0.0f : largest;
        const float keep = expf(m - shift);
        const float weight = sees ? expf(score - shift) : 0.0f;
        p[threadIdx.x] = weight;
        __syncthreads();  // all have read the maxima; p is there
        const float sum = warp_sum(weight);
        if (lane == 0) of_warp[warp] = sum;
        const int64_t n = entries - first < kBlockEntries ? entries - first : kBlockEntries;
        for (int i = 0; i < kMaxOwned; ++i) {
            const int64_t d = threadIdx.x + static_cast<int64_t>(i) * kThreads;
            if (d >= dim) break;
            acc[i] *= keep;
            for (int64_t j = hidden > first ? hidden - first : 0; j < n; ++j)
                acc[i] += p[j] * at(a.v, kPageEntries, first + j, d);
        }
        __syncthreads();  // the sums are there; p may be written again
        l *= keep;
        for (int w = 0; w < kWarps; ++w) l += of_warp[w];
        m = largest;
        __syncthreads();
    }
    float* const out = a.out + (static_cast<int64_t>(r) * a.n_heads + h) * dim;
    for (int i = 0; i < kMaxOwned; ++i) {
        const int64_t d = threadIdx.x + static_cast<int64_t>(i) * kThreads;
        if (d < dim) out[d] = acc[i] / l;
    }
}

}  // namespace

void attention_plain(const AttentionArgs& args, DType kv, Wanted wanted, int32_t n_rows,
                     cudaStream_t stream) {
    REFRAG_CHECK(args.head_dim <= 8 * kThreads, Status::runtime, "attention: head_dim ", args.head_dim,
                 ", at most ", 8 * kThreads);
    const size_t shared = static_cast<size_t>(args.head_dim + kBlockEntries) * sizeof(float);
    CUDA_CHECK(launch(attention_plain_kernel,
                      dim3(static_cast<unsigned>(n_rows), static_cast<unsigned>(args.n_heads)),
                      dim3(kThreads), shared, stream, args, kv, wanted));
}

void CudaBackend::attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape,
                            const KvView* kv, int32_t layer, const Batch& batch) {
    REFRAG_DCHECK(shape.n_heads % shape.n_kv_heads == 0);
    REFRAG_DCHECK(q.cols == static_cast<int64_t>(shape.n_heads) * shape.head_dim && out.cols == q.cols);
    REFRAG_DCHECK(k.cols == static_cast<int64_t>(shape.n_kv_heads) * shape.head_dim && v.cols == k.cols);
    REFRAG_DCHECK(q.rows == batch.n_rows && out.rows == q.rows && k.rows == q.rows && v.rows == q.rows);
    if (batch.n_rows == 0) return;
    AttentionArgs a{};
    a.out = out.f32();
    a.q = q.f32();
    a.k = k.f32();
    a.v = v.f32();
    a.n_heads = shape.n_heads;
    a.n_kv_heads = shape.n_kv_heads;
    a.head_dim = shape.head_dim;
    a.scale = shape.scale;
    a.window = shape.window;
    a.n_seq = batch.n_seq;
    a.max_rows = batch.max_rows;
    a.max_entries = batch.max_entries;
    a.row_begin = batch.row_begin;
    a.slot = batch.slot;
    if (kv != nullptr) {
        a.pages = kv->pages;
        a.length = kv->length;
        a.page_table = kv->page_table;
        a.n_layers = kv->n_layers;
        a.layer = layer;
        a.max_pages = kv->max_pages;
    }

    if (device_.options().plain_attention) {
        return attention_plain(a, kv == nullptr ? DType::f32 : kv->dtype, Wanted::all, batch.n_rows,
                               stream());
    }
    if (kv == nullptr || batch.n_uncached > 0) {
        if (shape.weights != DType::f32 && encoder_supports(shape.head_dim)) {
            attention_encoder(a, shape.weights == DType::f16 ? DType::f16 : DType::bf16, stream());
        } else if (fp32_supports(shape.head_dim)) {
            attention_fp32_uncached(a, stream());
        } else {
            attention_plain(a, DType::f32, Wanted::uncached, batch.n_rows, stream());
        }
    }
    if (kv == nullptr || batch.n_uncached == batch.n_seq) return;
    // A row alone is decode's, whatever else is in the batch, so that it does not depend on that. (Where the
    // plain kernel has done it as well, decode writes over it.)
    const bool decodes = decode_supports(shape.head_dim, a.group());
    if (batch.max_rows > 1 || !decodes) {
        if (kv->dtype != DType::f32 && prefill_supports(shape.head_dim))
            attention_prefill(a, kv->dtype, decodes ? 2 : 1, stream());
        else if (fp32_supports(shape.head_dim))
            attention_fp32(a, kv->dtype, decodes ? 2 : 1, stream());
        else
            attention_plain(a, kv->dtype, Wanted::cached, batch.n_rows, stream());
    }
    if (decodes && (batch.max_rows == 1 || batch.n_seq > 1)) {
        auto* const partial = static_cast<float*>(
            scratch(ScratchUse::partial, static_cast<size_t>(decode_scratch_floats(a)) * sizeof(float)));
        attention_decode(a, kv->dtype, partial, stream());
    }
}

}  // namespace refrag::REFRAG_CUDA
