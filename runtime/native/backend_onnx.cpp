// ONNX Runtime behind the backend interface: its C API, one pool of threads, every weight mapped once.

#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <onnxruntime_c_api.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <list>
#include <map>
#include <new>
#include <tuple>

#include "backend.h"
#include "error.h"
#include "operators.h"
#include "onnx_status.h"
#include "onnx_table.h"
#include "qnn.h"

namespace edgespec {
namespace {

constexpr uint32_t API_VERSION = 17;  // the oldest that has all we call; newer libraries serve it too
constexpr int INT4 = 22;                // an element type newer than the header
constexpr uint64_t SMALL = 1 << 16;   // bytes
const OrtApi* api = nullptr;

void check(OrtStatus* status, const std::string& doing) { check_status(api, status, "ONNX Runtime", doing, "run edgespec check on the bundle"); }

// A read-only file in memory, paged in as it is used.
class Mapping {
  public:
    explicit Mapping(const std::string& path) {
        const int file = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW);
        struct stat found {};
        if (file >= 0 && fstat(file, &found) == 0 && S_ISREG(found.st_mode)) size_ = size_t(found.st_size);
        void* at = file < 0 || size_ == 0 ? MAP_FAILED : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        const bool full = at == MAP_FAILED && errno == ENOMEM;
        if (file >= 0) ::close(file);
        if (full) throw std::bad_alloc();
        if (at == MAP_FAILED) throw Error(path + " cannot be read", "copy the bundle again");
        data_ = static_cast<uint8_t*>(at);
    }
    ~Mapping() { munmap(data_, size_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

    // Takes an array's whole pages out of memory, if it lies here; whoever reads them again finds them in the file.
    void drop(const void* array, size_t bytes) const {
        const auto at = reinterpret_cast<uintptr_t>(array), page = uintptr_t(sysconf(_SC_PAGESIZE)), base = reinterpret_cast<uintptr_t>(data_);
        const uintptr_t first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
        if (at >= base && at + bytes <= base + size_ && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }

  private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

size_t element_bits(int type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return 32;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return 16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return 64;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return 8;
        case INT4: return 4;
        default: throw Error("a weight has an element type that is not read: " + std::to_string(type), "update edgespec");
    }
}

class OnnxCall : public Call {
  public:
    OnnxCall(OrtSession* session, OrtMemoryInfo* memory, const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs)
        : session_(session) {
        OrtIoBinding* made = nullptr;
        check(api->CreateIoBinding(session, &made), "bind buffers");
        binding_.reset(made);
        for (const Buffer& b : inputs) check(api->BindInput(made, b.spec->name.c_str(), value(memory, b)), "bind " + b.spec->name);
        for (const Buffer& b : outputs) check(api->BindOutput(made, b.spec->name.c_str(), value(memory, b)), "bind " + b.spec->name);
    }
    void run() override { check(api->RunWithBinding(session_, nullptr, binding_.get()), "run a graph"); }

  private:
    OrtValue* value(OrtMemoryInfo* memory, const Buffer& b) {
        OrtValue* made = nullptr;
        const auto type = b.spec->type == Type::int32  ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                          : b.spec->type == Type::int8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                                                       : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        check(api->CreateTensorWithDataAsOrtValue(memory, b.data, size_t(b.spec->bytes()), b.spec->shape.data(), b.spec->shape.size(), type, &made), "wrap a buffer");
        values_.emplace_back(made, api->ReleaseValue);
        return made;
    }

    OrtSession* session_;
    std::vector<std::unique_ptr<OrtValue, void (*)(OrtValue*)>> values_;
    std::unique_ptr<OrtIoBinding, void (*)(OrtIoBinding*)> binding_{nullptr, api->ReleaseIoBinding};
};

class OnnxGraph : public Graph {
  public:
    OnnxGraph(OrtSession* session, OrtMemoryInfo* memory) : session_(session), memory_(memory) {}
    ~OnnxGraph() override { api->ReleaseSession(session_); }
    std::unique_ptr<Call> bind(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs) override {
        return std::make_unique<OnnxCall>(session_, memory_, inputs, outputs);
    }

  private:
    OrtSession* session_;
    OrtMemoryInfo* memory_;
};

class OnnxBackend : public Backend {
  public:
    OnnxBackend(std::string folder, const BackendOptions& options) : folder_(std::move(folder)), options_(options) {
        if (!api) api = OrtGetApiBase()->GetApi(API_VERSION);
        if (!api) throw Error("the ONNX Runtime library is older than 1.17", "install the version that edgespec pins");
        OrtThreadingOptions* threading = nullptr;
        check(api->CreateThreadingOptions(&threading), "start");
        check(api->SetGlobalIntraOpNumThreads(threading, options.threads), "set its threads");
        check(api->SetGlobalInterOpNumThreads(threading, 1), "set its threads");
        check(api->CreateEnvWithGlobalThreadPools(ORT_LOGGING_LEVEL_ERROR, "edgespec", threading, &env_), "start");
        api->ReleaseThreadingOptions(threading);
        check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory_), "start");
        check(api->CreatePrepackedWeightsContainer(&prepacked_), "start");
        const Kernels* own = kernels();
        const auto drop = [this](const void* array, size_t bytes) {
            for (const auto& [name, mapped] : files_) mapped->drop(array, bytes);
        };
        if (own && options_.prepack) operators_ = std::make_unique<Operators>(api, *own, drop);
        if (!options_.qnn.folder.empty()) qnn_ = std::make_unique<Qnn>(env_, options_.qnn);
    }
    ~OnnxBackend() override {
        for (auto& [key, value] : weights_) api->ReleaseValue(value);
        api->ReleasePrepackedWeightsContainer(prepacked_);
        api->ReleaseMemoryInfo(memory_);
        api->ReleaseEnv(env_);
    }

    std::unique_ptr<Graph> open(const ModelEntry& entry, const GraphSpec& graph) override {
        const std::string& file = graph.file;
        const std::string path = folder_ + "/" + file;
        OrtSessionOptions* options = nullptr;
        check(api->CreateSessionOptions(&options), "make session options");
        const std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions*)> owned(options, api->ReleaseSessionOptions);
        check(api->DisablePerSessionThreads(options), "share its threads");
        // The arena keeps the largest call's scratch for every graph; the system's allocator gives it back.
        check(api->DisableCpuMemArena(options), "set the allocator");
        if (qnn_) {  // the compiler copies what it needs of the weights
            qnn_->add_to(options);
            OrtSession* compiled = nullptr;
            check(api->CreateSession(env_, path.c_str(), options, &compiled), "compile " + file + " for the NPU");
            return std::make_unique<OnnxGraph>(compiled, memory_);
        }
        // Or products with coded weights round their activations to 8 bits.
        if (entry.cached == Type::int8) check(api->AddSessionConfigEntry(options, "session.disable_quant_qdq", "1"), "keep the codes of activations");
        if (operators_) operators_->add_to(options);
        if (!options_.prepack) check(api->AddSessionConfigEntry(options, "session.disable_prepacking", "1"), "set prepacking");
        const Mapping model(path);
        for (const External& array : external_arrays(model.data(), model.size())) {
            OrtValue* value = weight(array);  // which also refuses one that lies outside the bundle
            // An encoder shares its weights with no other graph, and must not: ONNX Runtime (1.32) may turn one to move a
            // Transpose across an Add, and then still takes the one that it was given.
            if (graph.kind != "vision") check(api->AddInitializer(options, array.name.c_str(), value), "share " + array.name);
        }
        OrtSession* session = nullptr;
        check(api->CreateSessionWithPrepackedWeightsContainer(env_, path.c_str(), options, prepacked_, &session), "open " + file);
        // Kernels read their own packed copies from now on; what is looked up in the mapping pages in again.
        for (auto& [name, mapped] : files_) mapped->drop(mapped->data(), mapped->size());
#ifdef __GLIBC__
        malloc_trim(0);
#endif
        return std::make_unique<OnnxGraph>(session, memory_);
    }

  private:
    // The one value of an array of a data file, over the file's mapping.
    OrtValue* weight(const External& array) {
        if (array.file.empty() || array.file[0] == '.' || array.file.find('/') != std::string::npos)
            throw Error("a graph's weights lie outside the bundle", "use a bundle as edgespec export made it");
        auto& file = files_[array.file];
        if (!file) file = std::make_unique<Mapping>(folder_ + "/" + array.file);
        const uint64_t bits = element_bits(array.type), element = bits < 8 ? 1 : bits / 8;
        uint64_t bytes = bits;
        for (const int64_t size : array.shape)
            if (size < 0 || __builtin_mul_overflow(bytes, uint64_t(size), &bytes) || bytes > UINT64_MAX - 7) throw Error(array.name + " has an impossible shape", "export the bundle again");
        bytes = (bytes + 7) / 8;
        if (uint64_t(array.bytes) != bytes || uint64_t(array.offset) % element || uint64_t(array.offset) > file->size() || bytes > file->size() - uint64_t(array.offset))
            throw Error(array.name + " does not lie inside " + array.file, "copy the bundle again, or export it again");
        OrtValue*& value = weights_[{array.file, array.type, array.offset, array.shape}];
        if (!value) {
            uint8_t* data = file->data() + array.offset;
            // A small array is read in place for ever; in the mapping it would hold its large, packed neighbours in memory.
            if (bytes <= SMALL) data = copies_.emplace_back(data, data + bytes).data();
            check(api->CreateTensorWithDataAsOrtValue(memory_, data, bytes, array.shape.data(), array.shape.size(), ONNXTensorElementDataType(array.type), &value), "map " + array.name);
        }
        return value;
    }

    std::string folder_;
    BackendOptions options_;
    std::unique_ptr<Qnn> qnn_;
    std::unique_ptr<Operators> operators_;
    OrtEnv* env_ = nullptr;
    OrtMemoryInfo* memory_ = nullptr;
    OrtPrepackedWeightsContainer* prepacked_ = nullptr;
    std::map<std::string, std::unique_ptr<Mapping>> files_;
    std::list<std::vector<uint8_t>> copies_;  // of small arrays
    std::map<std::tuple<std::string, int, int64_t, std::vector<int64_t>>, OrtValue*> weights_;
};

}  // namespace

const char* const BACKEND_FORMAT = "onnx";

std::unique_ptr<Backend> open_backend(const std::string& folder, const BackendOptions& options) {
    return std::make_unique<OnnxBackend>(folder, options);
}

}  // namespace edgespec
