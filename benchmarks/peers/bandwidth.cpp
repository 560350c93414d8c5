// Reads a buffer with several threads, as fast as the memory gives it: the limit of everything that decodes.

#include <sys/mman.h>

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef long long Vector __attribute__((vector_size(64)));

constexpr std::size_t kPage = std::size_t{1} << 21;
constexpr std::size_t kStep = 4 * sizeof(Vector);
constexpr std::size_t kAhead = 4096;

// Four independent sums, so that the loads and not the additions set the pace. Some processors read faster when they
// are asked for memory ahead of time, others are slowed down by it.
template <bool kAsksAhead>
long long sum(const char* data, std::size_t bytes) {
    Vector a{}, b{}, c{}, d{};
    for (std::size_t i = 0; i + kStep <= bytes; i += kStep) {
        const auto* line = reinterpret_cast<const Vector*>(data + i);
        for (std::size_t j = 0; kAsksAhead && j < kStep; j += sizeof(Vector)) __builtin_prefetch(data + i + kAhead + j);
        a += line[0];
        b += line[1];
        c += line[2];
        d += line[3];
    }
    a += b + c + d;
    long long total = 0;
    for (int i = 0; i < 8; ++i) total += a[i];
    return total;
}

template <typename Work>
void on_threads(int threads, Work work) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
    work(0);
    for (auto& thread : others) thread.join();
}

}  // namespace

extern "C" {

// A buffer of whole huge pages, written once so that the memory is there; null when there is not enough.
char* make_buffer(std::size_t bytes, int threads) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    auto* data = static_cast<char*>(std::aligned_alloc(kPage, bytes));
    if (data == nullptr) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    const std::size_t part = bytes / threads;
    on_threads(threads, [=](int i) { std::memset(data + part * i, i + 1, part); });
    return data;
}

// Seconds that one read of the buffer takes; each thread reads a contiguous part.
double read_buffer(const char* data, std::size_t bytes, int threads, bool asks_ahead) {
    const std::size_t part = bytes / threads / kStep * kStep;
    std::vector<long long> sums(threads);
    const auto start = std::chrono::steady_clock::now();
    on_threads(threads, [&](int i) {
        const char* own = data + part * i;
        sums[i] = asks_ahead ? sum<true>(own, part) : sum<false>(own, part);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    volatile long long used = 0;
    for (long long part_sum : sums) used = used + part_sum;
    return seconds.count();
}
}
