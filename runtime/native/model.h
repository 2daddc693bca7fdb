// A model's graphs over one session's cache: calls, appends and commits. Knows nothing of text or of drafting.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cache.h"
#include "context.h"

namespace edgespec {

// One graph call, as the trace has it.
struct CallRecord {
    const char* model;
    const char* kind;
    int width, rows;
    double us;
};

// The graphs of one model, opened once, with the buffers that every session's calls share.
class Model {
  public:
    Model(const ModelEntry& entry, Backend& backend);

    struct Part {
        const GraphSpec* spec;
        std::unique_ptr<Graph> graph;
        std::map<std::string, void*> at;  // buffers of the tensors that are no cache, by name
    };
    // The graphs of a step, in order of part, or one graph of another kind. A name means one buffer in all parts, but for what each
    // gives of its own layers.
    struct Opened {
        std::vector<Part> parts;
        std::vector<std::vector<char>> own;
        std::map<std::string, int64_t> bytes;

        const GraphSpec& spec() const { return *parts.front().spec; }
        void* find(const std::string& name) const;  // null where no part has it
        void* found(const std::string& name) const;
        template <typename T> T* at(const std::string& name) const { return static_cast<T*>(found(name)); }
    };
    Opened& opened(const std::string& kind, int width, int bucket);

    const ModelEntry& entry;

  private:
    std::map<std::tuple<std::string, int, int>, Opened> graphs_;
};

// What a call computed. Rows are the call's; the pointers live until the next call of the same graph.
struct Result {
    const float* logits = nullptr;   // [rows or 1, columns]
    int64_t columns = 0;             // the head's rows, and in a draft call the context's
    const int32_t* argmax = nullptr; // token ids
    const float* entropy = nullptr;  // nats, a draft's
    std::vector<std::pair<const float*, int64_t>> queries;  // [width,L,H,d] of each part, and floats a row, where the policy reads them
    const float* top = nullptr;      // probabilities [rows,k], a draft's
    int top_k = 0;
};

class State {
  public:
    explicit State(Model& model) : cache(model.entry), context(model.entry), model_(model) {}

    // Absorb tokens through a graph of this kind and width; nothing is counted before `accept`.
    // An embeds graph takes a row of features for a token below 0: the i-th of all for -1 - i; those from `first` on are given.
    Result call(const std::string& kind, int width, const int* tokens, int rows, const float* features = nullptr, int64_t first = 0);
    // Let the context rows be those of this text.
    void follow(const std::vector<int>& text);
    // Count the first rows of the last call as filled; a commit must not wait beyond `commit_if_full`.
    void accept(int rows);
    // Hold no more than the first tokens of a text but the last, which is absorbed anew for its logits. Rows since the last
    // commit come off the end; for more, everything is absorbed again.
    void cut(int tokens);
    int position_after(int cut) const;  // how much would be absorbed then
    void commit_if_full();  // and observe, where a block is full and the policy carries a score
    // Rows that a call may hold now: before a commit, and before the model's last position.
    int room() const;
    int place() const;  // the position of the next row: of the text, or in the cache where positions are compact

    const ModelEntry& entry() const { return model_.entry; }

    int64_t bytes() const { return cache.bytes() + context.bytes(); }

    Cache cache;
    Context context;
    std::vector<CallRecord>* trace = nullptr;

  private:
    Call& bound(Model::Part& part, int layer = -1);
    void run(Model::Opened& opened, int rows);
    Model::Opened& run_policy(const std::string& kind, int bucket, int layer);

    Model& model_;
    Model::Opened* last_ = nullptr;
    std::map<std::pair<const Model::Part*, int>, std::unique_ptr<Call>> calls_;
};

}  // namespace edgespec
