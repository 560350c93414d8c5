// Memory that a thread keeps between calls: one token makes hundreds of calls, and none should allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace autoq::cpu {

class Scratch {
  public:
    // At least `bytes`, aligned to a cache line, with anything in it. Valid until the next call.
    char* get(size_t bytes) {
        constexpr size_t kAlignment = 64;
        if (capacity_ < bytes) {
            memory_.reset();
            memory_.reset(new char[bytes + kAlignment]);
            capacity_ = bytes;
        }
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
        return reinterpret_cast<char*>((address + kAlignment - 1) & ~(kAlignment - 1));
    }

  private:
    std::unique_ptr<char[]> memory_;
    size_t capacity_ = 0;
};

}  // namespace autoq::cpu
