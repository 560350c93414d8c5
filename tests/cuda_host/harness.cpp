// Settings and findings of the emulation, for the tests.
#include "harness.h"

#include "device.h"

using namespace autoq::cuda;

// Forgets the buffers and the problem; `order` is host::Order.
AUTOQ_EXPORT void host_reset(int order, unsigned seed) {
    host::State& state = host::state();
    state.order = static_cast<host::Order>(order);
    state.random.seed(seed);
    state.buffers.clear();
    state.problem.clear();
}

AUTOQ_EXPORT void host_set_device(int multiprocessors, int shared_bytes_per_block, int major, int minor) {
    host::State& state = host::state();
    state.multiprocessors = multiprocessors;
    state.shared_bytes_per_block = shared_bytes_per_block;
    state.major = major;
    state.minor = minor;
}

// Memory that kernels may read, and write where it is writable.
AUTOQ_EXPORT void host_add_buffer(const void* begin, int64_t bytes, bool writable, const char* name) {
    host::state().buffers.push_back({static_cast<const char*>(begin), static_cast<size_t>(bytes), writable, name});
}

// The first problem since the reset, or an empty string.
AUTOQ_EXPORT const char* host_problem() { return host::state().problem.c_str(); }
