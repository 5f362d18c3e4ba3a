// See attention_report.h.
#include "refrag/attention_report.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/memory.h"
#include "models/device_batch.h"

namespace refrag {
namespace {

// On the host, layer by layer: k of all rows, and q of those from first_query on.
class KeptQk {
  public:
    KeptQk(Backend& backend, const DecoderConfig& config, int64_t first_query, int64_t n_rows)
        : backend_(backend),
          first_query_(first_query),
          q_(static_cast<size_t>(config.n_layers)),
          k_(static_cast<size_t>(config.n_layers)) {
        const int64_t q_dim = int64_t{config.n_heads} * config.head_dim;
        const int64_t kv_dim = int64_t{config.n_kv_heads} * config.head_dim;
        for (auto& q : q_) q.reserve(static_cast<size_t>((n_rows - first_query) * q_dim));
        for (auto& k : k_) k.reserve(static_cast<size_t>(n_rows * kv_dim));
    }

    // Rows n_before, n_before + 1, ... of the sequence.
    void take(int32_t layer, Tensor q, Tensor k, int64_t n_before) {
        const int64_t skipped = std::clamp<int64_t>(first_query_ - n_before, 0, q.rows);
        append(q_[static_cast<size_t>(layer)], q.row_slice(skipped, q.rows - skipped));
        append(k_[static_cast<size_t>(layer)], k);
    }
    const std::vector<float>& q(int32_t layer) const { return q_[static_cast<size_t>(layer)]; }
    const std::vector<float>& k(int32_t layer) const { return k_[static_cast<size_t>(layer)]; }

  private:
    void append(std::vector<float>& to, Tensor rows) const {
        if (rows.rows == 0) return;
        const size_t held = to.size();
        to.resize(held + static_cast<size_t>(rows.size()));
        backend_.download(to.data() + held, rows.data, rows.bytes());
    }

    Backend& backend_;
    int64_t first_query_;
    std::vector<std::vector<float>> q_, k_;
};

void check_memory(const DecoderConfig& config, int64_t n_rows) {
    const uint64_t floats = static_cast<uint64_t>(n_rows) * static_cast<uint64_t>(config.n_layers) *
                            static_cast<uint64_t>(config.n_kv_heads) * static_cast<uint64_t>(config.head_dim);
    const uint64_t bytes = floats * sizeof(float), free = available_memory_bytes() / 2;
    REFRAG_CHECK(bytes <= free, Status::out_of_memory, "attention of ", n_rows, " positions: expected ",
                 bytes >> 20, " MiB of memory for keys, found ", free >> 20, " MiB to spend on them");
}

// Feeds a prompt and an answer's ids to the decoder.
void feed(Backend& backend, const Llama& decoder, const Prompt& prompt, std::span<const int32_t> ids,
          int64_t step_rows, KeptQk& kept) {
    std::vector<int32_t> source = prompt.input.source;
    source.insert(source.end(), ids.begin(), ids.end());
    const int64_t n_rows = std::ssize(source);
    Arena arena(backend);
    KvCache kv = decoder.make_kv_cache(backend, 1, n_rows);
    const Tensor chunk_rows{prompt.chunk_rows.data(), DType::f32, std::ssize(prompt.input.row_chunk),
                            decoder.config().dim};
    for (int64_t begin = 0; begin < n_rows; begin += step_rows) {
        const ArenaScope scratch(arena);
        const auto n = static_cast<int32_t>(std::min(step_rows, n_rows - begin));
        kv.reserve(0, n);
        BatchPlan plan;
        plan.add_cached(0, kv.length(0), n);
        const auto tap = [&](int32_t layer, Tensor q, Tensor k) { kept.take(layer, q, k, begin); };
        decoder.forward(backend, plan, {source.begin() + begin, source.begin() + begin + n}, chunk_rows, kv,
                        arena, tap);
        kv.advance(0, n);
    }
    backend.wait();
}

// p[j] = softmax_j(q . k_j * scale), j < p.size(); k_j begins at k + j * stride.
void attend(std::span<double> p, std::span<const float> q, const float* k, int64_t stride, double scale) {
    double largest = -std::numeric_limits<double>::infinity();
    for (size_t j = 0; j < p.size(); ++j) {
        const float* const k_j = k + static_cast<int64_t>(j) * stride;
        double dot = 0.0;
        for (size_t d = 0; d < q.size(); ++d) dot += static_cast<double>(q[d]) * static_cast<double>(k_j[d]);
        p[j] = dot * scale;
        largest = std::max(largest, p[j]);
    }
    double sum = 0.0;
    for (double& value : p) sum += value = std::exp(value - largest);
    for (double& value : p) value /= sum;
}

}  // namespace

AttentionReport answer_attention(Backend& backend, const Llama& decoder, const Prompt& prompt,
                                 std::span<const int32_t> ids, int64_t step_rows) {
    const DecoderConfig& c = decoder.config();
    // The last token was chosen, and chose nothing that is told here.
    const std::span<const int32_t> fed = ids.empty() ? ids : ids.first(ids.size() - 1);
    const int64_t first_query = std::ssize(prompt.input.source) - 1;
    AttentionReport report;
    report.n_layers = c.n_layers;
    report.n_rows = 1 + std::ssize(fed);
    report.n_positions = first_query + report.n_rows;
    check_memory(c, report.n_positions);
    KeptQk kept(backend, c, first_query, report.n_positions);
    feed(backend, decoder, prompt, fed, step_rows, kept);

    const auto n_positions = static_cast<size_t>(report.n_positions),
               n_rows = static_cast<size_t>(report.n_rows), n_layers = static_cast<size_t>(c.n_layers),
               head_dim = static_cast<size_t>(c.head_dim);
    const int32_t group = c.n_heads / c.n_kv_heads;
    const int64_t stride = int64_t{c.n_kv_heads} * c.head_dim;
    const double scale = static_cast<double>(c.attention_scale());
    const double per_layer = 1.0 / (static_cast<double>(c.n_heads) * static_cast<double>(n_rows));
    const double per_row = 1.0 / (static_cast<double>(c.n_heads) * static_cast<double>(n_layers));
    std::vector<double> by_layer(n_layers * n_positions), by_row(n_rows * n_positions), p(n_positions);
    for (size_t layer = 0; layer < n_layers; ++layer) {
        const std::span<const float> q(kept.q(static_cast<int32_t>(layer)));
        const float* const k = kept.k(static_cast<int32_t>(layer)).data();
        const int32_t window = c.window(static_cast<int32_t>(layer));
        for (size_t row = 0; row < n_rows; ++row) {
            const size_t end = static_cast<size_t>(first_query) + row + 1;
            const size_t begin = window == 0 ? 0 : end - std::min(end, static_cast<size_t>(window));
            const auto seen = std::span(p).subspan(begin, end - begin);
            for (int32_t head = 0; head < c.n_heads; ++head) {
                const size_t at = row * static_cast<size_t>(c.n_heads) + static_cast<size_t>(head);
                attend(seen, q.subspan(at * head_dim, head_dim),
                       k + static_cast<int64_t>(begin) * stride + int64_t{head / group} * c.head_dim, stride,
                       scale);
                for (size_t j = begin; j < end; ++j) {
                    by_layer[layer * n_positions + j] += p[j] * per_layer;
                    by_row[row * n_positions + j] += p[j] * per_row;
                }
            }
        }
    }
    report.by_layer.assign(by_layer.begin(), by_layer.end());
    report.by_row.assign(by_row.begin(), by_row.end());
    return report;
}

}  // namespace refrag
