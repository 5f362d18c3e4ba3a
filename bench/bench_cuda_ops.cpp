// The tables of bench_cuda for what a layer does between its products, and for drawing tokens (bench_cuda.h).
#include <algorithm>
#include <cstdio>

#include "bench_cuda.h"
#include "models/device_batch.h"
#include "refrag/sampler.h"

namespace refrag_bench {

using namespace refrag;

namespace {

// Rows whose results the CPU's plain loops compute as well.
constexpr int64_t kCheckedRows = 64;

// One op over tensors of so many columns, some of them changed in place.
struct Op {
    std::string name;
    int64_t cols;
    double bytes;  // touched, of a row
    // The tensors it takes; the first holds the result.
    int tensors;
    std::function<void(Backend&, const std::vector<Tensor>&)> run;
    // Of one row, as the last of its tensors: a weight, say.
    bool last_is_a_row = false;
    double limit = kExact;
};

// Each call works on copies in turn, so that many rows do not lie in the L2 cache; a single row always does,
// in a forward too. Numbers that are changed in place go toward 0 from call to call, and no further than
// denormals: a GPU does not mind.
void table_row(Bench& bench, const Op& op, int32_t rows) {
    Arena arena(bench.b);
    const int walking = op.tensors - (op.last_is_a_row ? 1 : 0);
    const double bytes = 4.0 * rows * static_cast<double>(op.cols) * walking;
    const int64_t count =
        rows < bench.sizes.part
            ? 1
            : static_cast<int64_t>(static_cast<double>(bench.sizes.apart_bytes) / bytes) + 1;
    std::vector<Tensor> all;
    for (int i = 0; i < op.tensors; ++i) {
        const bool row = i >= walking;
        all.push_back(bench.tensor(arena, row ? 1 : rows * count, op.cols));
    }
    const auto part = [&](int64_t copy, int64_t n) {
        std::vector<Tensor> some = all;
        for (int i = 0; i < walking; ++i) {
            Tensor& t = some[static_cast<size_t>(i)];
            t = t.row_slice(copy * rows, n);
        }
        return some;
    };
    const double s = bench.seconds([&](int64_t i) { op.run(bench.b, part(i % count, rows)); });

    // Fresh numbers, and the same for the CPU.
    const int64_t n = std::min<int64_t>(rows, kCheckedRows);
    std::vector<std::vector<float>> held;
    std::vector<Tensor> on_cpu;
    for (int i = 0; i < op.tensors; ++i) {
        Tensor& t = all[static_cast<size_t>(i)];
        const Tensor fresh = bench.tensor(arena, i >= walking ? 1 : n, op.cols);
        t = fresh;
        held.push_back(Bench::values(bench.b, fresh));
    }
    for (int i = 0; i < op.tensors; ++i) {
        Tensor t = all[static_cast<size_t>(i)];
        t.data = held[static_cast<size_t>(i)].data();
        on_cpu.push_back(t);
    }
    op.run(bench.b, all);
    op.run(bench.cpu(), on_cpu);
    const double touched = op.bytes * rows;
    std::fprintf(bench.tables, "| %s, %lld | %d | %.2f | %.0f | %.2f | %s |\n", op.name.c_str(),
                 static_cast<long long>(op.cols), rows, s * 1e6, touched / s * 1e-9,
                 touched / s * 1e-9 / bench.peaks.read_gbs,
                 bench.off(Bench::values(bench.b, all[0]), held[0], op.limit).c_str());
    std::fflush(bench.tables);
}

// A decode step's rows are of as many sequences, a prefill's of one. The slots are emptied before every batch
// of calls.
void rope_row(Bench& bench, int32_t rows) {
    const Heads h = bench.sizes.heads[0];
    Arena arena(bench.b);
    const int32_t slots = rows < bench.sizes.part ? rows : 1, each = rows / slots;
    const int64_t most = rows < bench.sizes.part ? 256 : 16, cols = int64_t{h.heads} * h.dim,
                  k_cols = int64_t{h.kv_heads} * h.dim;
    const auto entries = static_cast<int32_t>(most * each);
    const auto cache_on = [&](Backend& on, int32_t room) {
        return KvCache(on, slots, 1, h.kv_heads, h.dim, room, on.device().kv_dtype(DType::bf16, h.dim));
    };
    KvCache cache = cache_on(bench.b, entries);
    const Tensor q = bench.tensor(arena, rows, cols), k = bench.tensor(arena, rows, k_cols),
                 v = bench.tensor(arena, rows, k_cols), cos_sin = bench.tensor(arena, rows, h.dim);
    BatchPlan plan;
    for (int32_t slot = 0; slot < slots; ++slot) plan.add_cached(slot, 0, each);
    const Batch batch = plan.upload(bench.b, arena);
    const auto empty = [&] {
        for (int32_t slot = 0; slot < slots; ++slot) {
            cache.truncate(slot, 0);
            cache.reserve(slot, entries);
        }
    };
    const double s = bench.seconds(
        [&](int64_t) { bench.b.rope_kv_append(cache.view(), 0, q, k, v, cos_sin, batch); }, most, empty);

    // q and k once more, from fresh numbers, here and on the CPU. What is in the cache shows in attention.
    const Tensor fresh_q = bench.tensor(arena, rows, cols), fresh_k = bench.tensor(arena, rows, k_cols);
    std::vector<float> host_q = Bench::values(bench.b, fresh_q), host_k = Bench::values(bench.b, fresh_k),
                       host_v = Bench::values(bench.b, v), table = Bench::values(bench.b, cos_sin);
    empty();
    bench.b.rope_kv_append(cache.view(), 0, fresh_q, fresh_k, v, cos_sin, batch);
    Arena on_cpu(bench.cpu());
    const auto there = [](Tensor t, std::vector<float>& x) {
        t.data = x.data();
        return t;
    };
    KvCache host_cache = cache_on(bench.cpu(), each);
    for (int32_t slot = 0; slot < slots; ++slot) host_cache.reserve(slot, each);
    bench.cpu().rope_kv_append(host_cache.view(), 0, there(fresh_q, host_q), there(fresh_k, host_k),
                               there(v, host_v), there(cos_sin, table), plan.upload(bench.cpu(), on_cpu));
    std::vector<float> got = Bench::values(bench.b, fresh_q), got_k = Bench::values(bench.b, fresh_k);
    got.insert(got.end(), got_k.begin(), got_k.end());
    host_q.insert(host_q.end(), host_k.begin(), host_k.end());
    // q and k read and written, v read, k and v appended in 16 bits.
    const double bytes = rows * (8.0 * static_cast<double>(cols) + 16.0 * static_cast<double>(k_cols));
    std::fprintf(bench.tables, "| rope_kv_append, %d heads of %d | %d | %.2f | %.0f | %.2f | %s |\n", h.heads,
                 h.dim, rows, s * 1e6, bytes / s * 1e-9, bytes / s * 1e-9 / bench.peaks.read_gbs,
                 bench.off(got, host_q, kExact).c_str());
    std::fflush(bench.tables);
}

void embed_row(Bench& bench, const Matrix& table, const Matrix& on_cpu, int32_t rows) {
    const int64_t dim = bench.sizes.dim;
    Arena arena(bench.b);
    std::vector<int32_t> ids(static_cast<size_t>(rows));
    for (size_t i = 0; i < ids.size(); ++i)
        ids[i] = static_cast<int32_t>(drawn(i) % static_cast<uint32_t>(bench.sizes.vocab));
    const double bytes = 6.0 * rows * static_cast<double>(dim);
    const int64_t count =
        rows < bench.sizes.part
            ? 1
            : static_cast<int64_t>(static_cast<double>(bench.sizes.apart_bytes) / bytes) + 1;
    const Tensor out = arena.tensor(rows * count, dim);
    const int32_t* const source = upload_vector(bench.b, arena, ids);
    const double s = bench.seconds(
        [&](int64_t i) { bench.b.embed(out.row_slice(i % count * rows, rows), table, source, Tensor{}); });
    std::vector<float> expected(static_cast<size_t>(rows * dim));
    bench.cpu().embed({expected.data(), DType::f32, rows, dim}, on_cpu, ids.data(), Tensor{});
    std::fprintf(bench.tables, "| embed, %lld of bf16 | %d | %.2f | %.0f | %.2f | %s |\n",
                 static_cast<long long>(dim), rows, s * 1e6, bytes / s * 1e-9,
                 bytes / s * 1e-9 / bench.peaks.read_gbs,
                 bench.off(Bench::values(bench.b, out.row_slice(0, rows)), expected, 0.0).c_str());
    std::fflush(bench.tables);
}

// A table whose rows say which they are: [vocab, dim] of bf16.
std::unique_ptr<Matrix> named_rows(Device& device, int64_t vocab, int64_t dim) {
    return device.make_matrix(DType::bf16, vocab, dim, [&](int64_t begin, int64_t n, void* dst) {
        auto* to = static_cast<uint16_t*>(dst);
        for (int64_t r = begin; r < begin + n; ++r) {
            for (int64_t i = 0; i < dim; ++i)
                *to++ = static_cast<uint16_t>(0x3f00 | (drawn(static_cast<uint64_t>(r * dim + i)) & 0x80ff));
        }
    });
}

}  // namespace

void small_ops(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| op | rows | us | memory touched GB/s | of read | off |\n|---|---|---|---|---|---|\n");
    const auto dim = static_cast<int64_t>(bench.sizes.dim), hidden = static_cast<int64_t>(bench.sizes.hidden);
    const auto d = static_cast<double>(dim), h = static_cast<double>(hidden);
    using Tensors = std::vector<Tensor>;
    const std::vector<Op> ops = {
        {"rms_norm", dim, 8.0 * d, 3,
         [](Backend& b, const Tensors& t) { b.rms_norm(t[0], t[1], t[2], 1e-5f); }, true},
        {"silu_mul", hidden, 12.0 * h, 2, [](Backend& b, const Tensors& t) { b.silu_mul(t[0], t[1]); }},
        {"gelu", hidden, 8.0 * h, 1, [](Backend& b, const Tensors& t) { b.gelu(t[0]); }},
        {"tanh", dim, 8.0 * d, 1, [](Backend& b, const Tensors& t) { b.tanh(t[0]); }},
        {"add", dim, 12.0 * d, 2, [](Backend& b, const Tensors& t) { b.add(t[0], t[1]); }},
    };
    const auto table = named_rows(bench.b.device(), bench.sizes.vocab, dim),
               on_cpu = named_rows(bench.cpu().device(), bench.sizes.vocab, dim);
    for (const int32_t rows : {1, 8, bench.sizes.part}) {
        for (const Op& op : ops) table_row(bench, op, rows);
        rope_row(bench, rows);
        embed_row(bench, *table, *on_cpu, rows);
    }
}

// Steps 4 to 8 of refrag/sampler.h where the logits are.
void draws(Bench& bench) {
    std::fprintf(bench.tables, "\n| draw, of %d logits | rows | us | as the sampler |\n|---|---|---|---|\n",
                 bench.sizes.vocab);
    struct Kind {
        const char* name;
        SamplerOptions options;
    };
    const Kind kinds[] = {{"greedy", {.temperature = 0.0f}},
                          {"temperature .05, top-p .9", {.temperature = 0.05f, .top_p = 0.9f}},
                          {"temperature 1, top-k 40", {.temperature = 1.0f, .top_k = 40}},
                          {"temperature 1", {.temperature = 1.0f}}};
    for (const Kind& kind : kinds) {
        for (const int64_t rows : bench.sizes.draw_rows) {
            Arena arena(bench.b);
            const Tensor logits = bench.tensor(arena, rows, bench.sizes.vocab);
            const std::vector<float> host = Bench::values(bench.b, logits);
            std::vector<TokenDraw> wanted;
            std::vector<Sampler> samplers;
            for (int64_t r = 0; r < rows; ++r) {
                SamplerOptions options = kind.options;
                options.seed = static_cast<uint64_t>(r);
                samplers.emplace_back(options);
                wanted.push_back(Sampler(options).draw_elsewhere().value());
            }
            const Tensor draws = arena.tensor(
                             1, std::ssize(wanted) * static_cast<int64_t>(sizeof(TokenDraw)) / 4),
                         ids = arena.tensor(1, rows);
            bench.b.upload(draws.data, wanted.data(), wanted.size() * sizeof(TokenDraw));
            auto* const to = static_cast<int32_t*>(ids.data);
            const auto* const from = static_cast<const TokenDraw*>(draws.data);
            const double s = bench.seconds([&](int64_t) { bench.b.draw(to, logits, from); });
            std::vector<int32_t> got(static_cast<size_t>(rows));
            bench.b.download(got.data(), to, got.size() * sizeof(int32_t));
            // One that was left to the host (-1) is neither right nor wrong.
            int64_t right = 0, left = 0;
            for (size_t r = 0; r < got.size(); ++r) {
                const auto cols = static_cast<size_t>(bench.sizes.vocab);
                const std::vector<float> row(host.begin() + static_cast<int64_t>(r * cols),
                                             host.begin() + static_cast<int64_t>((r + 1) * cols));
                if (got[r] < 0)
                    ++left;
                else
                    right += got[r] == samplers[r].sample(row) ? 1 : 0;
            }
            const bool all = bench.count(right + left == rows);
            std::fprintf(bench.tables, "| %s | %lld | %.2f | %s%lld of %lld%s |\n", kind.name,
                         static_cast<long long>(rows), s * 1e6,
                         all ? "" : "WRONG: ", static_cast<long long>(right),
                         static_cast<long long>(rows - left), left > 0 ? ", others left to the host" : "");
            std::fflush(bench.tables);
        }
    }
}

void profile(Bench& bench) {
    const Heads h = bench.sizes.heads[0];
    const int32_t part = bench.sizes.part, context = bench.sizes.contexts.back();
    Arena arena(bench.b);
    const int64_t q_cols = int64_t{h.heads} * h.dim, k_cols = int64_t{h.kv_heads} * h.dim;
    const Tensor q = bench.tensor(arena, part, q_cols), k = bench.tensor(arena, part, k_cols),
                 v = bench.tensor(arena, part, k_cols), out = arena.tensor(part, q_cols);
    const auto cache = bench.filled_cache(h, 1, 1, context, context);
    for (const int32_t rows : {part, 1}) {
        BatchPlan plan;
        plan.add_cached(0, context - rows, rows);
        bench.b.attention(out.row_slice(0, rows), q.row_slice(0, rows), k.row_slice(0, rows),
                          v.row_slice(0, rows), shape_of(h), &cache->view(), 0, plan.upload(bench.b, arena));
    }
    const auto& [out_dim, in_dim] = bench.sizes.products[0];
    for (const DType dtype : {DType::bf16, DType::i8}) {
        const auto w = bench.matrix(dtype, out_dim, in_dim);
        const Tensor x = bench.tensor(arena, 8, in_dim), y = arena.tensor(8, out_dim);
        for (const int64_t rows : {1, 8})
            bench.b.linear(y.row_slice(0, rows), x.row_slice(0, rows), *w, Tensor{});
        bench.b.wait();
    }
}

}  // namespace refrag_bench
