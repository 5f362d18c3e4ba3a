// The CPU backend: the readable reference and a fast path in one binary.
// Instruction sets are chosen at run time from what the CPU reports; memory is host memory.
//
// Queues of one device share its threads and take turns with them, one parallel region at a time.
#pragma once

#include <memory>
#include <string>

#include "ops/backend.h"

namespace refrag {

// Which loops run. Every level gives the same bits from call to call and whatever the batch; the levels
// differ from each other by rounding (the scalar loops have no fused multiply-add on x86-64).
enum class CpuIsa {
    scalar,
    avx2,         // AVX2, FMA, F16C
    avx512,       // AVX-512 F, BW, VL, DQ (and what avx2 asks)
    avx512_bf16,  // the same, and AVX-512 BF16: matrix products with BF16 weights round activations to bf16
    amx           // the same, and AMX-TILE, AMX-BF16: those products on tiles
};

// How products with I8 weights are computed. As with CpuIsa, a backend computes all of them in one way.
enum class CpuInt8 {
    widen,  // weights widened to fp32, then as with F32 weights: nothing is rounded but the sums
    bf16,   // weights and activations rounded to bf16, then as with BF16 weights
    vnni    // activations rounded to 8 bits with a scale for every 32; dot products of bytes
};

const char* cpu_isa_name(CpuIsa isa);
bool cpu_supports(CpuIsa isa);
CpuIsa best_cpu_isa();
// "scalar", "avx2", "avx512", "avx512-bf16" or "amx"; anything else is an Error(Status::usage).
CpuIsa parse_cpu_isa(const std::string& name);

const char* cpu_int8_name(CpuInt8 int8);
// widen is everywhere; bf16 needs the instruction sets that have it; vnni needs AVX-512 and AVX-512 VNNI, or
// the scalar loops.
bool cpu_supports(CpuIsa isa, CpuInt8 int8);
CpuInt8 best_cpu_int8(CpuIsa isa);
// "widen", "bf16" or "vnni"; anything else is an Error(Status::usage).
CpuInt8 parse_cpu_int8(const std::string& name);

// n_threads 0: one for each CPU that the process may run on. The instruction set is the best one, or what the
// environment variable REFRAG_CPU_ISA names (an Error if unknown or missing on this CPU); REFRAG_CPU_INT8
// says likewise how products with I8 weights are computed.
std::unique_ptr<Device> make_cpu_device(int n_threads = 0);
std::unique_ptr<Device> make_cpu_device(int n_threads, CpuIsa isa, CpuInt8 int8);
// A device with one queue, which owns it.
std::unique_ptr<Backend> make_cpu_backend(int n_threads = 0);
std::unique_ptr<Backend> make_cpu_backend(int n_threads, CpuIsa isa);
std::unique_ptr<Backend> make_cpu_backend(int n_threads, CpuIsa isa, CpuInt8 int8);

}  // namespace refrag
