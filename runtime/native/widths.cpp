#include "widths.h"

#include <algorithm>
#include <cstring>

#include "sampling.h"

namespace edgespec {
namespace {

constexpr int TOKENS = 40;

struct Run {
    std::vector<std::vector<float>> logits;  // by position; empty where the graph does not say
    std::vector<char> rows;
};

Run absorb(Model& model, const GraphSpec& graph, const std::vector<int>& tokens) {
    const ModelEntry& m = model.entry;
    State state(model);
    state.cache.fit(graph.bucket + m.block);
    Run out;
    out.logits.resize(tokens.size());
    for (int done = 0; done < int(tokens.size());) {
        const int rows = std::min({graph.width, int(tokens.size()) - done, state.room()});
        const Result r = state.call(graph.kind, graph.width, &tokens[size_t(done)], rows);
        const bool last_only = graph.last_only();
        for (int i = last_only ? rows - 1 : 0; i < rows; ++i) {
            const float* from = r.logits + int64_t(last_only ? 0 : i) * m.head_rows;
            out.logits[size_t(done + i)].assign(from, from + m.head_rows);
        }
        for (const auto& [queries, floats] : r.queries) {
            const char* from = reinterpret_cast<const char*>(queries);
            out.rows.insert(out.rows.end(), from, from + rows * floats * int64_t(sizeof(float)));
        }
        state.accept(rows);
        state.commit_if_full();
        done += rows;
    }
    std::vector<char> filled;
    state.cache.save(filled);
    out.rows.insert(out.rows.end(), filled.begin(), filled.end());
    return out;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

std::string width_difference(Model& model) {
    const ModelEntry& m = model.entry;
    Random random(0);
    std::vector<int> tokens(size_t(std::min({TOKENS, m.buckets.front() + m.block - 1, m.positions})));
    for (int& token : tokens) token = std::min(int(random.uniform() * m.vocab), m.vocab - 1);
    std::vector<const GraphSpec*> graphs;
    for (const GraphSpec& g : m.graphs)
        if (g.step() && g.part == 0) graphs.push_back(&g);
    std::sort(graphs.begin(), graphs.end(), [](auto* a, auto* b) { return std::make_pair(a->bucket, a->width) < std::make_pair(b->bucket, b->width); });
    Run first;
    for (const GraphSpec* g : graphs) {
        const Run run = absorb(model, *g, tokens);
        if (first.logits.empty()) {
            first = run;
            continue;
        }
        for (size_t i = 0; i < tokens.size(); ++i)
            if (!run.logits[i].empty() && !same(run.logits[i], first.logits[i]))
                return g->file + " leaves " + graphs[0]->file + " in the logits of row " + std::to_string(i);
        if (!same(run.rows, first.rows)) return g->file + " leaves " + graphs[0]->file + " in the caches";
    }
    return "";
}

}  // namespace edgespec
