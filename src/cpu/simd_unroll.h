// REFRAG_UNROLL before a loop with constant bounds: it must vanish, so that its arrays become registers.
#pragma once

#if defined(__clang__)
#define REFRAG_UNROLL _Pragma("clang loop unroll(full)")
#else
#define REFRAG_UNROLL _Pragma("GCC unroll 32")
#endif
