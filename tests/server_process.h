// Servers that a test starts itself: a process in a directory of its own, reached through a socket there, and
// killed with everything when the test ends. PostgreSQL, which does not run as root, runs as another user.
#pragma once

#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "support.h"

namespace refrag_test {

// The program of this name on the PATH or in one of the directories; "" where there is none.
inline std::string find_program(const std::string& name, std::vector<std::string> dirs = {}) {
    const char* path = std::getenv("PATH");
    std::string rest = path != nullptr ? path : "";
    while (!rest.empty()) {
        const size_t colon = std::min(rest.find(':'), rest.size());
        dirs.push_back(rest.substr(0, colon));
        rest.erase(0, colon + 1);
    }
    for (const std::string& dir : dirs)
        if (access((dir + "/" + name).c_str(), X_OK) == 0) return dir + "/" + name;
    return "";
}

// One process; its output goes to a file. Ends with this one, whatever happens.
class ServerProcess {
  public:
    ServerProcess() = default;
    ~ServerProcess() { kill_with(SIGKILL); }
    ServerProcess(const ServerProcess&) = delete;
    ServerProcess& operator=(const ServerProcess&) = delete;

    // user: null: this one.
    void start(std::vector<std::string> command, const std::string& log,
               const struct passwd* user = nullptr) {
        std::vector<char*> arguments;
        for (std::string& word : command) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        const std::string home = std::filesystem::path(log).parent_path();
        pid_ = fork();
        if (pid_ != 0) return;
        const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
        dup2(out, 1);
        dup2(out, 2);
        const bool is_allowed = user == nullptr || (setgroups(0, nullptr) == 0 && setgid(user->pw_gid) == 0 &&
                                                    setuid(user->pw_uid) == 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (is_allowed && chdir(home.c_str()) == 0) execv(arguments[0], arguments.data());
        _exit(127);
    }
    // The exit status; -1 where a signal ended it.
    int wait() {
        int status = 0;
        waitpid(pid_, &status, 0);
        pid_ = 0;
        return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    void signal(int number) const { ::kill(pid_, number); }
    void kill_with(int number) {
        if (pid_ <= 0) return;
        signal(number);
        signal(SIGCONT);
        wait();
    }

  private:
    pid_t pid_ = 0;
};

// Asks again and again, for up to 20 seconds.
inline bool becomes_true(const std::function<bool()>& ready) {
    for (int tries = 0; tries < 400; ++tries) {
        if (ready()) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    return false;
}

}  // namespace refrag_test
