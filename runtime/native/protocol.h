// The JSON lines of edgespec-runtime: requests in, events out. `HELP` documents them.
#pragma once

#include <string>

#include "backend.h"

namespace edgespec {

extern const char* const HELP;

struct Options {
    std::string bundle, table;
    BackendOptions backend;
};

// Serve requests from standard input until it ends; the exit code.
int serve(const Options& options);

}  // namespace edgespec
