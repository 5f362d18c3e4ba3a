// THE op list: everything a network's forward may ask of a device, and each op's contract, stated once.
//
// A Device is what is loaded once and shared: memory and weight matrices, used from any number of threads.
// A Backend is a queue on a device: the ops, and all that an op's call changes. Each engine has one of its
// own. Ops enqueue work in call order; download() and wait() alone wait for it.
// src/cpu/ and cuda/ implement the same list under the same file names. Ops know nothing of models.
//
// Conventions. Tensors are dense row-major [rows, cols] views of the device's memory; activations are F32
// unless an op says otherwise. Sums, means, softmax and dot products accumulate in fp32. No op reads an
// element it does not name. Outputs may not overlap inputs unless "in place" is said. rows = 0 is a no-op
// everywhere. A NaN in an input row reaches the outputs computed from that row and no others. Shape errors
// are programming errors: REFRAG_DCHECK, not messages.
// The same call gives the same bits; on the CPU a row's result does not depend on what other rows are in
// the batch, nor on how a sequence was split into calls (one accumulation order over the inner dimension and
// over the logical KV index), so `--deterministic` costs nothing there.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/arena.h"
#include "base/function_ref.h"
#include "base/memory.h"
#include "base/tensor.h"

namespace refrag {

// A weight matrix W [out_dim, in_dim] in whatever layout its device keeps. Immutable once made.
class Matrix {
  public:
    Matrix(DType dtype, int64_t out_dim, int64_t in_dim)
        : dtype_(dtype), out_dim_(out_dim), in_dim_(in_dim) {}
    virtual ~Matrix() = default;
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
    DType dtype() const { return dtype_; }  // as make_matrix was given it: F32, BF16, F16 or I8
    int64_t out_dim() const { return out_dim_; }
    int64_t in_dim() const { return in_dim_; }
    virtual size_t device_bytes() const = 0;

  private:
    DType dtype_;
    int64_t out_dim_;
    int64_t in_dim_;
};

// Delivers rows [row_begin, row_begin + n_rows) of a matrix in file order and file dtype into `dst`
// (n_rows * in_dim elements; of I8, n_rows rows as base/int8.h lays them out). May throw; the matrix is then
// not made.
using RowReader = std::function<void(int64_t row_begin, int64_t n_rows, void* dst)>;

// One ragged batch: the rows of all sequences stacked. Arrays lie in the device's memory.
// A sequence with slot >= 0 is causal and cached: its row i (0-based within the sequence) sees every entry
// its slot held before the call and the sequence's own rows 0 .. i. A sequence with slot = -1 has no cache
// and is bidirectional: every row sees all rows of its sequence. Sequences without rows are allowed.
struct Batch {
    int32_t n_seq = 0;
    int32_t n_rows = 0;
    int32_t max_rows = 0;                // longest sequence of this call; for launch sizes
    int32_t max_entries = 0;             // at least the longest start + rows; for launch sizes
    const int32_t* row_begin = nullptr;  // [n_seq + 1], row_begin[0] = 0, row_begin[n_seq] = n_rows
    const int32_t* start = nullptr;  // [n_seq] entries that the slot held before the call (0 without a cache)
    const int32_t* slot = nullptr;   // [n_seq] KV slot, or -1
    const float* position = nullptr;  // [n_rows] RoPE position of each row
    int32_t n_uncached = 0;           // sequences with slot = -1; for launches
};

inline constexpr int32_t kPageEntries = 32;  // KV entries to a page

// The paged KV cache as ops see it. A page belongs to one (slot, layer, KV head) and holds K and V of
// kPageEntries entries in 2 * 32 * head_dim elements: in F32, K [32, head_dim], then V [32, head_dim]; in
// other dtypes the order within a page is the backend's own affair. Entry e of a head is entry e % 32 of its
// page e / 32. Entries are in sequence order, K already rotated.
struct KvView {
    void* pages = nullptr;                // [n_pages][2 * 32 * head_dim]
    DType dtype = DType::f32;             // F32, or what Device::kv_dtype() says
    int32_t* length = nullptr;            // [n_slots, n_layers, n_kv_heads] entries held
    const int32_t* page_table = nullptr;  // [n_slots, n_layers, n_kv_heads, max_pages] page numbers
    int32_t n_layers = 0;
    int32_t n_kv_heads = 0;
    int32_t head_dim = 0;
    int32_t max_pages = 0;  // per (slot, layer, KV head)

    bool operator==(const KvView&) const = default;
    int64_t head_index(int32_t slot, int32_t layer, int32_t kv_head) const {
        return (static_cast<int64_t>(slot) * n_layers + layer) * n_kv_heads + kv_head;
    }
};

struct AttentionShape {
    int32_t n_heads = 0;
    int32_t n_kv_heads = 0;  // divides n_heads; query head h reads KV head h / (n_heads / n_kv_heads)
    int32_t head_dim = 0;
    float scale = 0.0f;  // scores are q.k * scale
    DType weights =
        DType::f32;  // of the network: with BF16, sequences without a cache may be computed in bf16
    // Of a sequence with a cache: a row sees its own entry and the window - 1 before it; 0: all before it.
    int32_t window = 0;
};

enum class Pooling { cls, mean };

// out = x W^T + bias, one of several products of the same x.
struct Product {
    Tensor out;
    const Matrix* w = nullptr;
    Tensor bias;
};

// What becomes of a product's sums s while they are at hand; `other` is the op's.
enum class Epilogue {
    store,     // out = s
    gelu,      // out = gelu(s)
    add,       // other += s, a residual
    silu_mul,  // out = silu(s) s', with the sums s' of a second product of the same shape
    rope       // out = s, rotated by `other` in all products but the last
};

// How to draw a token from a row of logits.
struct TokenDraw {
    double uniform;     // in [0, 1)
    float temperature;  // 0: the largest logit, the lowest id among equals
    float top_p;        // (0, 1]
    float min_p;        // [0, 1]
    int32_t top_k;      // below kMaxTopLogits; 0: all
};

// Work that a queue may have recorded to do it again (Backend::replay), and how often it did what. Made by a
// queue, for that queue; ends before it.
class Recording {
  public:
    struct Counts {
        int64_t run = 0;       // the work was enqueued op by op
        int64_t recorded = 0;  // the same, and recorded on the way
        int64_t replayed = 0;  // what had been recorded was done again
    };

    Recording() = default;
    virtual ~Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    // Nothing recorded so far is done again: memory that it names is about to go.
    virtual void forget() noexcept {}
    const Counts& counts() const { return counts_; }

  protected:
    friend class Backend;
    Counts counts_;
};

class Backend;

// What is loaded once and shared: memory, weight matrices, a CPU's threads. Any number of threads may call
// any of its functions at the same time.
class Device : public MemorySource {
  public:
    // MemorySource: every queue may use the memory as soon as allocate() has returned. When release() is
    // called, all work that names the memory must have ended (Backend::wait).

    // One line for people: the device, and how it is used ("cpu: AVX-512, 2 threads").
    virtual std::string description() const = 0;
    // Bytes that allocate() may still give, here and through the queues.
    virtual uint64_t available_bytes() const { return available_memory_bytes(); }
    // Whether reading the device's memory is a transfer, so that choosing there what is read pays.
    virtual bool is_remote() const { return false; }
    // What the KV cache of a decoder with `weights` should hold: F32, or a smaller type that attention
    // computes in.
    virtual DType kv_dtype(DType /*weights*/, int32_t /*head_dim*/) const { return DType::f32; }

    // Host -> device. The bytes are there for every queue when it returns. For loading: while engines run,
    // Backend::upload is the one that waits for nothing.
    virtual void upload(void* dst, const void* src, size_t bytes) = 0;
    // Makes a weight matrix, reading it row block by row block (never two whole copies in memory).
    virtual std::unique_ptr<Matrix> make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                                const RowReader& read) = 0;

    // A further queue. The device must outlive it.
    virtual std::unique_ptr<Backend> make_backend() = 0;
};

// One thread at a time. Two queues of a device know nothing of each other's order: what one has written,
// another may read after wait().
class Backend : public MemorySource {
  public:
    // MemorySource: the memory is the device's, taken and given back in the order of this queue's work. So
    // it may be released while work that names it is under way. It must not outlive the queue.

    virtual Device& device() const = 0;

    // ---- memory ---------------------------------------------------------------------------------------
    virtual void upload(void* dst, const void* src,
                        size_t bytes) = 0;  // host -> device; src may be reused at once
    virtual void download(void* dst, const void* src,
                          size_t bytes) = 0;      // device -> host; waits for all work
    virtual void copy(Tensor out, Tensor x) = 0;  // same shape and dtype
    // Returns when all enqueued work has ended.
    virtual void wait() = 0;

    // ---- work done again and again --------------------------------------------------------------------
    virtual std::unique_ptr<Recording> make_recording() { return std::make_unique<Recording>(); }
    // Does the work that `enqueue` enqueues: ops and nothing else, no upload, no download, no allocation. A
    // backend may record it, and in later calls with the same recording and key do it again without calling
    // `enqueue`. So ops must be given the same addresses and sizes whenever both are the same, and the memory
    // must stay until forget() or the recording's end; what lies in it may change. What else the queue does,
    // takes and releases in between does not matter.
    virtual void replay(Recording& recording, uint64_t /*key*/, FunctionRef<void()> enqueue) {
        ++recording.counts_.run;
        enqueue();
    }

    // ---- embedding ------------------------------------------------------------------------------------
    // out[r, :] = source[r] >= 0 ? table[source[r], :] : vectors[-1 - source[r], :], widened to F32.
    // out [n, d]; table [vocab, d]; source [n] int32 in device memory, each below vocab (callers check);
    // slots [n_slots, d] F32, or empty when no source is negative.
    virtual void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) = 0;
    // x[r, :] += table[ids[r], :], in place.
    virtual void add_embed(Tensor x, const Matrix& table, const int32_t* ids) = 0;
    // out[r, :] = x[index[r], :]; index [out.rows] int32 in device memory.
    virtual void gather_rows(Tensor out, Tensor x, const int32_t* index) = 0;

    // ---- matrix products ------------------------------------------------------------------------------
    // out[r, n] = sum_k x[r, k] * W[n, k] + bias[n]; x [rows, in_dim], out [rows, out_dim], bias [1, out_dim]
    // F32 or empty. Sums in fp32. With BF16 weights a backend may round x to bf16 first (nearest even), as
    // bf16 hardware takes it; otherwise products are those of x and the widened weights. With I8 weights it
    // may round both to bf16 (to nearest), or x to whole multiples of max |x| / 127 for every 32 of a row,
    // where a row with a NaN or an infinity gives NaN.
    virtual void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) = 0;
    // linear() for each product, so that what a backend prepares of x is prepared once.
    virtual void linears(Tensor x, std::span<const Product> products) {
        for (const Product& p : products) linear(p.out, x, *p.w, p.bias);
    }
    // out = gelu(linear(x)); fused where a backend can.
    virtual void linear_gelu(Tensor out, Tensor x, const Matrix& w, Tensor bias) {
        linear(out, x, w, bias);
        gelu(out);
    }

    // residual += linear(x, y): a block's last product, into the residual stream. What y.out then holds is
    // unspecified.
    virtual void linear_add(Tensor residual, Tensor x, const Product& y) {
        linear(y.out, x, *y.w, y.bias);
        add(residual, y.out);
    }

    // ---- element by element (in place) ----------------------------------------------------------------
    virtual void add(Tensor x, Tensor y) = 0;  // x += y; y [rows, cols], or [1, cols] added to every row
    virtual void gelu(Tensor x) = 0;           // x = 0.5 x (1 + erf(x / sqrt(2))): the exact form, not tanh
    virtual void tanh(Tensor x) = 0;
    virtual void silu_mul(Tensor gate, Tensor up) = 0;  // gate = gate / (1 + exp(-gate)) * up  (SwiGLU)
    // gate.out = silu(linear(x, gate)) * linear(x, up); what up.out then holds is unspecified.
    virtual void linear_silu_mul(Tensor x, const Product& gate, const Product& up) {
        linear(gate.out, x, *gate.w, gate.bias);
        linear(up.out, x, *up.w, up.bias);
        silu_mul(gate.out, up.out);
    }

    // ---- norms (over each row) ------------------------------------------------------------------------
    // out = x / sqrt(mean(x^2) + eps) * weight; weight [1, cols]; out may be x.
    virtual void rms_norm(Tensor out, Tensor x, Tensor weight, float eps) = 0;
    // out = (x - mean) / sqrt(var + eps) * weight + bias, var with 1/n; out may be x.
    virtual void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) = 0;
    // x = x / max(||x||_2, 1e-12), in place.
    virtual void l2_normalize(Tensor x) = 0;

    // ---- attention ------------------------------------------------------------------------------------
    // cos_sin[r, m] = cos(a), cos_sin[r, half + m] = sin(a), a = position[r] * inv_freq[m] rounded to fp32,
    // m < half = head_dim / 2. cos_sin [n_rows, head_dim]; inv_freq [1, half] F32.
    virtual void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) = 0;
    // Rotates every head of x [n_rows, n_heads * head_dim] in place (rotate-half):
    // x'[m] = x[m] cos - x[half + m] sin; x'[half + m] = x[half + m] cos + x[m] sin.
    virtual void rope(Tensor x, Tensor cos_sin) = 0;
    // For each sequence with slot >= 0 and each KV head: writes its rows of k and v (k already rotated) at
    // entries length, length + 1, ... of (slot, layer, KV head) and raises length by the number of rows.
    // Pages are already in the table. k, v [n_rows, n_kv_heads * head_dim]. Two sequences of a batch never
    // share a slot.
    virtual void kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) = 0;
    // rope(q), rope(k), kv_append(k, v); k is left rotated.
    virtual void rope_kv_append(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin,
                                const Batch& batch) {
        rope(q, cos_sin);
        rope(k, cos_sin);
        kv_append(kv, layer, k, v, batch);
    }
    // q, k, v = linears(x) in that order, then rope_kv_append of them.
    virtual void linears_rope_kv_append(const KvView& kv, int32_t layer, Tensor x,
                                        std::span<const Product, 3> qkv, Tensor cos_sin, const Batch& batch) {
        linears(x, qkv);
        rope_kv_append(kv, layer, qkv[0].out, qkv[1].out, qkv[2].out, cos_sin, batch);
    }
    // out[r, h] = sum_j softmax_j(q[r, h] . k_j * scale) v_j over what row r sees (see Batch). Called after
    // kv_append: a cached sequence's own rows are the last entries of its slot, and in k, v as well; a
    // backend may read them from either place. q, out [n_rows, n_heads * head_dim]; k, v [n_rows, n_kv_heads
    // * head_dim]. kv is null if and only if every sequence has slot = -1. Every row sees itself, so no row
    // is fully masked; a row whose scores are all -inf gives NaN, as the formula does. In bf16 (a BF16 cache,
    // or shape.weights where there is none) q * scale, k, v and the softmax's exponentials are rounded to
    // bf16 (nearest even) before they are multiplied; sums stay fp32.
    virtual void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape,
                           const KvView* kv, int32_t layer, const Batch& batch) = 0;

    // ---- reductions -----------------------------------------------------------------------------------
    // out[s, :] = the first row (cls) or the mean of the rows (mean) of sequence s. out [n_seq, cols]. Every
    // sequence has at least one row.
    virtual void pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) = 0;
    // out[r] = log(sum_j exp(logits[r, j])) - logits[r, target[r]]: negative log-likelihood in nats.
    // out [1, rows]; target [rows] int32 in device memory, each below cols.
    virtual void nll(Tensor out, Tensor logits, const int32_t* target) = 0;
    // The n = values.cols largest of each row with their columns, the largest first, equal ones by column;
    // NaN counts as larger than everything. values [rows, n], ids [rows, n], 1 <= n <= kMaxTopLogits, n <=
    // cols.
    static constexpr int32_t kMaxTopLogits = 128;
    virtual void top_logits(Tensor values, int32_t* ids, Tensor logits) = 0;
    // One token of each row, drawn as refrag/sampler.h says (steps 4 to 8), in double: ids[r], or -1 where
    // the kMaxTopLogits largest logits do not hold all that may be drawn, or where one is NaN or infinite;
    // whoever asked then reads the row. logits [rows, cols]; ids and draws [rows] in device memory. Only
    // where Device::is_remote(): elsewhere the sampler has the row at hand, and there is no definition to
    // fall back on.
    virtual void draw(int32_t* /*ids*/, Tensor /*logits*/, const TokenDraw* /*draws*/) {
        fail(Status::runtime, "this backend draws no tokens");
    }
};

}  // namespace refrag
