// The CPU backend itself: which instruction set, memory, and how rows are shared out among threads.
#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Below this many units of work a parallel region costs more than it saves (waking takes about 2 us).
constexpr double kMinTaskCost = 16384.0;

const CpuKernels kScalarKernels = [] {
    CpuKernels kernels = {
        scalar::gemm_tile,  scalar::widen_panel,    scalar::widen_int8,    scalar::add,
        scalar::gelu,       scalar::tanh,           scalar::silu_mul,      scalar::rms_norm,
        scalar::layer_norm, scalar::l2_normalize,   scalar::rope,          scalar::max,
        scalar::sum_exp,    scalar::transpose_keys, scalar::softmax_block, scalar::scale,
    };
    kernels.quantize_groups = scalar::quantize_groups;
    kernels.gemm_int8 = scalar::gemm_int8;
    return kernels;
}();

#if defined(__x86_64__)
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

// AMX-BF16 and AMX-TILE: bits 22 and 24 of edx.
bool has_amx_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned both = 1u << 22 | 1u << 24;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & both) == both;
}

// Linux gives a process the tile registers only if it asks. Threads begun later have them too.
bool may_use_amx() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}

// vdpbf16ps runs at twice the rate of fp32 multiply-adds on AMD's Zen 5, but at half of it on Intel's Granite
// Rapids (both measured), where AMX is meant to be used.
bool fast_avx512_bf16() {
    return __builtin_cpu_is("intel") == 0;
}
#endif

#if defined(__x86_64__)
// Bit 11 of ecx.
bool has_avx512_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 11)) != 0;
}
#endif

const char* shown_name(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::scalar:
            return "scalar";
        case CpuIsa::avx2:
            return "AVX2";
        case CpuIsa::avx512:
            return "AVX-512";
        case CpuIsa::avx512_bf16:
            return "AVX-512 BF16";
        case CpuIsa::amx:
            return "AVX-512 and AMX";
    }
    return "?";
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::scalar:
            return "scalar";
        case CpuIsa::avx2:
            return "avx2";
        case CpuIsa::avx512:
            return "avx512";
        case CpuIsa::avx512_bf16:
            return "avx512-bf16";
        case CpuIsa::amx:
            return "amx";
    }
    return "?";
}

bool cpu_supports(CpuIsa isa) {
    if (isa == CpuIsa::scalar) return true;
#if defined(__x86_64__)
    // These builtins also ask whether the operating system saves the wide registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (isa == CpuIsa::avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == CpuIsa::avx512) return avx512;
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == CpuIsa::avx512_bf16) return avx512_bf16;
    return avx512_bf16 && has_amx_bf16() && may_use_amx();
#else
    return false;
#endif
}

CpuIsa best_cpu_isa() {
    if (cpu_supports(CpuIsa::amx)) return CpuIsa::amx;
#if defined(__x86_64__)
    if (cpu_supports(CpuIsa::avx512_bf16) && fast_avx512_bf16()) return CpuIsa::avx512_bf16;
#endif
    for (const CpuIsa isa : {CpuIsa::avx512, CpuIsa::avx2}) {
        if (cpu_supports(isa)) return isa;
    }
    return CpuIsa::scalar;
}

CpuIsa parse_cpu_isa(const std::string& name) {
    for (const CpuIsa isa :
         {CpuIsa::scalar, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::amx}) {
        if (name == cpu_isa_name(isa)) return isa;
    }
    fail(Status::usage, "unknown CPU instruction set '", name,
         "': expected scalar, avx2, avx512, avx512-bf16 or amx");
}

const char* cpu_int8_name(CpuInt8 int8) {
    switch (int8) {
        case CpuInt8::widen:
            return "widen";
        case CpuInt8::bf16:
            return "bf16";
        case CpuInt8::vnni:
            return "vnni";
    }
    return "?";
}

bool cpu_supports(CpuIsa isa, CpuInt8 int8) {
    if (!cpu_supports(isa)) return false;
    switch (int8) {
        case CpuInt8::widen:
            return true;
        case CpuInt8::bf16:
            return cpu_kernels(isa).gemm_bf16 != nullptr;
        case CpuInt8::vnni:
#if defined(__x86_64__)
            if (isa != CpuIsa::scalar && !has_avx512_vnni()) return false;
#endif
            return cpu_kernels(isa).gemm_int8 != nullptr;
    }
    return false;
}

// Weights of 8 bits are for generating, where dot products of bytes read them as fast as memory gives them:
// on an Intel with AMX 1.3 times as fast (1.1B, measured) as widening them to bf16, which reads prompts 1.65
// times as fast there. AMX's own products of bytes are no faster than VNNI's: sums must leave the tiles every
// 32 k to meet their scales. The scalar loops stay exact.
CpuInt8 best_cpu_int8(CpuIsa isa) {
    if (isa == CpuIsa::scalar) return CpuInt8::widen;
    for (const CpuInt8 int8 : {CpuInt8::vnni, CpuInt8::bf16}) {
        if (cpu_supports(isa, int8)) return int8;
    }
    return CpuInt8::widen;
}

CpuInt8 parse_cpu_int8(const std::string& name) {
    for (const CpuInt8 int8 : {CpuInt8::widen, CpuInt8::bf16, CpuInt8::vnni}) {
        if (name == cpu_int8_name(int8)) return int8;
    }
    fail(Status::usage, "unknown way to compute with int8 weights '", name,
         "': expected widen, bf16 or vnni");
}

const CpuKernels& cpu_kernels(CpuIsa isa) {
#if defined(__x86_64__)
    if (isa == CpuIsa::avx2) return kAvx2Kernels;
    if (isa == CpuIsa::avx512) return kAvx512Kernels;
    if (isa == CpuIsa::avx512_bf16) return kAvx512Bf16Kernels;
    if (isa == CpuIsa::amx) return kAmxKernels;
#endif
    (void)isa;
    return kScalarKernels;
}

namespace {

std::unique_ptr<CpuDevice> new_cpu_device(int n_threads, CpuIsa isa, CpuInt8 int8) {
    REFRAG_CHECK(cpu_supports(isa), Status::usage, "this CPU does not support ", cpu_isa_name(isa));
    REFRAG_CHECK(cpu_supports(isa, int8), Status::usage, "this CPU does not support ", cpu_int8_name(int8),
                 " for int8 weights with ", cpu_isa_name(isa));
    REFRAG_CHECK(n_threads >= 0, Status::usage, "the number of threads is ", n_threads,
                 ", expected 0 (all CPUs) or more");
    return std::make_unique<CpuDevice>(n_threads == 0 ? default_threads() : n_threads, isa, int8);
}

std::unique_ptr<CpuDevice> new_cpu_device(int n_threads) {
    const char* name = std::getenv("REFRAG_CPU_ISA");  // NOLINT(concurrency-mt-unsafe): nothing here sets it
    const CpuIsa isa = name == nullptr ? best_cpu_isa() : parse_cpu_isa(name);
    const char* int8 = std::getenv("REFRAG_CPU_INT8");  // NOLINT(concurrency-mt-unsafe): as above
    return new_cpu_device(n_threads, isa, int8 == nullptr ? best_cpu_int8(isa) : parse_cpu_int8(int8));
}

std::unique_ptr<Backend> queue_of(std::unique_ptr<CpuDevice> device) {
    CpuDevice& of = *device;
    return std::make_unique<CpuBackend>(of, std::move(device));
}

}  // namespace

std::unique_ptr<Device> make_cpu_device(int n_threads) {
    return new_cpu_device(n_threads);
}

std::unique_ptr<Device> make_cpu_device(int n_threads, CpuIsa isa, CpuInt8 int8) {
    return new_cpu_device(n_threads, isa, int8);
}

std::unique_ptr<Backend> make_cpu_backend(int n_threads) {
    return queue_of(new_cpu_device(n_threads));
}

std::unique_ptr<Backend> make_cpu_backend(int n_threads, CpuIsa isa) {
    return queue_of(new_cpu_device(n_threads, isa, best_cpu_int8(isa)));
}

std::unique_ptr<Backend> make_cpu_backend(int n_threads, CpuIsa isa, CpuInt8 int8) {
    return queue_of(new_cpu_device(n_threads, isa, int8));
}

// ---- the device -----------------------------------------------------------------------------------------

CpuDevice::CpuDevice(int n_threads, CpuIsa isa, CpuInt8 int8)
    : isa_(isa), int8_(int8), kernels_(cpu_kernels(isa)), threads_(n_threads) {}

std::unique_ptr<Backend> CpuDevice::make_backend() {
    return std::make_unique<CpuBackend>(*this);
}

void* CpuDevice::allocate(size_t bytes) {
    if (bytes == 0) return nullptr;
    // Weights and caches are streamed: large pages spare most of the address translation.
    const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    // No object is larger than ptrdiff_t counts; asking the C library would only try its patience.
    const bool possible = bytes <= static_cast<size_t>(PTRDIFF_MAX) - alignment;
    void* data = possible ? std::aligned_alloc(alignment, rounded) : nullptr;
    if (data == nullptr) fail(Status::out_of_memory, "out of memory: cannot allocate ", bytes, " bytes");
#if defined(__linux__)
    if (alignment == kHugePage) (void)madvise(data, rounded, MADV_HUGEPAGE);
#endif
    return data;
}

void CpuDevice::release(void* data) noexcept {
    std::free(data);
}

std::string CpuDevice::description() const {
    return str("cpu: ", shown_name(isa_), ", ", threads_.size(),
               threads_.size() == 1 ? " thread" : " threads");
}

void CpuDevice::upload(void* dst, const void* src, size_t bytes) {
    if (bytes != 0) std::memcpy(dst, src, bytes);
}

// ---- a queue --------------------------------------------------------------------------------------------

CpuBackend::CpuBackend(CpuDevice& device, std::unique_ptr<CpuDevice> kept)
    : kept_(std::move(kept)),
      device_(device),
      kernels_(device.kernels()),
      threads_(device.threads()),
      left_(device),
      partial_(device) {
    const int n_threads = threads_.size();
    scratch_.reserve(static_cast<size_t>(n_threads));
    for (int i = 0; i < n_threads; ++i) scratch_.emplace_back(device);
}

void CpuBackend::upload(void* dst, const void* src, size_t bytes) {
    if (bytes != 0) std::memcpy(dst, src, bytes);
}

void CpuBackend::download(void* dst, const void* src, size_t bytes) {
    if (bytes != 0) std::memcpy(dst, src, bytes);
}

void CpuBackend::copy(Tensor out, Tensor x) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols && out.dtype == x.dtype);
    if (x.empty()) return;
    const size_t row_bytes = static_cast<size_t>(x.cols) * dtype_bytes(x.dtype);
    parallel(x.rows, static_cast<double>(x.cols), [&](int64_t begin, int64_t end) {
        std::memcpy(static_cast<std::byte*>(out.data) + static_cast<size_t>(begin) * row_bytes,
                    static_cast<const std::byte*>(x.data) + static_cast<size_t>(begin) * row_bytes,
                    static_cast<size_t>(end - begin) * row_bytes);
    });
}

void CpuBackend::parallel(int64_t n, double cost, FunctionRef<void(int64_t, int64_t)> body, int64_t grain) {
    if (n <= 0) return;
    // A few pieces for each thread even out their speeds; pieces too small cost more than they even out.
    const double total = static_cast<double>(n) * cost;
    const auto worth = static_cast<int64_t>(std::min(total / kMinTaskCost, 1e9));
    const int64_t pieces = std::min<int64_t>({worth, int64_t{4} * threads_.size(), n});
    if (threads_.size() == 1 || pieces <= 1) {
        body(0, n);
        return;
    }
    const int64_t piece = ((n + pieces - 1) / pieces + grain - 1) / grain * grain;
    const auto task = [&](int64_t i) { body(i * piece, std::min(n, (i + 1) * piece)); };
    threads_.run((n + piece - 1) / piece, task);
}

}  // namespace refrag
