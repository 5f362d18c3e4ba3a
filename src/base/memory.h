// How much memory this process may still take, and how much it took at most. Linux only; elsewhere, and where
// the system does not say, "unknown".
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace refrag {

// Bytes that can be allocated without swapping: what the machine has available, or what the process's control
// groups leave if that is less. UINT64_MAX where unknown.
uint64_t available_memory_bytes();

// The most resident memory this process had so far. 0 where unknown.
uint64_t peak_resident_bytes();

// What a control group leaves, from its files' texts: `limit` ("max" or bytes), `current` (bytes) and `stat`
// (lines "name bytes", of which reclaimable page cache, "inactive_file", counts as free). None where there is
// no limit or the texts are something else.
std::optional<uint64_t> control_group_left(const std::string& limit, const std::string& current,
                                           const std::string& stat);

}  // namespace refrag
