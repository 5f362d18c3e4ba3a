// Where an answer looked: the report against attention worked out here from each layer's q, k and v, which
// give the rows that the decoder itself got from its attention op; and the same on every backend.
#include <cmath>

#include "every_backend.h"
#include "golden.h"
#include "refrag/attention_report.h"
#include "tap_backend.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// Sums and probabilities are double; each figure is rounded to float once, by 2^-24 of itself at most. A sum
// over positions is thus off by 2^-24, and what summing n doubles adds, n 2^-53, is far below that.
constexpr double kRounding = 0x1p-23;

// A call of `attention`, of one sequence from its first row.
struct Call {
    std::vector<float> q, k, v, out;
};

class AttentionCalls : public TapBackend {
  public:
    using TapBackend::TapBackend;
    std::vector<Call> calls;

    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch& batch) override {
        TapBackend::attention(out, q, k, v, shape, kv, layer, batch);
        const auto values = [&](Tensor x) { return refrag_test::download(inner_, x); };
        calls.push_back({values(q), values(k), values(v), values(out)});
    }
};

// One golden's prompt and answer: a prompt of tokens and chunk rows, or of tokens alone.
struct Example {
    Example(Backend& backend, const std::string& network, bool mixed)
        : golden(network), decoder(backend.device(), network_path(network)) {
        source = golden.ids(mixed ? "source" : "ids");
        answer = golden.ids(mixed ? "mixed_greedy" : "greedy");
        if (mixed) rows = golden.values("chunk_rows");
    }
    Prompt prompt(Backend& backend) const {
        Prompt made;
        made.input.source = source;
        const size_t dim = static_cast<size_t>(decoder.config().dim);
        made.input.row_chunk.resize(rows.size() / dim);
        made.chunk_rows = Buffer(backend, std::max<size_t>(1, rows.size()) * sizeof(float));
        if (!rows.empty()) backend.upload(made.chunk_rows.data(), rows.data(), rows.size() * sizeof(float));
        return made;
    }
    AttentionReport report(Backend& backend, int64_t step_rows = 2048) const {
        return answer_attention(backend, decoder, prompt(backend), answer, step_rows);
    }

    Golden golden;
    Llama decoder;
    std::vector<int32_t> source, answer;
    std::vector<float> rows;
};

const std::string kNetworks[] = {"llama2", "llama3"};  // the second has grouped queries

// Attention of one head of a row, head by head and row by row as the formula says.
std::vector<double> probabilities(const Call& call, const DecoderConfig& c, size_t row, int32_t head) {
    const auto head_dim = static_cast<size_t>(c.head_dim), n_heads = static_cast<size_t>(c.n_heads),
               n_kv = static_cast<size_t>(c.n_kv_heads), h = static_cast<size_t>(head);
    const size_t kv_head = h / (n_heads / n_kv);
    std::vector<double> p;
    double sum = 0;
    for (size_t j = 0; j <= row; ++j) {
        double dot = 0;
        for (size_t d = 0; d < head_dim; ++d)
            dot += static_cast<double>(call.q[(row * n_heads + h) * head_dim + d]) *
                   static_cast<double>(call.k[(j * n_kv + kv_head) * head_dim + d]);
        p.push_back(std::exp(dot / std::sqrt(static_cast<double>(head_dim))));
        sum += p.back();
    }
    for (double& value : p) value /= sum;
    return p;
}

double largest_difference(const std::vector<float>& a, const std::vector<double>& b) {
    REQUIRE(a.size() == b.size());
    double largest = 0;
    for (size_t i = 0; i < a.size(); ++i)
        largest = std::max(largest, std::fabs(static_cast<double>(a[i]) - b[i]));
    return largest;
}

}  // namespace

TEST_CASE("attention report: the weights with which the decoder summed v") {
    for (const std::string& network : kNetworks) {
        for (const bool mixed : {false, true}) {
            CAPTURE(network);
            CAPTURE(mixed);
            Backend& scalar = *cpu_levels()[0];
            const Example example(scalar, network, mixed);
            const DecoderConfig& c = example.decoder.config();
            const AttentionReport report = example.report(scalar);
            const size_t first = example.source.size() - 1, n_rows = example.answer.size(),
                         n = first + n_rows, n_layers = static_cast<size_t>(c.n_layers),
                         head_dim = static_cast<size_t>(c.head_dim), n_heads = static_cast<size_t>(c.n_heads);
            REQUIRE(report.n_rows == static_cast<int64_t>(n_rows));
            REQUIRE(report.n_positions == static_cast<int64_t>(n));

            AttentionCalls tap(scalar);
            Arena arena(tap);
            KvCache kv = example.decoder.make_kv_cache(tap, 1, static_cast<int64_t>(n));
            kv.reserve(0, static_cast<int32_t>(n));
            BatchPlan plan;
            plan.add_cached(0, 0, static_cast<int32_t>(n));
            std::vector<int32_t> all = example.source;
            all.insert(all.end(), example.answer.begin(), example.answer.end() - 1);
            const Tensor chunk_rows = upload(tap, arena, example.rows, c.dim);
            example.decoder.forward(tap, plan, all, chunk_rows, kv, arena);
            REQUIRE(tap.calls.size() == n_layers);

            std::vector<double> by_layer(n_layers * n), by_row(n_rows * n);
            double worst_out = 0;
            for (size_t layer = 0; layer < n_layers; ++layer) {
                const Call& call = tap.calls[layer];
                for (size_t row = 0; row < n_rows; ++row) {
                    for (size_t head = 0; head < n_heads; ++head) {
                        const auto p = probabilities(call, c, first + row, static_cast<int32_t>(head));
                        for (size_t j = 0; j < p.size(); ++j) {
                            by_layer[layer * n + j] += p[j] / static_cast<double>(n_heads * n_rows);
                            by_row[row * n + j] += p[j] / static_cast<double>(n_heads * n_layers);
                        }
                        const size_t n_kv = static_cast<size_t>(c.n_kv_heads),
                                     kv_head = head / (n_heads / n_kv);
                        for (size_t d = 0; d < head_dim; ++d) {
                            double sum = 0;
                            for (size_t j = 0; j < p.size(); ++j)
                                sum +=
                                    p[j] * static_cast<double>(call.v[(j * n_kv + kv_head) * head_dim + d]);
                            const float out = call.out[((first + row) * n_heads + head) * head_dim + d];
                            worst_out = std::max(worst_out, std::fabs(sum - static_cast<double>(out)));
                        }
                    }
                }
            }
            // The op sums up to 40 fp32 terms of order 1, twice.
            CHECK(worst_out <= 1e-5);
            CHECK(largest_difference(report.by_layer, by_layer) <= kRounding);
            CHECK(largest_difference(report.by_row, by_row) <= kRounding);
        }
    }
}

TEST_CASE("attention report: what a row sees adds up to 1, what comes after it gets nothing") {
    for (const std::string& network : kNetworks) {
        const Example example(cpu(), network, true);
        const AttentionReport report = example.report(cpu());
        const auto n = static_cast<size_t>(report.n_positions);
        const auto sums_to_one = [&](const std::vector<float>& rows) {
            for (size_t row = 0; row * n < rows.size(); ++row) {
                double sum = 0;
                for (size_t j = 0; j < n; ++j) sum += static_cast<double>(rows[row * n + j]);
                CHECK(std::fabs(sum - 1.0) <= kRounding);
            }
        };
        sums_to_one(report.by_layer);
        sums_to_one(report.by_row);
        for (size_t row = 0; row < static_cast<size_t>(report.n_rows); ++row) {
            for (size_t j = example.source.size() + row; j < n; ++j)
                CHECK(report.by_row[row * n + j] == 0.0f);
            CHECK(report.by_row[row * n + example.source.size() - 1 + row] > 0.0f);
        }
    }
}

// Scores differ by what parity with PyTorch allows logits, 1e-4; then p differs by 2e-4 p at most.
TEST_CASE("attention report: the same on every backend") {
    for (const std::string& network : kNetworks) {
        const Example expected(*cpu_levels()[0], network, true);
        const AttentionReport scalar = expected.report(*cpu_levels()[0]);
        for (const auto& backend : every_backend()) {
            CAPTURE(network);
            CAPTURE(backend->device().description());
            const AttentionReport report = Example(*backend, network, true).report(*backend);
            CHECK(max_difference(report.by_layer, scalar.by_layer) <= 2e-4);
            CHECK(max_difference(report.by_row, scalar.by_row) <= 2e-4);
        }
    }
}

TEST_CASE("attention report: rows in steps are the rows at once, and no answer is one row") {
    for (const bool mixed : {false, true}) {
        Example example(cpu(), "llama3", mixed);
        const AttentionReport whole = example.report(cpu());
        for (const int64_t step : {1, 3, 7}) {
            const AttentionReport steps = example.report(cpu(), step);
            CHECK(steps.by_layer == whole.by_layer);
            CHECK(steps.by_row == whole.by_row);
        }
        example.answer.clear();
        const AttentionReport none = example.report(cpu());
        CHECK(none.n_rows == 1);
        CHECK(none.n_positions == std::ssize(example.source));
        const auto n = static_cast<size_t>(whole.n_positions);
        for (size_t j = 0; j < example.source.size(); ++j) CHECK(none.by_row[j] == whole.by_row[j]);
        CHECK(none.by_row.size() + static_cast<size_t>(whole.n_rows) - 1 == n);
    }
}
