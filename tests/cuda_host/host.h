// The functions of csrc/cuda/device.h on the host, so that tests run the very source of the kernels without a GPU.
//
// A block's threads are fibers of one operating system thread, which switch only where threads must wait for each
// other: at barriers and at operations of a whole warp. Blocks run one after the other, so a mistake in the order of
// memory between blocks goes unseen. What is checked on the way:
//
//   - Global memory may be touched only inside the buffers that the test has named, aligned to the access.
//   - A kernel that may start while those before it still run touches global memory only once it has waited for them,
//     all of its threads each for itself; weights alone may be read before.
//   - Shared memory starts as NaN, and what lies behind its end must be untouched at the end.
//   - A copy by cp.async makes its destination NaN at once and arrives only when its own thread waits for it: as late
//     as the hardware may deliver it.
//   - Threads that wait for each other in vain are reported, as are warps whose lanes are at different operations.
//   - The order in which fibers run is the test's choice (greedy from either end, or at random), so that a missing
//     barrier shows as a wrong result in one of them; blocks run in that order too.
//
// The first problem found is kept as a sentence; the run goes on, or ends where it cannot.
#pragma once

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// Blocks run one after the other, so one copy serves them all.
#define __shared__ static

namespace autoq::cuda {

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kCanary = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format

enum class Order { kAscending, kDescending, kRandom };

// ---- what the test sets and reads -----------------------------------------------------------------------------------

struct Buffer {
    const char* begin;
    size_t bytes;
    bool writable;
    std::string name;
    bool is_weight = false;
};

struct State {
    Order order = Order::kAscending;
    std::mt19937 random{0};
    std::vector<Buffer> buffers;
    std::string problem;
    bool overlapping = false;  // the kernel that runs: it may have started early
    // The device that the launchers see.
    int multiprocessors = 4;
    int shared_bytes_per_block = 227 * 1024;
    int major = 9, minor = 0;
};

inline State& state() {
    static State one;
    return one;
}

inline void report(const std::string& problem) {
    if (state().problem.empty()) state().problem = problem;
}

bool may_be_early();

inline bool in_buffer(const void* pointer, size_t bytes, bool write) {
    const auto* address = static_cast<const char*>(pointer);
    char text[160];
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
        std::snprintf(text, sizeof(text), "an access to %zu bytes of global memory is not aligned", bytes);
        report(text);
        return false;
    }
    for (const Buffer& buffer : state().buffers) {
        if (address < buffer.begin || address + bytes > buffer.begin + buffer.bytes) continue;
        if (may_be_early() && (write || !buffer.is_weight)) {
            report("an access to " + buffer.name + " by a thread that has not waited for the kernels before");
        }
        if (!write || buffer.writable) return true;
        std::snprintf(text, sizeof(text), "a write into %s, which is only read", buffer.name.c_str());
        report(text);
        return false;
    }
    const Buffer* nearest = nullptr;
    for (const Buffer& buffer : state().buffers) {
        if (!nearest || std::llabs(address - buffer.begin) < std::llabs(address - nearest->begin)) nearest = &buffer;
    }
    std::snprintf(text, sizeof(text), "a %s of %zu bytes outside the buffers, at %s + %lld", write ? "write" : "read",
                  bytes, nearest ? nearest->name.c_str() : "no buffer",
                  nearest ? static_cast<long long>(address - nearest->begin) : 0ll);
    report(text);
    return false;
}

// ---- threads --------------------------------------------------------------------------------------------------------

struct AsyncCopy {
    char* to;
    const char* from;  // null: zeros
};

struct Fiber {
    Index3 thread;
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false, done = false, blocked = false;
    bool has_waited = false;  // for earlier kernels
    std::vector<AsyncCopy> issued;
    std::deque<std::vector<AsyncCopy>> committed;
};

struct Warp {
    int size = 0, arrived = 0;
    const char* operation = nullptr;
    void* operands[kWarp] = {};
};

struct Barrier {
    std::vector<int> waiting;
    int arrived = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<char> shared;
    size_t shared_bytes = 0;
    int alive = 0, current = 0;
    unsigned long run = 0;  // counted
    jmp_buf scheduler;
    std::function<void()> kernel;
};

inline Block& block() {
    static Block one;
    return one;
}

inline Index3 block_index, grid_size, block_size;

inline Fiber& fiber() { return block().fibers[block().current]; }

inline bool may_be_early() { return state().overlapping && !fiber().has_waited; }

__attribute__((noinline)) inline void suspend() {
    if (_setjmp(fiber().resume) == 0) _longjmp(block().scheduler, 1);
}

inline void wait_blocked() {
    fiber().blocked = true;
    suspend();
}

inline void fiber_main() {
    block().kernel();
    fiber().done = true;
    --block().alive;
    _longjmp(block().scheduler, 1);
}

// The next fiber to run, or -1.
inline int pick() {
    const int count = static_cast<int>(block().fibers.size());
    const Order order = state().order;
    const int start = order == Order::kRandom ? static_cast<int>(state().random() % count) : 0;
    for (int i = 0; i < count; ++i) {
        const int index = order == Order::kDescending ? count - 1 - i : (start + i) % count;
        const Fiber& candidate = block().fibers[index];
        if (!candidate.done && !candidate.blocked) return index;
    }
    return -1;
}

__attribute__((noinline)) inline void enter(int index) {
    Block& running = block();
    running.current = index;
    Fiber& next = running.fibers[index];
    if (_setjmp(running.scheduler) != 0) return;
    if (next.started) _longjmp(next.resume, 1);
    next.started = true;
    setcontext(&next.context);
}

inline void release_barrier(Barrier& barrier) {
    for (int index : barrier.waiting) block().fibers[index].blocked = false;
    barrier.waiting.clear();
    barrier.arrived = 0;
}

inline void start_block(unsigned threads, size_t shared_bytes) {
    Block& running = block();
    running.fibers.resize(threads);
    running.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
    for (Barrier& barrier : running.barriers) barrier = Barrier{};
    running.shared.assign(shared_bytes + kCanary + 128, static_cast<char>(kPoison));
    running.shared_bytes = shared_bytes;
    running.alive = static_cast<int>(threads);
    ++running.run;
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& made = running.fibers[i];
        made.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        made.started = made.done = made.blocked = made.has_waited = false;
        made.issued.clear();
        made.committed.clear();
        getcontext(&made.context);
        made.context.uc_stack.ss_sp = made.stack.get();
        made.context.uc_stack.ss_size = kStack;
        makecontext(&made.context, fiber_main, 0);
        ++running.warps[i / kWarp].size;
    }
}

inline char* shared_begin() {
    const auto address = reinterpret_cast<uintptr_t>(block().shared.data());
    return block().shared.data() + (128 - address % 128) % 128;
}

inline void run_block(unsigned threads, size_t shared_bytes) {
    start_block(threads, shared_bytes);
    for (int index = pick(); index >= 0; index = pick()) enter(index);
    if (block().alive > 0) report("threads wait for each other in vain");
    const char* end = shared_begin() + shared_bytes;
    for (size_t i = 0; i < kCanary; ++i) {
        if (static_cast<unsigned char>(end[i]) != kPoison) return report("a write behind the end of shared memory");
    }
}

// The order in which blocks run.
inline std::vector<unsigned> order_of(unsigned blocks) {
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    if (state().order == Order::kDescending) std::reverse(order.begin(), order.end());
    if (state().order == Order::kRandom) std::shuffle(order.begin(), order.end(), state().random);
    return order;
}

// All lanes of a warp come together; the last to arrive computes for all.
template <typename Operand, typename Compute>
void collective(const char* operation, Operand& mine, Compute compute) {
    Block& running = block();
    Warp& warp = running.warps[running.current / kWarp];
    if (warp.arrived > 0 && warp.operation != operation) report("lanes of a warp are at different operations");
    warp.operation = operation;
    warp.operands[running.current % kWarp] = &mine;
    if (++warp.arrived < warp.size) return wait_blocked();
    warp.arrived = 0;
    Operand* lanes[kWarp];
    for (int i = 0; i < warp.size; ++i) lanes[i] = static_cast<Operand*>(warp.operands[i]);
    compute(lanes, warp.size);
    const int first = running.current / kWarp * kWarp;
    for (int i = first; i < first + warp.size; ++i) running.fibers[i].blocked = false;
}

inline void arrive(int id, int threads, bool wait) {
    Block& running = block();
    Barrier& barrier = running.barriers[id];
    if (wait) barrier.waiting.push_back(running.current);
    if (++barrier.arrived >= threads) return release_barrier(barrier);
    if (wait) wait_blocked();
}

inline void check_shared(const void* pointer, size_t bytes) {
    const char* address = static_cast<const char*>(pointer);
    if (address < shared_begin() || address + bytes > shared_begin() + block().shared_bytes) {
        report("an asynchronous copy to outside of shared memory");
    }
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) report("an asynchronous copy that is not aligned");
}

inline float half_to_float(uint16_t bits) { return c10::Half(bits, c10::Half::from_bits()); }
inline uint16_t float_to_half(float value) { return c10::Half(value).x; }
inline float bfloat_to_float(uint16_t bits) { return c10::BFloat16(bits, c10::BFloat16::from_bits()); }
inline uint16_t float_to_bfloat(float value) { return c10::BFloat16(value).x; }

}  // namespace host

// ---- device.h -------------------------------------------------------------------------------------------------------

#define threadIdx (::autoq::cuda::host::fiber().thread)
#define blockIdx (::autoq::cuda::host::block_index)
#define blockDim (::autoq::cuda::host::block_size)
#define gridDim (::autoq::cuda::host::grid_size)

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return host::half_to_float(value.bits); }
inline float to_float(BFloat16 value) { return host::bfloat_to_float(value.bits); }

template <typename T>
T from_float(float value) {
    if constexpr (std::is_same_v<T, Half>) {
        return Half{host::float_to_half(value)};
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return BFloat16{host::float_to_bfloat(value)};
    } else {
        return value;
    }
}

template <typename T>
uint32_t pair_from_floats(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int shift : {0, 16}) {
        const auto part = [shift](uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> shift)}); };
        // The product of two such numbers is exact in double, and the sum nearly always.
        const double exact = static_cast<double>(part(a)) * part(b) + part(c);
        result |= static_cast<uint32_t>(from_float<T>(static_cast<float>(exact)).bits) << shift;
    }
    return result;
}

inline float exp_of(float x) { return std::exp(x); }
inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}

template <typename T>
T shuffle(T value, int lane) {
    struct Operand {
        T value;
        int lane;
    } mine{value, lane};
    host::collective("shuffle", mine, [](Operand** lanes, int count) {
        T values[host::kWarp];
        for (int i = 0; i < count; ++i) values[i] = lanes[i]->value;
        for (int i = 0; i < count; ++i) lanes[i]->value = values[lanes[i]->lane % count];
    });
    return mine.value;
}

inline int lane_index() { return host::block().current % host::kWarp; }

template <typename T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, lane_index() ^ mask);
}

inline void trap() { std::abort(); }

inline void sync_warp() {
    int nothing = 0;
    host::collective("sync_warp", nothing, [](int**, int) {});
}

inline void sync_threads() { host::arrive(0, host::block().alive, true); }
inline void sync_barrier(int id, int threads) { host::arrive(id, threads, true); }
inline void arrive_barrier(int id, int threads) { host::arrive(id, threads, false); }

// The fragments of mma.m16n8k16, by lane = 4 * group + member:
//   a[0], a[2]: row group,     columns 2 * member + {0, 1}, and 8 more for a[2]
//   a[1], a[3]: row group + 8, likewise
//   b[0], b[1]: column group,  rows 2 * member + {0, 1}, and 8 more for b[1]
//   d[0..1]: row group, columns 2 * member + {0, 1};  d[2..3]: row group + 8
template <typename T>
void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operand {
        float* sum;
        const uint32_t* a;
        uint32_t b[2];
    } mine{sum, a, {b0, b1}};
    host::collective("mma", mine, [](Operand** lanes, int count) {
        if (count != host::kWarp) return host::report("mma in a warp that is not whole");
        const auto element = [](uint32_t pair, int index) {
            return static_cast<double>(to_float(T{static_cast<uint16_t>(pair >> (16 * index))}));
        };
        double weights[16][16], inputs[16][8];
        for (int lane = 0; lane < host::kWarp; ++lane) {
            const int group = lane / 4, member = lane % 4;
            for (int i = 0; i < 8; ++i) {
                weights[group + 8 * (i / 2 % 2)][2 * member + i % 2 + 8 * (i / 4)] =
                    element(lanes[lane]->a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i)
                inputs[2 * member + i % 2 + 8 * (i / 2)][group] = element(lanes[lane]->b[i / 2], i % 2);
        }
        for (int lane = 0; lane < host::kWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double exact = lanes[lane]->sum[i];
                for (int k = 0; k < 16; ++k) exact += weights[row][k] * inputs[k][column];
                lanes[lane]->sum[i] = static_cast<float>(exact);
            }
        }
    });
}

// ---- memory ---------------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(host::shared_begin()); }

template <typename T>
T load_global(const T* pointer) {
    T value{};
    if (host::in_buffer(pointer, sizeof(T), false)) std::memcpy(&value, pointer, sizeof(T));
    return value;
}

template <typename T>
T load_written(const T* pointer) {
    return load_global(pointer);
}

template <typename T>
void store_global(T* pointer, T value) {
    if (host::in_buffer(pointer, sizeof(T), true)) std::memcpy(pointer, &value, sizeof(T));
}

inline uint32_t atomic_add(uint32_t* pointer, uint32_t value) {
    if (!host::in_buffer(pointer, sizeof(uint32_t), true)) return 0;
    const uint32_t before = *pointer;
    *pointer += value;
    return before;
}

inline void memory_fence() {}

using SharedAddress = unsigned char*;

inline SharedAddress shared_address(void* pointer) { return static_cast<SharedAddress>(pointer); }

inline void copy_async_16(SharedAddress to, const void* from, bool inside = true) {
    host::check_shared(to, 16);
    if (inside && !host::in_buffer(from, 16, false)) return;
    std::memset(to, host::kPoison, 16);
    host::fiber().issued.push_back({reinterpret_cast<char*>(to), inside ? static_cast<const char*>(from) : nullptr});
}

inline uint64_t read_policy(bool /*once*/) { return 0; }

inline void copy_async_16_under(SharedAddress to, const void* from, uint64_t) { copy_async_16(to, from); }

inline void copy_async_commit() {
    host::fiber().committed.push_back(std::move(host::fiber().issued));
    host::fiber().issued.clear();
}

template <int kNewest>
void copy_async_wait() {
    auto& groups = host::fiber().committed;
    for (; groups.size() > kNewest; groups.pop_front()) {
        for (const host::AsyncCopy& copy : groups.front()) {
            if (copy.from) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
    }
}

// ---- launching ------------------------------------------------------------------------------------------------------

inline const char* device_properties(DeviceProperties& found) {
    const host::State& set = host::state();
    found = {set.multiprocessors, set.shared_bytes_per_block, set.major, set.minor};
    return nullptr;
}

template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* /*stream*/,
                   std::type_identity_t<Parameters>... arguments) {
    if (shape.shared_bytes > static_cast<size_t>(host::state().shared_bytes_per_block)) return "too much shared memory";
    host::grid_size = shape.grid;
    host::block_size = shape.block;
    host::block().kernel = [=] { kernel(arguments...); };
    const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
    if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
    for (const unsigned index : host::order_of(shape.grid.x * shape.grid.y * shape.grid.z)) {
        host::block_index = {index % shape.grid.x, index / shape.grid.x % shape.grid.y,
                             index / shape.grid.x / shape.grid.y};
        host::run_block(threads, shape.shared_bytes);
    }
    return nullptr;
}

// ---- overlap.h ------------------------------------------------------------------------------------------------------

constexpr bool kOverlaps = true;

inline void wait_for_earlier_kernels() { host::fiber().has_waited = true; }
inline void let_the_next_kernel_start() {}

template <typename... Parameters>
const char* launch_overlapping(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                               std::type_identity_t<Parameters>... arguments) {
    host::state().overlapping = true;
    const char* error = launch(kernel, shape, stream, arguments...);
    host::state().overlapping = false;
    return error;
}

}  // namespace autoq::cuda
