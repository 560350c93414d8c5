// What Hopper has beside the rest of device.h: bulk copies to shared memory, barriers that count their bytes, and
// products of four warps (a warpgroup), which read one operand from shared memory and go on while the threads do
// something else. Without sm_90a, kTakesWarpgroups is false and the functions must not be called.
#pragma once

#include "device.h"

#ifdef AUTOQ_CUDA_HOST
#include "hopper_host.h"
#else

namespace autoq::cuda {

// __CUDA_ARCH_FEAT_SM90_ALL: this is the code for sm_90a. AUTOQ_SM90A: there will be such code.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kTakesWarpgroups = true;
#elif defined(__CUDA_ARCH__) || !defined(AUTOQ_SM90A)
constexpr bool kTakesWarpgroups = false;
#else
constexpr bool kTakesWarpgroups = true;
#endif

// ---- barriers in shared memory --------------------------------------------------------------------------------------

// Makes 8 bytes of shared memory a barrier, whose phases end when so many threads have arrived and the bytes that they
// announced are there. To be followed by publish_barriers and sync_threads.
__device__ __forceinline__ void barrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows the barriers that this thread has made to the bulk copies.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and announces so many bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase has ended whose number is even (0) or odd (1).
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Starts to copy a multiple of 16 bytes from global to shared memory, both aligned to 16; the barrier counts them.
__device__ __forceinline__ void copy_bulk(SharedAddress to, const void* from, int bytes, SharedAddress barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The same, under a policy for the second-level cache (read_policy).
__device__ __forceinline__ void copy_bulk_under(SharedAddress to, const void* from, int bytes, SharedAddress barrier,
                                                uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

// A 64 x 16 operand in shared memory, made of pieces of 8 rows x 8 columns: a piece is 128 bytes on end, row by row.
struct SharedMatrix {
    uint64_t descriptor;

    // `column_step` and `row_step`: bytes from a piece to the one beside it and to the one below.
    __device__ __forceinline__ SharedMatrix(SharedAddress begin, int column_step, int row_step)
        : descriptor(static_cast<uint64_t>(begin >> 4 & 0x3fff) | static_cast<uint64_t>(column_step >> 4) << 16 |
                     static_cast<uint64_t>(row_step >> 4) << 32) {}
};

// Keeps what is computed before from being computed behind, and the other way round.
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }

// Comes before the first product of registers that others than products have written.
__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// sum = a * b^T (+ sum): a is 64 x 16, of which each warp has 16 rows in the fragments of mma_m16n8k16, and so it has
// of the sums, 8 columns after the other. Starts only; nothing may touch the registers until warpgroup_wait.
template <typename T>
__device__ __forceinline__ void warpgroup_multiply(float (&sum)[8][4], const uint32_t (&a)[4], const SharedMatrix& b,
                                                   bool add) {
    // A literal for `add` would let ptxas take the product for one that is not needed.
    const int adds = add;
#define AUTOQ_PRODUCT(type)                                                                                      \
    asm volatile(                                                                                                \
        "{\n"                                                                                                    \
        ".reg .pred adds;\n"                                                                                     \
        "setp.ne.b32 adds, %37, 0;\n"                                                                            \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                              \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n"         \
        "}"                                                                                                      \
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]),  \
          "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]),  \
          "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3]), "+f"(sum[4][0]), "+f"(sum[4][1]),  \
          "+f"(sum[4][2]), "+f"(sum[4][3]), "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]),  \
          "+f"(sum[6][0]), "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]),  \
          "+f"(sum[7][2]), "+f"(sum[7][3])                                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(adds))
    if constexpr (std::is_same_v<T, Half>) {
        AUTOQ_PRODUCT("f16");
    } else {
        AUTOQ_PRODUCT("bf16");
    }
#undef AUTOQ_PRODUCT
}

// Ends a group of products.
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for the groups of products, but for the newest ones.
template <int kNewest>
__device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}

}  // namespace autoq::cuda

#endif
