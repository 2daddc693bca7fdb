// What a bundle's manifest.json says, checked. Knows files and shapes; nothing of how graphs run.
#pragma once

#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace edgespec {

enum class Type { float32, int32, int8 };

inline int64_t bytes_of(Type type) { return type == Type::int8 ? 1 : 4; }

struct TensorSpec {
    std::string name;
    Type type;
    std::vector<int64_t> shape;

    int64_t elements() const;
    int64_t bytes() const { return elements() * bytes_of(type); }
};

struct GraphSpec {
    std::string file, kind;
    int width = 0, bucket = 0;
    std::vector<TensorSpec> inputs, outputs;
    std::string method = {};  // its name in an ExecuTorch program, else empty
    int part = 0;             // of the model, which the step's other graphs have the rest of

    bool policy() const { return kind == "commit" || kind == "observe"; }  // of one layer
    bool step() const { return !policy() && kind != "context"; }
    bool last_only() const { return kind == "prefill" || kind == "embeds"; }  // gives the logits of one row
};

struct ModelEntry {
    std::string name, weights, contract, policy, head_ids_file;
    int layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, positions = 0, head_rows = 0, context_rows = 0;
    int budget = 0, block = 0, queries = 0;  // queries: the last rows of a block whose queries the policy reads
    std::vector<int> parts;                       // layers of each
    std::vector<int> windows, buckets, head_ids;  // head_ids: the token of every head row, empty where row i is token i
    std::vector<GraphSpec> graphs;  // a step's in order of part
    int64_t bytes_weights = 0;
    Type cached = Type::float32;  // a cache's rows: int8 codes have their scales in the graphs
    bool widths_agree = false, compact = false, carries = false;  // compact: a key turns to its place; carries: a score goes on with its row

    // Logits of a row: the head's own, then those of context rows.
    int64_t columns(const std::string& kind) const { return head_rows + (kind == "draft" ? context_rows : 0); }
    int slots() const { return budget + block; }
    int first_layer(int part) const { return std::accumulate(parts.begin(), parts.begin() + part, 0); }
    int64_t query_floats() const { return int64_t(queries) * heads * head_dim; }  // of one layer
    int64_t carried_floats() const { return int64_t(heads) * slots(); }           // of one layer, where it carries
    int64_t bytes_read() const { return bytes_weights + int64_t(context_rows) * hidden * 4; }  // by a call
    std::vector<int> widths(const std::string& kind) const;  // ascending
};

// The image encoder of a target that reads images: a picture takes `rows` rows of a prompt, written as the id `token`.
struct VisionEntry {
    ModelEntry model;  // only what a backend asks of one: its name and weights
    GraphSpec graph;
    int size = 0, rows = 0, token = 0, draft_rows = 0;  // draft_rows: what a draft that reads pictures sees of one
};

struct Manifest {
    std::string folder, device, format;
    uint64_t identity = 0;  // of the manifest's bytes: a snapshot belongs to one bundle
    std::vector<ModelEntry> models;
    std::optional<VisionEntry> vision;
    std::vector<int> stop_ids;

    const ModelEntry* model(const std::string& name) const;  // null where the bundle has none
};

// Errors name the field; no path leaves the folder, and every file has its listed size. With a SoC's name, graphs are the files
// that open what was compiled for it.
Manifest read_manifest(const std::string& folder, const std::string& soc = {});

// A regular file of at most so many bytes; the hint is for one that is missing, of another kind or larger.
std::string read_file(const std::string& path, int64_t most, const std::string& hint);

uint64_t fnv1a(const void* data, size_t bytes, uint64_t start = 14695981039346656037ull);

}  // namespace edgespec
