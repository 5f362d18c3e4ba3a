// libFuzzer's entry, in a fuzz binary; nothing in the tests. Include it last in a target's file.
#pragma once

#include "targets.h"

#ifdef REFRAG_LIBFUZZER
#define REFRAG_FUZZ_ENTRY(target)                                                         \
    extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {             \
        refrag_fuzz::target(std::string_view(reinterpret_cast<const char*>(data), size)); \
        return 0;                                                                         \
    }
#else
#define REFRAG_FUZZ_ENTRY(target)
#endif
