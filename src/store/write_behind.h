// What every passage keeper does alike: records wait for one thread that writes them, what waits is found
// already, and what goes wrong is said once and is a miss. Where records go is the derived class's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "refrag/passage_keeper.h"

namespace refrag {

// Takes one line, once, when a cache cannot do its work: the program goes on without it.
using CacheWarning = std::function<void(const std::string&)>;

class WriteBehind : public PassageKeeper {
  public:
    ~WriteBehind() override;

    EmbeddingForm form() const noexcept override { return form_; }
    std::optional<std::string> find(const Sha256Digest& key) noexcept override;
    void forget(const Sha256Digest& key) noexcept override;
    // Written in the order they came; what comes faster than it can be written is dropped.
    void keep(const Sha256Digest& key, std::string record) noexcept override;

    // Returns when all that was kept so far is written, or dropped.
    void flush();

  protected:
    struct Entry {
        Sha256Digest key;
        std::shared_ptr<const std::string> record;  // null: to be forgotten
    };
    WriteBehind(EmbeddingForm form, CacheWarning warn) : form_(form), warn_(std::move(warn)) {}

    // A derived class starts the thread when it can look up and write, and ends it, first of all, in its
    // destructor.
    void start();
    void stop() noexcept;

    // Any thread; Error: a miss.
    virtual std::optional<std::string> look_up(const Sha256Digest& key) = 0;
    // The thread alone; Error: the entries are dropped. After wake() there may be none.
    virtual void write(const std::vector<Entry>& entries) = 0;

    // Makes the thread call write() soon.
    void wake() noexcept;
    // Says what is wrong, unless something was said already. Damage (Status::bad_input) ends the work.
    void complain(const Error& error) noexcept;
    // What is wrong next is said again.
    void recovered() noexcept;
    void warn(const std::string& line) const;
    bool is_broken() const noexcept;

  private:
    // Of what waits: the record, and which of several for one key it is.
    struct Unwritten {
        std::shared_ptr<const std::string> record;
        uint64_t order = 0;
    };
    void add(const Sha256Digest& key, std::shared_ptr<const std::string> record);
    void run();

    const EmbeddingForm form_;
    const CacheWarning warn_;

    mutable std::mutex mutex_;  // of all that follows
    std::condition_variable changed_;
    std::vector<Entry> waiting_;
    std::unordered_map<Sha256Digest, Unwritten, Sha256DigestHash> unwritten_;
    uint64_t unwritten_bytes_ = 0;
    uint64_t order_ = 0;  // of the last one
    bool writing_ = false;
    bool woken_ = false;
    bool stop_ = false;
    bool warned_ = false;
    bool broken_ = false;
    std::thread thread_;
};

}  // namespace refrag
