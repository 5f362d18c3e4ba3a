// --device: which device computes and why, on machines whose GPU is missing, too old, lacks something, is
// another process' own, or is one of two. The machines are tests/cuda_on_host/'s.
#include <doctest/doctest.h>

#include <array>
#include <thread>
#include <vector>

#include "base/check.h"
#include "cli/device.h"
#include "cuda_on_host/open.h"
#include "support.h"

using namespace refrag;
using refrag_on_host::Machine;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

// The machine for as long as this lives.
struct OnMachine {
    explicit OnMachine(const Machine& machine) { refrag_on_host::set_machine(machine); }
    ~OnMachine() { refrag_on_host::set_machine({}); }
    OnMachine(const OnMachine&) = delete;
    OnMachine& operator=(const OnMachine&) = delete;
};

GpuRuntime on_host() {
    return {[] { return refrag_on_host::present(); },
            [](int device) { return refrag_on_host::unavailable(device); },
            [](int device, double memory_fraction, bool deterministic) {
                refrag_on_host::OpenOptions options;
                options.device = device;
                options.memory_fraction = memory_fraction;
                options.deterministic = deterministic;
                return refrag_on_host::open_device(options);
            }};
}

ChosenDevice choose(const std::string& word) {
    DeviceOptions options;
    options.device = word;
    options.threads = 1;
    return choose_device(options, on_host());
}

// What --device auto and --device cuda do where GPU 0 cannot be used: warned of or not.
void check_fallback(const Machine& machine, const std::string& reason, bool warned) {
    CAPTURE(reason);
    const OnMachine here(machine);
    const ChosenDevice chosen = choose("auto");
    CHECK(!chosen.device->is_remote());
    CHECK(contains(chosen.why, reason));
    CHECK(contains(chosen.warning, warned ? reason : ""));
    CHECK(chosen.warning.empty() == !warned);
    const std::string refused = error_of([] { choose("cuda"); });
    CHECK(contains(refused, reason));
    CHECK(choose("cpu").warning.empty());
}

}  // namespace

TEST_CASE("--device: the words, and what is refused") {
    CHECK(gpu_number("auto") == 0);
    CHECK(gpu_number("cuda") == 0);
    CHECK(gpu_number("cpu") == -1);
    CHECK(gpu_number("cuda:3") == 3);
    for (const char* word :
         {"gpu", "", "cuda:", "cuda:-1", "cuda:1x", "cuda: 1", "cuda:99999999999", "CPU"}) {
        CAPTURE(word);
        CHECK(contains(error_of([&] { gpu_number(word); }), "--device: expected auto, cpu, cuda or cuda:N"));
    }
}

TEST_CASE("--device auto takes a GPU, and the CPU with the reason where the GPU cannot be used") {
    {
        const OnMachine here(Machine{});
        CHECK(choose("auto").device->is_remote());
        CHECK(choose("auto").why == "a GPU is there");
        CHECK(choose("cuda").why == "asked for");
        CHECK(!choose("cpu").device->is_remote());
    }
    Machine machine;
    machine.has_driver = false;
    check_fallback(machine, "no NVIDIA driver is installed", false);
    machine = {};
    machine.n_devices = 0;
    check_fallback(machine, "no CUDA device can be used: no device", false);
    machine = {};
    machine.capability = 7;
    check_fallback(machine, "cuda:0: it has compute capability 7.0; at least 8.0 is needed", true);
    machine = {};
    machine.has_pools = false;
    check_fallback(machine, "cuda:0: it has no memory pools (cudaMallocAsync), which are needed", true);
    machine = {};
    machine.has_cublas = false;
    check_fallback(machine, "cannot open cuBLAS", true);
    machine = {};
    machine.opens = false;
    check_fallback(machine, "devices unavailable", true);
}

TEST_CASE("--device cuda:N takes that GPU, and refuses one that is not there") {
    Machine machine;
    machine.n_devices = 2;
    const OnMachine here(machine);
    CHECK(contains(choose("cuda:1").device->description(), "cuda:1: "));
    CHECK(contains(choose("cuda").device->description(), "cuda: "));
    CHECK(contains(error_of([] { choose("cuda:2"); }),
                   "--device cuda:2: cuda:2: 2 devices are visible, cuda:0 to cuda:1"));
    refrag_on_host::set_machine({});
    CHECK(contains(error_of([] { choose("cuda:1"); }), "cuda:1: 1 device is visible, cuda:0"));
}

// The runtime refuses work of a thread whose current device is another than the stream's.
TEST_CASE("every thread that drives a queue makes its device the current one") {
    Machine machine;
    machine.n_devices = 2;
    const OnMachine here(machine);
    const std::unique_ptr<Device> first = choose("cuda:0").device, second = choose("cuda:1").device;
    const std::unique_ptr<Backend> one = first->make_backend(), other = second->make_backend();
    const auto use = [](Backend& backend) {
        const std::array<float, 4> values = {1, 2, 3, 4};
        const Buffer a(backend, sizeof values), b(backend, sizeof values);
        const Tensor x{a.data(), DType::f32, 1, 4}, y{b.data(), DType::f32, 1, 4};
        backend.upload(x.data, values.data(), sizeof values);
        backend.upload(y.data, values.data(), sizeof values);
        backend.add(x, y);
        backend.copy(y, x);
        std::array<float, 4> sum{};
        backend.download(sum.data(), y.data, sizeof sum);
        return sum == std::array<float, 4>{2, 4, 6, 8};
    };
    CHECK(use(*one));
    CHECK(use(*other));
    CHECK(use(*one));
    std::vector<int> good(2);
    std::thread thread([&] { good = {use(*other) ? 1 : 0, use(*one) ? 1 : 0}; });
    thread.join();
    CHECK(good == std::vector<int>{1, 1});
}
