// A model in a few lines behind the backend interface. Its logits depend on every visible cache row and on the call's
// own rows, so that a row lost, doubled or in the wrong place changes the text; its commit keeps rows that depend on
// their content.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>

#include "backend.h"
#include "testing.h"

namespace edgespec {

inline uint64_t mix(uint64_t a, uint64_t b) {
    uint64_t z = a * 0x9e3779b97f4a7c15ull + b + 0x632be59bd9b4e019ull;
    z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9ull;
    return z ^ (z >> 32);
}

struct Faults {
    int nan_at_position = -1, fail_at_position = -1, wild_token = 0, odd_width = 0;  // odd: rounds otherwise
};

class FakeCall : public Call {
  public:
    FakeCall(const ModelEntry& model, const GraphSpec& spec, const Faults& faults, const std::vector<Buffer>& in, const std::vector<Buffer>& out)
        : m_(model), spec_(spec), faults_(faults) {
        for (const auto* list : {&in, &out})
            for (const Buffer& b : *list) at_[b.spec->name] = b.data;
    }

    void run() override { spec_.kind == "context" ? look_up() : spec_.kind == "commit" ? commit() : spec_.kind == "observe" ? observe(*get<int32_t>("count")) : step(); }

  private:
    template <typename T> T* get(const char* name) { return static_cast<T*>(at_.at(name)); }

    void step() {
        const int32_t* tokens = get<int32_t>("tokens");
        const int position = *get<int32_t>("position"), count = *get<int32_t>("count");
        CHECK(count >= 0 && count < m_.slots() && position < m_.positions);
        if (position <= faults_.fail_at_position && faults_.fail_at_position < position + spec_.width) throw Error("the fake fails here", "it was told to");
        float* keys = get<float>("keys_0");
        const bool append = m_.contract == "append";
        float* fresh = append ? keys + count : get<float>("new_keys");
        const int only = spec_.kind == "prefill" ? *get<int32_t>("row") : -1;
        for (int r = 0; r < spec_.width; ++r) {
            fresh[r] = float((position + r) * 64 + tokens[r]);  // a row is its position and token
            if (at_.count("new_queries")) get<float>("new_queries")[r] = fresh[r] + 0.5f;
            uint64_t state = 0;
            for (int i = 0; i < count; ++i) state = mix(state, uint64_t(keys[i]));
            for (int i = 0; i <= r; ++i) state = mix(state, uint64_t(fresh[i]));
            if (only < 0 || r == only) logits(state, tokens[r], only < 0 ? r : 0, position + r);
        }
        if (!append) std::memcpy(get<float>("new_values"), fresh, sizeof(float) * size_t(spec_.width));
        if (append) std::memcpy(get<float>("values_0") + count, fresh, sizeof(float) * size_t(spec_.width));
    }

    // A head row is its token.
    void look_up() {
        for (int r = 0; r < spec_.width; ++r) {
            CHECK(get<int32_t>("tokens")[r] >= 0 && get<int32_t>("tokens")[r] < m_.vocab);
            get<float>("rows")[r] = float(get<int32_t>("tokens")[r]);
        }
    }

    // The token of a logit, -1 where that is masked.
    int token_of(int column) {
        if (column < m_.head_rows) return m_.head_ids.empty() ? column : m_.head_ids[size_t(column)];
        const int slot = column - m_.head_rows, id = get<int32_t>("context_ids")[slot];
        CHECK(id < 0 || get<float>("context")[slot] == float(id));
        CHECK(std::find(m_.head_ids.begin(), m_.head_ids.end(), id) == m_.head_ids.end());
        return id;
    }

    // The target's law depends on everything seen; the draft's is the same half of the time.
    void logits(uint64_t state, int token, int row, int position) {
        const int columns = int(m_.columns(spec_.kind));
        float* out = get<float>("logits") + row * columns;
        const bool draft = m_.name == "draft";
        if (draft && mix(state, 5) % 2) state = mix(state, 99);
        int best = 0;
        for (int i = 0; i < columns; ++i) {
            const int id = token_of(i);
            out[i] = id < 0 ? -1e4f : float(mix(state, uint64_t(id)) % 4096) / 1024 + (id == (token + 1) % m_.vocab ? 2.5f : 0.0f);  // likely: the next id
            if (out[i] > out[best]) best = i;
        }
        if (spec_.width == faults_.odd_width) out[0] = std::nextafter(out[0], 100.0f);
        if (position == faults_.nan_at_position) std::fill(out, out + columns, std::nanf(""));
        get<int32_t>("argmax")[row] = m_.head_ids.empty() ? best + faults_.wild_token : token_of(best);
        if (!draft || spec_.kind == "prefill") return;
        double total = 0, entropy = 0;
        for (int i = 0; i < columns; ++i) total += std::exp(double(out[i]));
        for (int i = 0; i < columns; ++i) {
            const double p = std::exp(double(out[i])) / total;
            if (p > 0) entropy -= p * std::log(p);
        }
        get<float>("entropy")[row] = float(entropy);
        get<float>("top_probabilities")[row] = float(std::exp(double(out[best])) / total);
    }

    // What the stored queries of the rows before `end` give to a row that they saw: their own rows and order count.
    float given(int slot, int end) {
        float sum = 0;
        for (int r = 0; r < m_.queries; ++r)
            if (slot <= end - m_.queries + r) sum += float(mix(uint64_t(get<float>("keys")[slot]), uint64_t(2 * get<float>("queries")[r]) + 7 * uint64_t(r)) % 1024);
        return sum;
    }

    void observe(int end) {
        for (int i = 0; i < m_.slots(); ++i) get<float>("new_carried")[i] = i < end ? get<float>("carried")[i] + given(i, end) : 0;
    }

    void commit() {
        const int slots = m_.slots();
        std::vector<float> score(size_t(slots), 0);
        for (int i = 0; i < slots; ++i) score[size_t(i)] = m_.queries ? given(i, slots) : float(mix(uint64_t(get<float>("keys")[i]), 3) % 65536);
        if (m_.carries) {
            observe(slots);
            std::copy_n(get<float>("new_carried"), slots, score.begin());
        }
        std::vector<int32_t> order(size_t(slots), 0);
        for (int i = 0; i < slots; ++i) order[size_t(i)] = i;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[size_t(a)] > score[size_t(b)]; });
        std::sort(order.begin(), order.begin() + m_.budget);
        std::copy(order.begin(), order.begin() + m_.budget, get<int32_t>("keep"));
        for (int i = 0; m_.carries && i < slots; ++i) get<float>("new_carried")[i] = i < m_.budget ? score[size_t(order[size_t(i)])] : 0;
    }

    const ModelEntry& m_;
    const GraphSpec& spec_;
    const Faults& faults_;
    std::map<std::string, void*> at_;
};

class FakeGraph : public Graph {
  public:
    FakeGraph(const ModelEntry& model, const GraphSpec& spec, const Faults& faults) : m_(model), spec_(spec), faults_(faults) {}
    std::unique_ptr<Call> bind(const std::vector<Buffer>& in, const std::vector<Buffer>& out) override {
        return std::make_unique<FakeCall>(m_, spec_, faults_, in, out);
    }

  private:
    const ModelEntry& m_;
    const GraphSpec& spec_;
    const Faults& faults_;
};

class FakeBackend : public Backend {
  public:
    explicit FakeBackend(const ModelEntry& model) : m_(model) {}
    std::unique_ptr<Graph> open(const ModelEntry&, const GraphSpec& graph) override { return std::make_unique<FakeGraph>(m_, graph, faults); }
    Faults faults;

  private:
    const ModelEntry& m_;
};

inline ModelEntry fake_model(const std::string& name, const std::string& contract, const std::string& policy, int budget, int block, std::vector<int> buckets = {}, int context = 0) {
    ModelEntry m;
    m.name = name, m.contract = contract, m.policy = policy, m.budget = budget, m.block = block;
    m.queries = policy == "h2o" ? block : policy == "snapkv" ? std::min(3, block) : 0, m.carries = policy == "h2o";
    m.layers = m.hidden = m.heads = m.kv_heads = m.head_dim = 1, m.vocab = m.head_rows = 12, m.positions = 400, m.windows = {0}, m.parts = {1}, m.widths_agree = true, m.bytes_weights = 10;
    m.buckets = buckets.empty() ? std::vector<int>{budget} : buckets;
    if (name == "draft") m.head_ids = {0, 1, 2, 3, 5, 6, 7, 8, 9, 11}, m.head_rows = 10, m.bytes_weights = 1;
    if (context) m.head_ids = {0, 2, 5, 6, 9}, m.head_rows = 5, m.context_rows = context;
    const auto f = Type::float32, i = Type::int32;
    std::vector<std::pair<std::string, int>> kinds{{"prefill", block}};
    if (name == "draft") kinds.push_back({"draft", 2});
    else for (const int w : {1, 2, 4, 8}) kinds.push_back({w == 1 ? "decode" : "verify", w});
    for (const int bucket : m.buckets)
        for (const auto& [kind, w] : kinds) {
            const int64_t n = kind == "prefill" ? 1 : w, rows = bucket + block + (contract == "append" ? block - 1 + 8 : 0);
            GraphSpec g{kind + std::to_string(w) + "-" + std::to_string(bucket), kind, w, bucket, {}, {}};
            g.inputs = {{"tokens", i, {1, w}}, {"position", i, {1}}, {"count", i, {1}}, {"keys_0", f, {1, 1, rows, 1}}, {"values_0", f, {1, 1, rows, 1}}};
            if (kind == "prefill") g.inputs.push_back({"row", i, {1}});
            if (kind == "draft" && context) g.inputs.insert(g.inputs.end(), {{"context", f, {1, context}}, {"context_ids", i, {context}}});
            g.outputs = {{"logits", f, {1, n, m.columns(kind)}}, {"argmax", i, {1, n}}};
            if (kind == "draft") g.outputs.insert(g.outputs.end(), {{"entropy", f, {1, n}}, {"top_probabilities", f, {1, n, 1}}});
            if (contract == "rows") g.outputs.insert(g.outputs.end(), {{"new_keys", f, {1, 1, w, 1}}, {"new_values", f, {1, 1, w, 1}}});
            if (m.queries) g.outputs.push_back({"new_queries", f, {w, 1, 1, 1}});
            m.graphs.push_back(g);
        }
    if (context) m.graphs.push_back({"context", "context", 2, budget, {{"tokens", i, {1, 2}}}, {{"rows", f, {1, 2, 1}}}});
    const TensorSpec carried{"carried", f, {1, budget + block}}, new_carried{"new_carried", f, {1, budget + block}};
    GraphSpec commit{"commit", "commit", block, budget, {{"keys", f, {1, 1, budget + block, 1}}}, {{"keep", i, {1, budget}}}};
    if (m.queries) commit.inputs.push_back({"queries", f, {m.queries, 1, 1}});
    if (m.carries) commit.inputs.push_back(carried), commit.outputs.push_back(new_carried);
    if (policy != "none") m.graphs.push_back(commit);
    for (const int bucket : m.carries ? m.buckets : std::vector<int>{})
        m.graphs.push_back({"observe" + std::to_string(bucket), "observe", block, bucket,
                            {{"keys", f, {1, 1, bucket + block, 1}}, {"queries", f, {m.queries, 1, 1}}, carried, {"count", i, {1}}}, {new_carried}});
    return m;
}

}  // namespace edgespec
