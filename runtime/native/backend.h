// What the loop needs of an inference engine: open graphs that share their weights, run one on given buffers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "manifest.h"

namespace edgespec {

struct Buffer {
    const TensorSpec* spec;
    void* data;
};

// A graph bound to buffers. One runs at a time.
class Call {
  public:
    virtual ~Call() = default;
    virtual void run() = 0;
};

class Graph {
  public:
    virtual ~Graph() = default;
    virtual std::unique_ptr<Call> bind(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs) = 0;
};

class Backend {
  public:
    virtual ~Backend() = default;
    virtual std::unique_ptr<Graph> open(const ModelEntry& model, const GraphSpec& graph) = 0;
};

// Qualcomm's NPU: the folder of its provider and compiler; empty: graphs run on the processor.
struct QnnOptions {
    std::string folder, compiled;  // compiled: the SoC whose compiled graphs of the bundle are opened; empty: they are compiled now
    int htp_arch = 0, soc_model = 0;
};

struct BackendOptions {
    QnnOptions qnn;
    int threads = 1;
    bool prepack = true;  // weights also in the kernels' own layout: faster, and once more in memory
};

// The backend that this binary was linked with (backend_onnx.cpp or backend_executorch.cpp), over the bundle in a folder;
// and the format of the bundles that it runs.
std::unique_ptr<Backend> open_backend(const std::string& folder, const BackendOptions& options);
extern const char* const BACKEND_FORMAT;

}  // namespace edgespec
