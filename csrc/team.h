// Threads that stay together for many small loops.
//
// A decoding step has some two hundred loops of 10 to 500 microseconds. Torch's pool takes microseconds to begin and to
// end each, and gives every thread its part beforehand, so that one that is held up holds up all. Here the pool is
// asked once: one thread, the caller's, runs the program, and the others wait beside it, awake, for the loops in it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

namespace autoq {

class Team {
  public:
    using Body = void (*)(const void* context, int64_t begin, int64_t end);

    // The team that the present thread leads, or null.
    static Team* current();

    // Runs `program` with all of torch's threads at hand for its loops, whose bodies run no others.
    template <class Program>
    static void lead(const Program& program);

    // Each thread begins with chunks of its own, the same in every loop of the same size, and then helps the others.
    void loop(int64_t begin, int64_t end, int64_t grain, Body body, const void* context);

  private:
    // Chunks that nobody has begun: [next, last), `last` in the high half of the word, so that one instruction claims a
    // chunk and tells whether there was one.
    struct alignas(64) Share {
        std::atomic<uint64_t> chunks{0};
    };

    explicit Team(int64_t threads) : shares_(threads) {}
    void help(int64_t member);  // until `dismissed_`
    void run_chunks(int64_t member);
    static void set_current(Team* team);

    std::vector<Share> shares_;
    alignas(64) std::atomic<uint64_t> loops_{0};  // begun so far
    std::atomic<bool> dismissed_{false};
    alignas(64) std::atomic<int64_t> unfinished_{0};  // chunks of the present loop
    // The present loop; who has claimed a chunk may read it.
    int64_t begin_ = 0, end_ = 0, chunk_ = 1;
    Body body_ = nullptr;
    const void* context_ = nullptr;
    std::mutex mutex_;          // of the next
    std::exception_ptr error_;  // the first that a chunk of the present loop threw
};

// at::parallel_for, among the threads of the team if there is one.
template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
    Team* team = Team::current();
    if (team == nullptr) {
        torch::stable::parallel_for(begin, end, grain, function);
        return;
    }
    const auto body = [](const void* context, int64_t from, int64_t to) {
        (*static_cast<const Function*>(context))(from, to);
    };
    team->loop(begin, end, grain, body, &function);
}

template <class Program>
void Team::lead(const Program& program) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    if (threads == 1 || current() != nullptr) return program();
    Team team(threads);
    std::exception_ptr error;  // torch would keep no more of it than that there was one
    torch::stable::parallel_for(0, threads, 1, [&](int64_t member, int64_t) {
        if (member > 0) return team.help(member);
        set_current(&team);
        try {
            program();
        } catch (...) {
            error = std::current_exception();
        }
        set_current(nullptr);
        team.dismissed_.store(true, std::memory_order_release);
    });
    if (error) std::rethrow_exception(error);
}

}  // namespace autoq
