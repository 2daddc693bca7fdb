// JSON that nobody vouches for.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace edgespec {

// Discarded where it is no JSON, or nested deeper than any of our formats: the library copies and prints by recursion.
inline nlohmann::json parse_json(const std::string& text) {
    constexpr int DEEPEST = 64;
    struct TooDeep {};
    const auto shallow = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) { return depth > DEEPEST ? throw TooDeep() : true; };
    try {
        return nlohmann::json::parse(text, shallow, false);
    } catch (const TooDeep&) {
        return nlohmann::json::value_t::discarded;
    }
}

}  // namespace edgespec
