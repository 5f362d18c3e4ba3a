// Scratch memory for one forward pass: a bump allocator over a backend's memory.
// Memory is kept between passes, so a steady state allocates nothing: when the outermost scope has ended, one
// block as large as the largest pass so far (1 MiB where that is more), or none until the next pass takes it.
// One arena is used by one thread at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/tensor.h"

namespace refrag {

// Where memory comes from: host memory for the CPU, device memory for a GPU.
class MemorySource {
  public:
    virtual ~MemorySource() = default;
    // At least `bytes` (> 0) bytes aligned to 64, uninitialised. Throws Status::out_of_memory naming the
    // size.
    virtual void* allocate(size_t bytes) = 0;
    // Gives back what allocate() returned; null is allowed.
    virtual void release(void* data) noexcept = 0;
};

// Owns one allocation of a MemorySource, which must outlive it.
class Buffer {
  public:
    Buffer() = default;
    Buffer(MemorySource& source, size_t bytes)
        : source_(&source), data_(bytes == 0 ? nullptr : source.allocate(bytes)), bytes_(bytes) {}
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (data_ != nullptr) source_->release(data_);
    }
    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    void swap(Buffer& other) noexcept {
        std::swap(source_, other.source_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }
    MemorySource* source_ = nullptr;
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

class Arena {
  public:
    explicit Arena(MemorySource& source) : source_(source) {}

    // Uninitialised memory, aligned to 64 bytes, valid until the enclosing ArenaScope ends. When it throws,
    // all that was taken before is still there.
    void* allocate(size_t bytes) {
        const size_t need = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        if (block_ == blocks_.size() || blocks_[block_].bytes() - used_ < need) next_block(need);
        void* at = static_cast<std::byte*>(blocks_[block_].data()) + used_;
        used_ += need;
        in_use_ += need;
        peak_ = std::max(peak_, in_use_);
        return at;
    }

    Tensor tensor(int64_t rows, int64_t cols, DType dtype = DType::f32) {
        Tensor t{nullptr, dtype, rows, cols};
        t.data = allocate(t.bytes());
        return t;
    }

    size_t held_bytes() const {
        size_t sum = 0;
        for (const Buffer& b : blocks_) sum += b.bytes();
        return sum;
    }
    size_t peak_bytes() const { return peak_; }  // the most that was taken at a time

  private:
    friend class ArenaScope;
    static constexpr size_t kAlignment = 64;
    static constexpr size_t kMinBlock = size_t{1} << 20;

    // The first block in which nothing is taken; nor is it in those behind.
    size_t first_free() const { return used_ == 0 ? block_ : block_ + 1; }

    void next_block(size_t need) {
        const size_t next = first_free();
        if (next == blocks_.size() || blocks_[next].bytes() < need) {
            // Blocks too small would be held for nothing. The new one has room for all that the largest pass
            // took beyond what is taken now.
            drop_from(next);
            blocks_.emplace_back(source_, std::max({need, kMinBlock, peak_ - in_use_}));
        }
        block_ = next;
        used_ = 0;
    }

    void drop_from(size_t block) noexcept {
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(block), blocks_.end());
    }

    // Outside of every scope: a pass that took several blocks leaves none of them, so that the next takes one
    // for all.
    void merge() noexcept {
        if (blocks_.size() - first_free() > 1) drop_from(first_free());
    }

    MemorySource& source_;
    std::vector<Buffer> blocks_;
    size_t block_ = 0;   // the block in use; blocks_.size() where there is none
    size_t used_ = 0;    // bytes taken in it
    size_t in_use_ = 0;  // bytes taken
    size_t peak_ = 0;
    int scopes_ = 0;  // that have not ended
};

// Gives back, when it ends, all that was taken from the arena since it began. Scopes end in the reverse order
// of their beginning.
class ArenaScope {
  public:
    explicit ArenaScope(Arena& arena)
        : arena_(arena), block_(arena.block_), used_(arena.used_), in_use_(arena.in_use_) {
        ++arena.scopes_;
    }
    ArenaScope(const ArenaScope&) = delete;
    ArenaScope& operator=(const ArenaScope&) = delete;
    ~ArenaScope() {
        arena_.block_ = block_;
        arena_.used_ = used_;
        arena_.in_use_ = in_use_;
        if (--arena_.scopes_ == 0) arena_.merge();
    }

  private:
    Arena& arena_;
    size_t block_;
    size_t used_;
    size_t in_use_;
};

}  // namespace refrag
