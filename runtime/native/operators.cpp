#include "operators.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
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

enum Kind { INT8_LINEAR, INT4_LINEAR, INT8_EMBED, ATTEND, ATTEND_PACKED };

constexpr auto F = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, U8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, I32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, I64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

struct Known {
    const char* name;
    Kind kind;
    std::vector<ONNXTensorElementDataType> inputs;
    size_t outputs;
};

const std::vector<Known>& known() {
    static const std::vector<Known> all = {
        {"Int8Linear", INT8_LINEAR, {F, U8, F, F}, 1},
        {"Int4Linear", INT4_LINEAR, {F, U8, F}, 1},
        {"Int4LinearRow", INT4_LINEAR, {F, U8, F}, 1},
        {"Int8Embed", INT8_EMBED, {I32, U8, F}, 1},
        {"Attend", ATTEND, {F, F, F, F, F, I32, I32, I32}, 3},                   // q, k, v, both caches, count, last, total
        {"AttendPacked", ATTEND_PACKED, {F, F, F, I32, I32, I32, F, F, I64}, 3},  // qkv, both caches, count, last, total, angles, positions
    };
    return all;
}

// One node of a graph.
struct Node {
    const OrtApi* api;
    explicit Node(const OrtApi* a) : api(a) {}
    virtual ~Node() = default;
    virtual void run(OrtKernelContext* context) const = 0;

    void check(OrtStatus* status) const { check_status(api, status, "a product", "run", "run edgespec check on the bundle"); }

    Array input(OrtKernelContext* context, size_t i = 0) const {
        const OrtValue* given = nullptr;
        check(api->KernelContext_GetInput(context, i, &given));
        return array(api, given);
    }

    float* output(OrtKernelContext* context, const std::vector<int64_t>& shape, size_t i = 0) const {
        OrtValue* made = nullptr;
        check(api->KernelContext_GetOutput(context, i, shape.data(), shape.size(), &made));
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

// Rows of q, k and v, turned here where they come packed -> what they attend to, and both caches with their keys and values, which
// are given and taken in the same buffers.
struct Attend : Node {
    const Kernels& kernels;
    const bool packed;
    int64_t heads = 0, kv_heads = 0, window = 0, interleaved = 0;
    float scale = 0, softcap = 0;
    Attend(const OrtApi* a, const Kernels& k, bool one, const OrtKernelInfo* info) : Node(a), kernels(k), packed(one) {
        check(api->KernelInfoGetAttribute_int64(info, "heads", &heads));
        check(api->KernelInfoGetAttribute_int64(info, "kv_heads", &kv_heads));
        check(api->KernelInfoGetAttribute_int64(info, "window", &window));
        check(api->KernelInfoGetAttribute_float(info, "scale", &scale));
        check(api->KernelInfoGetAttribute_float(info, "softcap", &softcap));
        if (packed) check(api->KernelInfoGetAttribute_int64(info, "interleaved", &interleaved));
        if (heads < 1 || kv_heads < 1 || heads % kv_heads) misfit();
    }

    void run(OrtKernelContext* context) const override {
        const size_t caches = packed ? 1 : 3;
        const Array q = input(context, 0), keys = input(context, caches), values = input(context, caches + 1), counted = input(context, caches + 2);
        if (keys.shape.size() != 4 || keys.shape != values.shape || keys.shape[0] != 1 || keys.shape[1] != kv_heads || product_of(counted.shape) != 1) misfit();
        Attention a{0, heads, kv_heads, keys.shape[3], keys.shape[2], *static_cast<const int32_t*>(counted.data), window, scale, softcap, nullptr, nullptr, nullptr, nullptr};
        if (q.shape.size() != 3 || q.shape[0] != 1 || a.head_dim < 1 || q.shape[2] != (packed ? heads + 2 * kv_heads : heads) * a.head_dim) misfit();
        a.rows = q.shape[1];
        if (a.count < 0 || a.count > a.slots) misfit();
        a.out = output(context, {1, a.rows, heads * a.head_dim});
        float* const held[2] = {taken(context, keys, 1), taken(context, values, 2)};
        a.keys = held[0], a.values = held[1];

        const float* given[3] = {static_cast<const float*>(q.data), nullptr, nullptr};
        int64_t strides[3] = {q.shape[2], kv_heads * a.head_dim, kv_heads * a.head_dim};
        Array cos{}, sin{}, positions{};
        if (packed) {
            given[1] = given[0] + heads * a.head_dim, given[2] = given[1] + kv_heads * a.head_dim;
            strides[1] = strides[2] = strides[0];
            cos = input(context, 6), sin = input(context, 7), positions = input(context, 8);
            if (cos.shape != sin.shape || cos.shape.size() != 2 || 2 * cos.shape[1] != a.head_dim || product_of(positions.shape) < a.rows) misfit();
        } else {
            for (size_t i : {1, 2}) {
                const Array rows = input(context, i);
                if (rows.shape != std::vector<int64_t>{1, a.rows, strides[i]}) misfit();
                given[i] = static_cast<const float*>(rows.data);
            }
        }
        thread_local std::vector<float> queries;  // grows to the widest call, once
        if (int64_t(queries.size()) < a.rows * heads * a.head_dim) queries.resize(size_t(a.rows * heads * a.head_dim));
        a.queries = queries.data();

        for (int64_t row = 0; row < a.rows; ++row) {
            const float *turn[2] = {nullptr, nullptr};
            if (packed) {
                const int64_t position = static_cast<const int64_t*>(positions.data)[row];
                if (position < 0 || position >= cos.shape[0]) misfit();
                turn[0] = static_cast<const float*>(cos.data) + position * cos.shape[1];
                turn[1] = static_cast<const float*>(sin.data) + position * cos.shape[1];
            }
            for (int64_t h = 0; h < heads; ++h) put(a, given[0] + row * strides[0] + h * a.head_dim, turn, queries.data() + (row * heads + h) * a.head_dim);
            if (a.count + row >= a.slots) continue;  // padding
            for (int64_t h = 0; h < kv_heads; ++h) {
                const int64_t at = (h * a.slots + a.count + row) * a.head_dim;
                put(a, given[1] + row * strides[1] + h * a.head_dim, turn, held[0] + at);
                std::copy_n(given[2] + row * strides[2] + h * a.head_dim, a.head_dim, held[1] + at);
            }
        }
        struct Work {
            const Kernels& kernels;
            const Attention& attention;
        } work{kernels, a};
        const auto unit_of = [](void* data, size_t i) {
            const Work& w = *static_cast<const Work*>(data);
            w.kernels.attend(w.attention, int64_t(i));
        };
        check(api->KernelContext_ParallelFor(context, unit_of, size_t(kernels.units(a)), 0, &work));
    }

  private:
    // The cache's output, with what its input holds.
    float* taken(OrtKernelContext* context, const Array& cache, size_t i) const {
        float* held = output(context, cache.shape, i);
        if (held != cache.data) std::memcpy(held, cache.data, size_t(product_of(cache.shape)) * sizeof(float));
        return held;
    }

    // One head's numbers, turned by the angles if there are any.
    void put(const Attention& a, const float* from, const float* const turn[2], float* to) const {
        if (!turn[0]) {
            std::copy_n(from, a.head_dim, to);
            return;
        }
        const int64_t half = a.head_dim / 2, apart = interleaved ? 1 : half, step = interleaved ? 2 : 1;
        for (int64_t i = 0; i < half; ++i) {
            const float x = from[i * step], y = from[i * step + apart];
            to[i * step] = x * turn[0][i] - y * turn[1][i];
            to[i * step + apart] = y * turn[0][i] + x * turn[1][i];
        }
    }
};

}  // namespace

struct Operators::Op : OrtCustomOp {
    Operators* owner;
    const Known* known;
};

Operators::Operators(const OrtApi* api, const Kernels& kernels, std::function<void(const void*, size_t)> read)
    : api_(api), kernels_(kernels), read_(std::move(read)) {
    const auto check = [&](OrtStatus* status) { check_status(api, status, "ONNX Runtime", "take our operators", "install the version that edgespec pins"); };
    check(api->CreateCustomOpDomain("edgespec", &domain_));
    for (const Known& each : known()) {
        Op& op = *ops_.emplace_back(std::make_unique<Op>());
        op.owner = this;
        op.known = &each;
        op.version = 17;
        op.GetName = [](const OrtCustomOp* o) { return static_cast<const Op*>(o)->known->name; };
        op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
        op.GetInputTypeCount = [](const OrtCustomOp* o) { return static_cast<const Op*>(o)->known->inputs.size(); };
        op.GetInputType = [](const OrtCustomOp* o, size_t i) { return static_cast<const Op*>(o)->known->inputs[i]; };
        op.GetOutputTypeCount = [](const OrtCustomOp* o) { return static_cast<const Op*>(o)->known->outputs; };
        op.GetOutputType = [](const OrtCustomOp*, size_t) { return F; };
        op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
        op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
        op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
        op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* a, const OrtKernelInfo* info, void** made) {
            return guarded(a, [&] {
                const Op& self = *static_cast<const Op*>(o);
                *made = self.owner->node(self, info);
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

Pages::~Pages() {
    for (const Run& run : runs_) munmap(run.data, run.size);
}

uint8_t* Pages::take(size_t bytes) {
    constexpr size_t LARGE = 2 << 20, RUN = 16 * LARGE;
    bytes = size_t(up(int64_t(bytes), LINE));
    if (runs_.empty() || runs_.back().size - used_ < bytes) {
        const size_t size = std::max(RUN, size_t(up(int64_t(bytes), LARGE)));
        void* at = mmap(nullptr, size + LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        // Only from a large page's start on.
        const size_t before = (LARGE - reinterpret_cast<uintptr_t>(at) % LARGE) % LARGE;
        auto* data = static_cast<uint8_t*>(at) + before;
        if (before) munmap(at, before);
        munmap(data + size, LARGE - before);
        runs_.push_back({data, size});
        used_ = 0;
#ifdef MADV_HUGEPAGE
        madvise(data, size, MADV_HUGEPAGE);
#endif
    }
    uint8_t* const made = runs_.back().data + used_;
    used_ += bytes;
    return made;
}

Operators::~Operators() { api_->ReleaseCustomOpDomain(domain_); }

void Operators::add_to(OrtSessionOptions* session) const { check_status(api_, api_->AddCustomOpDomain(session, domain_), "ONNX Runtime", "take our operators", "install the version that edgespec pins"); }

void* Operators::node(const Op& op, const OrtKernelInfo* info) {
    const Kind kind = op.known->kind;
    if (kind == ATTEND || kind == ATTEND_PACKED) return new Attend(api_, kernels_, kind == ATTEND_PACKED, info);
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
    Stored& found = weights_[{kind == INT4_LINEAR, codes.data, codes.shape}];
    Weight& w = found.weight;
    if (kind == INT8_EMBED) return new Embed(api_, kernels_, w, codes, scale);
    if (codes.shape.size() != (kind == INT8_LINEAR ? 2 : 3)) misfit();
    if (kind == INT8_LINEAR && codes.shape[0] > INT32_MAX / (255 * 128)) misfit();  // a sum would not fit its 32 bits
    const auto* from = static_cast<const uint8_t*>(codes.data);
    uint8_t* packed = nullptr;
    const Product& product = kind == INT8_LINEAR ? kernels_.int8 : kernels_.int4;
    if (!w.packed && kind == INT8_LINEAR) {
        w.k = codes.shape[0];
        w.n = codes.shape[1];
        found.scale = floats(scale, {w.n});
        found.sums = floats(constant(3), {w.n});
        packed = pages_.take(int8_size(kernels_, w.k, w.n));
        pack_int8(kernels_, from, w.k, w.n, packed);
    } else if (!w.packed) {
        check_status(api_, api_->KernelInfoGetAttribute_int64(info, "inputs", &w.k), "a product", "read its size", "export the bundle again");
        w.n = codes.shape[0];
        w.blocks = codes.shape[1];
        if (w.k < 1 || w.k > w.blocks * BLOCK || codes.shape[2] != BLOCK / 2 || w.blocks != blocks_of(w.k) + 2 * sum_blocks(w.k)) misfit();
        const std::vector<float> scales = floats(scale, {w.n, w.blocks});
        packed = pages_.take(int4_size(kernels_, w.n, w.blocks));
        pack_int4(kernels_, from, scales.data(), w.n, w.blocks, packed);
    }
    if (!w.packed) {
        read_(from, size_t(product_of(codes.shape)));
        w.scale = found.scale.data();
        w.sums = found.sums.data();
        w.packed = packed;
    }
    return new Linear(api_, product, kernels_.tile(), w);
}

}  // namespace edgespec
