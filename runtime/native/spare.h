// Memory held back for when all other is gone: for the line that says so, and for destructors that need some (nlohmann's
// do, and an exception there ends the program).
#pragma once

#include <atomic>
#include <new>

namespace edgespec {

class Spare {
  public:
    Spare() {
        std::set_new_handler(release);
        hold();
    }
    ~Spare() {
        std::set_new_handler(nullptr);
        delete[] held_.exchange(nullptr);
    }
    // Whether it is there (again): what is free may lie in smaller pieces than before.
    static bool hold() {
        for (size_t bytes = MOST; !held_ && bytes >= LEAST; bytes /= 2) held_ = new (std::nothrow) char[bytes];
        return held_;
    }

  private:
    static constexpr size_t MOST = 1 << 20, LEAST = 1 << 17;

    static void release() {  // then the allocation that failed is tried again
        const char* held = held_.exchange(nullptr);
        if (!held) throw std::bad_alloc();
        delete[] held;
    }

    static inline std::atomic<char*> held_{nullptr};
};

}  // namespace edgespec
