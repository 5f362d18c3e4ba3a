// See bench_report.h.
#include "cli/bench_report.h"

#include <cstdio>
#include <optional>

#include "base/check.h"
#include "cli/eval_table.h"
#include "io/json.h"

namespace refrag {
namespace {

std::string fixed(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}

std::string gigabytes(uint64_t bytes) {
    return bytes == 0 ? "unknown" : fixed(static_cast<double>(bytes) * 1e-9, 2) + " GB";
}

// A member of the figures, absent where there are none.
template <typename T>
std::optional<T> of(const BenchRow& row, T BenchFigures::*member) {
    if (!row.figures) return std::nullopt;
    return (*row.figures).*member;
}

std::optional<double> share(std::optional<double> value, double peak) {
    if (!value || peak <= 0.0) return std::nullopt;
    return *value / peak;
}

// What prefill and decode are held against.
double bf16_gflops(const BenchReport& report) {
    return report.gpu ? report.gpu->peaks.bf16_gflops : report.peaks.bf16_gflops;
}
double read_gbs(const BenchReport& report) {
    return report.gpu ? report.gpu->peaks.read_gbs : report.peaks.read_gbs;
}

// The keys of the JSON rows are a promise to whoever reads them (bench/plot.py is one).
ResultTable whole_table(const BenchReport& report, bool with_machine) {
    std::vector<std::string> columns = {"mode",
                                        "context",
                                        "k",
                                        "p",
                                        "cached",
                                        "batch",
                                        "positions",
                                        "ttft_ms",
                                        "ttit_ms",
                                        "tokens_per_s",
                                        "prefill_gflops",
                                        "prefill_share_of_peak",
                                        "decode_gbs",
                                        "decode_share_of_read",
                                        "kv_bytes",
                                        "ttft_ratio",
                                        "ttit_ratio",
                                        "throughput_ratio",
                                        "repeats",
                                        "spread"};
    if (with_machine) {
        for (const char* name : {"peak_bf16_gflops", "peak_fp32_gflops", "peak_int8_gops", "read_gbs"})
            columns.emplace_back(name);
    }
    ResultTable table(std::move(columns));
    for (const BenchRow& row : report.rows) {
        const std::optional<double> gflops = of(row, &BenchFigures::prefill_gflops);
        const std::optional<double> gbs = of(row, &BenchFigures::decode_gbs);
        std::optional<double> spread;
        if (row.figures) spread = row.figures->spread;
        table.begin_row()
            .text(row.full ? "full" : "refrag")
            .integer(row.context)
            .integer(row.chunk_len)
            .number(row.expand_fraction)
            .boolean(row.cached)
            .integer(row.batch)
            .integer(of(row, &BenchFigures::positions))
            .number(of(row, &BenchFigures::ttft_ms))
            .number(of(row, &BenchFigures::ttit_ms))
            .number(of(row, &BenchFigures::tokens_per_s))
            .number(gflops)
            .number(share(gflops, bf16_gflops(report)))
            .number(gbs)
            .number(share(gbs, read_gbs(report)))
            .integer(of(row, &BenchFigures::kv_bytes))
            .number(row.ttft_ratio)
            .number(row.ttit_ratio)
            .number(row.throughput_ratio)
            .integer(row.figures ? row.figures->repeats : 0)
            .number(spread);
        if (!with_machine) continue;
        std::optional<double> int8_gops;
        if (!report.gpu) int8_gops = report.peaks.int8_gops;
        table.number(bf16_gflops(report))
            .number(report.gpu ? report.gpu->peaks.fp32_gflops : report.peaks.fp32_gflops)
            .number(int8_gops)
            .number(read_gbs(report));
    }
    return table;
}

std::string write_json(const BenchReport& report) {
    JsonWriter json(1);
    json.begin_object().key("machine").begin_object();
    json.key("cpu").string(report.cpu);
    if (report.gpu) json.key("gpu").string(report.gpu->name);
    json.key("threads").integer(report.threads);
    if (report.gpu) {
        const cuda::GpuPeaks& peaks = report.gpu->peaks;
        json.key("peak_bf16_gflops").number(peaks.bf16_gflops);
        json.key("peak_fp32_gflops").number(peaks.fp32_gflops);
        json.key("read_gbs").number(peaks.read_gbs);
        json.key("copy_gbs").number(peaks.copy_gbs);
    } else {
        json.key("peak_bf16_gflops").number(report.peaks.bf16_gflops);
        json.key("peak_fp32_gflops").number(report.peaks.fp32_gflops);
        json.key("peak_int8_gops").number(report.peaks.int8_gops);
        json.key("read_gbs").number(report.peaks.read_gbs);
        json.key("bf16_instruction").string(report.peaks.bf16_instruction);
        json.key("fp32_instruction").string(report.peaks.fp32_instruction);
        json.key("int8_instruction").string(report.peaks.int8_instruction);
    }
    json.key("backend").string(report.backend);
    json.key("model").string(report.model);
    json.key("parameters").integer(static_cast<int64_t>(report.parameters));
    json.key("load_s").number(report.load_s);
    json.key("load_peak_rss_bytes").integer(static_cast<int64_t>(report.load_peak_rss_bytes));
    json.key("peak_rss_bytes").integer(static_cast<int64_t>(report.peak_rss_bytes));
    json.end_object().key("rows");
    whole_table(report, false).write_json(json);
    json.end_object();
    return json.text() + "\n";
}

// "1234 (0.56)": a speed and its share of the peak.
std::optional<std::string> with_share(std::optional<double> value, int digits, double peak) {
    if (!value) return std::nullopt;
    return str(fixed(*value, digits), " (", fixed(*value / peak, 2), ")");
}

// The two lines of the machine and its peaks.
std::string machine_lines(const BenchReport& report) {
    if (report.gpu) {
        const cuda::GpuPeaks& peaks = report.gpu->peaks;
        return str(report.gpu->name, "; ", report.backend, "; beside it ", report.cpu, "\npeaks of ",
                   report.gpu->name, ": bf16 ", fixed(peaks.bf16_gflops, 0), " GFLOP/s, fp32 ",
                   fixed(peaks.fp32_gflops, 0), " GFLOP/s, memory read ", fixed(peaks.read_gbs, 1),
                   " GB/s, copied ", fixed(peaks.copy_gbs, 1), " GB/s (read and written)\n");
    }
    const MachinePeaks& peaks = report.peaks;
    return str(report.cpu, "; ", report.backend, "\npeaks of ", report.threads,
               report.threads == 1 ? " thread" : " threads", ": bf16 ", fixed(peaks.bf16_gflops, 0),
               " GFLOP/s (", peaks.bf16_instruction, "), fp32 ", fixed(peaks.fp32_gflops, 0), " GFLOP/s (",
               peaks.fp32_instruction, "), int8 ", fixed(peaks.int8_gops, 0), " GOP/s (",
               peaks.int8_instruction, "), memory read ", fixed(peaks.read_gbs, 1), " GB/s\n");
}

std::string write_markdown(const BenchReport& report) {
    std::string out =
        str(report.model, ", ", fixed(static_cast<double>(report.parameters) * 1e-6, 1),
            "M parameters; loaded in ", fixed(report.load_s, 2), " s, peak memory ",
            gigabytes(report.load_peak_rss_bytes), " until then, ", gigabytes(report.peak_rss_bytes),
            report.gpu ? " in all, beside the GPU's\n" : " in all\n", machine_lines(report), "\n");
    ResultTable table({"mode", "context", "k", "p", "from", "batch", "positions", "TTFT ms", "TTIT ms",
                       "tokens/s", "prefill GFLOP/s (of bf16)", "decode GB/s (of read)", "KV MB", "TTFT x",
                       "TTIT x", "throughput x", "FLOP x", "repeats", "spread"});
    for (const BenchRow& row : report.rows) {
        std::optional<double> kv_mb, spread;
        if (row.figures) {
            kv_mb = static_cast<double>(row.figures->kv_bytes) * 1e-6;
            spread = row.figures->spread;
        }
        table.begin_row()
            .text(row.full ? "full" : "refrag")
            .integer(row.context)
            .integer(row.chunk_len)
            .number(row.expand_fraction)
            .text(row.cached ? "cached" : "text")
            .integer(row.batch)
            .integer(of(row, &BenchFigures::positions))
            .number(of(row, &BenchFigures::ttft_ms), 1)
            .number(of(row, &BenchFigures::ttit_ms), 2)
            .number(of(row, &BenchFigures::tokens_per_s), 1)
            .text(with_share(of(row, &BenchFigures::prefill_gflops), 0, bf16_gflops(report)))
            .text(with_share(of(row, &BenchFigures::decode_gbs), 1, read_gbs(report)))
            .number(kv_mb, 1)
            .number(row.ttft_ratio, 2)
            .number(row.ttit_ratio, 2)
            .number(row.throughput_ratio, 2)
            .number(row.flop_ratio, 2)
            .integer(row.figures ? row.figures->repeats : 0)
            .number(spread, 2);
    }
    return out + table.write("md");
}

}  // namespace

std::string write_bench_report(const BenchReport& report, const std::string& format) {
    check_table_format(format);
    if (format == "json") return write_json(report);
    return format == "csv" ? whole_table(report, true).write("csv") : write_markdown(report);
}

}  // namespace refrag
