// What the tests of the engine share: requests that fill a tiny model's engine, and running them to their
// end.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include <doctest/doctest.h>

#include "golden.h"
#include "refrag/engine.h"

namespace refrag_test {

// A prompt of ids first, first + 1, ... (whatever they spell).
inline refrag::Request token_request(int32_t n, int32_t n_new, int32_t first = 3) {
    refrag::Request request;
    refrag::TokenSegment segment;
    for (int32_t i = 0; i < n; ++i) segment.ids.push_back(first + i % 200);
    request.segments.emplace_back(std::move(segment));
    request.options.max_new_tokens = n_new;
    request.options.ignore_eos = true;
    return request;
}

// Distinct passages of several chunks each, all compressed.
inline refrag::Request compressed_request(const refrag::Model& model, int n_passages, int32_t n_new) {
    refrag::Request request;
    for (int i = 0; i < n_passages; ++i) {
        std::string text = refrag::str("Passage ", i, ":");
        for (int word = 0; word < 20; ++word) text += refrag::str(" w", i * 31 + word);
        request.segments.emplace_back(
            refrag::PassageSegment{std::make_shared<refrag::SharedPassage>(model, text)});
    }
    request.segments.emplace_back(refrag::TextSegment{"And so?"});
    request.options.max_new_tokens = n_new;
    request.options.ignore_eos = true;
    request.options.policy = refrag::SelectPolicy::none;
    return request;
}

using Results = std::map<uint64_t, refrag::Result>;

inline Results run_all(refrag::Engine& engine) {
    Results results;
    for (int step = 0; !engine.idle(); ++step) {
        REQUIRE(step < 5000);
        engine.step();
        for (refrag::Result& result : engine.take_finished()) results[result.id] = std::move(result);
    }
    for (refrag::Result& result : engine.take_finished()) results[result.id] = std::move(result);
    return results;
}

// What must not differ by a bit.
inline void check_same_answer(const refrag::Answer& a, const refrag::Answer& b) {
    CHECK(a.ids == b.ids);
    CHECK(a.text == b.text);
    CHECK(a.logprobs == b.logprobs);
    CHECK(a.scores == b.scores);
    CHECK(a.finish == b.finish);
}

}  // namespace refrag_test
