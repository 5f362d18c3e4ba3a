// Memory that runs out at every place: the n-th allocation fails, for one n after another, and each failure
// must come out at the border as one error, leak nothing, and leave a process in which the next request
// works.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <new>

#include "base/threads.h"
#include "cli/common.h"
#include "failing.h"
#include "golden.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* passages_text =
    "{\"id\": \"a\", \"title\": \"Hill\", \"text\": \"The old mill stands on a hill above the river.\"}\n"
    "{\"id\": 7, \"text\": \"A red lantern hangs over the door of the inn; its keeper is called Ada.\"}\n";

// What became of something that may run out of memory. It holds no memory of its own: filling it in cannot
// fail.
enum class Outcome { done, out_of_memory, wrong_error };

template <typename Body>
Outcome outcome_of(Body&& body) noexcept {
    try {
        body();
        return Outcome::done;
    } catch (const std::bad_alloc&) {
        return Outcome::out_of_memory;
    } catch (const Error& error) {
        return error.status() == Status::out_of_memory ? Outcome::out_of_memory : Outcome::wrong_error;
    } catch (...) {
        return Outcome::wrong_error;
    }
}

// Standard output and standard error of a piece of this process, kept in memory files.
class Captured {
  public:
    Captured() : out_(::memfd_create("out", MFD_CLOEXEC)), err_(::memfd_create("err", MFD_CLOEXEC)) {
        flush();
        saved_out_ = ::dup(STDOUT_FILENO);
        saved_err_ = ::dup(STDERR_FILENO);
        ::dup2(out_, STDOUT_FILENO);
        ::dup2(err_, STDERR_FILENO);
    }
    ~Captured() {
        end();
        ::close(out_);
        ::close(err_);
    }
    Captured(const Captured&) = delete;
    Captured& operator=(const Captured&) = delete;
    void end() {
        if (saved_out_ < 0) return;
        flush();
        ::dup2(saved_out_, STDOUT_FILENO);
        ::dup2(saved_err_, STDERR_FILENO);
        ::close(saved_out_);
        ::close(saved_err_);
        saved_out_ = -1;
    }
    std::string out() const { return text(out_); }
    std::string err() const { return text(err_); }

  private:
    static void flush() {
        std::cout.flush();
        std::fflush(stdout);
        std::fflush(stderr);
    }
    static std::string text(int descriptor) {
        std::string bytes(1 << 16, '\0');
        const ssize_t n = ::pread(descriptor, bytes.data(), bytes.size(), 0);
        return bytes.substr(0, static_cast<size_t>(std::max<ssize_t>(n, 0)));
    }
    int out_;
    int err_;
    int saved_out_;
    int saved_err_;
};

// `refrag run` on the tiny model in this process.
int run_command(const std::string& passages, const std::string& explain) {
    const char* arguments[] = {"refrag",     "run",
                               "-m",         "tests/golden/tiny-refrag",
                               "--passages", passages.c_str(),
                               "-q",         "Where?",
                               "-n",         "3",
                               "-t",         "2",
                               "--explain",  explain.c_str()};
    return run_command_line(static_cast<int>(std::size(arguments)), arguments);
}

// One line that says so; before it at most the summary of an answer that came out whole.
bool is_one_error(std::string_view text) {
    if (text.starts_with("chunks ")) text.remove_prefix(text.find('\n') + 1);
    return text.starts_with("refrag: ") && contains(text, "out of memory") &&
           text.find('\n') == text.size() - 1;
}

}  // namespace

TEST_CASE("failing memory: a model's loading, one allocation after another") {
    const auto load = [] {
        const std::unique_ptr<Backend> backend = make_cpu_backend(2);
        const Model model(backend->device(), tiny_refrag_path());
    };
    load();  // what is made once in a process is made now
    for (const bool from_then_on : {false, true}) {
        int64_t n = 0;
        bool done = false;
        // Every allocation up to 1000, then every third; in the second round every seventh.
        while (!done) {
            n += from_then_on ? 7 : n < 1000 ? 1 : 3;
            const int64_t live = live_allocations();
            FailingMemory memory(n, from_then_on);
            const Outcome outcome = outcome_of(load);
            memory.disarm();
            const int64_t left = live_allocations() - live;
            done = memory.asked() < n;
            CAPTURE(n);
            REQUIRE(outcome == (memory.failed() ? Outcome::out_of_memory : Outcome::done));
            REQUIRE(left == 0);
        }
        CHECK(n > 1000);  // the tiny model takes about 3900
    }
}

TEST_CASE(
    "failing memory: an answer, one allocation after another; the next one is right, in the same session "
    "too") {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2);
    const Model model(backend->device(), tiny_refrag_path());
    AnswerOptions options;
    options.max_new_tokens = 3;
    options.want_logits = true;
    const auto read = [] {
        std::vector<Passage> passages;
        passages = parse_passages(passages_text, "p");
        return passages;
    };
    const auto ids_of_answer = [&](Session& session, std::vector<Passage>& passages) {
        return session.answer(passages, "Where?", options).ids;
    };
    const auto with_chunk_len = [&](int32_t k, Session& session, std::vector<Passage>& passages) {
        options.chunk_len = k;
        return ids_of_answer(session, passages);
    };
    std::vector<int32_t> expected[2];
    for (const int32_t k : {4, 8}) {
        std::vector<Passage> passages = read();
        Session session(model);
        expected[k / 8] = with_chunk_len(k, session, passages);
    }
    REQUIRE(expected[0] != expected[1]);
    // Every allocation up to 300, every second up to 600, and so on; fewer where all that follow fail too.
    // A session that has worked before holds its scratch memory and its chunks; a new one has to ask for
    // them.
    for (const bool used_before : {false, true}) {
        for (const bool from_then_on : {false, true}) {
            int64_t n = 0, n_done_without = 0;
            bool done = false;
            while (!done) {
                n += from_then_on ? 3 : 1 + n / 300;
                const int64_t live = live_allocations();
                {
                    std::vector<Passage> passages = read();
                    Session session(model);
                    if (used_before) with_chunk_len(8, session, passages);
                    options.chunk_len = 4;
                    FailingMemory memory(n, from_then_on);
                    std::vector<int32_t> ids;
                    const Outcome outcome = outcome_of([&] { ids = ids_of_answer(session, passages); });
                    memory.disarm();
                    done = memory.asked() < n;
                    CAPTURE(n);
                    // Keeping the prompt's beginning for others is what an answer can do without.
                    if (memory.failed() && outcome == Outcome::done) {
                        ++n_done_without;
                        REQUIRE(ids == expected[0]);
                    } else {
                        REQUIRE(outcome == (memory.failed() ? Outcome::out_of_memory : Outcome::done));
                    }

                    // At both chunk lengths: a passage must not keep half of a new cut.
                    for (const int32_t k : {8, 4}) {
                        REQUIRE(with_chunk_len(k, session, passages) == expected[k / 8]);
                    }
                }
                // The first turn also makes what doctest makes once.
                if (n > 3) REQUIRE(live_allocations() == live);
            }
            CHECK(n > 200);
            CHECK(n_done_without < 10);  // a few blocks of 32 positions, three allocations each
        }
    }
}

namespace {

// Of all allocations of a run every step-th, from the first hundred every third; of the large blocks every
// large_step-th in a session that fails once.
void check_command(const std::string& file, int64_t step, int64_t large_step) {
    const TempDir dir;
    const std::string passages = dir.write("p.jsonl", passages_text);
    const std::string explain = dir.file(file);
    std::string expected;
    {
        Captured captured;
        REQUIRE(run_command(passages, explain) == 0);
        captured.end();
        expected = captured.out();
    }
    REQUIRE(!expected.empty());
    std::filesystem::remove(explain);

    const auto check = [&](int64_t n, bool from_then_on, Memory kind) {
        const int64_t live = live_allocations();
        int code = -1;
        bool failed = false;
        bool reached = false;
        bool right = false;
        std::string err;
        {
            Captured captured;
            FailingMemory memory(n, from_then_on, kind);
            code = run_command(passages, explain);
            memory.disarm();
            captured.end();
            failed = memory.failed();
            reached = memory.asked() >= n;
            err = captured.err();
            const bool written = is_file(explain);
            right = code == 0 ? captured.out() == expected && written
                              : code == 1 && !written && is_one_error(err);
            std::filesystem::remove(explain);
        }
        const int64_t left = live_allocations() - live - (err.capacity() > 15 ? 1 : 0);
        CAPTURE(n);
        CAPTURE(from_then_on);
        CAPTURE(err);
        // CLI11 composes help texts with streams, which keep a failed allocation to themselves: nobody reads
        // those texts here, so the command may do its work all the same, and then it must be right.
        if (!failed) REQUIRE(code == 0);
        REQUIRE(right);
        REQUIRE(left == 0);
        REQUIRE(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
        return reached;
    };
    // In a session that fails once and in one that fails from then on.
    for (const bool from_then_on : {false, true}) {
        int64_t n = 1;
        while (check(n, from_then_on, Memory::all)) n += n < 100 ? 3 : step;
        CHECK(n > 3000);
        // The backend's large blocks: weights, KV cache, scratch.
        n = 1;
        while (check(n, from_then_on, Memory::large)) n += from_then_on ? 5 : large_step;
        CHECK(n > 50);
    }
}

}  // namespace

TEST_CASE("failing memory: the command prints one line, ends with 1 and leaves no file") {
    // A run takes about 5900 allocations, of which the two tests above try most one by one, and 155 large
    // ones.
    check_command("explain.json", 11, 1);
}

TEST_CASE("failing memory: a page is whole or not there, too") {
    check_command("explain.html", 97, 3);
}

TEST_CASE("failing memory: an allocation that fails in a worker comes out of the caller's run()") {
    ThreadPool pool(3);
    for (int round = 0; round < 50; ++round) {
        std::atomic<int> begun{0};
        FailingMemory memory(5 + round % 20);
        const Outcome outcome = outcome_of([&] {
            pool.run(64, [&](int64_t) {
                ++begun;
                ::operator delete(::operator new(100));
            });
        });
        memory.disarm();
        REQUIRE(outcome == Outcome::out_of_memory);
        REQUIRE(begun >= 5);
        std::atomic<int64_t> sum{0};
        pool.run(64, [&](int64_t i) { sum += i; });
        REQUIRE(sum == 64 * 63 / 2);
    }
}

TEST_CASE("failing memory: text is whole or not there") {
    // A stream swallows a failed allocation and keeps what it has; a name cut so would be another file's.
    const std::string expected = "layers." + std::string(300, 'x') + "17";
    bool done = false;
    for (int64_t n = 1; !done; ++n) {
        std::string text;
        const std::string part(300, 'x');
        FailingMemory memory(n);
        const Outcome outcome = outcome_of([&] { text = str("layers.", part, 17); });
        memory.disarm();
        done = memory.asked() < n;
        REQUIRE(outcome == (memory.failed() ? Outcome::out_of_memory : Outcome::done));
        REQUIRE(text == (done ? expected : ""));
    }
}
