// A conversation as a file: versioned, checksummed, and of one bundle only.
#pragma once

#include <string>

#include "loop.h"

namespace edgespec {

// Write to a temporary name, then rename; the bytes written.
int64_t save(const Conversation& conversation, uint64_t bundle, const std::string& path);

// Fill a conversation from a file; on an Error it is left as it was.
void restore(Conversation& conversation, uint64_t bundle, const std::string& path);

}  // namespace edgespec
