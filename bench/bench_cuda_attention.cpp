// Attention's tables of bench_cuda (bench_cuda.h).
#include <algorithm>
#include <cstdio>

#include "bench_cuda.h"
#include "models/device_batch.h"

namespace refrag_bench {

using namespace refrag;

namespace {

// Of n new rows after `start` entries: scores and values over what each row sees.
double causal_flops(const Heads& h, double start, double n) {
    return 4.0 * h.dim * h.heads * (n * start + n * (n + 1.0) / 2.0);
}

// Rows of q and out whose results are held to the plain kernel.
constexpr int32_t kCheckedRows = 64;

// What `rows` rows ending at entry `end` of slot 0 should be; the cache ends there afterwards.
std::vector<float> by_definition(Bench& bench, KvCache& cache, const Heads& h, Tensor q, Tensor k, Tensor v,
                                 int32_t end) {
    bench.b.wait();
    cache.truncate(0, end);
    cache.reserve(0, 0);
    Arena arena(bench.b);
    const Tensor out = arena.tensor(q.rows, q.cols);
    BatchPlan plan;
    const auto rows = static_cast<int32_t>(q.rows);
    plan.add_cached(0, end - rows, rows);
    const Batch batch = plan.upload(bench.b, arena);
    bench.b.wait();
    bench.plain().attention(out, q, k, v, shape_of(h), &cache.view(), 0, batch);
    return Bench::values(bench.plain(), out);
}

std::vector<float> joined(std::vector<float> x, const std::vector<float>& y) {
    x.insert(x.end(), y.begin(), y.end());
    return x;
}

}  // namespace

void prefill_attention(Bench& bench) {
    const int32_t part_rows = bench.sizes.part, parts = bench.sizes.parts;
    std::fprintf(bench.tables,
                 "\n| attention, prefill: %d new rows | after | ms | TFLOP/s | of bf16 | off |\n"
                 "|---|---|---|---|---|---|\n",
                 part_rows);
    for (const Heads& h : bench.sizes.heads) {
        Arena arena(bench.b);
        const int64_t q_cols = int64_t{h.heads} * h.dim, k_cols = int64_t{h.kv_heads} * h.dim;
        const Tensor q = bench.tensor(arena, part_rows, q_cols), k = bench.tensor(arena, part_rows, k_cols),
                     v = bench.tensor(arena, part_rows, k_cols), out = arena.tensor(part_rows, q_cols);
        double all_s = 0.0;
        const auto row = [&](const std::string& after, double s, double flops, const std::string& off) {
            std::fprintf(bench.tables, "| %s | %s | %.3f | %.1f | %.2f | %s |\n", shown(h).c_str(),
                         after.c_str(), s * 1e3, flops / s * 1e-12,
                         flops / s * 1e-9 / bench.peaks.bf16_gflops, off.c_str());
            std::fflush(bench.tables);
        };
        for (int32_t part = 0; part < parts; ++part) {
            const int32_t start = part * part_rows;
            const auto cache = bench.filled_cache(h, 1, 1, start, start + part_rows);
            cache->reserve(0, part_rows);
            BatchPlan plan;
            plan.add_cached(0, start, part_rows);
            const ArenaScope scope(arena);
            const Batch batch = plan.upload(bench.b, arena);
            bench.b.kv_append(cache->view(), 0, k, v, batch);
            const double s = bench.seconds(
                [&](int64_t) { bench.b.attention(out, q, k, v, shape_of(h), &cache->view(), 0, batch); });
            all_s += s;
            if (part > 1 && part != parts - 1) continue;
            cache->advance(0, part_rows);
            // The last rows, some in the middle that begin at no multiple of 64, and the first.
            const int32_t n = std::min(kCheckedRows, part_rows);
            std::vector<float> got, expected;
            for (const int32_t first :
                 {part_rows - n, (part_rows - n) / 2 / 64 * 64 + (part_rows - n) % 31, 0}) {
                const Tensor some = q.row_slice(first, n);
                got = joined(std::move(got), Bench::values(bench.b, out.row_slice(first, n)));
                expected =
                    joined(std::move(expected), by_definition(bench, *cache, h, some, k.row_slice(first, n),
                                                              v.row_slice(first, n), start + first + n));
            }
            row(str(start), s, causal_flops(h, start, part_rows), bench.off(got, expected, kRounded));
        }
        row(str("sum of ", parts, " parts"), all_s, causal_flops(h, 0, parts * part_rows), "");
    }
}

void decode_attention(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| attention, decode | batch | context | us | KV GB/s | of read | off "
                 "|\n|---|---|---|---|---|---|---|\n");
    for (const Heads& h : bench.sizes.heads) {
        for (const int32_t n_seq : bench.sizes.batches) {
            for (const int32_t context : bench.sizes.contexts) {
                const double bytes =
                    2.0 * static_cast<double>(dtype_bytes(bench.b.device().kv_dtype(DType::bf16, h.dim))) *
                    h.kv_heads * h.dim * context * n_seq;
                const int32_t layers = std::max(
                    2, static_cast<int32_t>(static_cast<double>(bench.sizes.apart_bytes) / bytes) + 1);
                const auto cache = bench.filled_cache(h, n_seq, layers, context, context);
                Arena arena(bench.b);
                const int64_t q_cols = int64_t{h.heads} * h.dim, k_cols = int64_t{h.kv_heads} * h.dim;
                const Tensor q = bench.tensor(arena, n_seq, q_cols), k = bench.tensor(arena, n_seq, k_cols),
                             v = bench.tensor(arena, n_seq, k_cols), out = arena.tensor(n_seq, q_cols),
                             expected = arena.tensor(n_seq, q_cols);
                BatchPlan plan;
                for (int32_t slot = 0; slot < n_seq; ++slot) plan.add_cached(slot, context - 1, 1);
                const Batch batch = plan.upload(bench.b, arena);
                const double s = bench.seconds([&](int64_t i) {
                    bench.b.attention(out, q, k, v, shape_of(h), &cache->view(),
                                      static_cast<int32_t>(i % layers), batch);
                });
                bench.b.attention(out, q, k, v, shape_of(h), &cache->view(), layers - 1, batch);
                bench.b.wait();
                bench.plain().attention(expected, q, k, v, shape_of(h), &cache->view(), layers - 1, batch);
                std::fprintf(bench.tables, "| %s | %d | %d | %.1f | %.0f | %.2f | %s |\n", shown(h).c_str(),
                             n_seq, context, s * 1e6, bytes / s * 1e-9,
                             bytes / s * 1e-9 / bench.peaks.read_gbs,
                             bench.off(out, bench.plain(), expected, kExact).c_str());
                std::fflush(bench.tables);
            }
        }
    }
}

void encoder_attention(Bench& bench) {
    const Heads h = bench.sizes.encoder;
    std::fprintf(
        bench.tables,
        "\n| attention, encoder: %s | weights | us | TFLOP/s | of bf16 | q, k, v, out GB/s | of read | off "
        "|\n"
        "|---|---|---|---|---|---|---|---|\n",
        shown(h).c_str());
    for (const DType weights : {DType::bf16, DType::f32}) {
        for (const int32_t tokens : {16, 18}) {
            const int64_t rows = int64_t{bench.sizes.chunks} * tokens, cols = int64_t{h.heads} * h.dim;
            Arena arena(bench.b);
            const Tensor q = bench.tensor(arena, rows, cols), k = bench.tensor(arena, rows, cols),
                         v = bench.tensor(arena, rows, cols), out = arena.tensor(rows, cols),
                         expected = arena.tensor(rows, cols);
            BatchPlan plan;
            for (int32_t i = 0; i < bench.sizes.chunks; ++i) plan.add_encoder(tokens);
            const Batch batch = plan.upload(bench.b, arena);
            AttentionShape shape = shape_of(h);
            shape.weights = weights;
            const double s =
                bench.seconds([&](int64_t) { bench.b.attention(out, q, k, v, shape, nullptr, 0, batch); });
            bench.plain().attention(expected, q, k, v, shape, nullptr, 0, batch);
            const double flops = 4.0 * static_cast<double>(rows) * tokens * static_cast<double>(cols);
            const double bytes = 4.0 * static_cast<double>(q.bytes());
            std::fprintf(
                bench.tables, "| %d chunks of %d tokens | %s | %.1f | %.1f | %.2f | %.0f | %.2f | %s |\n",
                bench.sizes.chunks, tokens, dtype_name(weights), s * 1e6, flops / s * 1e-12,
                flops / s * 1e-9 / bench.peaks.bf16_gflops, bytes / s * 1e-9,
                bytes / s * 1e-9 / bench.peaks.read_gbs,
                bench.off(out, bench.plain(), expected, weights == DType::f32 ? kExact : kRounded).c_str());
            std::fflush(bench.tables);
        }
    }
}

}  // namespace refrag_bench
