#include "manifest.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

#include "error.h"
#include "json.h"

namespace edgespec {
namespace {

using Json = nlohmann::json;

constexpr int SCHEMA = 8;
constexpr int64_t LARGEST_MANIFEST = 64 << 20, MOST = int64_t{1} << 31;
const char* const AGAIN = "export the bundle again";

// A field of a type; `where` is its path for the message.
template <typename T>
T field(const Json& object, const std::string& name, const std::string& where) {
    if (!object.is_object() || !object.contains(name)) throw Error(where + "." + name + " is missing", AGAIN);
    try {
        return object.at(name).get<T>();
    } catch (const Json::exception&) {
        throw Error(where + "." + name + " has the wrong type", AGAIN);
    }
}

int number(const Json& object, const std::string& name, const std::string& where, int least = 0) {
    const Json& value = object.is_object() && object.contains(name) ? object.at(name) : Json();
    if (!value.is_number_integer()) throw Error(where + "." + name + " is not a whole number", AGAIN);
    if (value.is_number_unsigned() && value.get<uint64_t>() >= uint64_t(MOST)) throw Error(where + "." + name + " is absurdly large", AGAIN);
    const int64_t number = value.get<int64_t>();
    if (number < least || number >= MOST) throw Error(where + "." + name + " is out of range", AGAIN);
    return int(number);
}

const Json& array(const Json& object, const std::string& name, const std::string& where) {
    if (!object.is_object() || !object.contains(name) || !object.at(name).is_array())
        throw Error(where + "." + name + " is not a list", AGAIN);
    return object.at(name);
}

std::vector<int> numbers(const Json& object, const std::string& name, const std::string& where) {
    std::vector<int> out;
    for (const Json& value : array(object, name, where)) out.push_back(number({{name, value}}, name, where));
    return out;
}

// A path of plain parts below the folder; its regular file has the listed size.
void check_file(const std::string& folder, const std::string& name, int64_t bytes) {
    std::istringstream parts(name);
    bool safe = !name.empty() && name.front() != '/' && name.back() != '/' && name.size() < 300;
    for (std::string part; std::getline(parts, part, '/');)
        safe = safe && !part.empty() && part[0] != '.' &&
               part.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-") == std::string::npos;
    if (!safe) throw Error("manifest.files names an unsafe path", AGAIN);
    struct stat found {};
    if (lstat((folder + "/" + name).c_str(), &found) != 0) throw Error(name + " is missing from the bundle", AGAIN);
    if (!S_ISREG(found.st_mode)) throw Error(name + " is not a regular file", "use a bundle as edgespec export made it");
    if (found.st_size != bytes)
        throw Error(name + " has " + std::to_string(found.st_size) + " bytes, not " + std::to_string(bytes), std::string(AGAIN) + ", or copy it again");
}

Type type_of(const std::string& name, const std::string& where) {
    if (name == "float32") return Type::float32;
    if (name == "int32") return Type::int32;
    if (name == "int8") return Type::int8;
    throw Error(where + ".dtype is unknown: " + name, "update edgespec");
}

TensorSpec tensor(const Json& data, const std::string& where) {
    TensorSpec out{field<std::string>(data, "name", where), type_of(field<std::string>(data, "dtype", where), where), {}};
    int64_t elements = 1;
    for (const int size : numbers(data, "shape", where)) {
        out.shape.push_back(size);
        elements *= size;
        if (size < 1 || elements >= MOST) throw Error(where + ".shape makes no sense", AGAIN);
    }
    return out;
}

GraphSpec graph(const Json& data, const std::string& where) {
    GraphSpec out;
    out.file = field<std::string>(data, "file", where);
    out.kind = field<std::string>(data, "kind", where);
    out.method = field<std::string>(data, "method", where);
    out.width = number(data, "width", where, 1);
    out.bucket = number(data, "bucket", where);
    out.part = number(data, "part", where);
    for (const Json& t : array(data, "inputs", where)) out.inputs.push_back(tensor(t, where + ".inputs"));
    for (const Json& t : array(data, "outputs", where)) out.outputs.push_back(tensor(t, where + ".outputs"));
    return out;
}

const TensorSpec* named(const std::vector<TensorSpec>& tensors, const std::string& name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const TensorSpec& t) { return t.name == name; });
    return found == tensors.end() ? nullptr : &*found;
}

bool sized(const std::vector<TensorSpec>& tensors, const std::string& name, Type type, int64_t elements) {
    const TensorSpec* t = named(tensors, name);
    return t && t->type == type && t->elements() == elements;
}

// A draft graph takes the context rows and their ids; a context graph looks rows up.
void check_context(const ModelEntry& m, const GraphSpec& g, const std::string& where) {
    const int64_t rows = m.context_rows;
    const bool takes = named(g.inputs, "context") || named(g.inputs, "context_ids");
    bool right = !takes;
    if (g.kind == "draft" && rows && g.part == int(m.parts.size()) - 1) right = sized(g.inputs, "context", Type::float32, rows * m.hidden) && sized(g.inputs, "context_ids", Type::int32, rows);
    if (g.kind == "context")
        right = rows && g.inputs.size() == 1 && g.outputs.size() == 1 && sized(g.inputs, "tokens", Type::int32, g.width) &&
                sized(g.outputs, "rows", Type::float32, int64_t(g.width) * m.hidden);
    if (!right) throw Error(where + ": its context rows make no sense", AGAIN);
}

// The first part takes tokens, the last gives logits, and what one hands on is what the next takes.
void check_part(const ModelEntry& m, const GraphSpec& g, const std::string& where) {
    const int parts = int(m.parts.size());
    if (g.part >= (g.step() ? parts : 1)) throw Error(where + " is of a part that the model has not", AGAIN);
    if (!g.step()) return;
    const auto hidden = [](int part) { return "hidden_" + std::to_string(part); };
    const bool last = g.part == parts - 1;
    const int64_t handed = int64_t(g.width) * m.hidden;
    if ((g.part == 0 ? !named(g.inputs, "tokens") : !sized(g.inputs, hidden(g.part), Type::float32, handed)) ||
        (last ? !named(g.outputs, "logits") || !named(g.outputs, "argmax") : !sized(g.outputs, hidden(g.part + 1), Type::float32, handed)))
        throw Error(where + ": what its parts hand on makes no sense", AGAIN);
    const auto like = [&](const GraphSpec& o) { return o.kind == g.kind && o.width == g.width && o.bucket == g.bucket; };
    if (std::count_if(m.graphs.begin(), m.graphs.end(), like) != parts) throw Error(where + " has not all of its parts", AGAIN);
}

// The tensors of a graph are those that the runtime will bind, in the sizes that it will give them.
void check_graph(const ModelEntry& m, const GraphSpec& g, const std::string& where) {
    check_context(m, g, where);
    check_part(m, g, where);
    const bool step = g.step();
    const int64_t layers = m.parts[size_t(g.part)];
    if (step && std::find(m.buckets.begin(), m.buckets.end(), g.bucket) == m.buckets.end()) throw Error(where + " is of no bucket of the cache", AGAIN);
    const int64_t rows = m.contract == "append" ? 0 : g.bucket + m.block;
    int caches = 0;
    for (const TensorSpec& t : g.inputs) {
        if (t.name == "context" || t.name == "context_ids") continue;
        const bool cache = t.name.rfind("keys", 0) == 0 || t.name.rfind("values", 0) == 0;
        const bool right = !cache || (t.shape.size() == 4 && t.shape[1] == m.kv_heads && t.shape[3] == m.head_dim &&
                                      (rows ? t.shape[2] == rows : t.shape[2] >= g.bucket + m.block));
        const bool scalar = t.name == "position" || t.name == "count" || t.name == "row";
        const bool row = t.name == "features" || t.name.rfind("hidden_", 0) == 0;
        const int64_t elements = t.name == "tokens" ? g.width : row ? int64_t(g.width) * m.hidden : t.name == "queries" ? m.query_floats() : t.name == "carried" ? m.carried_floats() : 1;
        const bool typed = cache ? t.type == m.cached : t.type != Type::int8;
        if (!right || !typed || ((scalar || elements != 1) && t.elements() != elements))
            throw Error(where + ": input " + t.name + " has the wrong shape or type", AGAIN);
        caches += cache;
    }
    if ((g.kind == "embeds" && g.part == 0) != (named(g.inputs, "features") != nullptr)) throw Error(where + ": its features make no sense", AGAIN);
    if (step && caches != 2 * layers) throw Error(where + " does not take the model's caches", AGAIN);
    for (const TensorSpec& t : g.outputs) {
        const int64_t n = g.last_only() ? 1 : g.width;
        const bool right = t.name == "logits"                                ? t.elements() == n * m.columns(g.kind)
                           : t.name == "argmax" || t.name == "entropy"       ? t.elements() == n
                           : t.name == "keep"                                ? t.elements() == int64_t(m.kv_heads) * m.budget
                           : t.name == "kept_keys"                           ? t.elements() == int64_t(m.kv_heads) * m.budget * m.head_dim
                           : t.name == "new_queries"                         ? t.elements() == int64_t(g.width) * layers * m.heads * m.head_dim
                           : t.name == "new_carried"                         ? t.elements() == m.carried_floats()
                           : t.name == "new_keys" || t.name == "new_values"  ? t.elements() == layers * m.kv_heads * g.width * m.head_dim
                                                                             : true;
        const bool rows = t.name.rfind("new_keys", 0) == 0 || t.name.rfind("new_values", 0) == 0;
        const bool typed = rows ? t.type == m.cached : t.type != Type::int8;
        if (!right || !typed) throw Error(where + ": output " + t.name + " has the wrong shape or type", AGAIN);
    }
}

void read_head_ids(ModelEntry& m, const std::string& folder) {
    if (m.head_ids_file.empty()) return;
    const std::string bytes = read_file(folder + "/" + m.head_ids_file, int64_t(m.head_rows) * 4, AGAIN);
    if (bytes.size() != size_t(m.head_rows) * 4) throw Error(m.head_ids_file + " does not hold an id for each head row", AGAIN);
    for (size_t i = 0; i < bytes.size(); i += 4) {
        const auto* b = reinterpret_cast<const unsigned char*>(bytes.data() + i);
        const uint32_t id = uint32_t(b[0]) | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
        if (id >= uint32_t(m.vocab)) throw Error(m.head_ids_file + " holds an id outside the vocabulary", AGAIN);
        if (!m.head_ids.empty() && int(id) <= m.head_ids.back()) throw Error(m.head_ids_file + " is not in ascending order", AGAIN);
        m.head_ids.push_back(int(id));
    }
}

ModelEntry model(const Json& data, const std::string& folder, const Json& files, const std::string& format) {
    ModelEntry m;
    m.name = field<std::string>(data, "name", "models");
    const std::string where = m.name;
    const Json spec = field<Json>(data, "spec", where), cache = field<Json>(data, "cache", where);
    m.layers = number(spec, "layers", where + ".spec", 1);
    m.hidden = number(spec, "hidden", where + ".spec", 1);
    m.heads = number(spec, "heads", where + ".spec", 1);
    m.kv_heads = number(spec, "kv_heads", where + ".spec", 1);
    m.head_dim = number(spec, "head_dim", where + ".spec", 1);
    m.vocab = number(spec, "vocab", where + ".spec", 1);
    m.positions = number(spec, "positions", where + ".spec", 1);
    m.windows = numbers(spec, "windows", where + ".spec");
    m.contract = field<std::string>(cache, "contract", where + ".cache");
    m.policy = field<std::string>(cache, "policy", where + ".cache");
    m.budget = number(cache, "budget", where + ".cache", 1);
    m.block = number(cache, "block", where + ".cache", 1);
    m.queries = number(cache, "queries", where + ".cache");
    m.compact = field<std::string>(cache, "positions", where + ".cache") == "compact";
    m.buckets = numbers(cache, "buckets", where + ".cache");
    m.cached = type_of(field<std::string>(cache, "dtype", where + ".cache"), where + ".cache");
    if (m.cached == Type::int32 || (m.cached == Type::int8 && (m.compact || m.contract != "rows"))) throw Error(where + ": its cache makes no sense", AGAIN);
    m.head_rows = number(data, "head_rows", where, 1);
    m.head_ids_file = field<std::string>(data, "head_ids", where);
    m.weights = field<std::string>(data, "weights", where);
    m.context_rows = number(data, "context_rows", where);
    m.widths_agree = field<bool>(data, "widths_agree", where);
    if (m.contract != "append" && m.contract != "rows") throw Error(where + ".cache.contract is unknown: " + m.contract, "update edgespec");
    if (m.windows.size() != size_t(m.layers) || m.buckets.empty() || m.block > m.budget || m.buckets.back() != m.budget ||
        !std::is_sorted(m.buckets.begin(), m.buckets.end()))
        throw Error(where + ": its cache makes no sense", AGAIN);
    // So that no product of sizes overflows.
    if (m.layers > 1 << 10 || m.hidden > 1 << 20 || m.heads > 1 << 12 || m.head_dim > 1 << 14 || m.slots() > 1 << 24) throw Error(where + " is absurdly large", AGAIN);
    m.parts = numbers(data, "parts", where);
    if (m.parts.empty() || m.parts.size() > size_t(m.layers) || std::count(m.parts.begin(), m.parts.end(), 0) || m.first_layer(int(m.parts.size())) != m.layers)
        throw Error(where + ": its parts do not share out its layers", AGAIN);
    for (const Json& g : array(data, "graphs", where)) m.graphs.push_back(graph(g, where + ".graphs"));
    std::stable_sort(m.graphs.begin(), m.graphs.end(), [](const GraphSpec& a, const GraphSpec& b) { return a.part < b.part; });
    for (const GraphSpec& g : m.graphs) m.carries = m.carries || g.kind == "observe";
    if (m.heads % m.kv_heads || m.queries > m.block || (m.carries && m.budget % m.block)) throw Error(where + ": its cache makes no sense", AGAIN);
    for (const GraphSpec& g : m.graphs) {
        if (g.method.empty() == (format == "executorch")) throw Error(where + "." + g.file + " names a method, or none, where its format does otherwise", AGAIN);
        check_graph(m, g, where + "." + g.file);
        if (!files.contains(g.file)) throw Error("the manifest names " + g.file + ", which manifest.files lacks", AGAIN);
    }
    for (const int bucket : m.buckets)
        for (const char* kind : {"prefill", m.name == "draft" ? "draft" : "verify", m.carries ? "observe" : "prefill"})
            if (std::none_of(m.graphs.begin(), m.graphs.end(), [&](const GraphSpec& g) { return g.kind == kind && g.bucket == bucket; }))
                throw Error(where + " has no " + kind + " graph for bucket " + std::to_string(bucket), AGAIN);
    const auto lookups = std::count_if(m.graphs.begin(), m.graphs.end(), [](const GraphSpec& g) { return g.kind == "context"; });
    if (m.context_rows && (m.name != "draft" || m.head_ids_file.empty() || m.context_rows > m.vocab - m.head_rows || lookups != 1))
        throw Error(where + ": its context rows make no sense", AGAIN);
    if (m.head_ids_file.empty() && m.head_rows != m.vocab) throw Error(where + ": a trimmed head without its ids", AGAIN);
    if (!m.head_ids_file.empty() && !files.contains(m.head_ids_file)) throw Error("manifest.files lacks " + m.head_ids_file, AGAIN);
    if (format == "executorch" && !files.contains(m.weights)) throw Error("manifest.files lacks " + m.weights, AGAIN);
    if (files.contains(m.weights)) m.bytes_weights = files.at(m.weights).value("bytes", int64_t{0});
    read_head_ids(m, folder);
    return m;
}

// The image encoder: one graph of pixels and features, and a target that takes them in every bucket.
VisionEntry vision(const Json& data, const ModelEntry& target, const ModelEntry* draft, const Json& files, const std::string& format) {
    VisionEntry v;
    v.model.name = "vision";
    v.model.weights = field<std::string>(data, "weights", "vision");
    v.size = number(data, "size", "vision", 1), v.rows = number(data, "rows", "vision", 1), v.token = number(data, "token", "vision");
    v.graph = graph(field<Json>(data, "graph", "vision"), "vision.graph");
    v.draft_rows = number(data, "draft_rows", "vision");
    const GraphSpec& g = v.graph;
    const bool drafts = v.draft_rows > 0;
    if (v.size > 1 << 14 || v.rows > target.positions || v.graph.kind != "vision") throw Error("vision is absurdly large, or no image encoder", AGAIN);
    if (drafts && (!draft || v.draft_rows > v.rows || !sized(g.outputs, "draft_features", Type::float32, int64_t(v.draft_rows) * draft->hidden))) throw Error("vision: the draft's rows make no sense", AGAIN);
    const int64_t pixels = 3 * int64_t(v.size) * v.size, features = int64_t(v.rows) * target.hidden;
    if (g.inputs.size() != 1 || g.outputs.size() != 1 + size_t(drafts) || g.outputs[0].name != "features" || !sized(g.inputs, "pixels", Type::float32, pixels) || !sized(g.outputs, "features", Type::float32, features) || v.token >= target.vocab)
        throw Error("vision: its graph makes no sense", AGAIN);
    if (g.method.empty() == (format == "executorch")) throw Error("vision names a method, or none, where its format does otherwise", AGAIN);
    for (const std::string& file : {g.file, v.model.weights})
        if (!files.contains(file)) throw Error("the manifest names " + file + ", which manifest.files lacks", AGAIN);
    for (const ModelEntry* m : {&target, drafts ? draft : &target})
        for (const int bucket : m->buckets)
            if (std::none_of(m->graphs.begin(), m->graphs.end(), [&](const GraphSpec& o) { return o.kind == "embeds" && o.bucket == bucket; }))
                throw Error(m->name + " has no embeds graph for bucket " + std::to_string(bucket), AGAIN);
    return v;
}

// Let each graph's file be the one that opens it as compiled for a SoC.
void take_compiled(Manifest& manifest, const Json& compiled, const Json& files, const std::string& soc) {
    for (const Json& entry : compiled) {
        if (field<std::string>(entry, "soc", "compiled") != soc) continue;
        const Json graphs = field<Json>(entry, "graphs", "compiled");
        for (ModelEntry& m : manifest.models)
            for (GraphSpec& g : m.graphs) {
                g.file = field<std::string>(graphs, g.file.c_str(), "compiled.graphs");
                if (!files.contains(g.file)) throw Error("the manifest names " + g.file + ", which manifest.files lacks", AGAIN);
            }
        if (manifest.vision) {
            GraphSpec& g = manifest.vision->graph;
            g.file = field<std::string>(graphs, g.file.c_str(), "compiled.graphs");
            if (!files.contains(g.file)) throw Error("the manifest names " + g.file + ", which manifest.files lacks", AGAIN);
        }
        return;
    }
    throw Error("the bundle is not compiled for " + soc, "export it again with --soc " + soc);
}

}  // namespace

int64_t TensorSpec::elements() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
}

std::vector<int> ModelEntry::widths(const std::string& kind) const {
    std::set<int> found;
    for (const GraphSpec& g : graphs)
        if (g.kind == kind) found.insert(g.width);
    return {found.begin(), found.end()};
}

const ModelEntry* Manifest::model(const std::string& name) const {
    for (const ModelEntry& m : models)
        if (m.name == name) return &m;
    return nullptr;
}

uint64_t fnv1a(const void* data, size_t bytes, uint64_t hash) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 1099511628211ull;
    return hash;
}

std::string read_file(const std::string& path, int64_t most, const std::string& hint) {
    struct stat found {};
    const bool regular = ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);  // a pipe would wait to be opened
    std::ifstream file(regular ? path : "", std::ios::binary);
    if (!file) throw Error(path + " cannot be read", hint);
    if (found.st_size > most) throw Error(path + " is absurdly large", hint);
    std::string text(size_t(found.st_size), '\0');
    file.read(text.data(), std::streamsize(text.size()));
    text.resize(size_t(file.gcount()));
    return text;
}

Manifest read_manifest(const std::string& folder, const std::string& soc) {
    Manifest out;
    out.folder = folder;
    const std::string text = read_file(folder + "/manifest.json", LARGEST_MANIFEST, "give the folder of a bundle that edgespec export made");
    out.identity = fnv1a(text.data(), text.size());
    const Json data = parse_json(text);
    if (!data.is_object()) throw Error("manifest.json is no JSON object", AGAIN);
    const int schema = number(data, "schema", "manifest");
    if (schema != SCHEMA) throw Error("the bundle has schema " + std::to_string(schema) + ", this runtime reads " + std::to_string(SCHEMA), schema > SCHEMA ? "update edgespec" : AGAIN);
    out.device = field<std::string>(data, "device", "manifest");
    out.format = field<std::string>(data, "format", "manifest");
    if (out.format != "onnx" && out.format != "executorch") throw Error("manifest.format is unknown: " + out.format, "update edgespec");
    const Json files = field<Json>(data, "files", "manifest");
    if (!files.is_object()) throw Error("manifest.files is no object", AGAIN);
    for (const auto& [name, entry] : files.items()) check_file(folder, name, field<int64_t>(entry, "bytes", "manifest.files"));
    for (const Json& m : array(data, "models", "manifest")) out.models.push_back(model(m, folder, files, out.format));
    if (!out.model("target")) throw Error("the bundle has no target model", AGAIN);
    if (array(data, "vision", "manifest").size() > 1) throw Error("the bundle has several image encoders", AGAIN);
    for (const Json& v : array(data, "vision", "manifest")) out.vision = vision(v, *out.model("target"), out.model("draft"), files, out.format);
    if (!soc.empty()) take_compiled(out, array(data, "compiled", "manifest"), files, soc);
    const ModelEntry* draft = out.model("draft");
    if (draft && draft->context_rows && draft->hidden != out.model("target")->hidden) throw Error("draft: its context rows make no sense", AGAIN);
    out.stop_ids = numbers(field<Json>(data, "tokenizer", "manifest"), "stop_ids", "tokenizer");
    return out;
}

}  // namespace edgespec
