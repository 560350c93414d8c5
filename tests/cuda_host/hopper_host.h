// The functions of csrc/cuda/hopper.h on the host (see host.h). Beside what is checked there:
//
//   - A bulk copy makes its destination NaN at once and arrives only when a thread waits for its barrier, which must
//     have been told as many bytes as were copied, and of as many threads as it was made for.
//   - A product of a warpgroup makes its sums NaN at once. It reads shared memory, and writes its sums, only when its
//     group is waited for.
#pragma once

#include <array>
#include <map>

#include "device.h"

namespace autoq::cuda {

constexpr bool kTakesWarpgroups = true;

namespace host {

struct BulkCopy {
    char* to;
    const char* from;
    int bytes;
};

// A barrier in shared memory, known by its address.
struct PhaseBarrier {
    int arrivals = 0, missing = 0;
    long announced = 0, copied = 0;
    unsigned phase = 0;
    std::vector<BulkCopy> copies;
    std::vector<int> waiting;
};

// A product of one warp, whose part of the left operand was collected when it began.
struct Product {
    float* sum;
    std::shared_ptr<std::array<std::array<double, 16>, 16>> left;
    const unsigned char* right;
    int column_step, row_step;
    bool add;
    double (*number)(uint16_t);
};

struct Products {
    std::vector<Product> issued;
    std::deque<std::vector<Product>> committed;
    std::map<float*, std::array<float, 32>> sums;  // of what is under way
};

// Of the block that runs.
struct HopperState {
    unsigned long run = 0;
    std::map<const void*, PhaseBarrier> barriers;
    std::map<int, Products> products;  // by thread
};

inline HopperState& hopper() {
    static HopperState one;
    if (one.run != block().run) one = {block().run, {}, {}};
    return one;
}

inline PhaseBarrier& phase_barrier(const void* address) {
    auto& barriers = hopper().barriers;
    const auto found = barriers.find(address);
    if (found == barriers.end()) report("a barrier in shared memory that was not made");
    return barriers[address];
}

// Wakes those who wait, if the phase can end.
inline void stir(PhaseBarrier& barrier) {
    if (barrier.missing > 0 || barrier.announced != barrier.copied) return;
    for (int index : barrier.waiting) block().fibers[index].blocked = false;
    barrier.waiting.clear();
}

inline void run_product(const Product& product, std::array<float, 32>& sums) {
    const int lane = block().current % kWarp;
    for (int i = 0; i < 32; ++i) {
        const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        double exact = product.add ? sums[i] : 0.0;
        for (int k = 0; k < 16; ++k) {
            const unsigned char* at = product.right + column / 8 * product.row_step + k / 8 * product.column_step +
                                      column % 8 * 16 + k % 8 * 2;
            uint16_t bits = 0;
            std::memcpy(&bits, at, 2);
            exact += (*product.left)[row][k] * product.number(bits);
        }
        sums[i] = static_cast<float>(exact);
    }
}

template <typename T>
double number_of(uint16_t bits) {
    return to_float(T{bits});
}

}  // namespace host

inline void barrier_init(SharedAddress barrier, int arrivals) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8) host::report("a barrier that is not aligned");
    host::check_shared(barrier, 8);
    host::hopper().barriers[barrier] = {arrivals, arrivals};
}

inline void publish_barriers() {}

inline void barrier_expect(SharedAddress address, int bytes) {
    host::PhaseBarrier& barrier = host::phase_barrier(address);
    if (--barrier.missing < 0) host::report("more threads arrive at a barrier than it was made for");
    barrier.announced += bytes;
    host::stir(barrier);
}

inline void barrier_wait(SharedAddress address, uint32_t parity) {
    host::PhaseBarrier& barrier = host::phase_barrier(address);
    while (barrier.phase % 2 == parity) {
        if (barrier.missing > 0 || barrier.announced != barrier.copied) {
            barrier.waiting.push_back(host::block().current);
            host::wait_blocked();
            continue;
        }
        for (const host::BulkCopy& copy : barrier.copies) std::memcpy(copy.to, copy.from, copy.bytes);
        barrier.copies.clear();
        barrier.missing = barrier.arrivals;
        barrier.announced = barrier.copied = 0;
        ++barrier.phase;
    }
}

inline void copy_bulk(SharedAddress to, const void* from, int bytes, SharedAddress address) {
    if (bytes <= 0 || bytes % 16) host::report("a bulk copy of no multiple of 16 bytes");
    for (int i = 0; i < bytes; i += 16) {
        host::check_shared(to + i, 16);
        if (!host::in_buffer(static_cast<const char*>(from) + i, 16, false)) return;
    }
    std::memset(to, host::kPoison, bytes);
    host::PhaseBarrier& barrier = host::phase_barrier(address);
    barrier.copies.push_back({reinterpret_cast<char*>(to), static_cast<const char*>(from), bytes});
    barrier.copied += bytes;
    host::stir(barrier);
}

inline void copy_bulk_under(SharedAddress to, const void* from, int bytes, SharedAddress barrier, uint64_t) {
    copy_bulk(to, from, bytes, barrier);
}

struct SharedMatrix {
    const unsigned char* begin;
    int column_step, row_step;

    SharedMatrix(SharedAddress begin_, int column_step_, int row_step_)
        : begin(begin_), column_step(column_step_), row_step(row_step_) {
        if (reinterpret_cast<uintptr_t>(begin) % 16 || column_step % 16 || row_step % 16) {
            host::report("a matrix in shared memory that is not aligned");
        }
    }
};

inline void pin(uint32_t&) {}
inline void pin(float&) {}

inline void warpgroup_begin() { sync_warp(); }

template <typename T>
void warpgroup_multiply(float (&sum)[8][4], const uint32_t (&a)[4], const SharedMatrix& b, bool add) {
    struct Operand {
        const uint32_t* a;
        std::shared_ptr<std::array<std::array<double, 16>, 16>> left;
    } mine{a, nullptr};
    host::collective("warpgroup_multiply", mine, [](Operand** lanes, int count) {
        if (count != host::kWarp) return host::report("a product in a warp that is not whole");
        const auto left = std::make_shared<std::array<std::array<double, 16>, 16>>();
        for (int lane = 0; lane < host::kWarp; ++lane) {
            for (int i = 0; i < 8; ++i) {
                (*left)[lane / 4 + 8 * (i / 2 % 2)][2 * (lane % 4) + i % 2 + 8 * (i / 4)] =
                    host::number_of<T>(static_cast<uint16_t>(lanes[lane]->a[i / 2] >> (16 * (i % 2))));
            }
            lanes[lane]->left = left;
        }
    });
    host::Products& products = host::hopper().products[host::block().current];
    auto* values = &sum[0][0];
    if (!products.sums.count(values)) std::copy(values, values + 32, products.sums[values].begin());
    std::memset(values, host::kPoison, 32 * sizeof(float));
    products.issued.push_back({values, mine.left, b.begin, b.column_step, b.row_step, add, host::number_of<T>});
}

inline void warpgroup_commit() {
    host::Products& products = host::hopper().products[host::block().current];
    products.committed.push_back(std::move(products.issued));
    products.issued.clear();
}

template <int kNewest>
void warpgroup_wait() {
    sync_warp();
    host::Products& products = host::hopper().products[host::block().current];
    for (; products.committed.size() > kNewest; products.committed.pop_front()) {
        for (const host::Product& product : products.committed.front()) {
            host::run_product(product, products.sums[product.sum]);
        }
    }
    if (!products.committed.empty()) return;  // as late as may be
    for (const auto& [to, values] : products.sums) std::copy(values.begin(), values.end(), to);
    products.sums.clear();
}

}  // namespace autoq::cuda
