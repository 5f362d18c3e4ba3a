// What the tables of bench_cuda share: tensors and matrices of drawn numbers, how a call is timed, and how
// its result is held to another way of computing it. bench_cuda.cpp says what for.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "models/kv_cache.h"
#include "ops/backend.h"

namespace refrag_bench {

using refrag::Arena;
using refrag::Backend;
using refrag::DType;
using refrag::Matrix;
using refrag::str;
using refrag::Tensor;

struct Heads {
    int32_t heads, kv_heads, dim;
};

// What is measured: by default for a card.
struct Sizes {
    int repeats = 20;                          // timed batches of calls
    double batch_seconds = 5e-3;               // about how long one takes
    int64_t apart_bytes = int64_t{512} << 20;  // of data, before it comes round again
    std::vector<Heads> heads = {{32, 32, 128}, {32, 8, 128}, {32, 32, 64}, {32, 8, 64}};
    int32_t part = 2048, parts = 8;  // rows of a prefill's part
    std::vector<int32_t> contexts = {1024, 4096, 16384}, batches = {1, 8};
    Heads encoder = {16, 16, 64};
    int32_t chunks = 1024;
    std::vector<std::pair<int64_t, int64_t>> products = {
        {4096, 4096}, {11008, 4096}, {32000, 4096}};  // out x in
    std::vector<int64_t> few_rows = {1, 2, 4, 8}, many_rows = {128, 512, 576, 1088, 2048},
                         crossing_rows = {1, 2, 3, 4, 6, 8, 9, 12, 16},
                         deterministic_rows = {1, 8, 64, 512, 2048};
    std::vector<std::pair<int64_t, int64_t>> encoder_products = {{1024, 1024}, {4096, 1024}, {1024, 4096}};
    int64_t encoder_rows = 18432;  // 1024 chunks of 18 tokens
    int32_t dim = 4096, hidden = 11008, vocab = 32000;
    std::vector<int64_t> draw_rows = {1, 8};
};
// What the kernels that run on the CPU (tests/cuda_on_host/) can bear.
Sizes small_sizes();

struct Peaks {
    double bf16_gflops, read_gbs;
};

// Opens a backend of the card.
struct Way {
    bool plain_attention = false;
    int own_product_rows = 8;  // up to which products go to the backend's own kernels
    bool deterministic = false;
};
using Open = std::function<std::unique_ptr<Backend>(const Way&)>;

class Bench {
  public:
    Bench(const Open& open, Peaks measured, Sizes wanted, std::FILE* file);

    const std::unique_ptr<Backend> backend;
    Backend& b;  // *backend, as it is used
    // What results are held to, opened when first asked for.
    Backend& plain();         // attention by its definition
    Backend& own_products();  // every product through the backend's own kernels
    Backend& cublas();        // every product through cuBLAS
    Backend& deterministic();
    Backend& cpu();  // the CPU's plain loops
    const Peaks peaks;
    const Sizes sizes;
    std::FILE* const tables;  // where tables go

    // A tensor of drawn numbers.
    Tensor tensor(Arena& arena, int64_t rows, int64_t cols);
    // A weight matrix of drawn numbers about 1 / sqrt(in_dim) large.
    std::unique_ptr<Matrix> matrix(DType dtype, int64_t out_dim, int64_t in_dim);
    // As many matrices as lie apart in the L2 cache's eyes, at least two.
    std::vector<std::unique_ptr<Matrix>> matrices(DType dtype, int64_t out_dim, int64_t in_dim);
    // A cache of `layers` layers whose slots all hold `entries` entries of drawn numbers, with room for
    // `room`.
    std::unique_ptr<refrag::KvCache> filled_cache(const Heads& h, int32_t slots, int32_t layers,
                                                  int32_t entries, int32_t room);

    // Seconds of call(i), i counting the calls of a batch. prepare(): before each batch, not timed.
    // most_calls: of a batch.
    double seconds(
        const std::function<void(int64_t)>& call, int64_t most_calls = 1000,
        const std::function<void()>& prepare = [] {}) {
        return seconds_of(b, call, most_calls, prepare);
    }
    // The same of calls that go to another backend.
    double seconds_of(
        Backend& by, const std::function<void(int64_t)>& call, int64_t most_calls = 1000,
        const std::function<void()>& prepare = [] {});

    // How far off a result is: |got - expected| / |expected|, of the vectors' lengths. Of random numbers
    // around 0, so that a part that is missing shows by the root of its share. Beyond `limit`, or where a NaN
    // is, the result counts as wrong: the table says so, and bench_cuda fails.
    std::string off(const std::vector<float>& got, const std::vector<float>& expected, double limit);
    std::string off(Tensor got, Backend& other, Tensor expected, double limit) {
        return off(values(b, got), values(other, expected), limit);
    }
    static std::vector<float> values(Backend& of, Tensor t);
    // The same of what is right or not.
    bool count(bool right) {
        wrong_ += right ? 0 : 1;
        return right;
    }
    int64_t wrong() const { return wrong_; }

  private:
    Backend& opened(std::unique_ptr<Backend>& held, const Way& way);

    Open open_;
    std::unique_ptr<Backend> plain_, own_products_, cublas_, deterministic_, cpu_;
    uint64_t draws_ = 0;
    int64_t wrong_ = 0;
};

uint32_t drawn(uint64_t z);  // 32 random bits
std::string shown(const Heads& h);
refrag::AttentionShape shape_of(const Heads& h);

// Distances that rounding explains: fp32 sums in another order; activations, weights or powers rounded to
// bf16 (2^-9 each).
inline constexpr double kExact = 1e-4, kRounded = 1e-2;

// The tables.
void prefill_attention(Bench& bench);
void decode_attention(Bench& bench);
void encoder_attention(Bench& bench);
void matrix_vector(Bench& bench);
void own_against_cublas(Bench& bench);
void matrix_matrix(Bench& bench);
void deterministic_products(Bench& bench);
void small_ops(Bench& bench);
void draws(Bench& bench);
void all_tables(Bench& bench);
// The kernels that time is spent in, a few calls each, for a profiler.
void profile(Bench& bench);

}  // namespace refrag_bench
