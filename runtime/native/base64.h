// Numbers in a line of JSON.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace edgespec {

// Base64 (RFC 4648, padded) of little-endian float32 numbers; false where it is something else.
inline bool from_base64(const std::string& text, std::vector<float>& out) {
    const auto value = [](char c) -> int {
        if (c >= 'A' && c <= 'Z') return c - 'A';
        if (c >= 'a' && c <= 'z') return c - 'a' + 26;
        if (c >= '0' && c <= '9') return c - '0' + 52;
        return c == '+' ? 62 : c == '/' ? 63 : -1;
    };
    if (text.size() % 4 || text.empty()) return false;
    const size_t padding = (text[text.size() - 1] == '=') + (text[text.size() - 2] == '=');
    const size_t bytes = text.size() / 4 * 3 - padding;
    if (bytes % sizeof(float)) return false;
    std::vector<uint8_t> raw(bytes + padding);
    for (size_t i = 0; i < text.size(); i += 4) {
        uint32_t group = 0;
        for (size_t k = 0; k < 4; ++k) {
            const bool pads = i + k >= text.size() - padding;
            const int digit = pads ? 0 : value(text[i + k]);
            if (digit < 0) return false;
            group = group << 6 | uint32_t(digit);
        }
        for (size_t k = 0; k < 3; ++k) raw[i / 4 * 3 + k] = uint8_t(group >> (16 - 8 * k));
    }
    out.resize(bytes / sizeof(float));
    std::memcpy(out.data(), raw.data(), bytes);
    return true;
}

}  // namespace edgespec
