// What `refrag bench` writes: the machine (or the GPU) and its own peaks, and the rows with their shares of
// them, as a Markdown table for people, CSV or JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/bench.h"
#include "cpu/peaks.h"
#include "cuda/peaks.h"

namespace refrag {

struct BenchGpu {
    std::string name;
    cuda::GpuPeaks peaks;
};

struct BenchReport {
    std::string cpu;      // the CPU's name
    std::string backend;  // Device::description()
    int threads = 0;
    MachinePeaks peaks;           // of the CPU, where that computed
    std::optional<BenchGpu> gpu;  // where a GPU computed: its peaks are then the ones that count
    std::string model;            // a directory, or the shapes' names
    uint64_t parameters = 0;
    double load_s = 0.0;               // loading, or making random weights, packing included
    uint64_t load_peak_rss_bytes = 0;  // the most resident memory until the model was there; 0: unknown
    uint64_t peak_rss_bytes = 0;       // until the sweep's end, before the peaks were measured
    std::vector<BenchRow> rows;
};

// format: md, csv or json. JSON is {"machine": {...}, "rows": [{...}]}; CSV has the rows' JSON keys as
// columns and four of the machine's, so that a line says all of itself. Of a GPU there is no peak of int8.
std::string write_bench_report(const BenchReport& report, const std::string& format);

}  // namespace refrag
