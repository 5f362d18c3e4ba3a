// See executor.h. Fibers are switched by a few lines of assembly on x86-64 (ten nanoseconds), elsewhere by
// ucontext (microseconds: it asks the kernel about signals). AddressSanitizer and ThreadSanitizer are told of
// every switch.
#include "executor.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
extern "C" void refrag_on_host_switch(void** save, void* to);
// Keeps what a call must keep on the old stack, and takes it from the new one.
asm(R"(
.text
.p2align 4
.globl refrag_on_host_switch
.type refrag_on_host_switch, @function
refrag_on_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size refrag_on_host_switch, .-refrag_on_host_switch
)");
#endif

namespace refrag_on_host {
namespace {

using refrag::FunctionRef;

constexpr unsigned max_block_threads = 1024;
constexpr size_t max_shared_bytes = 227 << 10;  // of a block, on sm_90
constexpr unsigned warp_size = 32;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t stack_bytes = 256 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
constexpr int poison = 0xff;  // NaN in fp32, fp16 and bf16

struct Copy {
    void* to;
    const void* from;
};

enum class State { runnable, at_barrier, at_warp, done };

struct Fiber {
    std::unique_ptr<unsigned char[]> stack;
#if defined(__x86_64__)
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
    void* tsan = nullptr;
#endif
    State state = State::done;
    Dim index;
    std::deque<std::vector<Copy>> groups;  // committed
    std::vector<Copy> open;
};

struct Warp {
    const char* what = nullptr;
    uint32_t mask = 0;
    uint32_t arrived = 0;
    void* lanes[warp_size] = {};
};

struct Shared {
    std::unique_ptr<unsigned char[]> data;
    size_t bytes;
};

// One thread's executor.
struct Executor {
    uint64_t seed = 1;
    uint64_t n_launches = 0;
    std::vector<Fiber> fibers;  // kept for their stacks
    bool running = false;

    // The launch.
    Dim grid, block, at;
    FunctionRef<void()>* kernel = nullptr;
    std::mt19937_64 random;
    unsigned char* dynamic = nullptr;
    std::map<const void*, Shared> statics;
    std::vector<const void*>
        fresh;  // static arrays not yet asked for in this block are poisoned when they are

    // The block.
    unsigned n_threads = 0;
    std::vector<Warp> warps;
    unsigned current = 0;
    std::string broken;  // the rule, or empty

    // The scheduler's own context.
#if defined(__x86_64__)
    void* scheduler_sp = nullptr;
#else
    ucontext_t scheduler;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
    void* scheduler_tsan = nullptr;
#endif

    Fiber& fiber() {
        return fibers[current];
    }
};

thread_local Executor executor;

void to_scheduler(bool ends) {
    Executor& e = executor;
    Fiber& f = e.fiber();
    (void)f;
    (void)ends;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &f.fake_stack, e.scheduler_stack,
                                   e.scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(e.scheduler_tsan, 0);
#endif
#if defined(__x86_64__)
    refrag_on_host_switch(&f.sp, e.scheduler_sp);
#else
    swapcontext(&f.context, &e.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.fake_stack, &e.scheduler_stack, &e.scheduler_stack_bytes);
#endif
}

void fiber_main() {
    Executor& e = executor;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &e.scheduler_stack, &e.scheduler_stack_bytes);
#endif
    try {
        (*e.kernel)();
        const Fiber& f = e.fiber();
        if (!f.groups.empty() || !f.open.empty()) {
            e.broken = "a thread ended while copies that it began (cp.async) were under way";
        }
    } catch (const std::exception& error) {
        e.broken = error.what();
    }
    e.fiber().state = State::done;
    to_scheduler(true);
}

void start(Fiber& f) {
    if (!f.stack) f.stack = std::make_unique<unsigned char[]>(stack_bytes);
    f.groups.clear();
    f.open.clear();
    f.state = State::runnable;
#if defined(__SANITIZE_ADDRESS__)
    f.fake_stack = nullptr;
    __asan_unpoison_memory_region(f.stack.get(), stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    if (f.tsan != nullptr) __tsan_destroy_fiber(f.tsan);
    f.tsan = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    // As if fiber_main had been called: its stack pointer is 8 beyond a multiple of 16.
    auto top = (reinterpret_cast<uintptr_t>(f.stack.get()) + stack_bytes) & ~uintptr_t{15};
    auto** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
}

void resume(unsigned thread) {
    Executor& e = executor;
    e.current = thread;
    Fiber& f = e.fiber();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&e.scheduler_fake_stack, f.stack.get(), stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    e.scheduler_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f.tsan, 0);
#endif
#if defined(__x86_64__)
    refrag_on_host_switch(&e.scheduler_sp, f.sp);
#else
    swapcontext(&e.scheduler, &f.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(e.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Called when no thread can go on: lets those at the block's barrier pass, or says why nobody ever will.
void release_barrier() {
    Executor& e = executor;
    unsigned at_barrier = 0, done = 0;
    const Warp* stuck = nullptr;
    for (unsigned t = 0; t < e.n_threads; ++t) {
        at_barrier += e.fibers[t].state == State::at_barrier ? 1 : 0;
        done += e.fibers[t].state == State::done ? 1 : 0;
        if (e.fibers[t].state == State::at_warp) stuck = &e.warps[t / warp_size];
    }
    if (stuck != nullptr) {
        e.broken = refrag::str("threads wait for ever at ", stuck->what,
                               ": others of their warp ended, or wait for the block");
    } else if (done > 0) {
        e.broken =
            refrag::str(at_barrier, " threads wait at a barrier which ", done, " ended threads never reach");
    }
    for (unsigned t = 0; t < e.n_threads; ++t) {
        if (e.fibers[t].state == State::at_barrier) e.fibers[t].state = State::runnable;
    }
}

void run_block() {
    Executor& e = executor;
    e.fresh.clear();
    e.warps.assign((e.n_threads + warp_size - 1) / warp_size, Warp{});
    for (unsigned t = 0; t < e.n_threads; ++t) {
        start(e.fibers[t]);
        e.fibers[t].index = {t % e.block.x, t / e.block.x % e.block.y, t / (e.block.x * e.block.y)};
    }
    std::vector<unsigned> turn;
    for (;;) {
        turn.clear();
        bool waiting = false;
        for (unsigned t = 0; t < e.n_threads; ++t) {
            if (e.fibers[t].state == State::runnable) turn.push_back(t);
            waiting = waiting || e.fibers[t].state != State::done;
        }
        if (turn.empty()) {
            if (!waiting) return;
            release_barrier();
            if (!e.broken.empty()) return;
            continue;
        }
        std::shuffle(turn.begin(), turn.end(), e.random);
        for (const unsigned t : turn) {
            resume(t);
            if (!e.broken.empty()) return;
        }
    }
}

bool within(Dim d, unsigned x, unsigned yz) {
    return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= x && d.y <= yz && d.z <= yz;
}

}  // namespace

void set_seed(uint64_t seed) {
    executor.seed = seed;
}

uint64_t launches() {
    return executor.n_launches;
}

void run_grid(Dim grid, Dim block, size_t shared_bytes, FunctionRef<void()> kernel) {
    Executor& e = executor;
    const unsigned long n_threads = static_cast<unsigned long>(block.x) * block.y * block.z;
    REFRAG_CHECK(!e.running, refrag::Status::runtime, "a kernel launched from a kernel");
    REFRAG_CHECK(within(grid, 0x7fffffff, 65535), refrag::Status::runtime, "a grid of ", grid.x, " x ",
                 grid.y, " x ", grid.z, " blocks: CUDA takes 1 to 2147483647 x 65535 x 65535");
    REFRAG_CHECK(n_threads >= 1 && n_threads <= max_block_threads && block.z <= 64, refrag::Status::runtime,
                 "a block of ", block.x, " x ", block.y, " x ", block.z, " threads: CUDA takes 1 to 1024");
    REFRAG_CHECK(shared_bytes <= max_shared_bytes, refrag::Status::runtime, shared_bytes,
                 " bytes of shared memory: a block has ", max_shared_bytes);
    const auto shared = std::make_unique<unsigned char[]>(shared_bytes);
    e.running = true;
    e.grid = grid;
    e.block = block;
    e.kernel = &kernel;
    e.random.seed(e.seed * 1000003 + e.n_launches++);
    e.dynamic = shared.get();
    e.n_threads = static_cast<unsigned>(n_threads);
    if (e.fibers.size() < n_threads) e.fibers.resize(n_threads);
    e.broken.clear();
    for (unsigned z = 0; z < grid.z && e.broken.empty(); ++z) {
        for (unsigned y = 0; y < grid.y && e.broken.empty(); ++y) {
            for (unsigned x = 0; x < grid.x && e.broken.empty(); ++x) {
                e.at = {x, y, z};
                if (shared_bytes > 0) std::memset(shared.get(), poison, shared_bytes);
                run_block();
            }
        }
    }
    e.running = false;
    e.statics.clear();
    if (e.broken.empty()) return;
    for (Fiber& f : e.fibers) f.state = State::done;  // what is on their stacks is forgotten
    refrag::fail(refrag::Status::runtime, "kernel, block (", e.at.x, ", ", e.at.y, ", ", e.at.z,
                 "): ", e.broken);
}

const Dim& thread_index() {
    return executor.fiber().index;
}
const Dim& block_index() {
    return executor.at;
}
const Dim& block_dim() {
    return executor.block;
}
const Dim& grid_dim() {
    return executor.grid;
}

void* dynamic_shared_memory() {
    return executor.dynamic;
}

void* static_shared_memory(const void* tag, size_t bytes) {
    Executor& e = executor;
    Shared& shared = e.statics[tag];
    if (!shared.data) shared = {std::make_unique<unsigned char[]>(bytes), bytes};
    if (std::find(e.fresh.begin(), e.fresh.end(), tag) == e.fresh.end()) {
        e.fresh.push_back(tag);
        std::memset(shared.data.get(), poison, bytes);
    }
    return shared.data.get();
}

void block_barrier() {
    executor.fiber().state = State::at_barrier;
    to_scheduler(false);
}

void warp_together(const char* what, uint32_t mask, void* mine,
                   FunctionRef<void(void* const* lanes)> together) {
    Executor& e = executor;
    const unsigned lane = e.current % warp_size, first = e.current - lane;
    Warp& warp = e.warps[e.current / warp_size];
    if ((mask >> lane & 1) == 0) break_rule({what, ": a lane outside of its own mask"});
    if (warp.arrived == 0) {
        warp.what = what;
        warp.mask = mask;
    } else if (warp.what != what || warp.mask != mask) {
        break_rule({"lanes of one warp at ", warp.what, " and at ", what, ", or with different masks"});
    }
    warp.arrived |= 1u << lane;
    warp.lanes[lane] = mine;
    if (warp.arrived != mask) {
        e.fiber().state = State::at_warp;
        to_scheduler(false);
        return;
    }
    together(warp.lanes);
    warp = Warp{};
    for (unsigned i = 0; i < warp_size; ++i) {
        if ((mask >> i & 1) != 0 && i != lane) e.fibers[first + i].state = State::runnable;
    }
}

void copy_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        break_rule({"cp.async of 16 bytes from or to an address that is no multiple of 16"});
    }
    std::memset(to, poison, 16);
    executor.fiber().open.push_back({to, from});
}

void copy_async_commit() {
    Fiber& f = executor.fiber();
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void copy_async_wait(int left) {
    Fiber& f = executor.fiber();
    while (static_cast<int>(f.groups.size()) > left) {
        for (const Copy& copy : f.groups.front()) {
            if (copy.from != nullptr)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        f.groups.pop_front();
    }
}

void break_rule(std::initializer_list<const char*> message) {
    executor.broken.clear();
    for (const char* part : message) executor.broken += part;
    executor.fiber().state = State::done;
    to_scheduler(true);
    std::abort();  // a fiber that broke a rule is never resumed
}

}  // namespace refrag_on_host
