// The operators Int8Linear, Int4Linear, Int8Embed and Attend for ONNX Runtime. A graph defines them as functions of standard operators; where this
// processor has kernels (kernels.h), these take their place.
#pragma once

#include <onnxruntime_c_api.h>

#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace edgespec {

// Memory for weights that stays until the end, in large pages where the system has them: read row after row, small ones halve the
// speed of a call.
class Pages {
  public:
    ~Pages();
    uint8_t* take(size_t bytes);  // of zeros, 64-byte aligned

  private:
    struct Run {
        uint8_t* data;
        size_t size;
    };
    std::vector<Run> runs_;
    size_t used_ = 0;  // of the last
};

// The operators, and their weights in the kernels' layout, once for all graphs that share them. Outlives the sessions.
class Operators {
  public:
    // read: told of stored codes that are not read again.
    Operators(const OrtApi* api, const Kernels& kernels, std::function<void(const void*, size_t)> read);
    ~Operators();
    Operators(const Operators&) = delete;
    Operators& operator=(const Operators&) = delete;

    void add_to(OrtSessionOptions* session) const;

  private:
    struct Op;
    struct Stored {
        Weight weight;
        std::vector<float> scale, sums;
    };
    void* node(const Op& op, const OrtKernelInfo* info);  // the kernel of a node

    const OrtApi* api_;
    const Kernels& kernels_;
    std::function<void(const void*, size_t)> read_;
    OrtCustomOpDomain* domain_ = nullptr;
    Pages pages_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::map<std::tuple<bool, const void*, std::vector<int64_t>>, Stored> weights_;  // by form (int4), and the place and shape of the codes
};

}  // namespace edgespec
