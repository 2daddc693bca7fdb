// A fault as the user sees it: what is wrong, and what to do next.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace edgespec {

struct Error : std::exception {
    std::string message, hint;

    Error(std::string m, std::string h) : message(std::move(m)), hint(std::move(h)) {}
    const char* what() const noexcept override { return message.c_str(); }
};

}  // namespace edgespec
