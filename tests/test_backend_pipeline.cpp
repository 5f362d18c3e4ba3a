// The whole pipeline (compress, sense, expand, answer) on every backend: a tiny model gives the same answers
// everywhere, through prompts of chunk rows and tokens, recorded decode steps and the choice of logits on the
// device.
#include <doctest/doctest.h>

#include <memory>

#include "every_backend.h"
#include "golden.h"
#include "refrag/engine.h"
#include "refrag/memory_plan.h"

using namespace refrag;
using namespace refrag_test;

namespace {

std::vector<std::shared_ptr<SharedPassage>> some_passages(const Model& model) {
    std::vector<std::shared_ptr<SharedPassage>> passages;
    for (const char* text :
         {"Barrow has a lighthouse. The keeper of the lighthouse of Barrow is Mira Tolland.",
          "Ships carry barley and glass to the far coast."}) {
        passages.push_back(std::make_shared<SharedPassage>(model, text));
    }
    return passages;
}

// Three requests over two slots, so that they join and leave the batch: nothing, some and all expanded. Their
// questions are ones of which every choice is clear: no other token comes nearer than 1 nat (`refrag run
// --logprobs 2`), far beyond what rounding to bf16 moves.
std::vector<std::vector<int32_t>> answers(Backend& backend) {
    const Model model(backend.device(), repo_path("weights_tools/refrag-nano"));
    Engine engine(model, 2, 256);
    for (const double p : {0.0, 0.4, 1.0}) {
        Request request;
        request.segments = make_segments(
            model, {}, some_passages(model),
            p == 0.0 ? "Where do ships carry barley and glass?" : "Who keeps the lighthouse of Barrow?");
        request.options.policy = p == 1.0 ? SelectPolicy::all : SelectPolicy::model;
        request.options.expand_fraction = p;
        request.options.max_new_tokens = 6;
        // While a sequence bans end tokens the host draws; else the device does, where there is one.
        request.options.ignore_eos = p == 0.0;
        if (p == 1.0) request.options.sampler = {.temperature = 0.3f, .top_p = 0.9f, .seed = 4};
        engine.submit(std::move(request));
    }
    std::vector<std::vector<int32_t>> ids(3);
    while (!engine.idle()) {
        engine.step();
        for (Result& result : engine.take_finished()) {
            if (result.error) FAIL_CHECK(result.error->message());
            ids[result.id] = result.answer.ids;
        }
    }
    return ids;
}

}  // namespace

// A trained model, because some of its choices are clear enough to survive rounding.
TEST_CASE("pipeline: the default model answers alike on every backend") {
    const std::vector<std::vector<int32_t>> expected = answers(*every_backend()[0]);
    for (const std::vector<int32_t>& ids : expected) CHECK(!ids.empty());
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        CHECK(answers(*backend) == expected);
    }
}

TEST_CASE("pipeline: an engine that does not fit the device's memory is refused with the numbers") {
    const auto open = [](uint64_t bytes) { return refrag_on_host::open_backend({.memory_bytes = bytes}); };
    constexpr uint64_t kLarge = uint64_t{400} << 20;
    const auto large = open(kLarge);
    const Model roomy(large->device(), repo_path("weights_tools/refrag-nano"));
    const MemoryPlan plan = plan_memory(roomy, 1, 2048), short_plan = plan_memory(roomy, 1, 64);
    CHECK(plan.fits());
    const DecoderConfig& shape = roomy.decoder().config();
    const int32_t per_position = shape.n_layers * 2 * shape.n_kv_heads * shape.head_dim * 2;  // k and v, bf16
    CHECK(plan.kv_bytes == uint64_t{2048} * static_cast<uint64_t>(per_position));
    CHECK(plan.request_bytes == plan.kv_bytes);
    CHECK(plan.kv_blocks == 64);
    CHECK(plan.weight_bytes == roomy.weight_bytes());
    CHECK(plan.available_bytes == large->device().available_bytes());
    const Engine engine(roomy, 1);
    CHECK(engine.kv_bytes() == plan.kv_bytes);
    // Beside the weights, room for half of the difference between the two.
    const uint64_t used = kLarge - plan.available_bytes;
    const auto small = open(
        used + (plan.kv_bytes + plan.workspace_bytes + short_plan.kv_bytes + short_plan.workspace_bytes) / 2);
    const Model tight(small->device(), repo_path("weights_tools/refrag-nano"));
    try {
        const Engine refused(tight, 1, 2048);
        CHECK(false);
    } catch (const Error& error) {
        CHECK(error.status() == Status::out_of_memory);
        CHECK(contains(error.message(), str("GPU memory: ", plan.kv_bytes + plan.workspace_bytes,
                                            " bytes needed beside the weights (KV cache ", plan.kv_bytes,
                                            " for one request of 2048 positions")));
        CHECK(contains(error.message(), str(small->device().available_bytes(), " available")));
    }
    const Engine shorter(tight, 1, 64);
    // Where no context was asked for, the pool is what fits, and says what it holds when a request is longer.
    // An engine may take .9 of a card; the weights take the same on each.
    const auto weights = static_cast<double>(kLarge) * 0.9 - static_cast<double>(plan.available_bytes);
    const auto left = static_cast<double>(plan.workspace_bytes + plan.kv_bytes / 2);
    const auto half = open(static_cast<uint64_t>((weights + left) / 0.9));
    const Model halved(half->device(), repo_path("weights_tools/refrag-nano"));
    const MemoryPlan fitting = plan_memory(halved, 1, 2048);
    CHECK_FALSE(fitting.fits());
    CHECK(fitting.kv_bytes + fitting.workspace_bytes <= fitting.available_bytes);
    CHECK(fitting.kv_blocks >= 1);
    CHECK(fitting.kv_blocks < 64);
    Engine pooled(halved, 1);
    CHECK(pooled.kv_bytes() == fitting.kv_bytes);
    Request request;
    request.segments = {TokenSegment{std::vector<int32_t>(40, 5)}};
    request.options.max_new_tokens = 2000;
    pooled.submit(std::move(request));
    while (!pooled.idle()) pooled.step();
    const std::vector<Result> results = pooled.take_finished();
    REQUIRE(results.size() == 1);
    REQUIRE(results[0].error);
    CHECK(contains(results[0].error->message(), str("the prompt takes 40 decoder positions, which with the "
                                                    "tokens that may follow are more than the ",
                                                    fitting.kv_blocks * 32)));
}
