// `refrag bench` below the command line: shapes, random weights, texts of exact length, counted costs, and
// the sweep over a small random model. Nothing here looks at how long anything took.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "bench/bench.h"
#include "bench/cost.h"
#include "bench/random_model.h"
#include "cpu/cpu_backend.h"
#include "golden.h"
#include "models/random_weights.h"
#include "refrag/generator.h"
#include "refrag/memory_plan.h"
#include "refrag/select.h"
#include "support.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;
using refrag_test::repo_path;

namespace {

template <typename Config>
Config resized(Config c, int32_t dim, int32_t hidden_dim, int32_t n_layers, int32_t n_heads) {
    c.dim = dim;
    c.hidden_dim = hidden_dim;
    c.n_layers = n_layers;
    c.n_heads = n_heads;
    c.vocab_size = 10464;
    return c;
}

DecoderConfig small_decoder() {
    DecoderConfig c = resized(decoder_shape("llama-160m"), 32, 64, 2, 4);
    c.n_kv_heads = 2;
    c.head_dim = 8;
    return c;
}

RobertaConfig small_encoder() {
    return resized(encoder_shape("roberta-base"), 24, 40, 1, 2);
}

uint64_t parameters(const WeightCount& n) {
    return n.matrix + n.vector;
}

}  // namespace

TEST_CASE("named shapes have the published numbers of parameters") {
    // Hugging Face's parameter counts of TinyLlama-1.1B, Llama-3.2-3B, Llama-2-7b, Llama-3.1-8B, and of
    // RobertaModel with its pooler.
    CHECK(parameters(Llama::count(decoder_shape("tinyllama-1.1b"))) == 1100048384u);
    CHECK(parameters(Llama::count(decoder_shape("llama-3.2-3b"))) == 3212749824u);
    CHECK(parameters(Llama::count(decoder_shape("llama-2-7b"))) == 6738415616u);
    CHECK(parameters(Llama::count(decoder_shape("llama-3.1-8b"))) == 8030261248u);
    CHECK(parameters(Roberta::count(encoder_shape("roberta-base"), ChunkPooling::pooler)) == 124645632u);
    CHECK(parameters(Roberta::count(encoder_shape("roberta-large"), ChunkPooling::pooler)) == 355359744u);
    // 2 * 32000 * 768 + 12 * (4 * 768^2 + 3 * 768 * 2048 + 2 * 768) + 768
    CHECK(parameters(Llama::count(decoder_shape("llama-160m"))) == 134105856u);
    CHECK(contains(error_of([] { decoder_shape("gpt-2"); }), "--shape: expected llama-160m|"));
    CHECK(contains(error_of([] { encoder_shape("bert"); }), "found \"bert\""));
}

TEST_CASE(
    "random weights have mean 0 and variance 1 / in_dim, and each row is its own whatever is read with it") {
    constexpr int64_t kRows = 256, kCols = 1000;
    std::vector<uint16_t> values(kRows * kCols);
    for (int64_t row = 0; row < kRows; ++row) random_row(7, row, kCols, values.data() + row * kCols);
    double sum = 0.0, squares = 0.0;
    for (const uint16_t bits : values) {
        const double value = bf16_to_f32(bits);
        sum += value;
        squares += value * value;
    }
    const double n = kRows * kCols;
    // Five standard errors of a mean: sigma / sqrt(n), sigma = 1 / sqrt(kCols); and truncation to 8 bits,
    // toward zero, which takes less than 2^-8 of a value and half of it on average, so it can shrink the
    // variance by less than 2^-7. The squares' own standard error is below sqrt(2 / n).
    CHECK(std::fabs(sum / n) < 5.0 / std::sqrt(n * kCols));
    const double variance = squares / n * kCols;
    CHECK(variance < 1.0 + 5.0 * std::sqrt(2.0 / n));
    CHECK(variance > 1.0 - 0x1p-7 - 5.0 * std::sqrt(2.0 / n));
    // Largest possible: 510 of sigma sqrt(21845).
    for (const uint16_t bits : values)
        REQUIRE(std::fabs(bf16_to_f32(bits)) <= 510.0 / std::sqrt(21845.0 * kCols) * (1.0 + 0x1p-20));
    std::vector<uint16_t> again(kCols), other(kCols);
    random_row(7, 200, kCols, again.data());
    CHECK(std::equal(again.begin(), again.end(), values.begin() + 200 * kCols));
    random_row(8, 200, kCols, other.data());
    CHECK(other != again);
    const std::set<uint16_t> different(again.begin(), again.end());
    CHECK(different.size() > 100);
}

TEST_CASE("the syllable vocabulary makes texts of exactly so many tokens, and so does a trained one") {
    const Tokenizer syllables = syllable_tokenizer();
    CHECK(syllables.vocab_size() == 4 + 256 + 100 + 100 + 10000);
    CHECK(syllables.encode_ids(" badu zuxe").size() == 2);
    CHECK(syllables.decode(syllables.encode_ids(" badu zuxe \xc3\xa9!"), false) == " badu zuxe \xc3\xa9!");
    const Tokenizer nano = Tokenizer::from_file(repo_path("weights_tools/refrag-nano/decoder"));
    for (const Tokenizer& tokenizer : {syllables, nano}) {
        const WordTexts words(tokenizer);
        for (const int64_t n : {0, 1, 17, 4096}) {
            const std::string text = words.text(n, 3);
            CHECK(std::ssize(tokenizer.encode_ids(text)) == n);
            CHECK(text == words.text(n, 3));
        }
        CHECK(words.text(64, 3) != words.text(64, 4));
    }
}

TEST_CASE("counted operations equal a count matrix by matrix and row by row") {
    const DecoderConfig c = small_decoder();
    constexpr int n = 5;
    double decoder = 0.0;
    const auto linear = [](double rows, double out, double in) { return 2.0 * rows * out * in; };
    for (int layer = 0; layer < c.n_layers; ++layer) {
        decoder += linear(n, 32, 32) + 2 * linear(n, 16, 32) + linear(n, 32, 32);  // q, k and v, o
        decoder += 2 * linear(n, 64, 32) + linear(n, 32, 64);                      // gate and up, down
        for (int row = 0; row < n; ++row) decoder += 4.0 * (linear(1, row + 1, 8) + linear(1, 8, row + 1));
    }
    CHECK(prefill_flops(c, n) == decoder);
    CHECK(head_flops(c) == linear(1, 10464, 32));
    // The 160M decoder at 16384 tokens, by hand: 12 * (2 * 16384 * 7077888 + 2 * 768 * 16384 * 16385).
    CHECK(prefill_flops(decoder_shape("llama-160m"), 16384) == 7731243122688.0);

    const RobertaConfig e = small_encoder();
    double encoder = 4 * linear(n, 24, 24) + linear(n, 40, 24) + linear(n, 24, 40);
    encoder += 2 * (linear(n, n, 12) + linear(n, 12, n));  // two heads of 12
    CHECK(encode_flops(e, n) == encoder);

    PolicyConfig p;
    p.n_heads = 2;
    p.dim = 24;
    p.hidden_dim = 96;
    double policy = linear(n, 24, 10) + linear(n, 1, 24);
    for (int layer = 0; layer < 2; ++layer) {
        policy += 4 * linear(n, 24, 24) + linear(n, 96, 24) + linear(n, 24, 96);
        policy += 2 * (linear(n, n, 12) + linear(n, 12, n));
    }
    CHECK(policy_flops(p, 10, n) == policy);
    CHECK(projector_flops(10, 32, n) == linear(n, 32, 10) + linear(n, 32, 32));
    CHECK(kv_entry_bytes(c, DType::f32) * 32 == Generator::cache_bytes(c, DType::f32, 1, 32));
}

TEST_CASE(
    "a random model has as many parameters as its shapes, and a step reads all matrices but the embedding") {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2);
    const ModelParts parts = random_model_parts(small_decoder(), small_encoder());
    uint64_t last_done = 0, last_total = 0;
    const auto model = make_random_model(backend->device(), parts, 1, [&](uint64_t done, uint64_t total) {
        CHECK(done >= last_done);
        last_done = done;
        last_total = total;
    });
    const WeightCount n = count_weights(parts);
    CHECK(model->parameters() == parameters(n));
    CHECK(model->decoder().parameters() == parameters(Llama::count(parts.decoder)));
    CHECK(model->encoder().parameters() == parameters(Roberta::count(parts.encoder, ChunkPooling::mean)));
    CHECK(last_total == n.matrix * 2);
    CHECK(last_done == last_total);
    CHECK(random_weight_bytes(parts) == n.matrix * 2 + n.vector * 4);
    // The decoder's dimensions are multiples of 32: two bytes become 17 / 16.
    const auto int8 = make_random_model(backend->device(), parts, 1, {}, WeightFormat::int8);
    CHECK(int8->parameters() == model->parameters());
    CHECK(int8->decoder().weight_bytes() ==
          model->decoder().weight_bytes() - Llama::count(parts.decoder).layer_matrix * 15 / 16);
    CHECK(random_weight_bytes(parts, WeightFormat::int8) ==
          random_weight_bytes(parts) - n.layer_matrix * 15 / 16);
    // Nothing is padded: rows are multiples of the packing's 16 columns (10464 = 654 * 16), columns of 32.
    CHECK(model->decoder().step_bytes() == (Llama::count(parts.decoder).matrix - 10464u * 32u) * 2);
    DecoderConfig narrow = small_decoder();
    narrow.vocab_size = 100;
    CHECK(contains(error_of([&] { random_model_parts(narrow, small_encoder()); }),
                   "expected a vocabulary of at least 10460, found 100"));
}

TEST_CASE("a sweep gives every combination a row, with exact positions and ratios of its own figures") {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2);
    const auto model =
        make_random_model(backend->device(), random_model_parts(small_decoder(), small_encoder()), 1);
    BenchOptions options;
    options.contexts = {64, 100};
    options.chunk_lens = {8, 16};
    options.expand_fractions = {0.0, 0.25};
    options.batches = {1, 3};
    options.output_tokens = 5;
    options.repeats = 2;
    int64_t last = 0, total = 0;
    const std::vector<BenchRow> rows = run_bench(*model, options, [&](int64_t done, int64_t of) {
        CHECK(done == last + 1);
        last = done;
        total = of;
    });
    CHECK(last == total);
    REQUIRE(rows.size() == 2 * 2 * (1 + 2 * 2) * 2);
    size_t at = 0;
    for (const int32_t batch : {1, 3}) {
        for (const int64_t context : {64, 100}) {
            const BenchRow* full = &rows[at];
            for (int c = 0; c < 5; ++c) {
                for (const bool cached : {true, false}) {
                    const BenchRow& row = rows[at++];
                    CAPTURE(at);
                    CHECK(row.batch == batch);
                    CHECK(row.context == context);
                    CHECK(row.full == (c == 0));
                    CHECK(row.cached == cached);
                    REQUIRE(row.figures.has_value());
                    const BenchFigures& f = *row.figures;
                    const BenchFigures& base = *full[cached ? 0 : 1].figures;
                    // BOS, the context's tokens or chunks, 16 tokens of question; the template is empty.
                    int64_t expected = context;
                    if (!row.full) {
                        const int32_t k = c <= 2 ? 8 : 16;
                        CHECK(row.chunk_len == k);
                        CHECK(row.expand_fraction == (c % 2 == 1 ? 0.0 : 0.25));
                        const int64_t chunks = (context + k - 1) / k;
                        const int64_t expanded = n_expand(*row.expand_fraction, chunks);
                        expected = chunks + expanded * (k - 1);
                    }
                    // 100 tokens leave a shorter last chunk, which the policy may or may not choose.
                    CHECK(f.positions <= 1 + expected + 16);
                    CHECK(f.positions > 1 + expected + 16 - (row.full || context == 64 ? 1 : 16));
                    CHECK(f.repeats == 2);
                    CHECK(f.spread.has_value());
                    CHECK(f.kv_bytes == Generator::cache_bytes(model->decoder().config(),
                                                               model->decoder().kv_dtype(), batch,
                                                               f.positions + 5));
                    CHECK(*row.ttft_ratio == base.ttft_ms / f.ttft_ms);
                    CHECK(*row.ttit_ratio == base.ttit_ms / f.ttit_ms);
                    CHECK(*row.throughput_ratio == f.tokens_per_s / base.tokens_per_s);
                    CHECK(*row.flop_ratio == base.flops / f.flops);
                    const double step = static_cast<double>(model->decoder().step_bytes()) +
                                        batch * (static_cast<double>(f.positions) + 2.5) *
                                            static_cast<double>(kv_entry_bytes(model->decoder().config(),
                                                                               model->decoder().kv_dtype()));
                    CHECK(f.decode_gbs * f.ttit_ms * 1e6 == doctest::Approx(step).epsilon(1e-12));
                    CHECK(f.flops >= prefill_flops(model->decoder().config(), f.positions));
                }
            }
        }
    }
    // From text the encoder's operations come on top of what cached ones take; the full context's stay.
    CHECK(rows[0].figures->flops == rows[1].figures->flops);
    // 8 chunks of 8 tokens with <s> and </s>.
    CHECK(rows[3].figures->flops - rows[2].figures->flops ==
          doctest::Approx(8 * encode_flops(small_encoder(), 10)).epsilon(1e-9));
}

TEST_CASE("without the full context there are no ratios, and what passes the window has no figures") {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2);
    DecoderConfig decoder = small_decoder();
    decoder.max_seq_len = 64;
    const auto model = make_random_model(backend->device(), random_model_parts(decoder, small_encoder()), 1);
    BenchOptions options;
    options.contexts = {64};
    options.chunk_lens = {16};
    options.expand_fractions = {0.0};
    options.output_tokens = 4;
    options.repeats = 1;
    options.text = false;
    std::vector<BenchRow> rows = run_bench(*model, options);
    REQUIRE(rows.size() == 2);
    CHECK(rows[0].full);
    CHECK_FALSE(rows[0].figures.has_value());
    CHECK_FALSE(rows[0].ttft_ratio.has_value());
    REQUIRE(rows[1].figures.has_value());
    CHECK_FALSE(rows[1].ttft_ratio.has_value());
    CHECK_FALSE(rows[1].figures->spread.has_value());
    options.full = false;
    rows = run_bench(*model, options);
    REQUIRE(rows.size() == 1);
    CHECK(rows[0].figures.has_value());
    CHECK_FALSE(rows[0].throughput_ratio.has_value());
}

TEST_CASE("options of a sweep that make no sense are refused by name, and memory is counted from above") {
    const auto refused = [](auto&& change) {
        BenchOptions options;
        change(options);
        return error_of([&] { check_bench_options(options); });
    };
    CHECK(refused([](BenchOptions&) {}) == "(no error)");
    CHECK(contains(refused([](BenchOptions& o) { o.contexts = {0}; }), "1 to 2^20 tokens, found 0"));
    CHECK(contains(refused([](BenchOptions& o) { o.chunk_lens = {8, 5000}; }), "found 5000"));
    CHECK(contains(refused([](BenchOptions& o) { o.expand_fractions = {1.5}; }), "found 1.5"));
    CHECK(contains(refused([](BenchOptions& o) { o.batches = {0}; }), "found 0"));
    CHECK(
        contains(refused([](BenchOptions& o) { o.output_tokens = 1; }), "at least 2 output tokens, found 1"));
    CHECK(contains(refused([](BenchOptions& o) { o.full = o.refrag = false; }), "found neither"));
    CHECK(contains(refused([](BenchOptions& o) { o.cached = o.text = false; }), "found neither"));

    BenchOptions options;
    options.contexts = {512, 4096};
    options.batches = {1, 4};
    const ModelParts parts = random_model_parts(small_decoder(), small_encoder());
    const BenchMemory memory = bench_memory(parts.decoder, DType::f32, parts.encoder, parts.config, options);
    CHECK(memory.kv_bytes >= Generator::cache_bytes(parts.decoder, DType::f32, 4, 4096 + 1 + 16 + 256));
    CHECK(memory.kv_bytes < Generator::cache_bytes(parts.decoder, DType::f32, 4, 4096 + 400));
    options.full = false;  // the longest is k = 32, p = 0.1: 128 chunks, 13 of them expanded
    const BenchMemory less = bench_memory(parts.decoder, DType::f32, parts.encoder, parts.config, options);
    CHECK(less.kv_bytes >=
          Generator::cache_bytes(parts.decoder, DType::f32, 4, 128 + 13 * 31 + 1 + 16 + 256));
    CHECK(less.kv_bytes < memory.kv_bytes / 2);
}
