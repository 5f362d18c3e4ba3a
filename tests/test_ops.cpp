// The CPU backend itself: choosing an instruction set, memory, and the ops that only move rows.
#include <cstdlib>

#include "ops_test.h"

using namespace refrag_test;
using refrag::Buffer;
using refrag::Error;
using refrag::make_cpu_backend;
using refrag::Status;

namespace {

// Sets an environment variable for one scope.
class ScopedEnv {
  public:
    ScopedEnv(const char* name, const char* value) : name_(name) {
        const char* old = std::getenv(name);
        if (old != nullptr) old_ = old;
        had_ = old != nullptr;
        setenv(name, value, 1);
    }
    ~ScopedEnv() {
        if (had_) {
            setenv(name_, old_.c_str(), 1);
        } else {
            unsetenv(name_);
        }
    }
    ScopedEnv(const ScopedEnv&) = delete;
    ScopedEnv& operator=(const ScopedEnv&) = delete;

  private:
    const char* name_;
    std::string old_;
    bool had_ = false;
};

}  // namespace

TEST_CASE("cpu: the environment chooses the instruction set, and a wrong name is an error") {
    {
        const ScopedEnv env("REFRAG_CPU_ISA", "scalar");
        CHECK(make_cpu_backend(2)->device().description() == "cpu: scalar, 2 threads");
        CHECK(make_cpu_backend(1)->device().description() == "cpu: scalar, 1 thread");
    }
    const ScopedEnv env("REFRAG_CPU_ISA", "sse9");
    CHECK(error_of([] { make_cpu_backend(1); }) ==
          "unknown CPU instruction set 'sse9': expected scalar, avx2, avx512, avx512-bf16 or amx");
}

TEST_CASE("cpu: thread numbers") {
    CHECK_THROWS_AS(make_cpu_backend(-1, CpuIsa::scalar), Error);
    CHECK(contains(make_cpu_backend(0, CpuIsa::scalar)->device().description(), "cpu: scalar, "));
}

TEST_CASE("cpu: the best instruction set is one that the CPU has") {
    CHECK(refrag::cpu_supports(CpuIsa::scalar));
    CHECK(refrag::cpu_supports(refrag::best_cpu_isa()));
    for (const CpuIsa isa :
         {CpuIsa::scalar, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::amx}) {
        CHECK(refrag::parse_cpu_isa(refrag::cpu_isa_name(isa)) == isa);
        if (!refrag::cpu_supports(isa)) CHECK_THROWS_AS(make_cpu_backend(1, isa), Error);
    }
}

TEST_CASE("cpu: memory is aligned, and too much of it is an error with the size") {
    const auto backend = make_cpu_backend(1, CpuIsa::scalar);
    for (const size_t bytes : {size_t{1}, size_t{63}, size_t{64}, size_t{1000}, size_t{9} << 20}) {
        const Buffer buffer(*backend, bytes);
        CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % 64 == 0);
        std::memset(buffer.data(), 1, bytes);
    }
    backend->release(nullptr);
    for (const size_t bytes : {size_t{1} << 63, ~size_t{0}, ~size_t{0} - 63}) {
        CAPTURE(bytes);
        Status status = Status::runtime;
        std::string message;
        try {
            backend->release(backend->allocate(bytes));
        } catch (const Error& e) {
            status = e.status();
            message = e.message();
        }
        CHECK(status == Status::out_of_memory);
        CHECK(contains(message, std::to_string(bytes) + " bytes"));
    }
}

TEST_CASE("cpu: copy, upload and download") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    Floats x = random_floats(300 * 257, 1), y(x.size());
    backend->copy(view(y, 300, 257), view(x, 300, 257));
    CHECK(same_bits(x, y));
    backend->copy(Tensor{nullptr, DType::f32, 0, 5}, Tensor{nullptr, DType::f32, 0, 5});
    Floats z(x.size());
    backend->upload(z.data(), x.data(), x.size() * 4);
    CHECK(same_bits(x, z));
    Floats w(x.size());
    backend->download(w.data(), z.data(), z.size() * 4);
    CHECK(same_bits(x, w));
    backend->upload(nullptr, nullptr, 0);
    std::vector<int32_t> a = {1, 2, 3, 4}, b(4);
    backend->copy(Tensor{b.data(), DType::i32, 2, 2}, Tensor{a.data(), DType::i32, 2, 2});
    CHECK(a == b);
}

TEST_CASE("ops: gather_rows copies the named rows") {
    const auto backend = make_cpu_backend(3, CpuIsa::scalar);
    Floats x = random_floats(50 * 65, 3), out(200 * 65);
    x[7 * 65] = kNan;
    std::vector<int32_t> index(200);
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int32_t>((i * 37) % 50);
    backend->gather_rows(view(out, 200, 65), view(x, 50, 65), index.data());
    for (size_t r = 0; r < 200; ++r) {
        for (size_t c = 0; c < 65; ++c) {
            REQUIRE(same_bits(out[r * 65 + c], x[static_cast<size_t>(index[r]) * 65 + c]));
        }
    }
    backend->gather_rows(Tensor{nullptr, DType::f32, 0, 65}, view(x, 50, 65), nullptr);
}
