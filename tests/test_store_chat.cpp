// `chat`: from a pipe, and in a terminal of its own (a pseudo terminal): answers, commands, Ctrl-C, history.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <unistd.h>

#include <chrono>
#include <csignal>

#include "cli_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture {
    TempDir dir;
    Fixture() { dir.write("p.jsonl", kPassages); }
    Ran chat(const std::string& input, const std::string& arguments = "") const {
        dir.write("lines", input);
        return refrag_run(dir, "chat " + dir.file("p.jsonl") + " " + kModel + "-n 4 " + arguments,
                          dir.file("lines"));
    }
};

// The binary in a terminal.
class Terminal {
  public:
    Terminal(const TempDir& dir, const std::vector<std::string>& arguments) {
        pid_ = forkpty(&master_, nullptr, nullptr, nullptr);
        if (pid_ != 0) return;
        setenv("XDG_STATE_HOME", dir.path().c_str(), 1);
        setenv("TERM", "dumb", 1);
        std::vector<char*> argv;
        const std::string program = binary();
        argv.push_back(const_cast<char*>(program.c_str()));
        for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
        argv.push_back(nullptr);
        execv(program.c_str(), argv.data());
        _exit(127);
    }
    ~Terminal() {
        if (pid_ > 0) kill(pid_, SIGKILL);
        if (pid_ > 0) waitpid(pid_, nullptr, 0);
        close(master_);
    }
    Terminal(const Terminal&) = delete;
    Terminal& operator=(const Terminal&) = delete;

    // As a person would: what is typed while the terminal changes its mode is lost.
    void type(const std::string& text) const {
        usleep(200000);
        REQUIRE(write(master_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
    }
    // What is shown from now on, up to and with `wanted`; what there was when that did not come.
    std::string wait_for(const std::string& wanted, int seconds = 60) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
        while (shown_.find(wanted) == std::string::npos && std::chrono::steady_clock::now() < end) {
            pollfd ready{master_, POLLIN, 0};
            if (poll(&ready, 1, 100) <= 0) continue;
            char block[4096];
            const ssize_t n = read(master_, block, sizeof block);
            if (n <= 0) break;
            shown_.append(block, static_cast<size_t>(n));
        }
        const size_t at = shown_.find(wanted);
        CHECK_MESSAGE(at != std::string::npos, "expected \"" << wanted << "\" in: " << shown_);
        const size_t take = at == std::string::npos ? shown_.size() : at + wanted.size();
        const std::string front = shown_.substr(0, take);
        shown_.erase(0, take);
        return front;
    }
    int exit_code() {
        int status = 0;
        for (int i = 0; i < 600 && waitpid(pid_, &status, WNOHANG) == 0; ++i) usleep(100000);
        pid_ = -1;
        return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }

  private:
    pid_t pid_ = -1;
    int master_ = -1;
    std::string shown_;
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "chat: from a pipe, a line a turn; commands answer in words") {
    const Ran ran = chat(
        "Where is the mill?\n/documents\n\n/explain\n/retry\nAnd the "
        "lantern?\n/clear\n/documents\n/nope\n/help\n");
    CHECK(ran.code == 0);
    CHECK(contains(ran.out, "[1] "));
    CHECK(contains(ran.out, "  tokens "));
    CHECK(contains(ran.out, "  1 vector"));
    CHECK(contains(ran.out, "none yet: they are looked up for each question\n"));
    CHECK(contains(ran.out, "no such command: /nope (/help lists them)\n"));
    CHECK(contains(ran.out, "/retry "));
    CHECK(line_count(ran.err) == 3);
    CHECK(contains(ran.err, "passages 2, new 2 | chunks "));
    // The second turn takes over the first one's rows: the same passages, then what was said.
    const std::vector<std::string> lines = [&] {
        std::vector<std::string> out;
        for (size_t at = 0; at < ran.err.size(); at = ran.err.find('\n', at) + 1)
            out.push_back(ran.err.substr(at, ran.err.find('\n', at) - at));
        return out;
    }();
    CHECK(contains(lines[0], "reused 0"));
    CHECK(contains(lines[2], "new 0"));
    CHECK(chat("/quit\nWhere?\n").out == "");
    CHECK(chat("").code == 0);
    CHECK(
        contains(chat("/explain\n/retry\n").out, "nothing has been asked yet\nnothing has been asked yet\n"));
}

TEST_CASE_FIXTURE(Fixture, "chat: over a store, and what is refused") {
    CHECK(refrag_run(dir, "index " + dir.file("s.db") + " " + dir.file("p.jsonl") + " " + kModel + "-k 4")
              .code == 0);
    dir.write("lines", "Where is the mill?\n");
    const Ran ran = refrag_run(dir, "chat " + dir.file("s.db") + " " + kModel + "-n 4", dir.file("lines"));
    CHECK(ran.code == 0);
    CHECK(contains(ran.err, "passages 2, new 2"));
    const auto said = [&](const std::string& arguments, int code, const std::string& what) {
        const Ran refused = refrag_run(dir, "chat " + arguments, dir.file("lines"));
        CAPTURE(refused.err);
        CHECK(refused.code == code);
        CHECK(contains(refused.err, what));
    };
    said(dir.file("none") + " " + kModel, 3, "found no such path");
    said(dir.file("s.db") + " -m tests/golden/tiny-refrag/decoder", 3, "not by");
    dir.write("empty.txt", " \n");
    said(dir.file("empty.txt") + " " + kModel, 3, "expected documents, found no text");
    said(dir.file("s.db") + " --where x " + kModel, 2, "KEY OP VALUE");
}

TEST_CASE_FIXTURE(Fixture, "chat: in a terminal Ctrl-C stops the answer, not the program; Ctrl-D leaves") {
    const std::vector<std::string> arguments = {
        "chat", dir.file("p.jsonl"), "-m", "tests/golden/tiny-refrag", "-n", "-1", "--ignore-eos"};
    {
        Terminal terminal(dir, arguments);
        terminal.wait_for("/help lists the commands");
        terminal.wait_for("> ");
        terminal.type("/documents\n");
        terminal.wait_for("none yet");
        terminal.wait_for("> ");
        terminal.type("\x03");  // at the prompt: an empty line
        terminal.type("/help\n");
        terminal.wait_for("leave, as Ctrl-D does");
        terminal.type("\x04");
        CHECK(terminal.exit_code() == 0);
    }
    // An answer that goes on to the end of a window of 2048 positions.
    Terminal terminal(dir, {"chat", "bench/demo/passages.jsonl", "-m", "weights_tools/refrag-nano", "-n",
                            "-1", "--ignore-eos"});
    terminal.wait_for("> ");
    terminal.type("Where is the mill?\n");
    terminal.wait_for("mill?\r\n");
    terminal.wait_for(" ");  // it has begun
    terminal.type("\x03");
    terminal.wait_for("(stopped)");
    terminal.wait_for("> ");
    terminal.type("/documents\n");
    terminal.wait_for("[1] ");
    terminal.type("/quit\n");
    CHECK(terminal.exit_code() == 0);
#ifdef REFRAG_WITH_LIBEDIT
    CHECK(contains(read_file(dir.file("refrag/chat_history"), 1 << 16), "/documents"));
#endif
}
