// Do all widths give a row the same bits on this machine? What keeps speculation lossless (design, section 4).
#pragma once

#include <string>

#include "model.h"

namespace edgespec {

// Absorbs the same tokens through every step graph of every bucket and compares the logits of every row (in prefill
// of the last) and the caches, byte for byte. Empty where all agree, else what differs first.
std::string width_difference(Model& model);

}  // namespace edgespec
