#include "qnn.h"

#include <cstring>

#include "error.h"
#include "onnx_status.h"

namespace edgespec {
namespace {

constexpr uint32_t VERSION = 22;  // the first with libraries of providers
constexpr const char* NAME = "QNNExecutionProvider";

#if ORT_API_VERSION < 22
static_assert(ORT_API_VERSION == 17, "what follows stands behind the table of version 17, whose header edgespec build takes");

// The table of entry points only grows: what version 22 has behind that of version 17, as far as we call it.
struct Later {
    void* until_22[25];
    OrtStatus*(ORT_API_CALL* RegisterExecutionProviderLibrary)(OrtEnv*, const char* name, const char* path);
    void* unregister;
    OrtStatus*(ORT_API_CALL* GetEpDevices)(const OrtEnv*, const OrtEpDevice* const** devices, size_t* count);
    OrtStatus*(ORT_API_CALL* SessionOptionsAppendExecutionProvider_V2)(OrtSessionOptions*, OrtEnv*, const OrtEpDevice* const* devices, size_t count, const char* const* keys, const char* const* values, size_t options);
    void* until_names[7];
    const char*(ORT_API_CALL* EpDevice_EpName)(const OrtEpDevice*);
};

const Later* later(const OrtApi* api) { return reinterpret_cast<const Later*>(api + 1); }
#else
const OrtApi* later(const OrtApi* api) { return api; }
#endif

const OrtApi* api() {
    const OrtApi* found = OrtGetApiBase()->GetApi(VERSION);
    if (!found) throw Error("the ONNX Runtime library is older than 1.22, which loads no providers", "install the version that edgespec pins");
    return found;
}

void check(OrtStatus* status, const std::string& doing) { check_status(api(), status, "Qualcomm's provider", doing, "name the folder of onnxruntime-qnn's libraries with --qnn"); }

}  // namespace

Qnn::Qnn(OrtEnv* env, const QnnOptions& options) : env_(env), options_(options) {
    const std::string library = options.folder + "/libonnxruntime_providers_qnn.so";
    check(later(api())->RegisterExecutionProviderLibrary(env, NAME, library.c_str()), "be loaded");
    const OrtEpDevice* const* devices = nullptr;
    size_t count = 0;
    check(later(api())->GetEpDevices(env, &devices, &count), "name its devices");
    for (size_t i = 0; i < count && !device_; ++i)
        if (!std::strcmp(later(api())->EpDevice_EpName(devices[i]), NAME)) device_ = devices[i];
    if (!device_) throw Error("Qualcomm's provider finds no NPU here", "run the bundle without --qnn, on the processor");
}

void Qnn::add_to(OrtSessionOptions* session) const {
    check(api()->AddSessionConfigEntry(session, "session.disable_cpu_ep_fallback", "1"), "take graphs whole");
    if (!options_.compiled.empty())  // a context that holds several graphs is loaded once
        check(api()->AddSessionConfigEntry(session, "ep.share_ep_contexts", "1"), "share contexts");
    const std::string backend = options_.folder + "/libQnnHtp.so";
    const std::string arch = std::to_string(options_.htp_arch), soc = std::to_string(options_.soc_model);
    const char* keys[] = {"backend_path", "htp_arch", "soc_model", "enable_htp_fp16_precision"};
    const char* values[] = {backend.c_str(), arch.c_str(), soc.c_str(), "1"};
    check(later(api())->SessionOptionsAppendExecutionProvider_V2(session, env_, &device_, 1, keys, values, 4), "be added");
}

}  // namespace edgespec
