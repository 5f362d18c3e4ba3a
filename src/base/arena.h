// Scratch memory for one forward pass: a bump allocator over a backend's memory.
// Blocks are kept between passes, so a steady state allocates nothing. One arena is used by one thread at a
// time.
#pragma once

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

    // Uninitialised memory, aligned to 64 bytes, valid until the enclosing ArenaScope ends.
    void* allocate(size_t bytes) {
        const size_t need = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        while (block_ < blocks_.size() && blocks_[block_].bytes() - used_ < need) {
            ++block_;
            used_ = 0;
        }
        if (block_ == blocks_.size()) {
            blocks_.emplace_back(source_, need > kMinBlock ? need : kMinBlock);
            used_ = 0;
        }
        void* at = static_cast<std::byte*>(blocks_[block_].data()) + used_;
        used_ += need;
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

  private:
    friend class ArenaScope;
    static constexpr size_t kAlignment = 64;
    static constexpr size_t kMinBlock = size_t{1} << 20;
    MemorySource& source_;
    std::vector<Buffer> blocks_;
    size_t block_ = 0;  // the block in use
    size_t used_ = 0;   // bytes used in it
};

// Gives back, when it ends, all that was taken from the arena since it began.
class ArenaScope {
  public:
    explicit ArenaScope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ArenaScope(const ArenaScope&) = delete;
    ArenaScope& operator=(const ArenaScope&) = delete;
    ~ArenaScope() {
        arena_.block_ = block_;
        arena_.used_ = used_;
    }

  private:
    Arena& arena_;
    size_t block_;
    size_t used_;
};

}  // namespace refrag
