#include "linear_op.h"

#include <exception>
#include <new>
#include <utility>

#include "onnx_status.h"

namespace edgespec {
namespace {

constexpr int64_t LINE = 64;  // bytes that rows are aligned to

[[noreturn]] void misfit() { throw Error("a product's arrays do not fit each other", "export the bundle again"); }

struct Array {
    std::vector<int64_t> shape;
    void* data;
};

Array array(const OrtApi* api, const OrtValue* value) {
    const auto check = [&](OrtStatus* status) { check_status(api, status, "a product", "read an array", "export the bundle again"); };
    OrtTensorTypeAndShapeInfo* made = nullptr;
    check(api->GetTensorTypeAndShape(value, &made));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(made, api->ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    check(api->GetDimensionsCount(made, &rank));
    Array out{std::vector<int64_t>(rank), nullptr};
    check(api->GetDimensions(made, out.shape.data(), rank));
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &out.data));
    return out;
}

// What `doing` throws, as ONNX Runtime's status.
template <class Doing>
OrtStatus* guarded(const OrtApi* api, Doing doing) {
    try {
        doing();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return api->CreateStatus(ORT_FAIL, "bad_alloc");
    } catch (const std::exception& error) {
        return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
}

enum Kind { INT8_LINEAR, INT4_LINEAR, INT8_EMBED };

constexpr struct {
    const char* name;
    Kind kind;
    size_t inputs;
} OPS[] = {{"Int8Linear", INT8_LINEAR, 4}, {"Int4Linear", INT4_LINEAR, 3}, {"Int4LinearRow", INT4_LINEAR, 3}, {"Int8Embed", INT8_EMBED, 3}};

// One node of a graph.
struct Node {
    const OrtApi* api;
    explicit Node(const OrtApi* a) : api(a) {}
    virtual ~Node() = default;
    virtual void run(OrtKernelContext* context) const = 0;

    void check(OrtStatus* status) const { check_status(api, status, "a product", "run", "run edgespec check on the bundle"); }

    Array input(OrtKernelContext* context) const {
        const OrtValue* given = nullptr;
        check(api->KernelContext_GetInput(context, 0, &given));
        return array(api, given);
    }

    float* output(OrtKernelContext* context, const std::vector<int64_t>& shape) const {
        OrtValue* made = nullptr;
        check(api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &made));
        void* data = nullptr;
        check(api->GetTensorMutableData(made, &data));
        return static_cast<float*>(data);
    }
};

int64_t product_of(const std::vector<int64_t>& sizes) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
}

// x [.., k] -> [.., n].
struct Linear : Node {
    const Product& product;
    const int64_t tile;
    const Weight& weight;
    Linear(const OrtApi* a, const Product& p, int64_t outputs, const Weight& w) : Node(a), product(p), tile(outputs), weight(w) {}

    void run(OrtKernelContext* context) const override {
        Array x = input(context);
        if (x.shape.empty() || x.shape.back() != weight.k) misfit();
        const int64_t count = product_of(x.shape) / weight.k;
        x.shape.back() = weight.n;
        float* y = output(context, x.shape);

        const int64_t bytes = up(int64_t(product.row_bytes(weight)), LINE);
        thread_local std::vector<uint8_t> room;  // grows to the widest call, once
        if (int64_t(room.size()) < bytes * count + LINE) room.resize(size_t(bytes * count + LINE));
        auto* rows = reinterpret_cast<uint8_t*>(up(reinterpret_cast<int64_t>(room.data()), LINE));
        for (int64_t r = 0; r < count; ++r) product.row(weight, static_cast<const float*>(x.data) + r * weight.k, rows + r * bytes);

        struct Work {
            const Linear& node;
            Rows rows;
            float* y;
        } work{*this, {rows, size_t(bytes), count}, y};
        const auto tile_of = [](void* data, size_t i) {
            const Work& w = *static_cast<const Work*>(data);
            w.node.product.tiles(w.node.weight, w.rows, int64_t(i), int64_t(i) + 1, w.y);
        };
        check(api->KernelContext_ParallelFor(context, tile_of, size_t(up(weight.n, tile) / tile), 0, &work));
    }
};

// ids [..] -> [.., k]: rows of the weight, packed where a product reads it too, else as stored.
struct Embed : Node {
    const Kernels& kernels;
    const Weight& packed;  // of the same stored codes, once a product packs them
    const Array codes, scale;
    Embed(const OrtApi* a, const Kernels& k, const Weight& w, Array c, Array s) : Node(a), kernels(k), packed(w), codes(std::move(c)), scale(std::move(s)) {
        if (codes.shape.size() != 2 || scale.shape != std::vector<int64_t>{codes.shape[1]}) misfit();
    }

    void run(OrtKernelContext* context) const override {
        Array ids = input(context);
        const int64_t count = product_of(ids.shape), k = codes.shape[0], n = codes.shape[1];
        ids.shape.push_back(k);
        float* y = output(context, ids.shape);
        const auto* stored = static_cast<const uint8_t*>(codes.data);
        for (int64_t r = 0; r < count; ++r, y += k) {
            int64_t id = static_cast<const int32_t*>(ids.data)[r];
            if (id < 0) id += n;
            if (id < 0 || id >= n) throw Error("a token lies outside the vocabulary", "ask for tokens of the model's own");
            if (packed.packed) unpack_int8(kernels, packed, id, y);
            else
                for (int64_t i = 0; i < k; ++i) y[i] = (float(stored[i * n + id]) - 128) * static_cast<const float*>(scale.data)[id];
        }
    }
};

}  // namespace

struct LinearOps::Op : OrtCustomOp {
    LinearOps* owner;
    const char* name;
    Kind kind;
    size_t inputs;
};

LinearOps::LinearOps(const OrtApi* api, const Kernels& kernels, std::function<void(const void*, size_t)> read)
    : api_(api), kernels_(kernels), read_(std::move(read)) {
    const auto check = [&](OrtStatus* status) { check_status(api, status, "ONNX Runtime", "take our operators", "install the version that edgespec pins"); };
    check(api->CreateCustomOpDomain("edgespec", &domain_));
    for (const auto& known : OPS) {
        Op& op = *ops_.emplace_back(std::make_unique<Op>());
        op.owner = this;
        op.name = known.name;
        op.kind = known.kind;
        op.inputs = known.inputs;
        op.version = 17;
        op.GetName = [](const OrtCustomOp* o) { return static_cast<const Op*>(o)->name; };
        op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
        op.GetInputTypeCount = [](const OrtCustomOp* o) { return static_cast<const Op*>(o)->inputs; };
        op.GetInputType = [](const OrtCustomOp* o, size_t i) {
            if (i == 1) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
            return i == 0 && static_cast<const Op*>(o)->kind == INT8_EMBED ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        };
        op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
        op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
        op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
        op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
        op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
        op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* a, const OrtKernelInfo* info, void** made) {
            return guarded(a, [&] {
                const Op& op = *static_cast<const Op*>(o);
                *made = op.owner->node(op, info);
            });
        };
        op.KernelComputeV2 = [](void* node, OrtKernelContext* context) {
            const auto* self = static_cast<const Node*>(node);
            return guarded(self->api, [&] { self->run(context); });
        };
        op.KernelDestroy = [](void* node) { delete static_cast<Node*>(node); };
        check(api->CustomOpDomain_Add(domain_, &op));
    }
}

LinearOps::~LinearOps() { api_->ReleaseCustomOpDomain(domain_); }

void LinearOps::add_to(OrtSessionOptions* session) const { check_status(api_, api_->AddCustomOpDomain(session, domain_), "ONNX Runtime", "take our operators", "install the version that edgespec pins"); }

void* LinearOps::node(const Op& op, const OrtKernelInfo* info) {
    const auto constant = [&](size_t i) {
        int stored = 0;
        const OrtValue* value = nullptr;
        check_status(api_, api_->KernelInfoGetConstantInput_tensor(info, i, &stored, &value), "a product", "read its weights", "export the bundle again");
        if (!stored) misfit();
        return array(api_, value);
    };
    const auto floats = [](const Array& from, const std::vector<int64_t>& shape) {
        if (from.shape != shape) misfit();
        const auto* data = static_cast<const float*>(from.data);
        return std::vector<float>(data, data + product_of(shape));
    };
    const Array codes = constant(1), scale = constant(2);
    for (const int64_t size : codes.shape)
        if (size < 1) misfit();
    Stored& found = weights_[{op.kind == INT4_LINEAR, codes.data, codes.shape}];
    Weight& w = found.weight;
    if (op.kind == INT8_EMBED) return new Embed(api_, kernels_, w, codes, scale);
    if (codes.shape.size() != (op.kind == INT8_LINEAR ? 2 : 3)) misfit();
    if (op.kind == INT8_LINEAR && codes.shape[0] > INT32_MAX / (255 * 128)) misfit();  // a sum would not fit its 32 bits
    const auto* from = static_cast<const uint8_t*>(codes.data);
    const Product& product = op.kind == INT8_LINEAR ? kernels_.int8 : kernels_.int4;
    if (!w.packed && op.kind == INT8_LINEAR) {
        w.k = codes.shape[0];
        w.n = codes.shape[1];
        found.scale = floats(scale, {w.n});
        found.sums = floats(constant(3), {w.n});
        found.packed = pack_int8(kernels_, from, w.k, w.n);
    } else if (!w.packed) {
        check_status(api_, api_->KernelInfoGetAttribute_int64(info, "inputs", &w.k), "a product", "read its size", "export the bundle again");
        w.n = codes.shape[0];
        w.blocks = codes.shape[1];
        if (w.k < 1 || w.k > w.blocks * BLOCK || codes.shape[2] != BLOCK / 2 || w.blocks != blocks_of(w.k) + 2 * sum_blocks(w.k)) misfit();
        found.packed = pack_int4(kernels_, from, floats(scale, {w.n, w.blocks}).data(), w.n, w.blocks);
    }
    if (!w.packed) {
        read_(from, size_t(product_of(codes.shape)));
        w.scale = found.scale.data();
        w.sums = found.sums.data();
        w.packed = found.packed.data();
    }
    return new Linear(api_, product, kernels_.tile(), w);
}

}  // namespace edgespec
