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

}  // namespace

Model::Model(const ModelEntry& e, Backend& backend) : entry(e) {
    for (const GraphSpec& g : entry.graphs) {
        Opened& o = graphs_[{g.kind, g.step() ? g.width : 0, g.bucket}];
        o.spec = &g;
        o.graph = backend.open(entry, g);
        for (const auto* tensors : {&g.inputs, &g.outputs})
            for (const TensorSpec& t : *tensors)
                if (g.policy() ? is_own(t.name, entry.compact) : !is_cache(t.name) && !is_context(t.name)) {
                    o.own.emplace_back(size_t(t.bytes()));
                    o.at[t.name] = o.own.back().data();
                }
    }
}

Model::Opened& Model::opened(const std::string& kind, int width, int bucket) {
    const auto found = graphs_.find({kind, width, bucket});
    if (found == graphs_.end()) throw Error(entry.name + " has no " + kind + " graph of width " + std::to_string(width), "export the bundle with that width");
    return found->second;
}

int State::place() const { return model_.entry.compact ? cache.count() : cache.position(); }

int State::room() const { return std::min(cache.free(), model_.entry.positions - place()); }

Call& State::bound(Model::Opened& o, int layer) {
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

// Run a graph with its buffers as they are, and say so.
void State::run(Model::Opened& o, int rows) {
    Call& call = bound(o);
    const auto start = std::chrono::steady_clock::now();
    call.run();
    if (!trace) return;
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    trace->push_back({model_.entry.name.c_str(), o.spec->kind.c_str(), o.spec->width, rows, took.count()});
}

void State::follow(const std::vector<int>& text) {
    if (!model_.entry.context_rows) return;
    context.follow(text);
    Model::Opened& o = model_.opened("context", 0, model_.entry.budget);
    auto* tokens = static_cast<int32_t*>(o.at.at("tokens"));
    for (std::vector<int> slots; !(slots = context.stale(o.spec->width)).empty();) {
        std::fill_n(tokens, o.spec->width, 0);
        for (size_t i = 0; i < slots.size(); ++i) tokens[i] = context.tokens()[size_t(slots[i])];
        run(o, int(slots.size()));
        const auto* rows = static_cast<const float*>(o.at.at("rows"));
        for (size_t i = 0; i < slots.size(); ++i) context.fill(slots[i], rows + int64_t(i) * model_.entry.hidden);
    }
}

Result State::call(const std::string& kind, int width, const int* tokens, int rows, const float* features) {
    if (rows < 1 || rows > width || rows > room())
        throw Error("a call of " + std::to_string(rows) + " rows with room for " + std::to_string(room()), "this is a bug of the runtime; please report it");
    cache.fit(cache.count() + rows);
    Model::Opened& o = model_.opened(kind, width, cache.bucket());
    auto* ids = static_cast<int32_t*>(o.at.at("tokens"));
    std::fill(std::copy(tokens, tokens + rows, ids), ids + width, 0);
    *static_cast<int32_t*>(o.at.at("position")) = place();
    *static_cast<int32_t*>(o.at.at("count")) = cache.count();
    if (o.spec->last_only()) *static_cast<int32_t*>(o.at.at("row")) = rows - 1;
    if (kind == "embeds") {
        const int64_t hidden = model_.entry.hidden;
        auto* own = static_cast<float*>(o.at.at("features"));
        for (int i = 0; i < rows; ++i)
            if (tokens[i] < 0) std::copy_n(features + (-1 - int64_t(tokens[i])) * hidden, hidden, own + i * hidden);
    }
    run(o, rows);
    last_ = &o;
    Result r;
    r.columns = model_.entry.columns(kind);
    r.logits = static_cast<float*>(o.at.at("logits"));
    r.argmax = static_cast<int32_t*>(o.at.at("argmax"));
    if (const auto queries = o.at.find("new_queries"); queries != o.at.end()) r.queries = static_cast<float*>(queries->second);
    if (kind == "draft") {
        r.entropy = static_cast<float*>(o.at.at("entropy"));
        r.top = static_cast<float*>(o.at.at("top_probabilities"));
        for (const TensorSpec& t : o.spec->outputs)
            if (t.name == "top_probabilities") r.top_k = int(t.shape.back());
    }
    return r;
}

void State::accept(int rows) {
    const auto part = [&](const char* name) {
        const auto found = last_->at.find(name);
        return found == last_->at.end() ? nullptr : found->second;
    };
    cache.append(rows, last_->spec->width, part("new_keys"), part("new_values"), static_cast<const float*>(part("new_queries")));
}

void State::cut(int tokens) {
    context.forget(tokens);
    const int away = cache.position() - std::max(0, tokens - 1);
    if (away <= 0) return;
    if (away <= cache.removable()) cache.roll_back(away);
    else cache.clear();
}

// One layer through a policy's graph; what it carries goes on.
Model::Opened& State::run_policy(const std::string& kind, int bucket, int layer) {
    Model::Opened& o = model_.opened(kind, 0, bucket);
    if (const auto count = o.at.find("count"); count != o.at.end()) *static_cast<int32_t*>(count->second) = cache.count();
    bound(o, layer).run();
    if (const auto carried = o.at.find("new_carried"); carried != o.at.end())
        std::copy_n(static_cast<const float*>(carried->second), model_.entry.carried_floats(), cache.carried(layer));
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
        cache.keep(layer, o ? static_cast<const int32_t*>(o->at.at("keep")) : nullptr);
        if (o && m.compact) cache.replace_keys(layer, static_cast<const float*>(o->at.at("kept_keys")));
    }
    observe ? cache.observed() : cache.committed();
    if (trace) {
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        trace->push_back({m.name.c_str(), observe ? "observe" : "commit", m.block, observe ? m.block : m.budget, took.count()});
    }
}

}  // namespace edgespec
