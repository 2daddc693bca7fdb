#include "lines.h"

#include <unistd.h>

#include <thread>

namespace edgespec {

Lines::Lines() {
    std::thread([this] { read(); }).detach();  // it may be waiting in read(2) when the program ends
}

std::optional<std::string> Lines::take() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ || !lines_.empty(); });
    if (lines_.empty()) return {};
    std::string line = std::move(lines_.front());
    lines_.pop_front();
    return line;
}

void Lines::read() {
    std::string line;
    bool overlong = false;
    const auto push = [&](std::string text) {
        const std::lock_guard lock(mutex_);
        lines_.push_back(std::move(text));
        changed_.notify_one();
    };
    char chunk[65536];
    for (ssize_t n; (n = ::read(STDIN_FILENO, chunk, sizeof chunk)) > 0;)
        for (ssize_t i = 0; i < n; ++i) {
            if (chunk[i] != '\n') {
                if (line.size() <= LONGEST) line += chunk[i];
                else overlong = true;
                continue;
            }
            if (overlong) line = "\"over 64 MiB\"";  // no request: answered with an error
            if (!line.empty()) push(std::move(line));
            line.clear();
            overlong = false;
        }
    if (!line.empty() && !overlong) push(std::move(line));
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_one();
}

}  // namespace edgespec
