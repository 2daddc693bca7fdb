#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "error.h"

namespace edgespec {
namespace {

bool is_cache(const std::string& name) {
    const std::string own = name.rfind("new_", 0) == 0 ? name.substr(4) : name;
    return own.rfind("keys_", 0) == 0 || own.rfind("values_", 0) == 0;
}

bool is_context(const std::string& name) { return name == "context" || name == "context_ids"; }

// Of a policy's graph, what is no part of a session's cache.
bool is_own(const std::string& name, bool compact) { return name == "keep" || name == "new_carried" || name == "count" || (compact && name == "kept_keys"); }

// What a part gives of its own layers.
bool is_layered(const std::string& name) { return name == "new_keys" || name == "new_values" || name == "new_queries"; }

}  // namespace

void* Model::Opened::find(const std::string& name) const {
    for (const Part& part : parts)
        if (const auto found = part.at.find(name); found != part.at.end()) return found->second;
    return nullptr;
}

void* Model::Opened::found(const std::string& name) const {
    void* at = find(name);
    if (!at) throw Error(spec().file + " lacks " + name, "export the bundle again");
    return at;
}

Model::Model(const ModelEntry& e, Backend& backend) : entry(e) {
    for (const GraphSpec& g : entry.graphs) {
        Opened& o = graphs_[{g.kind, g.step() ? g.width : 0, g.bucket}];
        Part part{&g, backend.open(entry, g), {}};
        for (const auto* tensors : {&g.inputs, &g.outputs})
            for (const TensorSpec& t : *tensors) {
                if (g.policy() ? !is_own(t.name, entry.compact) : is_cache(t.name) || is_context(t.name)) continue;
                void* shared = is_layered(t.name) ? nullptr : o.find(t.name);
                if (shared && o.bytes.at(t.name) != t.bytes()) throw Error(g.file + " takes a " + t.name + " of another size", "export the bundle again");
                part.at[t.name] = shared ? shared : o.own.emplace_back(size_t(t.bytes())).data();
                o.bytes[t.name] = t.bytes();
            }
        o.parts.push_back(std::move(part));
    }
}

Model::Opened& Model::opened(const std::string& kind, int width, int bucket) {
    const auto found = graphs_.find({kind, width, bucket});
    if (found == graphs_.end()) throw Error(entry.name + " has no " + kind + " graph of width " + std::to_string(width), "export the bundle with that width");
    return found->second;
}

int State::place() const { return model_.entry.compact ? cache.count() : cache.position(); }

int State::room() const { return std::min(cache.free(), model_.entry.positions - place()); }

Call& State::bound(Model::Part& o, int layer) {
    auto& call = calls_[{&o, layer}];
    if (call) return *call;
    const auto buffer = [&](const TensorSpec& t) -> Buffer {
        if (const auto own = o.at.find(t.name); own != o.at.end()) return {&t, own->second};
        if (t.name == "context") return {&t, context.columns()};
        if (t.name == "context_ids") return {&t, context.ids()};
        if (layer >= 0 && t.name == "queries") return {&t, cache.queries(layer)};
        if (layer >= 0 && t.name == "carried") return {&t, cache.carried(layer)};
        const std::string name = t.name.rfind("new_", 0) == 0 ? t.name.substr(4) : t.name;
        const size_t part = name.find('_');
        const int index = part == std::string::npos ? layer : std::stoi(name.substr(part + 1));
        if (index < 0 || index >= model_.entry.layers) throw Error(o.spec->file + " has an unknown tensor " + t.name, "update edgespec");
        return {&t, cache.buffer(name.rfind("values", 0) == 0, index)};
    };
    std::vector<Buffer> inputs, outputs;
    for (const TensorSpec& t : o.spec->inputs) inputs.push_back(buffer(t));
    for (const TensorSpec& t : o.spec->outputs)
        if (layer < 0 || is_own(t.name, model_.entry.compact)) outputs.push_back(buffer(t));
    call = o.graph->bind(inputs, outputs);
    return *call;
}

// Run the graphs with their buffers as they are, and say so.
void State::run(Model::Opened& o, int rows) {
    std::vector<Call*> calls;
    for (Model::Part& part : o.parts) calls.push_back(&bound(part));
    const auto start = std::chrono::steady_clock::now();
    for (Call* call : calls) call->run();
    if (!trace) return;
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    trace->push_back({model_.entry.name.c_str(), o.spec().kind.c_str(), o.spec().width, rows, took.count()});
}

void State::follow(const std::vector<int>& text) {
    if (!model_.entry.context_rows) return;
    context.follow(text);
    Model::Opened& o = model_.opened("context", 0, model_.entry.budget);
    auto* tokens = o.at<int32_t>("tokens");
    for (std::vector<int> slots; !(slots = context.stale(o.spec().width)).empty();) {
        std::fill_n(tokens, o.spec().width, 0);
        for (size_t i = 0; i < slots.size(); ++i) tokens[i] = context.tokens()[size_t(slots[i])];
        run(o, int(slots.size()));
        const auto* rows = o.at<const float>("rows");
        for (size_t i = 0; i < slots.size(); ++i) context.fill(slots[i], rows + int64_t(i) * model_.entry.hidden);
    }
}

Result State::call(const std::string& kind, int width, const int* tokens, int rows, const float* features, int64_t first) {
    if (rows < 1 || rows > width || rows > room())
        throw Error("a call of " + std::to_string(rows) + " rows with room for " + std::to_string(room()), "this is a bug of the runtime; please report it");
    cache.fit(cache.count() + rows);
    Model::Opened& o = model_.opened(kind, width, cache.bucket());
    auto* ids = o.at<int32_t>("tokens");
    std::fill(std::copy(tokens, tokens + rows, ids), ids + width, 0);
    *o.at<int32_t>("position") = place();
    *o.at<int32_t>("count") = cache.count();
    if (o.spec().last_only()) *o.at<int32_t>("row") = rows - 1;
    if (kind == "embeds") {
        const int64_t hidden = model_.entry.hidden;
        auto* own = o.at<float>("features");
        for (int i = 0; i < rows; ++i)
            if (tokens[i] < 0) std::copy_n(features + (-1 - int64_t(tokens[i]) - first) * hidden, hidden, own + i * hidden);
    }
    run(o, rows);
    last_ = &o;
    Result r;
    r.columns = model_.entry.columns(kind);
    r.logits = o.at<float>("logits");
    r.argmax = o.at<int32_t>("argmax");
    for (const Model::Part& part : o.parts)
        if (const auto queries = part.at.find("new_queries"); queries != part.at.end())
            r.queries.push_back({static_cast<float*>(queries->second), int64_t(model_.entry.parts[size_t(part.spec->part)]) * model_.entry.heads * model_.entry.head_dim});
    if (kind == "draft") {
        r.entropy = o.at<float>("entropy");
        r.top = o.at<float>("top_probabilities");
        for (const TensorSpec& t : o.parts.back().spec->outputs)
            if (t.name == "top_probabilities") r.top_k = int(t.shape.back());
    }
    return r;
}

void State::accept(int rows) {
    for (const Model::Part& part : last_->parts) {
        const auto given = [&](const char* name) {
            const auto found = part.at.find(name);
            return found == part.at.end() ? nullptr : found->second;
        };
        const Cache::Layers layers{model_.entry.first_layer(part.spec->part), model_.entry.parts[size_t(part.spec->part)]};
        cache.append(layers, rows, part.spec->width, given("new_keys"), given("new_values"), static_cast<const float*>(given("new_queries")));
    }
    cache.grow(rows);
}

int State::position_after(int cut) const {
    const int left = std::max(0, cut - 1), away = cache.position() - left;
    return away <= 0 ? cache.position() : away <= cache.removable() ? left : 0;
}

void State::cut(int tokens) {
    context.forget(tokens);
    const int left = position_after(tokens), away = cache.position() - left;
    if (away == 0) return;
    if (away <= cache.removable()) cache.roll_back(away);
    else cache.clear();
}

// One layer through a policy's graph; what it carries goes on.
Model::Opened& State::run_policy(const std::string& kind, int bucket, int layer) {
    Model::Opened& o = model_.opened(kind, 0, bucket);
    if (o.find("count")) *o.at<int32_t>("count") = cache.count();
    bound(o.parts.front(), layer).run();
    if (o.find("new_carried")) std::copy_n(o.at<const float>("new_carried"), model_.entry.carried_floats(), cache.carried(layer));
    return o;
}

void State::commit_if_full() {
    const ModelEntry& m = model_.entry;
    const bool observe = cache.must_observe();
    if (!observe && (cache.count() < m.slots() || m.policy == "none")) return;
    const auto start = std::chrono::steady_clock::now();
    for (int layer = 0; layer < m.layers; ++layer) {
        const bool newest = m.windows[size_t(layer)] > 0;
        if (observe) {
            if (!newest) run_policy("observe", cache.bucket(), layer);
            continue;
        }
        const Model::Opened* o = newest ? nullptr : &run_policy("commit", m.budget, layer);
        cache.keep(layer, o ? o->at<const int32_t>("keep") : nullptr);
        if (o && m.compact) cache.replace_keys(layer, o->at<const float>("kept_keys"));
    }
    observe ? cache.observed() : cache.committed();
    if (trace) {
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        trace->push_back({m.name.c_str(), observe ? "observe" : "commit", m.block, observe ? m.block : m.budget, took.count()});
    }
}

}  // namespace edgespec
