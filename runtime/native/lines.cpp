#include "lines.h"

#include <unistd.h>

#include <new>
#include <thread>

namespace edgespec {
namespace {

bool grown(std::string& line, char more) {
    try {
        line += more;
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

}  // namespace

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
    const auto end = [&] {
        if (overlong) line = "\"too long\"";  // no request: answered with an error
        if (line.empty()) return;
        const std::lock_guard lock(mutex_);
        lines_.push_back(std::move(line));
        changed_.notify_one();
        line.clear();
        overlong = false;
    };
    char chunk[65536];
    for (ssize_t n; (n = ::read(STDIN_FILENO, chunk, sizeof chunk)) > 0;)
        for (ssize_t i = 0; i < n; ++i) {
            if (chunk[i] != '\n') {
                overlong = overlong || line.size() >= LONGEST || !grown(line, chunk[i]);
                if (overlong) line = std::string();
                continue;
            }
            end();
        }
    end();
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_one();
}

}  // namespace edgespec
