// A small random generator (splitmix64), the same on every machine and compiler; for sampling, not for
// secrets.
#pragma once

#include <cstdint>

namespace refrag {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15u;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    // Uniform in [0, 1), 53 bits.
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

    // Uniform in [0, n), n > 0; draws beyond the largest multiple of n are thrown away, so no value is
    // favoured.
    uint64_t below(uint64_t n) {
        const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
        uint64_t value = next();
        while (value >= limit) value = next();
        return value % n;
    }

  private:
    uint64_t state_;
};

}  // namespace refrag
