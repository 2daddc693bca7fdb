// The JSON lines of edgespec-runtime: requests in, events out. `HELP` documents them.
#pragma once

#include <cstdio>
#include <string>

#include "backend.h"

namespace edgespec {

extern const char* const HELP;

struct Options {
    std::string bundle, table;
    BackendOptions backend;
};

// Standard output, for events alone: what a library prints there goes to standard error from the first call on.
std::FILE* events();

// Serve requests from standard input until it ends; the exit code.
int serve(const Options& options);

}  // namespace edgespec
