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
    virtual std::unique_ptr<Graph> open(const std::string& file) = 0;
};

struct OnnxOptions {
    int threads = 1;
    bool prepack = true;  // weights also in the kernels' own layout: faster, and once more in memory
};

// Graphs of the bundle in this folder on ONNX Runtime's CPU kernels.
std::unique_ptr<Backend> onnx_backend(const std::string& folder, const OnnxOptions& options);

}  // namespace edgespec
