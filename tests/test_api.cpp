// The C interface: the same answers as the library's own, and what it promises of errors, callbacks, sizes
// and threads. tests/api_example.c is compiled as C99 and as C++20 and run against the shared library.
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "cli_test.h"
#include "golden.h"
#include "refrag.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* kTexts[] = {"The old mill stands on a hill above the river.",
                                  "A red lantern hangs over the door."};
constexpr std::string_view kQuestion = "Where is the mill?";

struct Failure {
    refrag_error error{sizeof(refrag_error), REFRAG_OK, ""};
    operator refrag_error*() { return &error; }
    std::string message() const { return error.message; }
};

// A model, its passages and a session.
struct Fixture {
    refrag_model* model = nullptr;
    refrag_session* session = nullptr;
    std::vector<refrag_passage*> passages;
    Failure error;
    Fixture() {
        refrag_model_options options;
        refrag_model_options_init(&options);
        options.device = "cpu";
        REQUIRE(refrag_model_load(tiny_refrag_path().c_str(), &options, &model, error) == REFRAG_OK);
        REQUIRE(refrag_session_new(model, nullptr, &session, error) == REFRAG_OK);
        for (const char* text : kTexts) {
            passages.push_back(nullptr);
            REQUIRE(refrag_passage_new(model, text, std::strlen(text), 4, &passages.back(), error) ==
                    REFRAG_OK);
        }
    }
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
    // Ids of the answer to the template's prompt.
    std::vector<int32_t> ids(refrag_session* with, const refrag_request* asked,
                             const refrag_generate_options& options) {
        refrag_answer* answer = nullptr;
        Failure own;
        REQUIRE(refrag_session_generate(with, asked, &options, &answer, own) == REFRAG_OK);
        size_t n = 0;
        const int32_t* first = refrag_answer_ids(answer, &n);
        std::vector<int32_t> out(first, first + n);
        refrag_answer_free(answer);
        return out;
    }
    refrag_generate_options options(int32_t n = 6) const {
        refrag_generate_options out;
        refrag_generate_options_init(&out);
        out.max_new_tokens = n;
        out.ignore_eos = 1;
        return out;
    }
    void add_prompt(refrag_request* to) {
        const refrag_text question{kQuestion.data(), kQuestion.size()};
        REQUIRE(refrag_request_add_prompt(to, passages.data(), passages.size(), nullptr, 0, &question,
                                          error) == REFRAG_OK);
    }
};

// The same in C++.
struct Plain : TinyRefrag {
    AnswerOptions options;
    Plain() {
        options.max_new_tokens = 6;
        options.ignore_eos = true;
        options.chunk_len = 4;
    }
};

}  // namespace

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
    const refrag_generate_options how = options();
    REQUIRE(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_OK);
    size_t n = 0;
    CHECK(std::string(refrag_answer_text(answer, &n)) == expected.text);
    CHECK(n == expected.text.size());
    const int32_t* first = refrag_answer_ids(answer, &n);
    CHECK(std::vector<int32_t>(first, first + n) == expected.ids);
    refrag_answer_info info{};
    info.struct_size = sizeof info;
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.finish == REFRAG_FINISH_LENGTH);
    CHECK(info.n_chunks == expected.chunks.size());
    CHECK(info.n_expanded == expected.n_expanded);
    CHECK(info.n_positions == expected.positions);
    CHECK(info.n_plain_tokens == expected.plain_tokens);
    CHECK(info.n_new_tokens == 6);
    for (size_t i = 0; i < info.n_chunks; ++i) {
        refrag_chunk_info chunk{};
        chunk.struct_size = sizeof chunk;
        REQUIRE(refrag_answer_chunk(answer, i, &chunk, error) == REFRAG_OK);
        CHECK(chunk.begin == expected.chunks[i].begin);
        CHECK(chunk.end == expected.chunks[i].end);
        CHECK((chunk.expanded != 0) == expected.chunks[i].expanded);
        CHECK((chunk.has_logit != 0) == expected.chunks[i].logit.has_value());
        CHECK(chunk.position == expected.chunks[i].position);
    }
    refrag_chunk_info chunk{};
    chunk.struct_size = sizeof chunk;
    CHECK(refrag_answer_chunk(answer, info.n_chunks, &chunk, error) == REFRAG_USAGE);
    refrag_answer_free(answer);
    // Asked again the passages are there, and the answer is the same.
    CHECK(refrag_passage_is_encoded(passages[0]) == 1);
    CHECK(ids(session, asked, how) == expected.ids);
    refrag_request_free(asked);
}

TEST_CASE_FIXTURE(Fixture, "api: segments of every kind, interleaved, are those of the engine") {
    refrag_model_info info{};
    info.struct_size = sizeof info;
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
    CHECK(ids(session, asked, options()) == own.answer(segments, plain.options).ids);
    // A choice for too few chunks, ids that are none: refused, and the request is as it was.
    CHECK(refrag_request_add_passage(asked, passages[0], choice.data(), 1, error) == REFRAG_USAGE);
    CHECK(contains(error.message(), str("one for each of ", n_chunks, " chunks, found 1")));
    const int32_t wrong[] = {1, -1};
    CHECK(refrag_request_add_tokens(asked, wrong, 2, error) == REFRAG_USAGE);
    CHECK(ids(session, asked, options()) == own.answer(segments, plain.options).ids);
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
    refrag_generate_options how = options(20);
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
    refrag_answer_info info{};
    info.struct_size = sizeof info;
    REQUIRE(refrag_answer_get_info(answer, &info, error) == REFRAG_OK);
    CHECK(info.finish == REFRAG_FINISH_CANCELLED);
    CHECK(info.n_new_tokens < 20);
    refrag_answer_free(answer);
    refrag_answer* none = nullptr;
    how = options(20);
    how.keep_on = [](void*) { return 0; };
    CHECK(refrag_session_generate(session, asked, &how, &none, error) == REFRAG_CANCELLED);
    CHECK(none == nullptr);
    CHECK(error.message() == "stopped by a callback");
    CHECK(ids(session, asked, options()).size() == 6);  // the session goes on
    refrag_request_free(asked);

    refrag_model_options loading;
    refrag_model_options_init(&loading);
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
    refrag_model_options_init(&loading);
    loading.device = "tpu";
    CHECK(refrag_model_load(tiny_refrag_path().c_str(), &loading, &none, error) == REFRAG_USAGE);
    refrag_model_options_init(&loading);
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
    refrag_generate_options how = options();
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);  // an empty prompt
    add_prompt(asked);
    how.temperature = -1.0f;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = options();
    how.policy = "best";
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = options();
    how.expand_fraction = 1.5;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    how = options();
    how.deadline_ms = -1;
    CHECK(refrag_session_generate(session, asked, &how, &answer, error) == REFRAG_USAGE);
    CHECK(answer == nullptr);
    CHECK(ids(session, asked, options()).size() == 6);
    refrag_session_options wide;
    refrag_session_options_init(&wide);
    wide.max_context = 1 << 30;
    refrag_session* no_session = nullptr;
    CHECK(refrag_session_new(model, &wide, &no_session, error) == REFRAG_USAGE);
    // Handles of two models do not mix.
    refrag_model_options cpu_options;
    refrag_model_options_init(&cpu_options);
    cpu_options.device = "cpu";
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
    const std::vector<int32_t> expected = ids(session, asked, options());
    std::vector<std::vector<int32_t>> found(4);
    {
        std::vector<std::thread> threads;
        for (std::vector<int32_t>& one : found)
            threads.emplace_back([&] {
                refrag_session* own = nullptr;
                if (refrag_session_new(model, nullptr, &own, nullptr) != REFRAG_OK) return;
                const refrag_generate_options how = options();
                for (int round = 0; round < 3; ++round) {
                    refrag_answer* answer = nullptr;
                    if (refrag_session_generate(own, asked, &how, &answer, nullptr) != REFRAG_OK) break;
                    size_t n = 0;
                    const int32_t* first = refrag_answer_ids(answer, &n);
                    one.assign(first, first + n);
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
    CHECK(ids(session, asked, options()) == expected);
    refrag_request_free(asked);
}

TEST_CASE("api: the shared library runs a C99 and a C++20 program, and exports nothing else") {
    const TempDir dir;
    const std::string build = std::filesystem::path(binary()).parent_path().string();
    if (!std::filesystem::exists(build + "/librefrag.so")) {
        skip("no librefrag.so beside the binary (make shared)");
        return;
    }
    const Ran nm = shell_run(dir, "nm -D --defined-only " + build + "/librefrag.so");
    REQUIRE(nm.code == 0);
    size_t n_symbols = 0;
    for (size_t at = 0; at < nm.out.size(); at = nm.out.find('\n', at) + 1) {
        const std::string line = nm.out.substr(at, nm.out.find('\n', at) - at);
        const std::string name = line.substr(line.find_last_of(' ') + 1);
        CHECK_MESSAGE(name.starts_with("refrag_"), name);
        ++n_symbols;
    }
    CHECK(n_symbols > 30);
    if (build.find("san-") != std::string::npos) {
        skip("programs without a sanitizer cannot load a library with one");
        return;
    }
    const std::string flags = " -Wall -Wextra -Wpedantic -Werror -Isrc tests/api_example.c -o " +
                              dir.file("x") + " -L" + build + " -lrefrag -Wl,-rpath," +
                              std::filesystem::absolute(build).string();
    for (const char* compiler : {"gcc -std=c99", "g++ -std=c++20 -x c++"}) {
        CAPTURE(compiler);
        const Ran built = shell_run(dir, compiler + flags);
        CAPTURE(built.err);
        REQUIRE(built.code == 0);
        const Ran ran = shell_run(dir, dir.file("x") + " tests/golden/tiny-refrag");
        CHECK(ran.code == 0);
        CHECK(ran.err == "");
        const Ran wrong = shell_run(dir, dir.file("x") + " nowhere");
        CHECK(wrong.code == 3);
        CHECK(contains(wrong.err, "bad input: nowhere: expected a model directory"));
    }
}
