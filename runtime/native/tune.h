// Measures what a call costs at each width, for the table that the cost rule reads.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>

#include "model.h"

namespace edgespec {

// Microseconds a call: the median of `runs`, the kinds interleaved, at a cache that is a quarter full; and whether all
// widths agree here. `ran` is told after each run.
nlohmann::json measure(Model& target, Model* draft, int runs, int threads, const std::function<void(int)>& ran);

}  // namespace edgespec
