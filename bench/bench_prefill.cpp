// Prefill and decode of a decoder with random weights, on the CPU backend: GFLOP/s, share of the machine's
// fp32 peak measured in the same run, and tokens/s. Writes a temporary model directory, since the decoder is
// loaded from files.
//
//   build/bench_prefill [--threads N]      LLaMA of 160M parameters: 12 layers, dim 768, hidden 2048, 12
//   heads
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "bench/peaks.h"
#include "cpu/cpu_backend.h"
#include "io/file.h"
#include "models/llama.h"
#include "refrag/random.h"
#include "refrag/scoring.h"

using namespace refrag;

namespace {

struct Shape {
    int64_t dim = 768, hidden = 2048, n_layers = 12, n_heads = 12, vocab = 32000, window = 4096;
};

// One safetensors file of bf16 weights, uniform in +-0.04, norms 1.
void write_model(const std::string& dir, const Shape& s) {
    struct Entry {
        std::string name;
        std::vector<int64_t> shape;
    };
    std::vector<Entry> entries = {{"model.embed_tokens.weight", {s.vocab, s.dim}},
                                  {"model.norm.weight", {s.dim}}};
    entries.push_back({"lm_head.weight", {s.vocab, s.dim}});
    for (int64_t i = 0; i < s.n_layers; ++i) {
        const std::string p = str("model.layers.", i, ".");
        for (const char* name : {"q", "k", "v", "o"}) {
            entries.push_back({p + "self_attn." + name + "_proj.weight", {s.dim, s.dim}});
        }
        entries.push_back({p + "mlp.gate_proj.weight", {s.hidden, s.dim}});
        entries.push_back({p + "mlp.up_proj.weight", {s.hidden, s.dim}});
        entries.push_back({p + "mlp.down_proj.weight", {s.dim, s.hidden}});
        entries.push_back({p + "input_layernorm.weight", {s.dim}});
        entries.push_back({p + "post_attention_layernorm.weight", {s.dim}});
    }
    std::string header = "{";
    std::string body;
    Random random(1);
    for (const Entry& entry : entries) {
        int64_t n = 1;
        for (const int64_t d : entry.shape) n *= d;
        const size_t begin = body.size();
        body.resize(begin + static_cast<size_t>(n) * 2);
        for (int64_t i = 0; i < n; ++i) {
            const float value =
                entry.shape.size() == 1 ? 1.0f : (static_cast<float>(random.uniform()) - 0.5f) * 0.08f;
            const uint16_t bits = f32_to_bf16(value);
            std::memcpy(body.data() + begin + static_cast<size_t>(i) * 2, &bits, 2);
        }
        std::string dims;
        for (const int64_t d : entry.shape) dims += str(dims.empty() ? "" : ",", d);
        header += str(header.size() > 1 ? "," : "", "\"", entry.name, "\":{\"dtype\":\"BF16\",\"shape\":[",
                      dims, "],\"data_offsets\":[", begin, ",", body.size(), "]}");
    }
    header += "}";
    const uint64_t length = header.size();
    std::string file(8, '\0');
    std::memcpy(file.data(), &length, 8);
    file += header;
    file += body;
    write_file_atomic(dir + "/model.safetensors", file);
    write_file_atomic(
        dir + "/config.json",
        str("{\"model_type\":\"llama\",\"hidden_size\":", s.dim, ",\"intermediate_size\":", s.hidden,
            ",\"num_hidden_layers\":", s.n_layers, ",\"num_attention_heads\":", s.n_heads,
            ",\"vocab_size\":", s.vocab, ",\"max_position_embeddings\":", s.window,
            ",\"rms_norm_eps\":1e-5,\"eos_token_id\":2}"));
}

// FLOPs of a prefill of n tokens: 2 for every weight of the layers and token, causal attention, the head for
// one row.
double prefill_flops(const Shape& s, double n) {
    const auto d = static_cast<double>(s.dim);
    const double per_layer =
        2.0 * n * (4.0 * d * d + 3.0 * d * static_cast<double>(s.hidden)) + 2.0 * d * n * n;
    return static_cast<double>(s.n_layers) * per_layer + 2.0 * d * static_cast<double>(s.vocab);
}

void run(int threads) {
    std::string dir = (std::filesystem::temp_directory_path() / "refrag_bench_XXXXXX").string();
    REFRAG_CHECK(mkdtemp(dir.data()) != nullptr, Status::runtime, "cannot make ", dir);
    const Shape shape;
    write_model(dir, shape);
    const std::unique_ptr<Backend> backend = make_cpu_backend(threads);
    const double load_began = bench::now();
    const Llama decoder(*backend, dir);
    const double load_s = bench::now() - load_began;
    std::filesystem::remove_all(dir);
    bench::Machine machine(*backend, threads == 0 ? default_threads() : threads, best_cpu_isa(), 0.2);
    std::printf("%s; %llu parameters (bf16), loaded in %.2f s\n\n", backend->description().c_str(),
                static_cast<unsigned long long>(decoder.parameters()), load_s);
    std::printf(
        "| what | median ms | spread | tokens/s | GFLOP/s | fp32 peak | share "
        "|\n|---|---|---|---|---|---|---|\n");
    Arena arena(*backend);
    Random random(2);
    for (const int n : {128, 512, 2048}) {
        std::vector<int32_t> ids;
        for (int i = 0; i < n; ++i) {
            ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(shape.vocab))));
        }
        const double peak = machine.fma_gflops();
        KvCache kv = decoder.make_kv_cache(1, n + 64);  // room for the prompt and 32 steps
        std::vector<double> times;
        std::vector<double> decode_times;
        for (int repeat = 0; repeat < 6; ++repeat) {
            const ArenaScope scratch(arena);
            kv.truncate(0, 0);
            float first = 0.0f;
            double began = bench::now();
            const Tensor logits = decoder.logits(prefill(decoder, ids, Tensor{}, kv, 0, 1, arena), arena);
            backend->download(&first, logits.data, sizeof first);
            if (repeat > 0) times.push_back(bench::now() - began);  // the first one warms up
            began = bench::now();
            for (int i = 0; i < 32; ++i) {
                const ArenaScope step(arena);
                const int32_t id = ids[static_cast<size_t>(i)];
                const Tensor one =
                    decoder.logits(prefill(decoder, std::span(&id, 1), Tensor{}, kv, 0, 1, arena), arena);
                backend->download(&first, one.data, sizeof first);
            }
            if (repeat > 0) decode_times.push_back((bench::now() - began) / 32.0);
        }
        const auto line = [&](const std::string& what, std::vector<double> t, double tokens, double flops) {
            std::sort(t.begin(), t.end());
            const double median = t[t.size() / 2];
            const double gflops = flops / median / 1e9;
            std::printf("| %s | %.1f | %.1f-%.1f | %.0f | %.0f | %.0f | %.2f |\n", what.c_str(), median * 1e3,
                        t.front() * 1e3, t.back() * 1e3, tokens / median, gflops, peak, gflops / peak);
        };
        line(str("prefill ", n), times, n, prefill_flops(shape, n));
        const double decode_flops = prefill_flops(shape, n + 1) - prefill_flops(shape, n) +
                                    2.0 * static_cast<double>(shape.dim * shape.vocab);
        line(str("decode after ", n), decode_times, 1, decode_flops);
    }
}

}  // namespace

int main(int argc, char** argv) {
    try {
        int threads = 0;
        if (argc == 3 && std::strcmp(argv[1], "--threads") == 0) threads = std::atoi(argv[2]);
        run(threads);
        return 0;
    } catch (const Error& error) {
        std::fprintf(stderr, "bench_prefill: %s\n", error.what());
        return 1;
    }
}
