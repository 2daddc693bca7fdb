// What ONNX Runtime says of a call that failed, as the project's errors.
#pragma once

#include <onnxruntime_c_api.h>

#include <new>
#include <string>

#include "error.h"

namespace edgespec {

// Nothing, or an Error "<who> cannot <doing>: ..."; lack of memory is std::bad_alloc.
inline void check_status(const OrtApi* api, OrtStatus* status, const std::string& who, const std::string& doing, const std::string& hint) {
    if (!status) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    for (const char* words : {"bad_alloc", "bad allocation", "Failed to allocate memory"})
        if (message.find(words) != std::string::npos) throw std::bad_alloc();
    throw Error(who + " cannot " + doing + ": " + message.substr(0, message.find('\n')), hint);
}

}  // namespace edgespec
