// Speed of the CUDA backend's ops on a GPU, each beside a limit that was measured in the same run
// (cuda/peaks.h): products and prefill attention beside cuBLAS' bf16 product, the rest beside reading memory.
// Markdown tables on stdout. The mirror of bench_ops.cpp; bench/sdpa.py measures PyTorch at the same
// attention shapes.
//
// A figure is the median of at least 20 batches of calls. The calls of a batch are recorded once (as a decode
// step is) and replayed, so that the gaps between launches are not in it, and ended by one download. What
// waits for memory goes round through copies of its data that together are far larger than the L2 cache.
//
// Every result that is timed is held to another way of computing it: attention to the plain kernel, the
// backend's own products to cuBLAS' and the other way round, the rest to the CPU's plain loops. `off` is how
// far apart they are. Beyond what rounding explains it says WRONG, and the exit status is 1.
//
//   bench_cuda [REPEATS]
//   bench_cuda profile      a few calls of each main kernel, for a profiler
#include "bench_cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "cuda/cuda_backend.h"
#include "cuda/peaks.h"

namespace {

std::string today() {
    const std::time_t time = std::time(nullptr);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&time));
    return text;
}

std::unique_ptr<refrag::Backend> open(const refrag_bench::Way& way) {
    return refrag::cuda::make_cuda_backend({.deterministic = way.deterministic,
                                            .plain_attention = way.plain_attention,
                                            .own_product_rows = way.own_product_rows});
}

}  // namespace

int main(int argc, char** argv) {
    using namespace refrag;
    try {
        refrag_bench::Sizes sizes;
        if (argc > 1 && std::strcmp(argv[1], "profile") == 0) {
            refrag_bench::Bench bench(open, {1.0, 1.0}, sizes, stdout);
            refrag_bench::profile(bench);
            return 0;
        }
        sizes.repeats = std::max(20, argc > 1 ? std::atoi(argv[1]) : 0);
        const cuda::GpuInfo info = cuda::gpu_info();
        const cuda::GpuPeaks peaks = cuda::measure_gpu_peaks();
        refrag_bench::Bench bench(open, {peaks.bf16_gflops, peaks.read_gbs}, sizes, stdout);
        std::printf("date: %s\nGPU: %s (%s)\nCUDA: driver up to %s, runtime %s\n", today().c_str(),
                    info.name.c_str(), bench.b.device().description().c_str(), info.driver.c_str(),
                    info.runtime.c_str());
        std::printf(
            "peaks: bf16 %.1f TFLOP/s, fp32 %.1f TFLOP/s, memory read %.0f GB/s, copied %.0f GB/s (read and "
            "written)\nmedians of %d batches of calls\n",
            peaks.bf16_gflops * 1e-3, peaks.fp32_gflops * 1e-3, peaks.read_gbs, peaks.copy_gbs,
            sizes.repeats);
        std::fflush(stdout);
        refrag_bench::all_tables(bench);
        if (bench.wrong() == 0) return 0;
        std::fprintf(stderr, "bench_cuda: %lld results are WRONG\n", static_cast<long long>(bench.wrong()));
    } catch (const Error& e) {
        std::fprintf(stderr, "bench_cuda: %s\n", e.what());
    }
    return 1;
}
