// `refrag bench`: REFRAG against the full context, with random weights of a published shape or a model of
// one's own. What is measured is refrag/bench.h's, how it is written bench_report.h's.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>

#include "base/check.h"
#include "base/memory.h"
#include "base/threads.h"
#include "bench/random_model.h"
#include "cli/bench_report.h"
#include "cli/common.h"
#include "cli/eval_table.h"
#include "cli/numbers.h"
#include "cuda/peaks.h"
#include "io/file.h"
#include "io/output.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

struct BenchCommand {
    std::string model_dir;      // "": random weights
    std::string shape;          // "": by the device, see set_shapes
    std::string encoder_shape;  // the same
    std::vector<std::string> modes{"full", "refrag"};
    std::vector<std::string> from{"cached", "text"};
    bool skip_known = false;
    std::string format = "md";
    std::string output;
    std::string json_output;
    DeviceOptions device;
    BenchOptions bench;
};

// By default what the device is made for: a GPU is idle between the kernels of a small decoder.
constexpr const char* kShape = "llama-160m";
constexpr const char* kEncoderShape = "roberta-base";
constexpr const char* kGpuShape = "llama-2-7b";
constexpr const char* kGpuEncoderShape = "roberta-large";

bool is_gpu(const Device& device) {
    return device.description().starts_with("cuda");
}

void set_shapes(BenchCommand& command, bool gpu) {
    if (command.shape.empty()) command.shape = gpu ? kGpuShape : kShape;
    if (command.encoder_shape.empty()) command.encoder_shape = gpu ? kGpuEncoderShape : kEncoderShape;
}

// Whether each of two words is in a comma list of no others.
void read_words(const char* option, const std::vector<std::string>& words, const char* first, bool& has_first,
                const char* second, bool& has_second) {
    has_first = has_second = false;
    for (const std::string& word : words) {
        REFRAG_CHECK(word == first || word == second, Status::usage, option, ": expected ", first, ", ",
                     second, " or both; found \"", printable(word), "\"");
        (word == first ? has_first : has_second) = true;
    }
}

void check_memory(const BenchCommand& command, const Device& device, const std::string& what,
                  uint64_t weight_bytes, const DecoderConfig& decoder, DType kv, const RobertaConfig& encoder,
                  const RefragConfig& config) {
    const BenchMemory memory = bench_memory(decoder, kv, encoder, config, command.bench);
    const uint64_t needed = weight_bytes + memory.kv_bytes + memory.workspace_bytes;
    const uint64_t available = device.available_bytes();
    const auto shown = [](uint64_t bytes) {
        char text[32];
        std::snprintf(text, sizeof text, "%.2f", static_cast<double>(bytes) * 1e-9);
        return std::string(text);
    };
    REFRAG_CHECK(needed <= available, Status::out_of_memory, "bench: ", what, " needs ", shown(needed),
                 is_gpu(device) ? " GB of GPU memory (weights " : " GB of memory (weights ",
                 shown(weight_bytes), ", KV cache ", shown(memory.kv_bytes), ", workspace ",
                 shown(memory.workspace_bytes), "), ", shown(available),
                 " GB are available: choose a smaller --shape, --context or --batch");
}

std::unique_ptr<Model> make_model(const BenchCommand& command, Device& device, std::string& name) {
    if (!command.model_dir.empty()) {
        name = command.model_dir;
        std::unique_ptr<Model> model = load_model(device, command.model_dir, command.device);
        check_memory(command, device, command.model_dir, 0, model->decoder().config(),
                     model->decoder().kv_dtype(), model->encoder().config(), model->config());
        return model;
    }
    const WeightFormat format = parse_weight_format("--weights", command.device.weights);
    name = str(command.shape, " with ", command.encoder_shape, ", random weights",
               format == WeightFormat::int8 ? " in int8" : "");
    ModelParts parts = random_model_parts(decoder_shape(command.shape), encoder_shape(command.encoder_shape));
    // Keys and values follow the layers' weights, as Llama::kv_dtype.
    check_memory(
        command, device, str(command.shape, " with ", command.encoder_shape),
        random_weight_bytes(parts, format), parts.decoder,
        device.kv_dtype(format == WeightFormat::int8 ? DType::i8 : DType::bf16, parts.decoder.head_dim),
        parts.encoder, parts.config);
    Progress progress("making random weights", ProgressUnit::bytes);
    return make_random_model(device, std::move(parts), command.bench.seed, progress.sink(), format);
}

// After the sweep, because the memory it reads would hide the sweep's own peak.
void measure_machine(const BenchCommand& command, const Device& device, BenchReport& report) {
    report.threads = command.device.threads == 0 ? default_threads() : command.device.threads;
    report.cpu = cpu_name();
    report.backend = device.description();
#if defined(REFRAG_WITH_CUDA)
    if (is_gpu(device)) {
        const Progress progress("measuring the GPU's peaks");
        const int number = gpu_number(command.device.device);
        report.gpu = BenchGpu{cuda::gpu_info(number).name, cuda::measure_gpu_peaks(number)};
        return;
    }
#endif
    const Progress progress("measuring the machine's peaks");
    report.peaks = measure_peaks(report.threads, device.available_bytes() / 8);
}

// Rows whose rounds differ much say more about what else runs here than about refrag.
void warn_of_noise(const std::vector<BenchRow>& rows) {
    constexpr double kNoisy = 0.2;
    size_t noisy = 0, measured = 0;
    double most = 0.0;
    for (const BenchRow& row : rows) {
        if (!row.figures || !row.figures->spread) continue;
        ++measured;
        noisy += *row.figures->spread > kNoisy ? 1 : 0;
        most = std::max(most, *row.figures->spread);
    }
    if (noisy == 0) return;
    std::fprintf(
        stderr,
        "refrag: warning: the rounds of %zu of %zu rows differ by more than %.0f%% (up to %.0f%%): is "
        "something else running here?\n",
        noisy, measured, kNoisy * 100.0, most * 100.0);
}

void bench(BenchCommand& command) {
    check_table_format(command.format);
    BenchOptions& options = command.bench;
    read_words("--modes", command.modes, "full", options.full, "refrag", options.refrag);
    read_words("--from", command.from, "cached", options.cached, "text", options.text);
    options.always_sense = !command.skip_known;
    check_bench_options(options);
    REFRAG_CHECK(!command.model_dir.empty() || command.device.adapters.empty(), Status::usage,
                 "bench: --lora needs a model (-m): random weights take no adapter");
    check_output_paths({{"--out", command.output}, {"--json", command.json_output}});

    BenchReport report;
    const std::unique_ptr<Device> device = make_device(command.device);
    set_shapes(command, is_gpu(*device));
    const double began_ms = now_ms();
    const std::unique_ptr<Model> model = make_model(command, *device, report.model);
    report.load_s = (now_ms() - began_ms) / 1000.0;
    report.load_peak_rss_bytes = peak_resident_bytes();
    report.parameters = model->parameters();
    {
        Progress progress("measuring");
        report.rows =
            run_bench(*model, options, [&](int64_t done, int64_t total) { progress.update(done, total); });
    }
    report.peak_rss_bytes = peak_resident_bytes();
    measure_machine(command, *device, report);
    write_each({[&] {
                    write_result(command.output.empty() ? "-" : command.output,
                                 write_bench_report(report, command.format));
                },
                [&] {
                    if (!command.json_output.empty())
                        write_result(command.json_output, write_bench_report(report, "json"));
                }});
    warn_of_noise(report.rows);
    for (const BenchRow& row : report.rows) {
        if (row.figures || row.cached != options.cached) continue;
        std::fprintf(
            stderr,
            "refrag: warning: mode %s, context %lld: prompt and answer pass the decoder's window of %d "
            "positions; no figures\n",
            row.full ? "full" : "refrag", static_cast<long long>(row.context),
            model->decoder().config().max_seq_len);
    }
}

template <typename T>
CLI::Option* add_list(CLI::App& sub, const char* name, std::vector<T>& values, const char* description) {
    CLI::Option* option =
        sub.add_option(name, values, description)->capture_default_str()->delimiter(',')->type_name("LIST");
    if constexpr (std::is_arithmetic_v<T>) option->transform(number_of(T()));
    return option;
}

}  // namespace

void add_bench(CLI::App& app) {
    auto command = std::make_shared<BenchCommand>();
    BenchOptions& bench_options = command->bench;
    CLI::App& sub = *app.add_subcommand("bench",
                                        "Times REFRAG against the full context, and the machine's own peaks "
                                        "(on a GPU: the card's) beside it");
    const char* group = "Model";
    CLI::Option* model = sub.add_option("-m,--model", command->model_dir,
                                        "Model directory; without it random weights of a shape, in memory")
                             ->group(group)
                             ->type_name("DIR");
    sub.add_option("--shape", command->shape, "The decoder's shape")
        ->group(group)
        ->excludes(model)
        ->default_str(str(kShape, "; on a GPU ", kGpuShape))
        ->type_name(decoder_shape_names());
    sub.add_option("--encoder-shape", command->encoder_shape, "The encoder's shape")
        ->group(group)
        ->excludes(model)
        ->default_str(str(kEncoderShape, "; on a GPU ", kGpuEncoderShape))
        ->type_name(encoder_shape_names());
    group = "What is measured (comma lists; every combination is a row)";
    add_list(sub, "--context", bench_options.contexts, "Context tokens")->group(group);
    add_list(sub, "-k,--chunk-len", bench_options.chunk_lens, "Decoder tokens to a chunk")->group(group);
    add_list(sub, "-p,--expand-fraction", bench_options.expand_fractions, "Shares of chunks expanded")
        ->group(group);
    add_list(sub, "-b,--batch", bench_options.batches, "Requests at a time, each with a context of its own")
        ->group(group);
    add_list(sub, "--modes", command->modes, "full, refrag; without full there are no ratios")->group(group);
    add_list(sub, "--from", command->from,
             "cached: passages held as ids and chunk embeddings; text: nothing held, everything included")
        ->group(group);
    sub.add_flag(
           "--skip-known", command->skip_known,
           "Leave the policy network out where its choice is known beforehand (p = 0 or 1), as run does")
        ->group(group);
    sub.add_option("-n,--output-tokens", bench_options.output_tokens, "Tokens generated by each request")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(2, 1 << 20))
        ->type_name("N");
    group = "How";
    sub.add_option("--repeats", bench_options.repeats,
                   "Rounds of a row, after a warm-up; medians are reported")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(1, 1000))
        ->type_name("N");
    sub.add_option("--row-seconds", bench_options.row_seconds,
                   "No further round of a row that has taken longer than this")
        ->group(group)
        ->capture_default_str()
        ->transform(decimal_number(0.0, 1e9))
        ->type_name("S");
    add_seed_option(sub, bench_options.seed, "Seed of weights and texts")->group(group);
    sub.add_option("-o,--output-format", command->format, "How the result is written")
        ->group(group)
        ->capture_default_str()
        ->type_name("md|csv|json");
    sub.add_option("--out", command->output, "Write it to a file instead of standard output")
        ->group(group)
        ->type_name("FILE");
    sub.add_option("--json", command->json_output, "Write it as JSON to this file as well")
        ->group(group)
        ->type_name("FILE");
    add_device_options(sub, command->device);
    sub.final_callback([command] { bench(*command); });
}

}  // namespace refrag
