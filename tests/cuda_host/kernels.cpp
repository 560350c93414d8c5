// Small kernels with known results, right and wrong ones, to test the emulation itself.
#include "harness.h"
#include "hopper.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread adds up, over four stages of asynchronous copies, four integers that its neighbour of the other warp
// copied.
template <bool kWait, bool kBarrier>
__global__ void sum_neighbours(const uint4* in, uint32_t* out, int stages) {
    auto* buffer = reinterpret_cast<uint4*>(shared_memory());
    const unsigned thread = threadIdx.x;
    uint32_t sum = 0;
    copy_async_16(shared_address(buffer + thread), in + thread);
    copy_async_commit();
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) {
            copy_async_16(shared_address(buffer + (stage + 1) % 2 * kThreads + thread),
                          in + (stage + 1) * kThreads + thread);
        }
        copy_async_commit();
        if (kWait) copy_async_wait<1>();
        if (kBarrier) sync_threads();
        const uint4 read = buffer[stage % 2 * kThreads + (thread + 32) % kThreads];
        sum += read.x + read.y + read.z + read.w;
        sync_threads();
    }
    store_global(out + thread, sum);
}

__global__ void matrix_product(const uint4* a, const uint2* b, float4* d) {
    const uint4 weights = load_global(a + threadIdx.x);
    const uint2 inputs = load_global(b + threadIdx.x);
    const uint32_t fragment[4] = {weights.x, weights.y, weights.z, weights.w};
    float sum[4] = {};
    mma_m16n8k16<Half>(sum, fragment, inputs.x, inputs.y);
    store_global(d + threadIdx.x, make_float4(sum[0], sum[1], sum[2], sum[3]));
}

// Four warps: d = 1 + 2 a b^T, of 64 x 16 by 64 x 16, the second operand in pieces, copied in bulk.
__global__ void warpgroup_product(const uint32_t* a, const unsigned char* b, float* d, bool wait, int told) {
    constexpr int kBytes = 64 * 16 * 2;
    const SharedAddress matrix = shared_address(shared_memory());
    const SharedAddress barrier = matrix + kBytes;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        publish_barriers();
    }
    sync_threads();
    if (threadIdx.x == 0) {
        barrier_expect(barrier, told);
        copy_bulk(matrix, b, kBytes / 2, barrier);
        copy_bulk(matrix + kBytes / 2, b + kBytes / 2, kBytes / 2, barrier);
    }
    barrier_wait(barrier, 0);
    const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = load_global(a + (row + i % 2 * 8) * 8 + lane % 4 + i / 2 * 4);
    float sum[8][4];
    for (auto& part : sum) part[0] = part[1] = part[2] = part[3] = 1.0f;
    warpgroup_begin();
    for (int i = 0; i < 2; ++i) {
        warpgroup_multiply<Half>(sum, fragment, SharedMatrix(matrix, kBytes / 2, 128), true);
    }
    warpgroup_commit();
    if (wait) warpgroup_wait<0>();
    for (int i = 0; i < 32; ++i) {
        store_global(d + (row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2, sum[i / 4][i % 4]);
    }
}

// The sum over a warp; lane 31 stays away from the last step where it is told to.
__global__ void warp_sum(float* values, bool leave) {
    float value = load_written(values + threadIdx.x);
    for (int mask = 16; mask > 0; mask /= 2) {
        if (leave && mask == 1 && threadIdx.x == 31) return;
        value += shuffle_xor(value, mask);
    }
    store_global(values + threadIdx.x, value);
}

// Warp 0 makes, warp 1 takes, by a named barrier.
__global__ void hand_over(float* out, bool hand) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        shared[lane] = static_cast<float>(lane);
        if (hand) arrive_barrier(1, kThreads);
    } else {
        sync_barrier(1, kThreads);
        store_global(out + lane, shared[31 - lane]);
    }
}

}  // namespace
}  // namespace autoq::cuda

using namespace autoq::cuda;

AUTOQ_EXPORT const char* test_sum_neighbours(const void* in, void* out, int stages, bool wait, bool barrier) {
    const LaunchShape shape{{1}, {kThreads}, 2 * kThreads * sizeof(uint4)};
    const auto run = [&](auto kernel) {
        return launch(kernel, shape, nullptr, static_cast<const uint4*>(in), static_cast<uint32_t*>(out), stages);
    };
    if (wait) return barrier ? run(sum_neighbours<true, true>) : run(sum_neighbours<true, false>);
    return barrier ? run(sum_neighbours<false, true>) : run(sum_neighbours<false, false>);
}

AUTOQ_EXPORT const char* test_matrix_product(const void* a, const void* b, void* d) {
    return launch(matrix_product, {{1}, {32}}, nullptr, static_cast<const uint4*>(a), static_cast<const uint2*>(b),
                  static_cast<float4*>(d));
}

AUTOQ_EXPORT const char* test_warpgroup_product(const void* a, const void* b, void* d, bool wait, int told) {
    return launch(warpgroup_product, {{1}, {128}, 64 * 16 * 2 + 8}, nullptr, static_cast<const uint32_t*>(a),
                  static_cast<const unsigned char*>(b), static_cast<float*>(d), wait, told);
}

AUTOQ_EXPORT const char* test_warp_sum(void* values, bool leave) {
    return launch(warp_sum, {{1}, {32}}, nullptr, static_cast<float*>(values), leave);
}

AUTOQ_EXPORT const char* test_hand_over(void* out, bool hand, int64_t shared_bytes) {
    return launch(hand_over, {{1}, {kThreads}, static_cast<size_t>(shared_bytes)}, nullptr, static_cast<float*>(out),
                  hand);
}
