// Runs CUDA kernels, compiled as ordinary C++, on the CPU: the grid's blocks in turn, a block's threads as
// fibers. It is there to check a kernel's logic, not to be fast.
//
// A thread runs until it ends or waits (for the block, or for its warp). Then another one of the block runs,
// in an order that a seed shuffles anew after every wait. So a missing barrier shows as a wrong result: what
// was to be written before is not there yet, and shared memory begins as NaN in every type. Copies begun with
// cp.async arrive only when they are waited for.
//
// What a GPU would leave undefined ends with an Error that says so: threads that wait for different things
// for ever; a barrier that an ended thread never reaches; misaligned 16-byte copies; copies that nobody waits
// for. Addresses beyond an allocation are AddressSanitizer's business: every allocation is one of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "base/function_ref.h"

namespace refrag_on_host {

struct Dim {
    unsigned x = 1;
    unsigned y = 1;
    unsigned z = 1;
};

// ---- for tests ----------------------------------------------------------------------------------------

// The shuffles' seed; from it every launch takes its own. Thread-local, as all state here.
void set_seed(uint64_t seed);
// Kernels launched so far by this thread.
uint64_t launches();

// Runs `kernel` for every thread of the grid. Throws refrag::Error where the launch or what the kernel does
// is against the rules.
void run_grid(Dim grid, Dim block, size_t shared_bytes, refrag::FunctionRef<void()> kernel);

// ---- for kernels, by the names of on_host.h -------------------------------------------------------------

const Dim& thread_index();
const Dim& block_index();
const Dim& block_dim();
const Dim& grid_dim();
void* dynamic_shared_memory();
// The block's memory for the variable that `tag` stands for; made, and poisoned, when first asked for.
void* static_shared_memory(const void* tag, size_t bytes);
void block_barrier();

// Waits until all lanes of the warp that `mask` names have come here with the same `what`; the last to come
// runs `together` over what each lane brought (null for lanes outside of the mask), and all go on.
void warp_together(const char* what, uint32_t mask, void* mine,
                   refrag::FunctionRef<void(void* const* lanes)> together);

// cp.async: 16 bytes, or zeros where `from` is null; groups; waiting until at most `left` groups are under
// way.
void copy_async(void* to, const void* from);
void copy_async_commit();
void copy_async_wait(int left);

// Ends the launch with this message, its parts joined. Owns nothing on the caller's stack, which is
// abandoned.
[[noreturn]] void break_rule(std::initializer_list<const char*> message);

}  // namespace refrag_on_host
