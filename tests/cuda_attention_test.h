// What the tests of cuda/'s attention kernels share: a call's tensors and cache, the kernels run on the CPU
// (cuda_on_host/), and a softmax in double over what the kernels multiply: with q * scale * log2 e, k and v
// rounded to 16 bits where they round them.
//
// Bound. Scores, in units of log2, are dim products and sums: |ds| <= gamma(dim + 2) sum |q k|. The
// difference to the maximum has one rounding; 2^x is right to 2^-22, which leaves room for a GPU's. In each
// of the steps the sums so far are multiplied by a power whose exponent's rounding is of the size of what it
// rose by: these add up to the scores' range. So a weight is right to
//   E = ln 2 (gamma(dim + 2) sum |q k| + 2 eps range) + 2^-22 (1 + steps),
// sums over n entries and steps to gamma(n + 2 steps), the last division and the joining of lanes, warps and
// splits to some 32 eps. Weights appear above and below the line, so all counts twice; above it 16-bit
// kernels round them once more: u = 2^-8 in bf16, 2^-11 in f16, where what is below 2^-14 of the maximum is
// rounded to multiples of 2^-24. Together, with 1% for second order,
//   |error| <= (2 E + 2 gamma(n + 2 steps + 32) + u) sum_j w_j |v_j| (+ 2^-25 sum_j |v_j| in f16).
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "attention.cuh"
#include "ops_test.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace refrag_test::cuda_attention {

using refrag::kPageEntries;
using refrag::cuda_on_host::AttentionArgs;
namespace gpu = refrag::cuda_on_host;

inline constexpr float kUntouched = 12345.0f;
inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr int32_t kLayers = 2, kLayer = 1;
inline constexpr int32_t kGarbage = 0x7fffff00;  // no page number

struct Shape {
    int32_t heads;
    int32_t kv_heads;
    int32_t dim;
    DType dtype;         // of the cache, or what a sequence without one is rounded to
    int32_t window = 0;  // entries that a cached row sees; 0: all

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
    int32_t group() const { return heads / kv_heads; }
};

inline float rounded(DType dtype, float x) {
    if (dtype == DType::bf16) return refrag::bf16_to_f32(refrag::f32_to_bf16(x));
    return dtype == DType::f16 ? refrag::f16_to_f32(round_f16(x)) : x;
}

// One sequence of a call: `start` entries and then its rows. In KV head h the first h * pruned entries are
// missing.
struct Part {
    int32_t rows;
    int32_t start;
    bool cached = true;
    int32_t pruned = 0;
};

// A call's tensors and its cache, whose pages are as many as it needs and lie in a shuffled order. What is
// not written is NaN in every type, and AddressSanitizer's; page numbers beyond what a head holds point
// nowhere.
class Call {
  public:
    Call(const Shape& shape, std::vector<Part> parts, uint32_t seed, float size = 2.0f)
        : shape_(shape), parts_(std::move(parts)) {
        int32_t n_pages = 0;
        for (const Part& p : parts_) {
            slot_.push_back(p.cached ? n_slots_++ : -1);
            row_begin_.push_back(row_begin_.back() + p.rows);
            max_rows_ = std::max(max_rows_, p.rows);
            max_entries_ = std::max(max_entries_, p.start + p.rows);
        }
        max_pages_ = static_cast<int32_t>(refrag::cuda_on_host::ceil_div(max_entries_, kPageEntries));
        const int64_t rows = row_begin_.back(), dim = shape.dim;
        q = random_floats(rows * shape.heads * dim, seed, size);
        k = random_floats(rows * shape.kv_heads * dim, seed + 1, size);
        v = random_floats(rows * shape.kv_heads * dim, seed + 2);
        length_.assign(static_cast<size_t>(n_slots_ * kLayers * shape.kv_heads), 1 << 30);
        table_.assign(length_.size() * static_cast<size_t>(max_pages_), kGarbage);
        for (size_t s = 0; s < parts_.size(); ++s) {
            for (int32_t h = 0; h < shape.kv_heads; ++h) {
                const int32_t n = entries(s, h);
                const auto of = static_cast<uint32_t>(s * 100 + static_cast<size_t>(h));
                keys_.push_back(random_floats(n * dim, seed + 1000 + of, size));
                values_.push_back(random_floats(n * dim, seed + 1001 + of));
                for (float& x : keys_.back()) x = rounded(shape.dtype, x);
                for (float& x : values_.back()) x = rounded(shape.dtype, x);
                if (!parts_[s].cached) {
                    for (int64_t i = 0; i < n * dim; ++i) {
                        const auto at = static_cast<size_t>(
                            ((row_begin_[s] + i / dim) * shape.kv_heads + h) * dim + i % dim);
                        keys_.back()[static_cast<size_t>(i)] = rounded(shape.dtype, k[at]);
                        values_.back()[static_cast<size_t>(i)] = rounded(shape.dtype, v[at]);
                    }
                    continue;
                }
                const auto head = static_cast<size_t>(head_index(s, h));
                length_[head] = n;
                for (int32_t e = 0; e < n; e += kPageEntries) {
                    table_[head * static_cast<size_t>(max_pages_) + static_cast<size_t>(e / kPageEntries)] =
                        n_pages++;
                }
            }
        }
        std::vector<int32_t> order(static_cast<size_t>(n_pages));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), std::mt19937(seed));
        for (int32_t& page : table_) {
            if (page != kGarbage) page = order[static_cast<size_t>(page)];
        }
        pages_.assign(
            static_cast<size_t>(n_pages * 2 * kPageEntries * dim) * refrag::dtype_bytes(shape.dtype),
            std::byte{0xff});
        write_pages();
#if defined(__SANITIZE_ADDRESS__)
        for (size_t s = 0; s < parts_.size(); ++s) {
            for (int32_t h = 0; parts_[s].cached && h < shape.kv_heads; ++h) {
                for (int32_t e = entries(s, h); e % kPageEntries != 0; ++e) {
                    for (int part = 0; part < 2; ++part) {
                        ASAN_POISON_MEMORY_REGION(element(s, h, e, 0, part), row_bytes());
                    }
                }
            }
        }
#endif
    }
    ~Call() {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(pages_.data(), pages_.size());
#endif
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // Puts what `key` and `value` give into the pages.
    void write_pages() {
        for (size_t s = 0; s < parts_.size(); ++s) {
            if (!parts_[s].cached) continue;
            for (int32_t h = 0; h < shape_.kv_heads; ++h) {
                for (int32_t e = 0; e < entries(s, h); ++e) {
                    for (int32_t d = 0; d < shape_.dim; ++d) {
                        store(s, h, e, d, 0, key(s, h, e, d));
                        store(s, h, e, d, 1, value(s, h, e, d));
                    }
                }
            }
        }
    }

    const Shape& shape() const {
        return shape_;
    }
    const std::vector<Part>& parts() const {
        return parts_;
    }
    int32_t row_begin(size_t s) const {
        return row_begin_[s];
    }
    int32_t n_rows() const {
        return row_begin_.back();
    }
    int32_t max_entries() const {
        return max_entries_;
    }
    // What KV head h of sequence s holds.
    int32_t entries(size_t s, int32_t h) const {
        return parts_[s].start + parts_[s].rows - h * parts_[s].pruned;
    }
    float& key(size_t s, int32_t h, int32_t e, int32_t d) {
        return keys_[of(s, h)][at(e, d)];
    }
    float& value(size_t s, int32_t h, int32_t e, int32_t d) {
        return values_[of(s, h)][at(e, d)];
    }
    float key(size_t s, int32_t h, int32_t e, int32_t d) const {
        return keys_[of(s, h)][at(e, d)];
    }
    float value(size_t s, int32_t h, int32_t e, int32_t d) const {
        return values_[of(s, h)][at(e, d)];
    }
    // As long as the call lives. For all heads of a slot.
    void set_length(size_t s, int32_t n) {
        for (int32_t h = 0; h < shape_.kv_heads; ++h) length_[static_cast<size_t>(head_index(s, h))] = n;
    }

    AttentionArgs args(Floats& out) const {
        AttentionArgs a{};
        a.out = out.data();
        a.q = q.data();
        if (n_slots_ == 0 || n_slots_ < static_cast<int32_t>(parts_.size())) {
            a.k = k.data();
            a.v = v.data();
        }
        a.n_heads = shape_.heads;
        a.n_kv_heads = shape_.kv_heads;
        a.head_dim = shape_.dim;
        a.scale = shape_.scale();
        a.window = shape_.window;
        a.n_seq = static_cast<int32_t>(parts_.size());
        a.max_rows = max_rows_;
        a.max_entries = max_entries_;
        a.row_begin = row_begin_.data();
        a.slot = slot_.data();
        if (n_slots_ > 0) {
            a.pages = pages_.data();
            a.length = length_.data();
            a.page_table = table_.data();
        }
        a.n_layers = kLayers;
        a.layer = kLayer;
        a.max_pages = max_pages_;
        return a;
    }
    Floats untouched() const {
        return Floats(static_cast<size_t>(n_rows()) * static_cast<size_t>(shape_.heads * shape_.dim),
                      kUntouched);
    }

    Floats q, k, v;

  private:
    size_t of(size_t s, int32_t h) const {
        return s * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(h);
    }
    size_t at(int32_t e, int32_t d) const {
        return static_cast<size_t>(e * shape_.dim + d);
    }
    int64_t head_index(size_t s, int32_t h) const {
        return (int64_t{slot_[s]} * kLayers + kLayer) * shape_.kv_heads + h;
    }
    size_t row_bytes() const {
        return static_cast<size_t>(shape_.dim) * refrag::dtype_bytes(shape_.dtype);
    }
    // Of K (part 0) or V (part 1), in its page.
    std::byte* element(size_t s, int32_t h, int32_t e, int32_t d, int part) {
        const auto page = static_cast<size_t>(
            table_[static_cast<size_t>(head_index(s, h) * max_pages_ + e / kPageEntries)]);
        const auto row =
            (page * 2 + static_cast<size_t>(part)) * kPageEntries + static_cast<size_t>(e % kPageEntries);
        return &pages_[row * row_bytes()] + static_cast<size_t>(d) * refrag::dtype_bytes(shape_.dtype);
    }
    void store(size_t s, int32_t h, int32_t e, int32_t d, int part, float x) {
        const uint16_t bits = shape_.dtype == DType::bf16 ? refrag::f32_to_bf16(x) : round_f16(x);
        if (shape_.dtype == DType::f32) {
            std::memcpy(element(s, h, e, d, part), &x, 4);
        } else {
            std::memcpy(element(s, h, e, d, part), &bits, 2);
        }
    }

    Shape shape_;
    std::vector<Part> parts_;
    std::vector<int32_t> row_begin_ = {0}, slot_, length_, table_;
    int32_t n_slots_ = 0, max_rows_ = 0, max_entries_ = 0, max_pages_ = 0;
    std::vector<Floats> keys_, values_;  // by sequence and KV head; [entries, dim], rounded
    std::vector<std::byte> pages_;
};

inline cudaStream_t stream() {
    static Stream the_stream;
    return &the_stream;
}

inline Floats prefill(const Call& call, int32_t least_rows = 1) {
    Floats out = call.untouched();
    gpu::attention_prefill(call.args(out), call.shape().dtype, least_rows, stream());
    return out;
}
inline Floats encode(const Call& call) {
    Floats out = call.untouched();
    gpu::attention_encoder(call.args(out), call.shape().dtype, stream());
    return out;
}
inline Floats decode(const Call& call, int32_t max_entries = 0) {
    Floats out = call.untouched();
    AttentionArgs a = call.args(out);
    a.max_entries = std::max(a.max_entries, max_entries);
    Floats scratch(static_cast<size_t>(gpu::decode_scratch_floats(a)), kNan);
    gpu::attention_decode(a, call.shape().dtype, scratch.data(), stream());
    return out;
}

inline Floats rows_of(const Call& call, const Floats& out, size_t s) {
    const auto cols = static_cast<int64_t>(call.shape().heads * call.shape().dim);
    return Floats(out.begin() + call.row_begin(s) * cols, out.begin() + call.row_begin(s + 1) * cols);
}

// Elements of a sequence that are further from the reference than the bound. `in_16_bits`: the kernel rounds
// q and the powers.
inline int64_t count_wrong(const Call& call, const Floats& out, size_t s, bool in_16_bits) {
    const Shape& shape = call.shape();
    const Part& part = call.parts()[s];
    const float factor = shape.scale() * kLog2e;
    int64_t wrong = 0;
    for (int32_t r = 0; r < part.rows; ++r) {
        for (int32_t head = 0; head < shape.heads; ++head) {
            const int32_t h = head / shape.group();
            const int32_t n = part.cached ? call.entries(s, h) - part.rows + r + 1 : part.rows;
            const int64_t row = (int64_t{call.row_begin(s) + r} * shape.heads + head) * shape.dim;
            const int32_t first = part.cached && shape.window > 0 ? std::max(0, n - shape.window) : 0;
            std::vector<double> weight(static_cast<size_t>(n), -std::numeric_limits<double>::infinity());
            double sizes = 0.0;
            for (int32_t e = first; e < n; ++e) {
                double dot = 0.0, size = 0.0;
                for (int32_t d = 0; d < shape.dim; ++d) {
                    const float scaled = call.q[static_cast<size_t>(row + d)] * factor;
                    const float x = in_16_bits ? rounded(shape.dtype, scaled) : scaled;
                    const double term = static_cast<double>(x) * static_cast<double>(call.key(s, h, e, d));
                    dot += term;
                    size += std::fabs(term);
                }
                weight[static_cast<size_t>(e)] = dot;
                sizes = std::max(sizes, size);
            }
            const auto [least, most] = std::minmax_element(weight.begin() + first, weight.end());
            const double largest = *most, range = *most - *least;
            const int64_t steps = n / 16 + 1;
            const double e = std::log(2.0) * (gamma_n(shape.dim + 2) * sizes + 2.0 * kEps * range) +
                             0x1p-22 * static_cast<double>(1 + steps);
            double bound = 2.0 * e + 2.0 * gamma_n(n + 2 * steps + 32);
            if (in_16_bits) bound += shape.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
            double total = 0.0;
            for (double& w : weight) total += w = std::exp2(w - largest);
            for (int32_t d = 0; d < shape.dim; ++d) {
                double sum = 0.0, size = 0.0, all = 0.0;
                for (int32_t i = first; i < n; ++i) {
                    const auto x = static_cast<double>(call.value(s, h, i, d));
                    const double w = weight[static_cast<size_t>(i)] / total;
                    sum += w * x;
                    size += w * std::fabs(x);
                    all += std::fabs(x);
                }
                const double small = in_16_bits && shape.dtype == DType::f16 ? 0x1p-25 * all : 0.0;
                if (!within(out[static_cast<size_t>(row + d)], sum, 1.01 * (bound * size + small))) ++wrong;
            }
        }
    }
    return wrong;
}

// Checks the sequences that `wanted` names, and that all others were left alone.
inline void check(const Call& call, const Floats& out, bool in_16_bits,
                  const std::function<bool(const Part&)>& wanted) {
    for (size_t s = 0; s < call.parts().size(); ++s) {
        const Part& part = call.parts()[s];
        CAPTURE(s);
        CAPTURE(part.rows);
        CAPTURE(part.start);
        if (wanted(part)) {
            CHECK(count_wrong(call, out, s, in_16_bits) == 0);
        } else {
            const Floats rows = rows_of(call, out, s);
            CHECK(std::all_of(rows.begin(), rows.end(), [](float x) { return x == kUntouched; }));
        }
    }
}

inline bool cached(const Part& p) {
    return p.cached;
}
inline bool one_row(const Part& p) {
    return p.cached && p.rows == 1;
}

}  // namespace refrag_test::cuda_attention
