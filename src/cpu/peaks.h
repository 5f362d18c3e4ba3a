// The machine's own limits, measured. A figure of this backend is judged as a share of them. Each is the best
// of several short runs on all threads at once, from registers (products) or from a buffer well past the
// caches (reading). On a shared machine they move: measure them in the run that they judge.
//
// Products count 2 operations a multiply-add. The best instruction that this CPU has, and that the process
// may use, is timed and named. A type without one is widened to fp32, and has the fp32 limit.
#pragma once

#include <cstdint>
#include <string>

namespace refrag {

struct MachinePeaks {
    double fp32_gflops = 0.0;
    double bf16_gflops = 0.0;  // bf16 products, fp32 sums; never below fp32_gflops
    double int8_gops = 0.0;    // int8 products, int32 sums; never below fp32_gflops
    double read_gbs = 0.0;     // 1e9 bytes a second
    std::string fp32_instruction;
    std::string bf16_instruction;
    std::string int8_instruction;
};

// Takes about two seconds. n_threads 0: one for each CPU that the process may run on. max_buffer_bytes: the
// most memory that the reading may take. Status::out_of_memory when there is not so much.
MachinePeaks measure_peaks(int n_threads, uint64_t max_buffer_bytes);

// What the system calls this CPU ("Intel(R) Xeon(R) ..."), or its architecture.
std::string cpu_name();

}  // namespace refrag
