// Lines from standard input, read beside the work so that a request can be cancelled while another runs.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

namespace edgespec {

class Lines {
  public:
    static constexpr size_t LONGEST = size_t{64} << 20;

    Lines();                            // starts the reader
    std::optional<std::string> take();  // waits; nothing at the end of input
    // Take the first waiting line for which `wanted` is true, without waiting.
    template <typename F> std::optional<std::string> take_if(F wanted) {
        const std::lock_guard lock(mutex_);
        for (auto at = lines_.begin(); at != lines_.end(); ++at)
            if (wanted(*at)) {
                std::string line = std::move(*at);
                lines_.erase(at);
                return line;
            }
        return {};
    }

  private:
    void read();

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::string> lines_;
    bool ended_ = false;
};

}  // namespace edgespec
