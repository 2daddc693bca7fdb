// Qualcomm's NPU behind ONNX Runtime: a provider library that is loaded while the program runs. Knows no graph.
#pragma once

#include <onnxruntime_c_api.h>

#include "backend.h"

struct OrtEpDevice;  // newer than the header of version 17

namespace edgespec {

class Qnn {
  public:
    // Load the provider from its folder; the SoC is the one that this machine has, or emulates.
    Qnn(OrtEnv* env, const QnnOptions& options);
    // Sessions of these options run on the NPU whole, or are refused.
    void add_to(OrtSessionOptions* session) const;

  private:
    OrtEnv* env_;
    QnnOptions options_;
    const OrtEpDevice* device_ = nullptr;
};

}  // namespace edgespec
