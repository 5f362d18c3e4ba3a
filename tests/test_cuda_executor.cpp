// The executor that runs CUDA kernels on the CPU (tests/cuda_on_host/): that it computes what a GPU computes,
// and that it catches what a GPU would leave undefined. Compiled like a .cu file.
#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "device.cuh"
#include "support.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace refrag::cuda_on_host;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

constexpr int kThreads = 128;
constexpr int kSeeds = 20;

// Sums the block's inputs by halves in shared memory. `barriers`: as it should be; without, as a bug.
template <bool barriers>
__global__ void sum_kernel(float* out, const float* x) {
    REFRAG_SHARED(float, part, kThreads);
    part[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        if (barriers) __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// The neighbour's value, through dynamic shared memory.
template <bool barrier>
__global__ void neighbour_kernel(float* out, const float* x) {
    float* const values = dynamic_shared<float>();
    values[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void unwritten_kernel(float* out) {
    REFRAG_SHARED(float, fixed, 4);
    out[0] = fixed[1];
    out[1] = dynamic_shared<float>()[2];
    out[2] = widen_bf16(dynamic_shared<uint16_t>()[1]);
}

__global__ void lost_thread_kernel() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}
__global__ void lost_lane_kernel(float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = warp_sum(1.0f);
}
__global__ void split_warp_kernel(float* out) {
    if (threadIdx.x % 2 == 0)
        out[threadIdx.x] = warp_sum(1.0f);
    else
        __syncwarp();
}

__global__ void vote_kernel(uint32_t* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const uint32_t votes = __ballot_sync(kAllLanes, lane % 3 == 0);
    const int any = __any_sync(kAllLanes, lane == 7), all = __all_sync(kAllLanes, lane < 31);
    out[lane] = votes + static_cast<uint32_t>(any - all);
}

// mode 0: waits as it should; 1: reads before waiting; 2: never waits; 3: from an odd address.
__global__ void copy_kernel(float* out, const float* x, int mode) {
    float* const to = dynamic_shared<float>() + 4 * threadIdx.x;
    copy_async_16(to, x + 4 * threadIdx.x + (mode == 3 ? 1 : 0), threadIdx.x != 1);
    copy_async_commit();
    if (mode != 2 && mode != 1) copy_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = to[i];
    if (mode == 1) copy_async_wait<0>();
}

// d = a b for one tile, a and b row-major in bf16, by ldmatrix; b goes through the transposing form.
__global__ void tile_kernel(float* d, const uint16_t* a, const uint16_t* b) {
    uint16_t* const shared =
        dynamic_shared<uint16_t>();  // a [16, 16], then b [16, 16], of which 8 columns count
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += kWarp) {
        shared[i] = a[i];
        shared[256 + i] = b[i];
    }
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t left[4], right[4];
    // Matrices in the order of a's fragments: rows 0-7, 8-15 of columns 0-7, then of columns 8-15.
    load_matrix_x4(left, shared + (lane % 16) * 16 + lane / 16 * 8);
    load_matrix_x4_trans(right, shared + 256 + (lane % 16) * 16 + lane / 16 * 8);
    float sum[4] = {};
    const uint32_t columns[2] = {right[0], right[1]};
    mma_bf16(sum, left, columns);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

struct Stream1 {
    cudaStream_t stream = nullptr;
    Stream1() { cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); }
    ~Stream1() { cudaStreamDestroy(stream); }
};

std::vector<float> numbers(size_t n) {
    std::vector<float> x(n);
    std::iota(x.begin(), x.end(), 1.0f);
    return x;
}

}  // namespace

TEST_CASE("cuda on host: blocks, barriers and shared memory, whatever the threads' order") {
    const Stream1 s;
    const std::vector<float> x = numbers(3 * kThreads);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        set_seed(seed);
        std::vector<float> sum(3), next(kThreads);
        launch(sum_kernel<true>, Dim{3}, Dim{kThreads}, 0, s.stream, sum.data(), x.data());
        for (size_t b = 0; b < 3; ++b) {
            CHECK(sum[b] == std::accumulate(x.begin() + static_cast<long>(b) * kThreads,
                                            x.begin() + static_cast<long>(b + 1) * kThreads, 0.0f));
        }
        launch(neighbour_kernel<true>, Dim{1}, Dim{kThreads}, kThreads * sizeof(float), s.stream, next.data(),
               x.data());
        for (size_t i = 0; i < kThreads; ++i) CHECK(next[i] == x[(i + 1) % kThreads]);
    }
}

TEST_CASE("cuda on host: a missing barrier gives a wrong result under every seed") {
    const Stream1 s;
    const std::vector<float> x = numbers(kThreads);
    int sums = 0, neighbours = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        set_seed(seed);
        float sum = 0.0f;
        std::vector<float> next(kThreads);
        launch(sum_kernel<false>, Dim{1}, Dim{kThreads}, 0, s.stream, &sum, x.data());
        launch(neighbour_kernel<false>, Dim{1}, Dim{kThreads}, kThreads * sizeof(float), s.stream,
               next.data(), x.data());
        sums += sum == std::accumulate(x.begin(), x.end(), 0.0f) ? 1 : 0;
        bool right = true;
        for (size_t i = 0; i < kThreads; ++i) right = right && next[i] == x[(i + 1) % kThreads];
        neighbours += right ? 1 : 0;
    }
    CHECK(sums == 0);
    CHECK(neighbours == 0);
}

TEST_CASE("cuda on host: what was never written is NaN, in every type") {
    const Stream1 s;
    float out[3] = {};
    launch(unwritten_kernel, Dim{1}, Dim{1}, 16, s.stream, static_cast<float*>(out));
    for (const float x : out) CHECK(std::isnan(x));
    void* data = nullptr;
    CHECK(cudaMallocAsync(&data, 64, s.stream) == cudaSuccess);
    CHECK(std::isnan(static_cast<float*>(data)[15]));
#if defined(__SANITIZE_ADDRESS__)
    CHECK(__asan_address_is_poisoned(static_cast<char*>(data) + 64) == 1);
#endif
    CHECK(cudaFreeAsync(data, s.stream) == cudaSuccess);
}

TEST_CASE("cuda on host: threads that wait for ever are an error that says for what") {
    const Stream1 s;
    std::vector<float> out(64);
    const auto error = [&](auto&& call) { return error_of(call); };
    CHECK(error([&] { launch(lost_thread_kernel, Dim{1}, Dim{64}, 0, s.stream); }) ==
          "kernel, block (0, 0, 0): 63 threads wait at a barrier which 1 ended threads never reach");
    CHECK(contains(error([&] { launch(lost_lane_kernel, Dim{1}, Dim{64}, 0, s.stream, out.data()); }),
                   "threads wait for ever at __shfl_xor_sync"));
    CHECK(contains(error([&] { launch(split_warp_kernel, Dim{1}, Dim{32}, 0, s.stream, out.data()); }),
                   "lanes of one warp at "));
    CHECK(contains(error([&] { launch(lost_thread_kernel, Dim{1}, Dim{1025}, 0, s.stream); }), "1 to 1024"));
    CHECK(contains(error([&] { launch(lost_thread_kernel, Dim{0}, Dim{32}, 0, s.stream); }), "a grid of 0"));
    CHECK(contains(error([&] { launch(lost_thread_kernel, Dim{1}, Dim{32}, 1 << 20, s.stream); }),
                   "bytes of shared memory"));
    // And the next launch works.
    float sum = 0.0f;
    const std::vector<float> x = numbers(kThreads);
    launch(sum_kernel<true>, Dim{1}, Dim{kThreads}, 0, s.stream, &sum, x.data());
    CHECK(sum == 8256.0f);
}

TEST_CASE("cuda on host: votes of a warp") {
    const Stream1 s;
    std::vector<uint32_t> out(32);
    launch(vote_kernel, Dim{1}, Dim{32}, 0, s.stream, out.data());
    for (const uint32_t votes : out) CHECK(votes == 0x49249249u + 1);
}

TEST_CASE("cuda on host: asynchronous copies arrive when they are waited for") {
    const Stream1 s;
    alignas(16) float x[4 * 32 + 4];
    std::iota(x, x + 4 * 32 + 4, 1.0f);
    std::vector<float> out(4 * 32);
    const auto copy = [&](int mode) {
        launch(copy_kernel, Dim{1}, Dim{32}, 4 * 32 * sizeof(float), s.stream, out.data(),
               static_cast<const float*>(x), mode);
    };
    copy(0);
    for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == (i / 4 == 1 ? 0.0f : x[i]));
    copy(1);
    for (const float value : out) CHECK(std::isnan(value));
    CHECK(contains(error_of([&] { copy(2); }), "copies that it began (cp.async) were under way"));
    CHECK(contains(error_of([&] { copy(3); }), "no multiple of 16"));
}

TEST_CASE("cuda on host: a tile's product by ldmatrix and mma") {
    const Stream1 s;
    std::vector<uint16_t> a(256), b(256);
    std::vector<float> d(128);
    const auto value = [](size_t i, size_t step) { return static_cast<float>((i * step) % 17) - 8.0f; };
    for (size_t i = 0; i < 256; ++i) {
        a[i] = round_bf16(value(i, 7));
        b[i] = round_bf16(value(i, 5));
    }
    launch(tile_kernel, Dim{1}, Dim{32}, 1024, s.stream, d.data(), static_cast<const uint16_t*>(a.data()),
           static_cast<const uint16_t*>(b.data()));
    for (size_t r = 0; r < 16; ++r) {
        for (size_t c = 0; c < 8; ++c) {
            float sum = 0.0f;
            for (size_t k = 0; k < 16; ++k) sum += value(r * 16 + k, 7) * value(k * 16 + c, 5);
            CHECK(d[r * 8 + c] == sum);
        }
    }
}

TEST_CASE("cuda on host: halves and bf16 round to nearest even") {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float exact = widen_f16(static_cast<uint16_t>(bits));
        if (std::isnan(exact)) continue;
        REQUIRE(round_f16(exact) == bits);
        if ((bits & 0x7fff) >= 0x7bff) continue;
        // Halfway to the next one goes to the even one; a little beyond, to the next.
        const float next = widen_f16(static_cast<uint16_t>(bits + 1)), middle = exact + (next - exact) / 2;
        REQUIRE(round_f16(middle) == bits + bits % 2);
        REQUIRE(round_f16(std::nextafter(middle, next)) == bits + 1);
    }
    CHECK(round_f16(65520.0f) == 0x7c00);
    CHECK(round_f16(65519.0f) == 0x7bff);
    CHECK(std::isnan(widen_f16(round_f16(std::nanf("")))));
    CHECK(std::isnan(widen_bf16(round_bf16(std::nanf("")))));
    CHECK(round_bf16(1.00390625f) == 0x3f80);
    CHECK(round_bf16(1.01171875f) == 0x3f82);
    CHECK(pack_bf16(1.0f, -2.0f) == 0xc0003f80);
}

TEST_CASE("cuda on host: captured work is done again with what memory holds then") {
    const Stream1 s;
    std::vector<float> x = numbers(kThreads), next(kThreads);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal);
    launch(neighbour_kernel<true>, Dim{1}, Dim{kThreads}, kThreads * sizeof(float), s.stream, next.data(),
           static_cast<const float*>(x.data()));
    cudaStreamEndCapture(s.stream, &graph);
    CHECK(next[0] == 0.0f);
    cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    for (const float first : {2.0f, 5.0f}) {
        x[1] = first;
        cudaGraphLaunch(exec, s.stream);
        CHECK(next[0] == first);
    }
    cudaGraphExecDestroy(exec);
}
