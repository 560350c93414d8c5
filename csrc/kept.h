// Objects that Python keeps by numbers, from one call of an operator to the next.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace autoq {

template <class T>
class Kept {
  public:
    int64_t add(std::shared_ptr<T> object) {
        const std::lock_guard<std::mutex> guard(mutex_);
        objects_.emplace(next_, std::move(object));
        return next_++;
    }

    // Throws where there is none.
    std::shared_ptr<T> at(int64_t number) {
        const std::lock_guard<std::mutex> guard(mutex_);
        const auto found = objects_.find(number);
        STD_TORCH_CHECK(found != objects_.end(), "autoq: nothing is kept as number ", number, "; it has been dropped");
        return found->second;
    }

    void drop(int64_t number) {
        std::shared_ptr<T> last;  // goes after the lock
        const std::lock_guard<std::mutex> guard(mutex_);
        const auto found = objects_.find(number);
        if (found == objects_.end()) return;
        last = std::move(found->second);
        objects_.erase(found);
    }

  private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<T>> objects_;
    int64_t next_ = 0;
};

}  // namespace autoq
