// The C interface: the same answers as the library's own, and what it promises of errors, callbacks, sizes
// and threads. What is built and installed: test_api_library.cpp; memory: test_api_memory.cpp.
#include <doctest/doctest.h>

#include <array>
#include <csignal>
#include <cstddef>
#include <functional>
#include <locale>
#include <thread>

#include "api_test.h"
#include "refrag/passage_cache.h"

using namespace refrag;
using namespace refrag_test;
using namespace refrag_test::api;

TEST_CASE("api: versions and names") {
    CHECK(refrag_abi_matches(REFRAG_ABI_VERSION) == 1);
    CHECK(refrag_abi_matches(REFRAG_ABI_VERSION + 1) == 0);
    CHECK(std::string(refrag_version()) ==
          read_file("VERSION", 100).substr(0, std::strlen(refrag_version())));
    CHECK(std::string(refrag_status_name(REFRAG_BAD_INPUT)) == "bad input");
}

TEST_CASE_FIXTURE(Fixture, "api: answers are the library's own") {
    refrag_request* asked = request();
    add_prompt(asked);
    Plain plain;
    Session own(plain.model);
    const std::vector<Passage> texts = {{"", "", kTexts[0]}, {"", "", kTexts[1]}};
    const Answer expected = own.answer(texts, kQuestion, plain.options);
    refrag_answer* answer = nullptr;
    const refrag_generate_options how = new_tokens(6);
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    size_t n = 0;
    CHECK(std::string(refrag_answer_text(answer, &n)) == expected.text);
    CHECK(n == expected.text.size());
    const int32_t* first = refrag_answer_ids(answer, &n);
    CHECK(std::vector<int32_t>(first, first + n) == expected.ids);
    auto info = sized<refrag_answer_info>();
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.finish == REFRAG_FINISH_LENGTH);
    CHECK(info.n_chunks == expected.chunks.size());
    CHECK(info.n_expanded == expected.n_expanded);
    CHECK(info.n_positions == expected.positions);
    CHECK(info.n_plain_tokens == expected.plain_tokens);
    CHECK(info.n_new_tokens == 6);
    for (size_t i = 0; i < info.n_chunks; ++i) {
        auto chunk = sized<refrag_chunk_info>();
        REQUIRE(refrag_answer_chunk(answer, i, &chunk, error) == REFRAG_OK);
        CHECK(chunk.begin == expected.chunks[i].begin);
        CHECK(chunk.end == expected.chunks[i].end);
        CHECK((chunk.expanded != 0) == expected.chunks[i].expanded);
        CHECK((chunk.has_logit != 0) == expected.chunks[i].logit.has_value());
        CHECK(chunk.position == expected.chunks[i].position);
    }
    auto chunk = sized<refrag_chunk_info>();
    CHECK(refrag_answer_chunk(answer, info.n_chunks, &chunk, error) == REFRAG_USAGE);
    refrag_answer_free(answer);
    // Asked again the passages are there, and the answer is the same.
    CHECK(refrag_passage_is_encoded(passages[0]) == 1);
    CHECK(ids(session, asked, how) == expected.ids);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: segments of every kind, interleaved, are those of the engine") {
    auto info = sized<refrag_model_info>();
    REQUIRE(refrag_model_get_info(model, &info, error) == REFRAG_OK);
    Plain plain;
    CHECK(info.dim == plain.model.decoder().config().dim);
    CHECK(info.d_enc == plain.model.d_enc());
    CHECK(info.vocab_size == plain.model.decoder().config().vocab_size);
    std::vector<float> embeddings(static_cast<size_t>(2 * info.d_enc));
    std::vector<float> vectors(static_cast<size_t>(info.dim));
    for (size_t i = 0; i < embeddings.size(); ++i) embeddings[i] = 0.01f * static_cast<float>(i % 17);
    for (size_t i = 0; i < vectors.size(); ++i) vectors[i] = 0.02f * static_cast<float>(i % 13);
    const std::vector<int32_t> tokens = {5, 6, 7};
    size_t n_chunks = 0;
    REQUIRE(refrag_passage_n_chunks(passages[0], &n_chunks, error) == REFRAG_OK);
    std::vector<uint8_t> choice(n_chunks);
    choice[1] = 1;
    refrag_request* asked = request();
    CHECK(refrag_request_add_tokens(asked, tokens.data(), tokens.size(), error) == REFRAG_OK);
    CHECK(refrag_request_add_passage(asked, passages[0], choice.data(), choice.size(), error) == REFRAG_OK);
    CHECK(refrag_request_add_chunk_embeddings(asked, embeddings.data(), 2, error) == REFRAG_OK);
    CHECK(refrag_request_add_text(asked, "and", 3, 0, error) == REFRAG_OK);
    CHECK(refrag_request_add_vectors(asked, vectors.data(), 1, error) == REFRAG_OK);
    CHECK(refrag_request_add_passage(asked, passages[1], nullptr, 0, error) == REFRAG_OK);
    CHECK(refrag_request_add_question(asked, kQuestion.data(), kQuestion.size(), error) == REFRAG_OK);
    std::vector<Segment> segments;
    PassageCache cache;
    segments.push_back(TokenSegment{tokens});
    segments.push_back(PassageSegment{cache.share(plain.model, kTexts[0], 4),
                                      std::vector<bool>(choice.begin(), choice.end())});
    segments.push_back(ChunkEmbSegment{embeddings});
    segments.push_back(TextSegment{"and"});
    segments.push_back(VectorSegment{vectors});
    segments.push_back(PassageSegment{cache.share(plain.model, kTexts[1], 4)});
    segments.push_back(QuestionSegment{std::string(kQuestion)});
    Session own(plain.model);
    CHECK(ids(session, asked, new_tokens(6)) == own.answer(segments, plain.options).ids);
    // A choice for too few chunks, ids that are none: refused, and the request is as it was.
    CHECK(refrag_request_add_passage(asked, passages[0], choice.data(), 1, error) == REFRAG_USAGE);
    CHECK(contains(error.message(), str("one for each of ", n_chunks, " chunks, found 1")));
    const int32_t wrong[] = {1, -1};
    CHECK(refrag_request_add_tokens(asked, wrong, 2, error) == REFRAG_USAGE);
    CHECK(ids(session, asked, new_tokens(6)) == own.answer(segments, plain.options).ids);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture,
                  "api: passages are kept as bytes and come back; torn and foreign ones are refused") {
    CHECK(refrag_passage_is_encoded(passages[0]) == 0);
    size_t n = 0;
    CHECK(refrag_passage_save(session, passages[0], nullptr, 0, &n, error) == REFRAG_USAGE);
    REQUIRE(refrag_session_encode(session, passages.data(), passages.size(), error) == REFRAG_OK);
    CHECK(refrag_passage_is_encoded(passages[0]) == 1);
    REQUIRE(refrag_passage_save(session, passages[0], nullptr, 0, &n, error) == REFRAG_OK);
    std::string record(n, '\0');
    REQUIRE(refrag_passage_save(session, passages[0], record.data(), record.size(), &n, error) == REFRAG_OK);
    refrag_passage* again = nullptr;
    const size_t bytes = std::strlen(kTexts[0]);
    REQUIRE(refrag_passage_load(model, kTexts[0], bytes, record.data(), record.size(), &again, error) ==
            REFRAG_OK);
    const auto values = [&](const refrag_passage* of) {
        size_t n_values = 0;
        REQUIRE(refrag_session_embeddings(session, of, nullptr, 0, &n_values, error) == REFRAG_OK);
        std::vector<float> out(n_values);
        REQUIRE(refrag_session_embeddings(session, of, out.data(), out.size(), &n_values, error) ==
                REFRAG_OK);
        return out;
    };
    CHECK(values(again) == values(passages[0]));
    size_t begin = 1, end = 0, n_tokens = 0;
    CHECK(refrag_passage_chunk(again, 0, &begin, &end, &n_tokens, error) == REFRAG_OK);
    CHECK(begin == 0);
    CHECK(n_tokens == 4);
    CHECK(refrag_passage_chunk(again, 1000, &begin, &end, &n_tokens, error) == REFRAG_USAGE);
    refrag_passage* shared = nullptr;
    REQUIRE(refrag_passage_share(again, &shared, error) == REFRAG_OK);
    refrag_passage_free(again);
    CHECK(values(shared) == values(passages[0]));
    refrag_passage_free(shared);
    refrag_passage* untouched = passages[1];
    for (size_t cut = 0; cut < record.size(); cut += 7)
        CHECK(refrag_passage_load(model, kTexts[0], bytes, record.data(), cut, &untouched, error) ==
              REFRAG_BAD_INPUT);
    record[record.size() / 2] ^= 1;
    CHECK(refrag_passage_load(model, kTexts[0], bytes, record.data(), record.size(), &untouched, error) ==
          REFRAG_BAD_INPUT);
    record[record.size() / 2] ^= 1;
    CHECK(refrag_passage_load(model, kTexts[1], std::strlen(kTexts[1]), record.data(), record.size(),
                              &untouched, error) == REFRAG_BAD_INPUT);
    CHECK(untouched == passages[1]);
}

TEST_CASE_FIXTURE(Fixture, "api: callbacks stop loading, prompts and answers") {
    refrag_request* asked = request();
    add_prompt(asked);
    std::string text;
    refrag_generate_options how = new_tokens(20);
    how.user = &text;
    how.text = [](void* user, const char* more, size_t n) {
        static_cast<std::string*>(user)->append(more, n);
        return 1;
    };
    refrag_answer* answer = nullptr;
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    CHECK(text == refrag_answer_text(answer, nullptr));
    refrag_answer_free(answer);
    how.text = [](void*, const char*, size_t) { return 0; };
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    auto info = sized<refrag_answer_info>();
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.finish == REFRAG_FINISH_CANCELLED);
    CHECK(info.n_new_tokens < 20);
    refrag_answer_free(answer);
    refrag_answer* none = nullptr;
    how = new_tokens(20);
    how.keep_on = [](void*) { return 0; };
    CHECK(refrag_session_generate(session, asked, &how, &none, error) == REFRAG_CANCELLED);
    CHECK(none == nullptr);
    CHECK(error.message() == "stopped by a callback");
    CHECK(ids(session, asked, new_tokens(6)).size() == 6);  // the session goes on
    refrag_request_free(asked);

    refrag_model_options loading;
    refrag_model_options_init(&loading, sizeof loading);
    loading.device = "cpu";
    loading.progress = [](void*, uint64_t, uint64_t) { return 0; };
    refrag_model* other = nullptr;
    CHECK(refrag_model_load(tiny_refrag_path().c_str(), &loading, &other, error) == REFRAG_CANCELLED);
    CHECK(other == nullptr);
    std::vector<std::string> lines;
    loading.progress = nullptr;
    loading.user = &lines;
    loading.log = [](void* user, refrag_log_level, const char* line) {
        static_cast<std::vector<std::string>*>(user)->emplace_back(line);
    };
    REQUIRE(refrag_model_load(tiny_refrag_path().c_str(), &loading, &other, error) == REFRAG_OK);
    REQUIRE(lines.size() == 1);
    CHECK(contains(lines[0], "device cpu"));
    refrag_model_free(other);
}

TEST_CASE_FIXTURE(Fixture, "api: whatever makes no sense is one line and a status, and nothing has changed") {
    refrag_model* none = nullptr;
    CHECK(refrag_model_load("nowhere", nullptr, &none, error) == REFRAG_BAD_INPUT);
    CHECK(contains(error.message(), "nowhere: expected a model directory or a GGUF file"));
    CHECK(refrag_model_load(nullptr, nullptr, &none, error) == REFRAG_USAGE);
    CHECK(error.message() == "path: expected an address, found NULL");
    CHECK(refrag_model_load("x", nullptr, nullptr, error) == REFRAG_USAGE);
    refrag_model_options loading;
    refrag_model_options_init(&loading, sizeof loading);
    loading.device = "tpu";
    CHECK(refrag_model_load(tiny_refrag_path().c_str(), &loading, &none, error) == REFRAG_USAGE);
    refrag_model_options_init(&loading, sizeof loading);
    loading.struct_size = 0;
    CHECK(refrag_model_load(tiny_refrag_path().c_str(), &loading, &none, error) == REFRAG_USAGE);
    CHECK(contains(error.message(), "struct_size"));
    CHECK(none == nullptr);
    // No error wanted; one that has room for few characters.
    CHECK(refrag_model_load(nullptr, nullptr, &none, nullptr) == REFRAG_USAGE);
    Failure small;
    small.error.struct_size = offsetof(refrag_error, message) + 6;
    std::memset(small.error.message, 'x', 12);
    CHECK(refrag_model_load(nullptr, nullptr, &none, small) == REFRAG_USAGE);
    CHECK(std::string(small.error.message) == "path:");
    CHECK(small.error.message[6] == 'x');

    refrag_request* asked = request();
    refrag_answer* answer = nullptr;
    refrag_generate_options how = new_tokens(6);
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);  // an empty prompt
    add_prompt(asked);
    how.temperature = -1.0f;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = new_tokens(6);
    how.policy = "best";
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = new_tokens(6);
    how.expand_fraction = 1.5;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = new_tokens(6);
    how.deadline_ms = -1;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    CHECK(answer == nullptr);
    CHECK(ids(session, asked, new_tokens(6)).size() == 6);
    refrag_session_options wide;
    refrag_session_options_init(&wide, sizeof wide);
    wide.max_context = 1 << 30;
    refrag_session* no_session = nullptr;
    CHECK(refrag_session_new(model, &wide, &no_session, error) == REFRAG_USAGE);
    // Handles of two models do not mix.
    const refrag_model_options cpu_options = on_cpu();
    REQUIRE(refrag_model_load(tiny_refrag_path().c_str(), &cpu_options, &none, error) == REFRAG_OK);
    refrag_request* foreign = nullptr;
    REQUIRE(refrag_request_new(none, &foreign, error) == REFRAG_OK);
    CHECK(refrag_request_add_passage(foreign, passages[0], nullptr, 0, error) == REFRAG_USAGE);
    CHECK(refrag_session_generate(session, foreign, nullptr, &answer, error) == REFRAG_USAGE);
    refrag_request_free(foreign);
    refrag_model_free(none);
    refrag_request_free(asked);
    refrag_model_free(nullptr);
    refrag_answer_free(nullptr);
}

TEST_CASE_FIXTURE(Fixture, "api: ids and texts, with as much room as there is") {
    size_t n = 0;
    const std::string text = "A red lantern.";
    REQUIRE(refrag_tokenize(model, text.data(), text.size(), 0, nullptr, 0, &n, error) == REFRAG_OK);
    std::vector<int32_t> all(n, -1);
    REQUIRE(refrag_tokenize(model, text.data(), text.size(), 0, all.data(), all.size(), &n, error) ==
            REFRAG_OK);
    std::vector<int32_t> some(n, -1);
    REQUIRE(refrag_tokenize(model, text.data(), text.size(), 0, some.data(), 2, &n, error) == REFRAG_OK);
    CHECK(n == all.size());
    CHECK(some[1] == all[1]);
    CHECK(some[2] == -1);
    std::string back(text.size() + 9, '.');
    REQUIRE(refrag_detokenize(model, all.data(), all.size(), back.data(), back.size(), &n, error) ==
            REFRAG_OK);
    CHECK(back.substr(0, n) == text);
    const int32_t beyond = 1 << 30;
    CHECK(refrag_detokenize(model, &beyond, 1, back.data(), back.size(), &n, error) == REFRAG_USAGE);
    CHECK(refrag_tokenize(model, nullptr, 3, 0, nullptr, 0, &n, error) == REFRAG_USAGE);
    CHECK(refrag_tokenize(model, nullptr, 0, 0, nullptr, 0, &n, error) == REFRAG_OK);
    CHECK(n == 0);
}

TEST_CASE_FIXTURE(Fixture, "api: sessions on several threads over one model; what was freed early is kept") {
    refrag_request* asked = request();
    add_prompt(asked);
    const std::vector<int32_t> expected = ids(session, asked, new_tokens(6));
    refrag_request_free(asked);
    // The same passages anew: neither cut nor encoded, so that the threads meet there too.
    for (size_t i = 0; i < passages.size(); ++i) {
        refrag_passage_free(passages[i]);
        passages[i] = nullptr;
        REQUIRE(refrag_passage_new(model, kTexts[i], std::strlen(kTexts[i]), 4, &passages[i], error) ==
                REFRAG_OK);
    }
    asked = request();
    add_prompt(asked);
    std::vector<std::vector<int32_t>> found(4);
    {
        std::vector<std::thread> threads;
        for (std::vector<int32_t>& one : found)
            threads.emplace_back([&] {
                refrag_session* own = nullptr;
                if (refrag_session_new(model, nullptr, &own, nullptr) != REFRAG_OK) return;
                const refrag_generate_options how = new_tokens(6);
                for (int round = 0; round < 3; ++round) {
                    size_t n = 0;
                    std::array<int32_t, 64> tokens{};
                    refrag_passage* shared = nullptr;
                    refrag_answer* answer = nullptr;
                    if (refrag_passage_share(passages[0], &shared, nullptr) != REFRAG_OK ||
                        refrag_passage_n_chunks(shared, &n, nullptr) != REFRAG_OK ||
                        refrag_tokenize(model, kTexts[0], std::strlen(kTexts[0]), 0, tokens.data(),
                                        tokens.size(), &n, nullptr) != REFRAG_OK ||
                        refrag_session_generate(own, asked, &how, &answer, nullptr) != REFRAG_OK)
                        break;
                    refrag_passage_free(shared);
                    one = ids_of_answer(answer);
                    refrag_answer_free(answer);
                }
                refrag_session_free(own);
            });
        for (std::thread& thread : threads) thread.join();
    }
    for (const std::vector<int32_t>& one : found) CHECK(one == expected);
    refrag_model_free(model);
    model = nullptr;
    for (refrag_passage*& passage : passages) {
        refrag_passage_free(passage);
        passage = nullptr;
    }
    CHECK(ids(session, asked, new_tokens(6)) == expected);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: earlier turns stand in the prompt as the library puts them") {
    const std::vector<Turn> turns = {{.question = "What hangs there?", .answer = "A lantern."},
                                     {.question = "Of what colour?", .answer = "Red."}};
    std::vector<refrag_text> history;
    for (const Turn& turn : turns) {
        history.push_back({turn.question.data(), turn.question.size()});
        history.push_back({turn.answer.data(), turn.answer.size()});
    }
    Plain plain;
    Session own(plain.model);
    const std::vector<Passage> texts = {{"", "", kTexts[0]}, {"", "", kTexts[1]}};
    refrag_request* asked = request();
    const refrag_text question{kQuestion.data(), kQuestion.size()};
    REQUIRE(refrag_request_add_prompt(asked, passages.data(), passages.size(), history.data(), turns.size(),
                                      &question, error) == REFRAG_OK);
    refrag_answer* answer = nullptr;
    const refrag_generate_options how = new_tokens(6);
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    const Answer expected = own.answer(texts, kQuestion, plain.options, {}, turns);
    CHECK(ids_of_answer(answer) == expected.ids);
    auto info = sized<refrag_answer_info>();
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.n_positions == expected.positions);
    refrag_answer_free(answer);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: a deadline ends an answer as far as it came") {
    refrag_request* asked = request();
    add_prompt(asked);
    refrag_generate_options how = new_tokens(400);
    how.deadline_ms = 60;
    how.text = [](void*, const char*, size_t) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        return 1;
    };
    refrag_answer* answer = nullptr;
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    auto info = sized<refrag_answer_info>();
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.finish == REFRAG_FINISH_DEADLINE);
    CHECK(info.n_new_tokens < 400);
    refrag_answer_free(answer);
    // One beyond what the clock can tell is none.
    how = new_tokens(6);
    how.deadline_ms = INT64_MAX;
    CHECK(ids(session, asked, how) == ids(session, asked, new_tokens(6)));
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: programs of other versions, whose structs are shorter or longer") {
    refrag_request* asked = request();
    add_prompt(asked);
    const std::vector<int32_t> expected = ids(session, asked, new_tokens(6));
    refrag_answer* answer = nullptr;

    SUBCASE("an older one: what it does not know has its default, and is not touched") {
        struct Older {  // the fields up to `policy`
            alignas(refrag_generate_options) unsigned char bytes[sizeof(refrag_generate_options)];
        } memory;
        std::memset(memory.bytes, 0xA5, sizeof memory.bytes);
        const size_t size = offsetof(refrag_generate_options, policy);
        auto* how = reinterpret_cast<refrag_generate_options*>(memory.bytes);
        refrag_generate_options_init(how, size);
        CHECK(how->struct_size == size);
        CHECK(how->max_new_tokens == 256);
        for (size_t i = size; i < sizeof memory.bytes; ++i) REQUIRE(memory.bytes[i] == 0xA5);
        how->max_new_tokens = 6;
        REQUIRE(refrag_session_generate(session, asked, how, &answer, error) == REFRAG_OK);
        refrag_generate_options whole;
        refrag_generate_options_init(&whole, sizeof whole);
        whole.max_new_tokens = 6;
        CHECK(ids_of_answer(answer) == ids(session, asked, whole));
        // The same of what is filled in.
        std::memset(memory.bytes, 0xA5, sizeof memory.bytes);
        auto* info = reinterpret_cast<refrag_answer_info*>(memory.bytes);
        info->struct_size = offsetof(refrag_answer_info, n_expanded);
        REQUIRE(refrag_answer_get_info(answer, info, error) == REFRAG_OK);
        CHECK(info->n_chunks > 0);
        for (size_t i = info->struct_size; i < sizeof memory.bytes; ++i) REQUIRE(memory.bytes[i] == 0xA5);
        refrag_answer_free(answer);
        // A session and a model with the first option alone.
        auto* context = reinterpret_cast<refrag_session_options*>(memory.bytes);
        refrag_session_options_init(context, offsetof(refrag_session_options, prefix_cache));
        context->max_context = 128;
        refrag_session* small = nullptr;
        REQUIRE(refrag_session_new(model, context, &small, error) == REFRAG_OK);
        CHECK(ids(small, asked, new_tokens(6)) == expected);
        refrag_session_free(small);
        auto* loading = reinterpret_cast<refrag_model_options*>(memory.bytes);
        std::memset(memory.bytes, 0xA5, sizeof memory.bytes);
        refrag_model_options_init(loading, offsetof(refrag_model_options, n_threads));
        loading->device = "cpu";
        refrag_model* again = nullptr;
        REQUIRE(refrag_model_load(tiny_refrag_path().c_str(), loading, &again, error) == REFRAG_OK);
        refrag_model_free(again);
    }
    SUBCASE("a newer one: what is unknown here must not be set, and is 0 where it is filled in") {
        struct Newer {
            refrag_generate_options known;
            uint64_t beyond;
        } how;
        static_assert(offsetof(Newer, beyond) == sizeof(refrag_generate_options));
        how.beyond = 7;
        refrag_generate_options_init(&how.known, sizeof how);
        CHECK(how.beyond == 0);
        how.known.max_new_tokens = 6;
        how.known.ignore_eos = 1;
        REQUIRE(refrag_session_generate(session, asked, &how.known, &answer, error) == REFRAG_OK);
        CHECK(ids_of_answer(answer) == expected);
        struct NewerInfo {
            refrag_answer_info known;
            uint64_t beyond;
        } info{};
        info.known.struct_size = sizeof info;
        info.beyond = 7;
        REQUIRE(refrag_answer_get_info(answer, &info.known, error) == REFRAG_OK);
        CHECK(info.known.n_new_tokens == 6);
        CHECK(info.beyond == 0);
        refrag_answer_free(answer);
        answer = nullptr;
        how.beyond = 1;
        CHECK(refrag_session_generate(session, asked, &how.known, &answer, error) == REFRAG_USAGE);
        CHECK(error.message() == str("refrag_generate_options: expected the ", sizeof how.known,
                                     " bytes that version ", refrag_version(), " knows, found byte ",
                                     sizeof how.known, " set"));
        CHECK(answer == nullptr);
    }
    SUBCASE("sizes that no version has are refused") {
        for (const size_t size : {size_t{0}, size_t{1}, size_t{8}, size_t{12}, size_t{1} << 30}) {
            CAPTURE(size);
            const std::string found = str(", found ", size);
            refrag_generate_options how = new_tokens(6);
            how.struct_size = size;
            CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
            CHECK(error.message() ==
                  "refrag_generate_options: expected struct_size to be sizeof(refrag_generate_options)" +
                      found);
            refrag_session_options for_session{};
            for_session.struct_size = size;
            refrag_session* other = nullptr;
            CHECK(refrag_session_new(model, &for_session, &other, error) == REFRAG_USAGE);
            CHECK(contains(error.message(), found));
            refrag_model_options loading = on_cpu();
            loading.struct_size = size;
            refrag_model* none = nullptr;
            CHECK(refrag_model_load(tiny_refrag_path().c_str(), &loading, &none, error) == REFRAG_USAGE);
            CHECK(contains(error.message(), found));
            auto info = sized<refrag_model_info>();
            info.struct_size = size;
            CHECK(refrag_model_get_info(model, &info, error) == REFRAG_USAGE);
            CHECK(contains(error.message(), found));
            CHECK(info.struct_size == size);
        }
        // Not even the size has room: nothing is written.
        uint64_t untouched = 7;
        refrag_generate_options_init(reinterpret_cast<refrag_generate_options*>(&untouched), 4);
        CHECK(untouched == 7);
    }
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: NULL in any place is refused by name") {
    refrag_request* asked = request();
    add_prompt(asked);
    REQUIRE(refrag_session_encode(session, passages.data(), passages.size(), error) == REFRAG_OK);
    refrag_answer* answer = nullptr;
    const refrag_generate_options how = new_tokens(1);
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);

    // Where a call succeeds by mistake, this is what it writes.
    refrag_model* a_model = nullptr;
    refrag_passage* a_passage = nullptr;
    refrag_session* a_session = nullptr;
    refrag_request* a_request = nullptr;
    refrag_answer* an_answer = nullptr;
    size_t n = 0;
    const refrag_text question{"?", 1}, no_text{nullptr, 1}, no_turn[2] = {question, no_text};
    refrag_passage* no_passage[1] = {nullptr};
    const int32_t id = 5;
    const float value = 0;
    const uint8_t choice = 0;
    const char byte = 'x';
    auto model_info = sized<refrag_model_info>();
    auto answer_info = sized<refrag_answer_info>();
    auto chunk_info = sized<refrag_chunk_info>();
    refrag_generate_options no_stop = new_tokens(1);
    no_stop.n_stop = 1;
    const char* stops[1] = {nullptr};
    refrag_generate_options null_stop = no_stop;
    null_stop.stop = stops;
    refrag_model_options no_adapters = on_cpu();
    no_adapters.n_adapters = 1;
    refrag_model_options null_adapter = no_adapters;
    null_adapter.adapters = stops;

    const std::vector<std::pair<const char*, std::function<refrag_status()>>> calls = {
        {"path", [&] { return refrag_model_load(nullptr, nullptr, &a_model, error); }},
        {"model", [&] { return refrag_model_load("x", nullptr, nullptr, error); }},
        {"adapters", [&] { return refrag_model_load("x", &no_adapters, &a_model, error); }},
        {"adapters", [&] { return refrag_model_load("x", &null_adapter, &a_model, error); }},
        {"model", [&] { return refrag_model_get_info(nullptr, &model_info, error); }},
        {"refrag_model_info", [&] { return refrag_model_get_info(model, nullptr, error); }},
        {"model", [&] { return refrag_tokenize(nullptr, "x", 1, 0, nullptr, 0, &n, error); }},
        {"text", [&] { return refrag_tokenize(model, nullptr, 1, 0, nullptr, 0, &n, error); }},
        {"ids", [&] { return refrag_tokenize(model, "x", 1, 0, nullptr, 1, &n, error); }},
        {"n_ids", [&] { return refrag_tokenize(model, "x", 1, 0, nullptr, 0, nullptr, error); }},
        {"model", [&] { return refrag_detokenize(nullptr, &id, 1, nullptr, 0, &n, error); }},
        {"ids", [&] { return refrag_detokenize(model, nullptr, 1, nullptr, 0, &n, error); }},
        {"text", [&] { return refrag_detokenize(model, &id, 1, nullptr, 1, &n, error); }},
        {"n_bytes", [&] { return refrag_detokenize(model, &id, 1, nullptr, 0, nullptr, error); }},
        {"model", [&] { return refrag_passage_new(nullptr, "x", 1, 0, &a_passage, error); }},
        {"text", [&] { return refrag_passage_new(model, nullptr, 1, 0, &a_passage, error); }},
        {"passage", [&] { return refrag_passage_new(model, "x", 1, 0, nullptr, error); }},
        {"model", [&] { return refrag_passage_load(nullptr, "x", 1, &byte, 1, &a_passage, error); }},
        {"text", [&] { return refrag_passage_load(model, nullptr, 1, &byte, 1, &a_passage, error); }},
        {"record", [&] { return refrag_passage_load(model, "x", 1, nullptr, 1, &a_passage, error); }},
        {"passage", [&] { return refrag_passage_load(model, "x", 1, &byte, 1, nullptr, error); }},
        {"passage", [&] { return refrag_passage_share(nullptr, &a_passage, error); }},
        {"other", [&] { return refrag_passage_share(passages[0], nullptr, error); }},
        {"passage", [&] { return refrag_passage_n_chunks(nullptr, &n, error); }},
        {"n_chunks", [&] { return refrag_passage_n_chunks(passages[0], nullptr, error); }},
        {"passage", [&] { return refrag_passage_chunk(nullptr, 0, &n, &n, &n, error); }},
        {"model", [&] { return refrag_session_new(nullptr, nullptr, &a_session, error); }},
        {"session", [&] { return refrag_session_new(model, nullptr, nullptr, error); }},
        {"session", [&] { return refrag_session_encode(nullptr, passages.data(), 1, error); }},
        {"passages", [&] { return refrag_session_encode(session, nullptr, 1, error); }},
        {"passages", [&] { return refrag_session_encode(session, no_passage, 1, error); }},
        {"session", [&] { return refrag_session_embeddings(nullptr, passages[0], nullptr, 0, &n, error); }},
        {"passage", [&] { return refrag_session_embeddings(session, nullptr, nullptr, 0, &n, error); }},
        {"values", [&] { return refrag_session_embeddings(session, passages[0], nullptr, 1, &n, error); }},
        {"n_values",
         [&] { return refrag_session_embeddings(session, passages[0], nullptr, 0, nullptr, error); }},
        {"session", [&] { return refrag_passage_save(nullptr, passages[0], nullptr, 0, &n, error); }},
        {"passage", [&] { return refrag_passage_save(session, nullptr, nullptr, 0, &n, error); }},
        {"record", [&] { return refrag_passage_save(session, passages[0], nullptr, 1, &n, error); }},
        {"record_bytes",
         [&] { return refrag_passage_save(session, passages[0], nullptr, 0, nullptr, error); }},
        {"model", [&] { return refrag_request_new(nullptr, &a_request, error); }},
        {"request", [&] { return refrag_request_new(model, nullptr, error); }},
        {"request", [&] { return refrag_request_add_tokens(nullptr, &id, 1, error); }},
        {"ids", [&] { return refrag_request_add_tokens(asked, nullptr, 1, error); }},
        {"request", [&] { return refrag_request_add_text(nullptr, "x", 1, 0, error); }},
        {"text", [&] { return refrag_request_add_text(asked, nullptr, 1, 0, error); }},
        {"request", [&] { return refrag_request_add_question(nullptr, "x", 1, error); }},
        {"text", [&] { return refrag_request_add_question(asked, nullptr, 1, error); }},
        {"request", [&] { return refrag_request_add_passage(nullptr, passages[0], nullptr, 0, error); }},
        {"passage", [&] { return refrag_request_add_passage(asked, nullptr, &choice, 1, error); }},
        {"expanded", [&] { return refrag_request_add_passage(asked, passages[0], nullptr, 1, error); }},
        {"request", [&] { return refrag_request_add_chunk_embeddings(nullptr, &value, 1, error); }},
        {"values", [&] { return refrag_request_add_chunk_embeddings(asked, nullptr, 1, error); }},
        {"request", [&] { return refrag_request_add_vectors(nullptr, &value, 1, error); }},
        {"values", [&] { return refrag_request_add_vectors(asked, nullptr, 1, error); }},
        {"request",
         [&] { return refrag_request_add_prompt(nullptr, nullptr, 0, nullptr, 0, &question, error); }},
        {"passages",
         [&] { return refrag_request_add_prompt(asked, nullptr, 1, nullptr, 0, &question, error); }},
        {"passages",
         [&] { return refrag_request_add_prompt(asked, no_passage, 1, nullptr, 0, &question, error); }},
        {"history",
         [&] { return refrag_request_add_prompt(asked, nullptr, 0, nullptr, 1, &question, error); }},
        {"history",
         [&] { return refrag_request_add_prompt(asked, nullptr, 0, no_turn, 1, &question, error); }},
        {"question",
         [&] { return refrag_request_add_prompt(asked, nullptr, 0, nullptr, 0, nullptr, error); }},
        {"question",
         [&] { return refrag_request_add_prompt(asked, nullptr, 0, nullptr, 0, &no_text, error); }},
        {"session", [&] { return refrag_session_generate(nullptr, asked, nullptr, &an_answer, error); }},
        {"request", [&] { return refrag_session_generate(session, nullptr, nullptr, &an_answer, error); }},
        {"answer", [&] { return refrag_session_generate(session, asked, nullptr, nullptr, error); }},
        {"stop", [&] { return refrag_session_generate(session, asked, &no_stop, &an_answer, error); }},
        {"stop", [&] { return refrag_session_generate(session, asked, &null_stop, &an_answer, error); }},
        {"answer", [&] { return refrag_answer_get_info(nullptr, &answer_info, error); }},
        {"refrag_answer_info", [&] { return refrag_answer_get_info(answer, nullptr, error); }},
        {"answer", [&] { return refrag_answer_chunk(nullptr, 0, &chunk_info, error); }},
        {"refrag_chunk_info", [&] { return refrag_answer_chunk(answer, 0, nullptr, error); }},
    };
    for (size_t i = 0; i < calls.size(); ++i) {
        CAPTURE(i);
        CHECK(calls[i].second() == REFRAG_USAGE);
        CHECK(error.message() == str(calls[i].first, ": expected an address, found NULL"));
        CHECK(error.error.status == REFRAG_USAGE);
    }
    const std::vector<const void*> outs = {a_model, a_passage, a_session, a_request, an_answer};
    for (const void* out : outs) CHECK(out == nullptr);
    CHECK(n == 0);
    // Functions that cannot fail.
    refrag_model_options_init(nullptr, sizeof(refrag_model_options));
    refrag_session_options_init(nullptr, sizeof(refrag_session_options));
    refrag_generate_options_init(nullptr, sizeof(refrag_generate_options));
    CHECK(refrag_passage_is_encoded(nullptr) == 0);
    CHECK(std::string(refrag_answer_text(nullptr, nullptr)).empty());
    CHECK(refrag_answer_ids(nullptr, &n) == nullptr);
    refrag_model_free(nullptr);
    refrag_passage_free(nullptr);
    refrag_session_free(nullptr);
    refrag_request_free(nullptr);
    refrag_answer_free(nullptr);
    // An empty text needs no address, and what may be NULL may be.
    CHECK(refrag_request_add_text(asked, nullptr, 0, 0, error) == REFRAG_OK);
    CHECK(refrag_passage_chunk(passages[0], 0, nullptr, nullptr, nullptr, error) == REFRAG_OK);
    CHECK(refrag_session_encode(session, nullptr, 0, nullptr) == REFRAG_OK);
    refrag_answer_free(answer);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: a session answers one call at a time, and says so to a second one") {
    refrag_request* asked = request();
    add_prompt(asked);
    struct Inside {
        Fixture* fixture;
        refrag_request* asked;
        refrag_status status[2] = {REFRAG_OK, REFRAG_OK};
        Failure error;
    } inside{this, asked, {}, {}};
    refrag_generate_options how = new_tokens(6);
    how.user = &inside;
    how.text = [](void* user, const char*, size_t) {
        Inside& in = *static_cast<Inside*>(user);
        refrag_answer* answer = nullptr;
        in.status[0] = refrag_session_generate(in.fixture->session, in.asked, nullptr, &answer, in.error);
        in.status[1] = refrag_session_encode(in.fixture->session, in.fixture->passages.data(), 1, nullptr);
        // Another session is free.
        refrag_session* other = nullptr;
        if (refrag_session_new(in.fixture->model, nullptr, &other, nullptr) == REFRAG_OK)
            in.fixture->ids(other, in.asked, new_tokens(1));
        refrag_session_free(other);
        return 1;
    };
    const std::vector<int32_t> found = ids(session, asked, how);
    CHECK(inside.status[0] == REFRAG_USAGE);
    CHECK(inside.status[1] == REFRAG_USAGE);
    CHECK(inside.error.message() == "session: expected one call at a time, found a second one");
    CHECK(found == ids(session, asked, new_tokens(6)));
    refrag_request_free(asked);
}

TEST_CASE("api: a plain decoder takes what it can, and refuses what needs an encoder") {
    Failure error;
    refrag_model* model = nullptr;
    const refrag_model_options loading = on_cpu();
    const std::string path = tiny_refrag_path() + "/decoder";
    REQUIRE(refrag_model_load(path.c_str(), &loading, &model, error) == REFRAG_OK);
    auto info = sized<refrag_model_info>();
    REQUIRE(refrag_model_get_info(model, &info, error) == REFRAG_OK);
    CHECK(info.has_encoder == 0);
    CHECK(info.d_enc == 0);
    refrag_session* session = nullptr;
    refrag_passage* passage = nullptr;
    refrag_request* asked = nullptr;
    REQUIRE(refrag_session_new(model, nullptr, &session, error) == REFRAG_OK);
    REQUIRE(refrag_passage_new(model, kTexts[0], std::strlen(kTexts[0]), 4, &passage, error) == REFRAG_OK);
    REQUIRE(refrag_request_new(model, &asked, error) == REFRAG_OK);
    CHECK(refrag_session_encode(session, &passage, 1, error) == REFRAG_USAGE);
    CHECK(contains(error.message(), "encoder"));
    const float value = 0;
    CHECK(refrag_request_add_chunk_embeddings(asked, &value, 1, error) == REFRAG_USAGE);
    CHECK(contains(error.message(), "encoder"));
    const refrag_text question{kQuestion.data(), kQuestion.size()};
    REQUIRE(refrag_request_add_prompt(asked, &passage, 1, nullptr, 0, &question, error) == REFRAG_OK);
    refrag_answer* answer = nullptr;
    const refrag_generate_options how = new_tokens(3);
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    CHECK(ids_of_answer(answer).size() == 3);
    refrag_answer_free(answer);
    refrag_request_free(asked);
    refrag_passage_free(passage);
    refrag_session_free(session);
    refrag_model_free(model);
}

TEST_CASE_FIXTURE(Fixture, "api: an empty passage, and another model's") {
    refrag_passage* empty = nullptr;
    REQUIRE(refrag_passage_new(model, nullptr, 0, 4, &empty, error) == REFRAG_OK);
    size_t n = 7;
    REQUIRE(refrag_passage_n_chunks(empty, &n, error) == REFRAG_OK);
    CHECK(n == 0);
    REQUIRE(refrag_session_encode(session, &empty, 1, error) == REFRAG_OK);
    CHECK(refrag_passage_is_encoded(empty) == 1);
    REQUIRE(refrag_passage_save(session, empty, nullptr, 0, &n, error) == REFRAG_OK);
    std::string record(n, '\0');
    REQUIRE(refrag_passage_save(session, empty, record.data(), n, &n, error) == REFRAG_OK);
    refrag_passage* again = nullptr;
    REQUIRE(refrag_passage_load(model, nullptr, 0, record.data(), record.size(), &again, error) == REFRAG_OK);
    refrag_passage_free(again);
    refrag_passage_free(empty);

    REQUIRE(refrag_session_encode(session, passages.data(), passages.size(), error) == REFRAG_OK);
    Fixture other;
    const std::string message = "passage: expected one of the session's model, found another model's";
    CHECK(refrag_passage_save(other.session, passages[0], nullptr, 0, &n, error) == REFRAG_USAGE);
    CHECK(error.message() == message);
    CHECK(refrag_session_embeddings(other.session, passages[0], nullptr, 0, &n, error) == REFRAG_USAGE);
    CHECK(error.message() == message);
    CHECK(refrag_session_encode(other.session, passages.data(), 1, error) == REFRAG_USAGE);
}

TEST_CASE("api: a message is one line, whatever a name holds, and is cut between characters") {
    Failure error;
    refrag_model* none = nullptr;
    CHECK(refrag_model_load("no\nwhere\x1b[1m", nullptr, &none, error) == REFRAG_BAD_INPUT);
    for (const char c : error.message()) CHECK(static_cast<unsigned char>(c) >= 0x20);
    // "path: expected..." and a name of many two-byte characters, in all lengths of the message's room.
    std::string name;
    for (int i = 0; i < 700; ++i) name += "\xc3\xa9";
    for (size_t room = 1; room <= sizeof error.error.message; ++room) {
        error.error.struct_size = offsetof(refrag_error, message) + room;
        CHECK(refrag_model_load(name.c_str(), nullptr, &none, error) == REFRAG_BAD_INPUT);
        const std::string message = error.message();
        REQUIRE(message.size() < room);
        CHECK(message.size() + 2 >= std::min(room, size_t{250}));
        size_t n_bytes = 0;  // of two-byte characters: whole ones alone
        for (const char c : message) n_bytes += static_cast<unsigned char>(c) >= 0x80 ? 1 : 0;
        REQUIRE(n_bytes % 2 == 0);
    }
}

TEST_CASE("api: the host's signal handlers and locale are its own") {
    std::vector<struct sigaction> before(65), after(65);
    const auto read = [](std::vector<struct sigaction>& all) {
        for (int i = 1; i < 65; ++i) ::sigaction(i, nullptr, &all[static_cast<size_t>(i)]);
    };
    // A host whose numbers look like 1.024,5.
    struct Grouped : std::numpunct<char> {
        char do_decimal_point() const override { return ','; }
        char do_thousands_sep() const override { return '.'; }
        std::string do_grouping() const override { return "\3"; }
    };
    const std::locale old = std::locale::global(std::locale(std::locale::classic(), new Grouped));
    read(before);
    {
        Fixture fixture;
        refrag_request* asked = fixture.request();
        fixture.add_prompt(asked);
        CHECK(fixture.ids(fixture.session, asked, new_tokens(6)).size() == 6);
        const int32_t id = 123456;
        CHECK(refrag_request_add_tokens(asked, &id, 1, fixture.error) == REFRAG_USAGE);
        CHECK(contains(fixture.error.message(), "found 123456"));
        refrag_request_free(asked);
    }
    read(after);
    CHECK(std::locale() != old);  // still the host's
    std::locale::global(old);
    for (size_t i = 1; i < before.size(); ++i) {
        CAPTURE(i);
        const bool same_handler = before[i].sa_handler == after[i].sa_handler;
        CHECK(same_handler);
        CHECK(before[i].sa_flags == after[i].sa_flags);
    }
}
