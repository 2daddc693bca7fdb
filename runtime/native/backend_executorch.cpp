// ExecuTorch behind the backend interface: a model's program and weights are mapped once, XNNPACK packs each weight once.

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <map>
#include <new>

#include "backend.h"
#include "error.h"

// The wheel has the library and not this header.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace edgespec {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Span;
using Failure = executorch::runtime::Error;

const char* const XNNPACK = "XnnpackBackend";
const char* const CHECK = "run edgespec check on the bundle";
std::string last_words;  // what the library last said of a failure; else it would go to standard error

void listen(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message, size_t length) {
    if (level == kError || level == kFatal) last_words.assign(message, length);
}

void check(Failure failure, const std::string& doing) {
    if (failure == Failure::Ok) return;
    if (failure == Failure::MemoryAllocationFailed) throw std::bad_alloc();
    const std::string why = last_words.empty() ? "error " + std::to_string(int(failure)) : last_words;
    throw Error("ExecuTorch cannot " + doing + ": " + why.substr(0, why.find('\n')), CHECK);
}

template <typename T>
T taken(executorch::runtime::Result<T>&& result, const std::string& doing) {
    check(result.error(), doing);
    return std::move(result.get());
}

// A model's file of methods over its file of weights; the methods share the memory of what they compute in between.
class Opened {
  public:
    Opened(const std::string& folder, const std::string& file, const std::string& weights)
        : loader_(map(folder + "/" + file)), weights_loader_(map(folder + "/" + weights)),
          weights_(taken(FlatTensorDataMap::load(&weights_loader_), "read " + weights)),
          program_(taken(Program::load(&loader_, Program::Verification::InternalConsistency), "read " + file)) {
        for (size_t i = 0; i < program_.num_methods(); ++i) {
            const auto meta = taken(program_.method_meta(taken(program_.get_method_name(i), "read " + file)), "read " + file);
            for (size_t k = 0; k < meta.num_memory_planned_buffers(); ++k) {
                if (arenas_.size() <= k) arenas_.emplace_back();
                arenas_[k].resize(std::max(arenas_[k].size(), size_t(taken(meta.memory_planned_buffer_size(k), "read " + file))));
            }
        }
        for (auto& arena : arenas_) spans_.emplace_back(arena.data(), arena.size());
    }

    Method load(const std::string& name, MemoryManager* memory) { return taken(program_.load_method(name.c_str(), memory, nullptr, &weights_), "open " + name); }
    Span<Span<uint8_t>> arenas() { return {spans_.data(), spans_.size()}; }

  private:
    static MmapDataLoader map(const std::string& path) { return taken(MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock), "map " + path); }

    MmapDataLoader loader_, weights_loader_;
    FlatTensorDataMap weights_;
    Program program_;
    std::vector<std::vector<uint8_t>> arenas_;
    std::vector<Span<uint8_t>> spans_;
};

// A manifest's tensor as ExecuTorch has it, over somebody's memory.
class Bound {
  public:
    Bound(const TensorSpec& spec, void* data)
        : sizes_(spec.shape.begin(), spec.shape.end()),
          impl_(spec.type == Type::int32 ? ScalarType::Int : ScalarType::Float, ssize_t(sizes_.size()), sizes_.data(), data), bytes_(size_t(spec.bytes())) {}
    Bound(const Bound&) = delete;
    Bound& operator=(const Bound&) = delete;

    EValue value() { return EValue(Tensor(&impl_)); }
    void* data() { return impl_.mutable_data(); }
    size_t bytes() const { return bytes_; }

  private:
    std::vector<executorch::aten::SizesType> sizes_;
    TensorImpl impl_;
    size_t bytes_;
};

class MethodGraph;

class MethodCall : public Call {
  public:
    MethodCall(MethodGraph& graph, const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs);
    void run() override;

  private:
    MethodGraph& graph_;
    const uint64_t number_;  // not its address: the next call may get the same
    std::vector<std::unique_ptr<Bound>> inputs_, outputs_;
};

class MethodGraph : public Graph {
  public:
    MethodGraph(Opened& program, const GraphSpec& spec)
        : spec(spec), planned_(program.arenas()), memory_(&allocator_, &planned_, &scratch_), method(program.load(spec.method, &memory_)) {
        const auto meta = method.method_meta();
        bool same = meta.num_inputs() == spec.inputs.size() && meta.num_outputs() == spec.outputs.size();
        for (size_t i = 0; same && i < spec.inputs.size(); ++i) same = is(meta.input_tensor_meta(i), spec.inputs[i]);
        for (size_t i = 0; same && i < spec.outputs.size(); ++i) same = is(meta.output_tensor_meta(i), spec.outputs[i]);
        if (!same) throw Error(spec.file + ": the inputs or outputs of " + spec.method + " are not the manifest's", "export the bundle again");
    }
    std::unique_ptr<Call> bind(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs) override { return std::make_unique<MethodCall>(*this, inputs, outputs); }

    // Memory for an output that nobody asked for.
    void* unread(const TensorSpec& output) {
        auto& memory = unread_[output.name];
        memory.resize(size_t(output.elements()) * 4);
        return memory.data();
    }

    const GraphSpec& spec;

  private:
    static bool is(const executorch::runtime::Result<executorch::runtime::TensorInfo>& found, const TensorSpec& wanted) {
        if (!found.ok() || found->scalar_type() != (wanted.type == Type::int32 ? ScalarType::Int : ScalarType::Float)) return false;
        return std::equal(found->sizes().begin(), found->sizes().end(), wanted.shape.begin(), wanted.shape.end());
    }

    MallocMemoryAllocator allocator_, scratch_;
    HierarchicalAllocator planned_;
    MemoryManager memory_;
    std::map<std::string, std::vector<char>> unread_;

  public:
    Method method;  // after the memory that it lives in
    uint64_t calls = 0, last = 0;  // how many were bound, and whose buffers the method has (0: nobody's)
};

MethodCall::MethodCall(MethodGraph& graph, const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs) : graph_(graph), number_(++graph.calls) {
    for (const Buffer& b : inputs) inputs_.push_back(std::make_unique<Bound>(*b.spec, b.data));
    for (const TensorSpec& t : graph.spec.outputs) {
        const auto asked = std::find_if(outputs.begin(), outputs.end(), [&](const Buffer& b) { return b.spec->name == t.name; });
        outputs_.push_back(std::make_unique<Bound>(t, asked == outputs.end() ? graph.unread(t) : asked->data));
    }
}

void MethodCall::run() {
    if (graph_.last != number_) {
        graph_.last = 0;
        for (size_t i = 0; i < inputs_.size(); ++i) check(graph_.method.set_input(inputs_[i]->value(), i), "bind " + graph_.spec.inputs[i].name);
        for (size_t i = 0; i < outputs_.size(); ++i)
            check(graph_.method.set_output_data_ptr(outputs_[i]->data(), outputs_[i]->bytes(), i), "bind " + graph_.spec.outputs[i].name);
        graph_.last = number_;
    }
    check(graph_.method.execute(), "run " + graph_.spec.method);
}

class ExecutorchBackend : public Backend {
  public:
    ExecutorchBackend(std::string folder, int threads) : folder_(std::move(folder)) {
        executorch::runtime::register_pal(executorch::runtime::PalImpl::create(listen, __FILE__));
        executorch::runtime::runtime_init();
        if (!executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(uint32_t(threads))) throw Error("ExecuTorch refuses " + std::to_string(threads) + " threads", "use fewer --threads");
        // Without both every method would pack its own copy of the weights, and keep its own scratch.
        executorch::runtime::BackendOptions<2> options;
        check(options.set_option("weight_cache_enabled", true), "set up XNNPACK");
        check(options.set_option("workspace_sharing_mode", 2), "set up XNNPACK");
        check(executorch::runtime::set_option(XNNPACK, options.view()), "set up XNNPACK");
    }

    std::unique_ptr<Graph> open(const ModelEntry& model, const GraphSpec& graph) override {
        auto& program = programs_[graph.file];
        if (!program) program = std::make_unique<Opened>(folder_, graph.file, model.weights);
        auto made = std::make_unique<MethodGraph>(*program, graph);
#ifdef __GLIBC__
        malloc_trim(0);
#endif
        return made;
    }

  private:
    std::string folder_;
    std::map<std::string, std::unique_ptr<Opened>> programs_;
};

}  // namespace

const char* const BACKEND_FORMAT = "executorch";

std::unique_ptr<Backend> open_backend(const std::string& folder, const BackendOptions& options) {
    return std::make_unique<ExecutorchBackend>(folder, options.threads);
}

}  // namespace edgespec
