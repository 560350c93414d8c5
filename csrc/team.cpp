#include "team.h"

#include <algorithm>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace autoq {
namespace {

// So many chunks for each thread: the last of them is what the others wait for at most.
constexpr int64_t kChunksPerThread = 8;

// Waits this often before it lets other processes run.
constexpr int kPauses = 1 << 12;

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

template <class Condition>
void wait_until(const Condition& condition) {
    for (int pauses = 0; !condition(); ++pauses) {
        if (pauses < kPauses) {
            pause_briefly();
        } else {
            std::this_thread::yield();
        }
    }
}

uint64_t span(int64_t next, int64_t last) { return static_cast<uint64_t>(last) << 32 | static_cast<uint64_t>(next); }
int64_t next_of(uint64_t span) { return static_cast<int64_t>(span & 0xffffffff); }
int64_t last_of(uint64_t span) { return static_cast<int64_t>(span >> 32); }

thread_local Team* current_team = nullptr;

}  // namespace

Team* Team::current() { return current_team; }

void Team::set_current(Team* team) { current_team = team; }

void Team::loop(int64_t begin, int64_t end, int64_t grain, Body body, const void* context) {
    if (begin >= end) return;
    const int64_t items = end - begin;
    const auto threads = static_cast<int64_t>(shares_.size());
    const int64_t parts = std::min(threads, (items + grain - 1) / grain);
    if (parts == 1) return body(context, begin, end);
    begin_ = begin;
    end_ = end;
    body_ = body;
    context_ = context;
    chunk_ = (items + parts * kChunksPerThread - 1) / (parts * kChunksPerThread);
    const int64_t chunks = (items + chunk_ - 1) / chunk_;
    unfinished_.store(chunks, std::memory_order_relaxed);
    for (int64_t part = 0; part < parts; ++part) {
        shares_[part].chunks.store(span(chunks * part / parts, chunks * (part + 1) / parts), std::memory_order_release);
    }
    loops_.fetch_add(1, std::memory_order_release);
    run_chunks(0);
    wait_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::run_chunks(int64_t member) {
    const auto threads = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < threads; ++i) {
        std::atomic<uint64_t>& share = shares_[(member + i) % threads].chunks;
        while (true) {
            uint64_t claim = share.load(std::memory_order_relaxed);
            if (next_of(claim) >= last_of(claim)) break;
            claim = share.fetch_add(1, std::memory_order_acquire);
            if (next_of(claim) >= last_of(claim)) break;
            const int64_t begin = begin_ + next_of(claim) * chunk_;
            try {
                body_(context_, begin, std::min(begin + chunk_, end_));
            } catch (...) {
                const std::lock_guard<std::mutex> guard(mutex_);
                if (!error_) error_ = std::current_exception();
            }
            unfinished_.fetch_sub(1, std::memory_order_release);
        }
    }
}

void Team::help(int64_t member) {
    uint64_t seen = 0;
    while (true) {
        uint64_t loops = seen;
        wait_until([&] {
            loops = loops_.load(std::memory_order_acquire);
            return loops != seen || dismissed_.load(std::memory_order_acquire);
        });
        if (loops == seen) return;
        seen = loops;
        run_chunks(member);
    }
}

}  // namespace autoq
