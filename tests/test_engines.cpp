// Several engines over one model, and what an engine's decode steps keep: two engines on two threads answer
// as alone; recorded steps survive requests that come and go; steps that only generate take no memory.
#include <doctest/doctest.h>

#include <functional>
#include <memory>
#include <thread>

#include "cpu/cpu_backend.h"
#include "cuda_on_host/open.h"
#include "failing.h"
#include "golden.h"
#include "refrag/engine.h"
#include "support.h"

using namespace refrag;

namespace {

Request request_of(const Model& model, double expand_fraction, int32_t n_tokens,
                   const std::string& question) {
    Request request;
    std::vector<std::shared_ptr<SharedPassage>> passages;
    for (const char* text : {"The old mill stands on a hill above the river.",
                             "A red lantern hangs over the door; owners light it every evening."}) {
        passages.push_back(std::make_shared<SharedPassage>(model, text));
    }
    request.segments = make_segments(model, {}, passages, question);
    request.options.expand_fraction = expand_fraction;
    request.options.max_new_tokens = n_tokens;
    request.options.ignore_eos = true;
    return request;
}

using Ids = std::vector<std::vector<int32_t>>;

// Eight requests over three slots, so that they join and leave; `shift` makes them others.
Ids answers(const Model& model, int shift, Recording::Counts* counts = nullptr) {
    Engine engine(model, 3, 160);
    for (int i = 0; i < 8; ++i) {
        const int kind = i * 3 + shift;
        Request request =
            request_of(model, kind % 3 * 0.5, 4 + kind % 5 * 3, str("What about number ", kind * kind, "?"));
        if (kind % 2 == 1) request.options.sampler = {.temperature = 0.8f, .seed = static_cast<uint64_t>(i)};
        engine.submit(std::move(request));
    }
    Ids ids(8);
    while (!engine.idle()) {
        engine.step();
        for (Result& result : engine.take_finished()) {
            if (result.error) throw Error(result.error->status(), result.error->message());
            ids[result.id] = result.answer.ids;
        }
    }
    if (counts != nullptr) *counts = engine.decode_counts();
    return ids;
}

// Two engines at once, twice, so that both are in the middle of their work when the other begins.
void check_two_threads(const Model& model, bool records) {
    const Ids alone[] = {answers(model, 0), answers(model, 1)};
    REQUIRE(alone[0] != alone[1]);
    Ids together[2][2];
    Recording::Counts counts[2];
    std::string errors[2];
    const auto work = [&](int t) {
        try {
            for (Ids& ids : together[t]) ids = answers(model, t, &counts[t]);
        } catch (const std::exception& error) {
            errors[t] = error.what();
        }
    };
    std::thread other(work, 1);
    work(0);
    other.join();
    for (int t = 0; t < 2; ++t) {
        CHECK(errors[t] == "");
        for (const Ids& ids : together[t]) CHECK(ids == alone[t]);
        CHECK((counts[t].replayed > 0) == records);
    }
}

}  // namespace

TEST_CASE("engines: two over one model on two threads answer as alone, on the CPU") {
    for (const int n_threads : {1, 3}) {
        for (const CpuIsa isa : {CpuIsa::scalar, best_cpu_isa()}) {
            const std::unique_ptr<Device> device = make_cpu_device(n_threads, isa, best_cpu_int8(isa));
            const Model model(*device, refrag_test::tiny_refrag_path());
            check_two_threads(model, false);
            const Model int8(*device, refrag_test::tiny_refrag_path(), {}, WeightFormat::int8);
            check_two_threads(int8, false);
        }
    }
}

TEST_CASE("engines: two over one model on two threads answer as alone, with recorded steps") {
    const std::unique_ptr<Device> device = refrag_on_host::open_device();
    const Model model(*device, refrag_test::tiny_refrag_path());
    const uint64_t available = device->available_bytes();
    check_two_threads(model, true);
    CHECK(device->available_bytes() == available);
}

TEST_CASE("engines: recorded steps survive requests that come and go") {
    const std::unique_ptr<Device> device = refrag_on_host::open_device();
    const Model model(*device, refrag_test::tiny_refrag_path());
    Engine engine(model, 3, 160);
    engine.submit(request_of(model, 1.0, 60, "What stays?"));
    int64_t steps = 0;
    const auto until_alone = [&] {
        size_t finished = 0;
        while (finished == 0) {
            engine.step();
            ++steps;
            for (const Result& result : engine.take_finished()) {
                CHECK(!result.error);
                ++finished;
            }
        }
    };
    for (int i = 0; i < 5; ++i) engine.step();
    CHECK(engine.decode_counts().run == 1);
    CHECK(engine.decode_counts().recorded == 1);
    CHECK(engine.decode_counts().replayed == 2);
    // Each is compressed: its projected chunks are memory that comes and goes.
    for (int i = 0; i < 4; ++i) {
        engine.submit(request_of(model, 0.0, 5, str("What passes, ", i, "?")));
        until_alone();
        REQUIRE(engine.n_running() == 1);
        for (int s = 0; s < 2; ++s, ++steps) engine.step();
    }
    // One sequence, and two: each is run once and recorded once. The rest was replayed but for the steps in
    // which a prompt was read.
    CHECK(engine.decode_counts().run == 2);
    CHECK(engine.decode_counts().recorded == 2);
    CHECK(engine.decode_counts().replayed == 2 + steps - 4 - 2);
}

TEST_CASE("engines: steps that only generate take no memory of the device") {
    const std::unique_ptr<Device> device = refrag_on_host::open_device();
    const Model model(*device, refrag_test::tiny_refrag_path());
    Engine engine(model, 3, 160);
    for (int i = 0; i < 3; ++i) engine.submit(request_of(model, i * 0.5, 60, str("Where is ", i, "?")));
    for (int i = 0; i < 4; ++i) engine.step();
    const uint64_t taken = refrag_on_host::allocations_made();
    for (int i = 0; i < 40; ++i) engine.step();
    CHECK(refrag_on_host::allocations_made() == taken);
    CHECK(engine.n_running() == 3);
}
