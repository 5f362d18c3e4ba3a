// What the tests of the C interface share: a model, passages and a session behind handles, and the same in
// C++.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "golden.h"
#include "refrag.h"
#include "refrag/session.h"
#include "support.h"

namespace refrag_test::api {

inline constexpr const char* kTexts[] = {"The old mill stands on a hill above the river.",
                                         "A red lantern hangs over the door."};
inline constexpr std::string_view kQuestion = "Where is the mill?";

struct Failure {
    refrag_error error{sizeof(refrag_error), REFRAG_OK, ""};
    operator refrag_error*() { return &error; }
    std::string message() const { return error.message; }
};

inline refrag_model_options on_cpu() {
    refrag_model_options options;
    refrag_model_options_init(&options, sizeof options);
    options.device = "cpu";
    options.n_threads = 2;
    return options;
}
inline refrag_generate_options new_tokens(int32_t n) {
    refrag_generate_options options;
    refrag_generate_options_init(&options, sizeof options);
    options.max_new_tokens = n;
    options.ignore_eos = 1;
    return options;
}
// A struct to be filled in.
template <typename Info>
Info sized() {
    Info info{};
    info.struct_size = sizeof info;
    return info;
}
inline std::vector<int32_t> ids_of_answer(const refrag_answer* answer) {
    size_t n = 0;
    const int32_t* first = refrag_answer_ids(answer, &n);
    return n == 0 ? std::vector<int32_t>() : std::vector<int32_t>(first, first + n);
}

// A model, its passages and a session.
struct Fixture {
    refrag_model* model = nullptr;
    refrag_session* session = nullptr;
    std::vector<refrag_passage*> passages;
    Failure error;
    Fixture() {
        const refrag_model_options options = on_cpu();
        REQUIRE(refrag_model_load(tiny_refrag_path().c_str(), &options, &model, error) == REFRAG_OK);
        REQUIRE(refrag_session_new(model, nullptr, &session, error) == REFRAG_OK);
        for (const char* text : kTexts) {
            passages.push_back(nullptr);
            REQUIRE(refrag_passage_new(model, text, std::strlen(text), 4, &passages.back(), error) ==
                    REFRAG_OK);
        }
    }
    Fixture(const Fixture&) = delete;
    Fixture& operator=(const Fixture&) = delete;
    ~Fixture() {
        for (refrag_passage* passage : passages) refrag_passage_free(passage);
        refrag_session_free(session);
        refrag_model_free(model);
    }
    refrag_request* request() {
        refrag_request* out = nullptr;
        REQUIRE(refrag_request_new(model, &out, error) == REFRAG_OK);
        return out;
    }
    // The answer's ids.
    std::vector<int32_t> ids(refrag_session* with, const refrag_request* asked,
                             const refrag_generate_options& options) {
        refrag_answer* answer = nullptr;
        Failure own;
        const refrag_status status = refrag_session_generate(with, asked, &options, &answer, own);
        CAPTURE(own.message());
        REQUIRE(status == REFRAG_OK);
        std::vector<int32_t> out = ids_of_answer(answer);
        refrag_answer_free(answer);
        return out;
    }
    // The template's prompt.
    void add_prompt(refrag_request* to) {
        const refrag_text question{kQuestion.data(), kQuestion.size()};
        REQUIRE(refrag_request_add_prompt(to, passages.data(), passages.size(), nullptr, 0, &question,
                                          error) == REFRAG_OK);
    }
};

// The same in C++.
struct Plain : TinyRefrag {
    refrag::AnswerOptions options;
    Plain() {
        options.max_new_tokens = 6;
        options.ignore_eos = true;
        options.chunk_len = 4;
    }
};

}  // namespace refrag_test::api
