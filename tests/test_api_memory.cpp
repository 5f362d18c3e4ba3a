// The C interface and memory: a step that generates allocates nothing, and memory that runs out anywhere is a
// status, after which the same call works.
#include <doctest/doctest.h>

#include <array>

#include "api_test.h"
#include "failing.h"

using namespace refrag;
using namespace refrag_test;
using namespace refrag_test::api;

namespace {

// Allocations asked for when keep_on was called, and whether the first text had come.
struct Steps {
    const FailingMemory* memory = nullptr;
    std::array<int64_t, 256> asked{};
    size_t n = 0;
    size_t n_at_first_text = 0;
};
int note_step(void* user) {
    Steps& steps = *static_cast<Steps*>(user);
    if (steps.n < steps.asked.size()) steps.asked[steps.n++] = steps.memory->asked();
    return 1;
}
int note_text(void* user, const char*, size_t) {
    Steps& steps = *static_cast<Steps*>(user);
    if (steps.n_at_first_text == 0) steps.n_at_first_text = steps.n;
    return 1;
}

// Every call of the interface that allocates, one after another. A call that memory fails is made again.
struct Story {
    refrag_status wrong = REFRAG_OK;  // what it was that neither worked nor said so
    int n_failed = 0;                 // calls that memory failed
    std::vector<int32_t> ids;

    template <typename Call>
    bool made(FailingMemory& memory, Call&& call) {
        if (wrong != REFRAG_OK) return false;
        refrag_error error{sizeof(refrag_error), REFRAG_OK, ""};
        refrag_status status = call(&error);
        if (status == REFRAG_OUT_OF_MEMORY && std::strstr(error.message, "memory") != nullptr) {
            ++n_failed;
            memory.disarm();
            status = call(&error);
        }
        wrong = status;
        return status == REFRAG_OK;
    }

    void tell(refrag_model* model, FailingMemory& memory) {
        std::array<refrag_passage*, 2> passages{};
        refrag_passage* again = nullptr;
        refrag_passage* shared = nullptr;
        refrag_session* session = nullptr;
        refrag_request* request = nullptr;
        refrag_answer* answer = nullptr;
        std::array<int32_t, 64> tokens{};
        std::array<char, 256> text{};
        std::array<char, 8192> record{};
        std::array<float, 1024> values{};
        size_t n_tokens = 0, n = 0, n_record = 0;
        const size_t n_bytes = std::strlen(kTexts[0]);
        const refrag_text question{kQuestion.data(), kQuestion.size()};
        const refrag_text history[2] = {{"Where?", 6}, {"There.", 6}};
        const char* stops[] = {"a stop text that is too long to lie within a string"};
        refrag_generate_options how = new_tokens(4);
        how.stop = stops;
        how.n_stop = 1;
        how.text = [](void*, const char*, size_t) { return 1; };
        how.keep_on = [](void*) { return 1; };
        const auto m = [&](auto&& call) { return made(memory, call); };
        const auto told = [&] {
            return m([&](refrag_error* e) {
                       return refrag_tokenize(model, kTexts[0], n_bytes, 0, tokens.data(), tokens.size(),
                                              &n_tokens, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_detokenize(model, tokens.data(), n_tokens, text.data(), text.size(), &n,
                                                e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_passage_new(model, kTexts[0], n_bytes, 4, &passages[0], e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_passage_new(model, kTexts[1], std::strlen(kTexts[1]), 4, &passages[1],
                                                 e);
                   }) &&
                   m([&](refrag_error* e) { return refrag_passage_n_chunks(passages[0], &n, e); }) &&
                   m([&](refrag_error* e) { return refrag_session_new(model, nullptr, &session, e); }) &&
                   m([&](refrag_error* e) {
                       return refrag_session_encode(session, passages.data(), 1, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_passage_save(session, passages[0], record.data(), record.size(),
                                                  &n_record, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_session_embeddings(session, passages[0], values.data(), values.size(),
                                                        &n, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_passage_load(model, kTexts[0], n_bytes, record.data(), n_record, &again,
                                                  e);
                   }) &&
                   m([&](refrag_error* e) { return refrag_passage_share(again, &shared, e); }) &&
                   m([&](refrag_error* e) { return refrag_request_new(model, &request, e); }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_tokens(request, tokens.data(), n_tokens, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_text(request, kTexts[0], n_bytes, 1, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_passage(request, shared, nullptr, 0, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_chunk_embeddings(request, values.data(), 1, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_vectors(request, values.data(), 1, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_request_add_prompt(request, passages.data(), passages.size(), history, 1,
                                                        &question, e);
                   }) &&
                   m([&](refrag_error* e) {
                       return refrag_session_generate(session, request, &how, &answer, e);
                   });
        }();
        memory.disarm();
        if (told) ids = ids_of_answer(answer);
        refrag_answer_free(answer);
        refrag_request_free(request);
        refrag_session_free(session);
        refrag_passage_free(shared);
        refrag_passage_free(again);
        for (refrag_passage* passage : passages) refrag_passage_free(passage);
    }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture,
                  "api memory: a step that generates allocates nothing, callbacks and text included") {
    refrag_request* asked = request();
    add_prompt(asked);
    refrag_session_options options;
    refrag_session_options_init(&options, sizeof options);
    // What is kept of prompts and answers for later ones has an index, an entry for every 32 positions.
    for (const bool prefix_cache : {false, true}) {
        CAPTURE(prefix_cache);
        options.prefix_cache = prefix_cache ? 1 : 0;
        refrag_session* own = nullptr;
        REQUIRE(refrag_session_new(model, &options, &own, error) == REFRAG_OK);
        Steps steps;
        refrag_generate_options how = new_tokens(100);
        how.temperature = 0.8f;
        how.top_k = 40;
        how.top_p = 0.95f;
        how.user = &steps;
        how.keep_on = note_step;
        how.text = note_text;
        const FailingMemory counting(0);
        steps.memory = &counting;
        refrag_answer* answer = nullptr;
        REQUIRE(refrag_session_generate(own, asked, &how, &answer, error) == REFRAG_OK);
        refrag_answer_free(answer);
        refrag_session_free(own);
        // The first text comes within the step that reads the prompt's end, the 100th token ends the answer.
        REQUIRE(steps.n_at_first_text > 0);
        REQUIRE(steps.n >= steps.n_at_first_text + 90);
        size_t n_allocating = 0;
        for (size_t i = steps.n_at_first_text + 1; i < steps.n; ++i)
            n_allocating += steps.asked[i] != steps.asked[i - 1] ? 1 : 0;
        if (prefix_cache)
            CHECK(n_allocating <= 4);
        else
            CHECK(n_allocating == 0);
        CHECK(counting.asked() > 0);
    }
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture,
                  "api memory: what runs out in any call is a status, and the call made again works") {
    std::vector<int32_t> expected;
    int64_t n_all = 0;
    {
        FailingMemory counting(0);
        Story story;
        story.tell(model, counting);
        REQUIRE(story.wrong == REFRAG_OK);
        expected = story.ids;
        n_all = counting.asked();
    }
    REQUIRE(expected.size() == 4);
    CHECK(n_all > 300);
    int n_done_without = 0;
    for (int64_t n = 1; n <= n_all; ++n) {
        CAPTURE(n);
        const int64_t live = live_allocations();
        {
            FailingMemory memory(n);
            Story story;
            story.tell(model, memory);
            REQUIRE(story.wrong == REFRAG_OK);
            REQUIRE(story.ids == expected);
            REQUIRE(story.n_failed <= 1);
            if (memory.failed() && story.n_failed == 0) ++n_done_without;
        }
        REQUIRE(live_allocations() == live);
    }
    // Two things do without: keeping a prompt's beginning for others, and a pass of the decoder, which is
    // done once more after a failure.
    CHECK(n_done_without < n_all / 10);
}

TEST_CASE("api memory: a model that cannot be loaded for want of memory") {
    const refrag_model_options options = on_cpu();
    const std::string path = tiny_refrag_path();
    bool done = false;
    for (int64_t n = 1; !done; n += n < 100 ? 1 : 37) {
        CAPTURE(n);
        const int64_t live = live_allocations();
        FailingMemory memory(n);
        refrag_error error{sizeof(refrag_error), REFRAG_OK, ""};
        refrag_model* model = nullptr;
        const refrag_status status = refrag_model_load(path.c_str(), &options, &model, &error);
        memory.disarm();
        done = memory.asked() < n;
        REQUIRE(status == (memory.failed() ? REFRAG_OUT_OF_MEMORY : REFRAG_OK));
        REQUIRE((model == nullptr) == (status != REFRAG_OK));
        REQUIRE(error.status == status);
        refrag_model_free(model);
        if (n > 3) REQUIRE(live_allocations() == live);
    }
}
