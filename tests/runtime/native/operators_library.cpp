// The runtime's operators as a library that Python's ONNX Runtime loads, so that they stand beside the functions they replace.
#include "operators.h"

using namespace edgespec;

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* session, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(17);
    if (!kernels()) return api->CreateStatus(ORT_NOT_IMPLEMENTED, "no kernels for this processor");
    // Each session has its own: another's weights may have lain where these lie.
    auto* made = new Operators(api, *kernels(), [](const void*, size_t) {});
    made->add_to(session);
    return nullptr;
}
