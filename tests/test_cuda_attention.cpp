// The attention kernels of cuda/, run on the CPU (cuda_on_host/), against a softmax in double over what the
// kernels multiply: with q * scale * log2 e, k and v rounded to 16 bits where they round them.
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
#include <algorithm>
#include <functional>
#include <numeric>

#include "attention.cuh"
#include "ops_test.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace refrag_test;
using refrag::kPageEntries;
using refrag::cuda_on_host::AttentionArgs;
namespace gpu = refrag::cuda_on_host;

namespace {

constexpr float kUntouched = 12345.0f;
constexpr float kLog2e = 0x1.715476p+0f;
constexpr int32_t kLayers = 2, kLayer = 1;
constexpr int32_t kGarbage = 0x7fffff00;  // no page number

struct Shape {
    int32_t heads;
    int32_t kv_heads;
    int32_t dim;
    DType dtype;  // of the cache, or what a sequence without one is rounded to

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
    int32_t group() const { return heads / kv_heads; }
};

float rounded(DType dtype, float x) {
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

cudaStream_t stream() {
    static Stream the_stream;
    return &the_stream;
}

Floats prefill(const Call& call, int32_t least_rows = 1) {
    Floats out = call.untouched();
    gpu::attention_prefill(call.args(out), call.shape().dtype, least_rows, stream());
    return out;
}
Floats encode(const Call& call) {
    Floats out = call.untouched();
    gpu::attention_encoder(call.args(out), call.shape().dtype, stream());
    return out;
}
Floats decode(const Call& call, int32_t max_entries = 0) {
    Floats out = call.untouched();
    AttentionArgs a = call.args(out);
    a.max_entries = std::max(a.max_entries, max_entries);
    Floats scratch(static_cast<size_t>(gpu::decode_scratch_floats(a)), kNan);
    gpu::attention_decode(a, call.shape().dtype, scratch.data(), stream());
    return out;
}

Floats rows_of(const Call& call, const Floats& out, size_t s) {
    const auto cols = static_cast<int64_t>(call.shape().heads * call.shape().dim);
    return Floats(out.begin() + call.row_begin(s) * cols, out.begin() + call.row_begin(s + 1) * cols);
}

// Elements of a sequence that are further from the reference than the bound. `in_16_bits`: the kernel rounds
// q and the powers.
int64_t count_wrong(const Call& call, const Floats& out, size_t s, bool in_16_bits) {
    const Shape& shape = call.shape();
    const Part& part = call.parts()[s];
    const float factor = shape.scale() * kLog2e;
    int64_t wrong = 0;
    for (int32_t r = 0; r < part.rows; ++r) {
        for (int32_t head = 0; head < shape.heads; ++head) {
            const int32_t h = head / shape.group();
            const int32_t n = part.cached ? call.entries(s, h) - part.rows + r + 1 : part.rows;
            const int64_t row = (int64_t{call.row_begin(s) + r} * shape.heads + head) * shape.dim;
            std::vector<double> weight(static_cast<size_t>(n));
            double sizes = 0.0;
            for (int32_t e = 0; e < n; ++e) {
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
            const auto [least, most] = std::minmax_element(weight.begin(), weight.end());
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
                for (int32_t i = 0; i < n; ++i) {
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
void check(const Call& call, const Floats& out, bool in_16_bits,
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

bool cached(const Part& p) {
    return p.cached;
}
bool one_row(const Part& p) {
    return p.cached && p.rows == 1;
}

}  // namespace

// ---- prefill --------------------------------------------------------------------------------------------

TEST_CASE("cuda attention: prefill over ragged batches") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{8, 1, 64, DType::bf16}, Shape{2, 1, 80, DType::bf16}, Shape{2, 2, 96, DType::bf16},
          Shape{4, 1, 128, DType::bf16}, Shape{4, 2, 64, DType::f16}, Shape{1, 1, 80, DType::f16},
          Shape{4, 1, 96, DType::f16}, Shape{1, 1, 128, DType::f16}}) {
        CAPTURE(shape.dim);
        CAPTURE(shape.heads);
        set_seed(seed);
        const bool odd = seed++ % 2 != 0;
        const std::vector<Part> parts =
            odd ? std::vector<Part>{{1, 300}, {15, 33},       {0, 40},           {64, 1},
                                    {65, 31}, {20, 0, false}, {17, 100, true, 9}}
                : std::vector<Part>{{1, 0},  {16, 32}, {20, 0, false}, {63, 33}, {130, 0, true, 0},
                                    {1, 63}, {0, 0}};
        const Call call(shape, parts, static_cast<uint32_t>(10 * seed));
        check(call, prefill(call), true, cached);
        if (shape.heads <= 2) {
            check(call, prefill(call, 16), true, [](const Part& p) { return p.cached && p.rows >= 16; });
        }
    }
}

TEST_CASE("cuda attention: prefill of every length after every start") {
    set_seed(3);
    const Shape shape{1, 1, 64, DType::bf16};
    std::vector<Part> parts;
    for (const int32_t start : {0, 1, 31, 32, 33, 100, 300}) {
        for (const int32_t rows : {1, 15, 16, 17, 63, 64, 65, 130}) parts.push_back({rows, start});
    }
    const Call call(shape, parts, 31);
    check(call, prefill(call), true, cached);
    // The last page is full, and there is no page number behind it.
    const Call full(shape, {{64, 64}}, 32);
    check(full, prefill(full), true, cached);
}

TEST_CASE("cuda attention: prefill in one call and in several, alone and in a batch, gives the same bits") {
    const Shape shape{2, 1, 80, DType::bf16};
    const Call whole(shape, {{130, 33}}, 41);
    set_seed(1);
    const Floats expected = prefill(whole);
    for (uint64_t seed = 2; seed < 4; ++seed) {
        set_seed(seed);
        CHECK(same_bits(prefill(whole), expected));
    }
    // The rows from 77 on alone: what was before is in the cache.
    const int32_t done = 77, cols = shape.heads * shape.dim;
    const Call rest(shape, {{3, 50}, {130 - done, 33 + done}, {1, 0}}, 42);
    Call copy(shape, {{3, 50}, {130 - done, 33 + done}, {1, 0}}, 42);
    for (int32_t e = 0; e < 163; ++e) {
        for (int32_t d = 0; d < shape.dim; ++d) {
            copy.key(1, 0, e, d) = whole.key(0, 0, e, d);
            copy.value(1, 0, e, d) = whole.value(0, 0, e, d);
        }
    }
    std::copy(whole.q.begin() + done * cols, whole.q.end(), copy.q.begin() + copy.row_begin(1) * cols);
    copy.write_pages();
    const Floats out = prefill(copy);
    CHECK(same_bits(rows_of(copy, out, 1), Floats(expected.begin() + done * cols, expected.end())));
    CHECK(same_bits(rows_of(copy, out, 0), rows_of(rest, prefill(rest), 0)));
}

TEST_CASE("cuda attention: in prefill, what a row does not see cannot reach it") {
    for (const Shape& shape : {Shape{2, 2, 64, DType::bf16}, Shape{1, 1, 96, DType::f16}}) {
        // Entries before `start` are seen by all rows; at (62, 63) by all but the first, in a step that ends
        // there.
        for (const auto& place : {std::pair{20, 5},
                                  {20, 21},
                                  {20, 63},
                                  {20, 64},
                                  {20, 83},
                                  {20, 99},
                                  {62, 63},
                                  {63, 63},
                                  {64, 127}}) {
            const int32_t start = place.first, bad = place.second;
            CAPTURE(start);
            CAPTURE(bad);
            set_seed(static_cast<uint64_t>(bad));
            Call call(shape, {{80, start}, {20, 3}}, 51);
            const Floats clean = prefill(call);
            const int32_t cols = shape.heads * shape.dim, first = bad - start;
            const auto count = [&](const Floats& out, const std::function<float(int32_t, float)>& expected) {
                int64_t wrong = 0;
                for (int32_t r = 0; r < call.n_rows(); ++r) {
                    for (int32_t c = 0; c < cols; ++c) {
                        const auto at = static_cast<size_t>(r * cols + c);
                        const bool reads = r < 80 && r >= first && c < shape.dim;
                        const float value = reads ? expected(c, clean[at]) : clean[at];
                        if (!same_bits(out[at], value)) ++wrong;
                    }
                }
                return wrong;
            };
            // A key makes NaN of all elements, a value of its own.
            const float key = std::exchange(call.key(0, 0, bad, 7), kNan);
            call.write_pages();
            CHECK(count(prefill(call), [](int32_t, float) { return kNan; }) == 0);
            call.key(0, 0, bad, 7) = key;
            for (const float x : {kNan, kInf, -kInf}) {
                const float low = std::exchange(call.value(0, 0, bad, 6), x);
                const float high = std::exchange(call.value(0, 0, bad, 41), x);
                call.write_pages();
                CHECK(count(prefill(call), [&](int32_t c, float y) { return c == 6 || c == 41 ? x : y; }) ==
                      0);
                call.value(0, 0, bad, 6) = low;
                call.value(0, 0, bad, 41) = high;
            }
        }
    }
}

TEST_CASE("cuda attention: in prefill, infinities of both signs meet") {
    set_seed(5);
    Call call({1, 1, 64, DType::bf16}, {{40, 0}}, 52);
    call.value(0, 0, 10, 3) = kInf;
    call.value(0, 0, 12, 3) = -kInf;
    call.value(0, 0, 12, 4) = kNan;
    call.write_pages();
    const Floats out = prefill(call);
    for (int32_t r = 0; r < 40; ++r) {
        const float x = out[static_cast<size_t>(r * 64 + 3)], y = out[static_cast<size_t>(r * 64 + 4)];
        CHECK((r < 10 ? std::isfinite(x) : r < 12 ? x == kInf : std::isnan(x)));
        CHECK((r < 12 ? std::isfinite(y) : std::isnan(y)));
    }
}

TEST_CASE("cuda attention: scores of -inf and +inf") {
    const Shape shape{1, 1, 64, DType::bf16};
    for (const bool decoding : {false, true}) {
        // Scores of -inf for entries 0 .. 79: the whole first step, or two pages, and more.
        set_seed(6);
        const int32_t rows = decoding ? 1 : 100;
        Call call(shape, {{rows, decoding ? 99 : 0}}, 53);
        std::fill(call.q.begin(), call.q.end(), 1e30f);
        for (int32_t e = 0; e < 100; ++e) {
            for (int32_t d = 0; d < 64; ++d)
                call.key(0, 0, e, d) = e < 80 ? rounded(DType::bf16, -1e30f) : 0.0f;
        }
        call.write_pages();
        const auto run = [&] { return decoding ? decode(call) : prefill(call); };
        Floats out = run();
        int64_t wrong = 0;
        for (int32_t r = 0; r < rows; ++r) {
            const int32_t last = 100 - rows + r;
            for (int32_t d = 0; d < 64; ++d) {
                const float got = out[static_cast<size_t>(r * 64 + d)];
                if (last < 80) {
                    wrong += std::isnan(got) ? 0 : 1;
                    continue;
                }
                // All weights are 1: what is left are the sums' roundings and the division's.
                double mean = 0.0;
                for (int32_t e = 80; e <= last; ++e) mean += static_cast<double>(call.value(0, 0, e, d));
                mean /= last - 79;
                wrong += within(got, mean, gamma_n(40)) ? 0 : 1;
            }
        }
        CHECK(wrong == 0);
        for (int32_t d = 0; d < 64; ++d) call.key(0, 0, 0, d) = rounded(DType::bf16, 1e30f);
        call.write_pages();
        out = run();
        CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }));
    }
}

// ---- decode ---------------------------------------------------------------------------------------------

TEST_CASE("cuda attention: decode over ragged batches") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{2, 2, 8, DType::f32}, Shape{2, 1, 64, DType::bf16}, Shape{4, 1, 72, DType::f16},
          Shape{8, 1, 128, DType::bf16}, Shape{3, 1, 256, DType::f32}, Shape{1, 1, 256, DType::bf16},
          Shape{16, 1, 80, DType::f32}, Shape{12, 1, 64, DType::f16}, Shape{2, 2, 128, DType::f32},
          Shape{4, 2, 24, DType::bf16}, Shape{4, 1, 200, DType::f16}, Shape{8, 1, 16, DType::f32}}) {
        CAPTURE(shape.dim);
        CAPTURE(shape.heads);
        set_seed(seed++);
        const Call call(shape,
                        {{1, 0},
                         {1, 30},
                         {2, 300},
                         {1, 31},
                         {0, 50},
                         {1, 32},
                         {1, 254},
                         {1, 0, false},
                         {1, 255, true, 7},
                         {1, 256, true, 1},
                         {1, 512, true, 300}},
                        static_cast<uint32_t>(seed * 7));
        const Floats out = decode(call);
        check(call, out, false, one_row);
        if (shape.heads > 4) continue;
        // A launch for longer sequences than there are, in another order of threads.
        set_seed(seed + 100);
        CHECK(same_bits(decode(call, 1500), out));
    }
}

TEST_CASE("cuda attention: a row decoded alone has the bits that it has in a batch") {
    const Shape shape{4, 2, 64, DType::bf16};
    const Call batch(shape, {{1, 20}, {1, 600}, {1, 255}}, 61);
    const Floats out = decode(batch);
    for (size_t s = 0; s < 3; ++s) {
        Call alone(shape, {{1, batch.parts()[s].start}}, 62);
        for (int32_t h = 0; h < 2; ++h) {
            for (int32_t e = 0; e < alone.entries(0, h); ++e) {
                for (int32_t d = 0; d < 64; ++d) {
                    alone.key(0, h, e, d) = batch.key(s, h, e, d);
                    alone.value(0, h, e, d) = batch.value(s, h, e, d);
                }
            }
        }
        alone.write_pages();
        alone.q = rows_of(batch, batch.q, s);
        CHECK(same_bits(decode(alone), rows_of(batch, out, s)));
    }
}

TEST_CASE("cuda attention: a captured decode reads the lengths that it finds") {
    const Shape shape{2, 1, 64, DType::bf16};
    Call call(shape, {{1, 299}}, 63);
    const Floats at_300 = decode(call, 1024);
    call.set_length(0, 200);
    const Floats at_200 = decode(call, 1024);
    CHECK(!same_bits(at_300, at_200));

    Floats out = call.untouched();
    AttentionArgs a = call.args(out);
    a.max_entries = 1024;
    Floats scratch(static_cast<size_t>(gpu::decode_scratch_floats(a)), kNan);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal);
    gpu::attention_decode(a, shape.dtype, scratch.data(), stream());
    cudaStreamEndCapture(stream(), &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    CHECK(out == call.untouched());
    cudaGraphLaunch(exec, stream());
    CHECK(same_bits(out, at_200));
    call.set_length(0, 300);
    cudaGraphLaunch(exec, stream());
    CHECK(same_bits(out, at_300));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
}

TEST_CASE("cuda attention: in decode, a NaN reaches its head, or its element, and no other") {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        const Shape shape{4, 2, 64, dtype};
        for (const int32_t bad : {0, 40, 255, 256, 299}) {
            CAPTURE(bad);
            Call call(shape, {{1, 299}, {1, 10}}, 64);
            const Floats clean = decode(call);
            const float key = std::exchange(call.key(0, 1, bad, 9), kNan);
            call.write_pages();
            const Floats k_out = decode(call);
            call.key(0, 1, bad, 9) = key;
            call.value(0, 1, bad, 9) = kInf;
            call.write_pages();
            const Floats v_out = decode(call);
            int64_t wrong = 0;
            for (size_t i = 0; i < clean.size(); ++i) {
                const bool reads = i < 256 && i / 128 == 1;
                wrong += same_bits(k_out[i], reads ? kNan : clean[i]) ? 0 : 1;
                wrong += same_bits(v_out[i], reads && i % 64 == 9 ? kInf : clean[i]) ? 0 : 1;
            }
            CHECK(wrong == 0);
        }
    }
}

// ---- sequences without a cache --------------------------------------------------------------------------

TEST_CASE("cuda attention: sequences without a cache") {
    uint64_t seed = 1;
    for (const int32_t dim : {32, 64, 80, 96, 128}) {
        for (const DType dtype : {DType::bf16, DType::f16}) {
            const Shape shape = dim == 64 ? Shape{4, 2, dim, dtype} : Shape{2, dim == 80 ? 1 : 2, dim, dtype};
            CAPTURE(shape.dim);
            CAPTURE(shape.heads);
            set_seed(seed++);
            std::vector<Part> parts = {{1, 0, false},  {15, 0, false}, {5, 9},         {16, 0, false},
                                       {17, 0, false}, {0, 0, false},  {33, 0, false}, {64, 0, false}};
            if (dim == 64) parts.push_back({300, 0, false});
            const Call call(shape, parts, static_cast<uint32_t>(seed * 11));
            check(call, encode(call), true, [](const Part& p) { return !p.cached; });
        }
    }
}

TEST_CASE("cuda attention: a sequence without a cache has the bits that it has alone, and its own NaN") {
    const Shape shape{2, 2, 64, DType::bf16};
    Call batch(shape, {{18, 0, false}, {18, 0, false}, {40, 0, false}}, 71);
    const Floats out = encode(batch);
    Call alone(shape, {{18, 0, false}}, 72);
    alone.q = rows_of(batch, batch.q, 1);
    alone.k = rows_of(batch, batch.k, 1);
    alone.v = rows_of(batch, batch.v, 1);
    CHECK(same_bits(encode(alone), rows_of(batch, out, 1)));

    // NaN in the first sequence's keys, in an element of the last's values (head 1, element 5), and in a
    // query.
    std::fill(batch.k.begin(), batch.k.begin() + 18 * 128, kNan);
    batch.v[static_cast<size_t>((36 + 39) * 128 + 64 + 5)] = kNan;
    batch.q[static_cast<size_t>(20 * 128 + 3)] = kNan;
    const Floats bad = encode(batch);
    int64_t wrong = 0;
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t row = i / 128, column = i % 128;
        const bool nan = row < 18 || (row == 20 && column < 64) || (row >= 36 && column == 64 + 5);
        wrong += same_bits(bad[i], nan ? kNan : out[i]) ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("cuda attention: scores of -inf without a cache") {
    const Shape shape{1, 1, 64, DType::bf16};
    Call call(shape, {{40, 0, false}}, 73);
    std::fill(call.q.begin(), call.q.end(), 1e30f);
    std::fill(call.k.begin(), call.k.begin() + 20 * 64, -1e30f);  // the first step, and part of the second
    std::fill(call.k.begin() + 20 * 64, call.k.end(), 0.0f);
    const Floats out = encode(call);
    int64_t wrong = 0;
    for (int32_t i = 0; i < 40 * 64; ++i) {
        double mean = 0.0;
        for (int32_t e = 20; e < 40; ++e) mean += static_cast<double>(call.value(0, 0, e, i % 64)) / 20.0;
        wrong += within(out[static_cast<size_t>(i)], mean, gamma_n(40)) ? 0 : 1;
    }
    CHECK(wrong == 0);
    std::fill(call.k.begin(), call.k.end(), -1e30f);
    const Floats none = encode(call);
    CHECK(std::all_of(none.begin(), none.end(), [](float x) { return std::isnan(x); }));
}

// ---- all ------------------------------------------------------------------------------------------------

TEST_CASE("cuda attention: what the kernels support") {
    for (const int32_t dim : {64, 80, 96, 128}) CHECK(gpu::prefill_supports(dim));
    for (const int32_t dim : {0, 32, 40, 63, 112, 160, 256}) CHECK(!gpu::prefill_supports(dim));
    for (const int32_t dim : {32, 64, 80, 96, 128}) CHECK(gpu::encoder_supports(dim));
    for (const int32_t dim : {0, 16, 48, 33, 256}) CHECK(!gpu::encoder_supports(dim));
    for (const int32_t dim : {8, 24, 128, 256}) CHECK(gpu::decode_supports(dim, 16));
    for (const int32_t dim : {0, 4, 12, 257, 264}) CHECK(!gpu::decode_supports(dim, 1));
}

TEST_CASE("cuda attention: batches without anything to do") {
    const Shape shape{2, 1, 64, DType::bf16};
    for (const std::vector<Part>& parts :
         {std::vector<Part>{}, {{0, 0}}, {{0, 40}, {0, 0, false}}, {{0, 0, false}}}) {
        const Call call(shape, parts, 81);
        CHECK(prefill(call).empty());
        CHECK(decode(call).empty());
        CHECK(encode(call).empty());
    }
}
