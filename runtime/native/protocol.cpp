#include "protocol.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <set>

#include "base64.h"
#include "error.h"
#include "eye.h"
#include "json.h"
#include "lines.h"
#include "loop.h"
#include "snapshot.h"
#include "spare.h"
#include "tune.h"
#include "widths.h"

namespace edgespec {

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr size_t LONGEST_CANCEL = 1 << 16;  // bytes: two ids, each letter escaped

int64_t rss_peak() {
    struct rusage used {};
    getrusage(RUSAGE_SELF, &used);
    return int64_t(used.ru_maxrss) * 1024;
}

int64_t rss_now() {
    int64_t pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%*d %" SCNd64, &pages) != 1) pages = 0;
        std::fclose(file);
    }
    return pages ? pages * sysconf(_SC_PAGESIZE) : rss_peak();
}

void say(const Json& event) {
    const std::string line = event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    if (std::fwrite(line.data(), 1, line.size(), events()) == line.size() && std::fflush(events()) == 0) return;
    if (errno == EPIPE) _exit(0);  // nobody listens any more
    std::fprintf(stderr, "error: the output cannot be written: %s\nhint:  free some space, or read it through a pipe\n", std::strerror(errno));
    _exit(2);
}

// Never freed: its reader may still be waiting for input when the program ends.
Lines& input() {
    static Lines& lines = *new Lines;
    return lines;
}

Json record(const std::vector<CallRecord>& calls) {
    Json out = Json::array();
    for (const CallRecord& c : calls) out.push_back({c.model, c.kind, c.width, c.rows, std::round(c.us * 10) / 10});
    return out;
}

// A request's fields, each read once; what is left over is unknown.
class Fields {
  public:
    explicit Fields(const Json& data) : data_(data) {}
    bool has(const std::string& name) const { return data_.contains(name); }
    std::string text(const std::string& name) {
        const Json& value = take(name);
        if (!value.is_string() || value.get_ref<const std::string&>().size() > 4096) wrong(name, "a text");
        return value.get<std::string>();
    }
    std::string text(const std::string& name, const char* otherwise) { return has(name) ? text(name) : otherwise; }
    double number(const std::string& name, double otherwise, double least, double most) {
        if (!has(name)) return otherwise;
        const Json& value = take(name);
        if (!value.is_number()) wrong(name, "a number");
        const double number = value.get<double>();
        if (!(number >= least && number <= most)) wrong(name, "from " + Json(least).dump() + " to " + Json(most).dump());
        return number;
    }
    int64_t whole(const std::string& name, int64_t otherwise, int64_t least, int64_t most) {
        if (!has(name)) return otherwise;
        const Json& value = take(name);
        if (!value.is_number_integer()) wrong(name, "a whole number");
        if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(most)) wrong(name, "at most " + std::to_string(most));
        const int64_t number = value.get<int64_t>();
        if (number < least || number > most) wrong(name, "from " + std::to_string(least) + " to " + std::to_string(most));
        return number;
    }
    bool flag(const std::string& name) {
        if (!has(name)) return false;
        const Json& value = take(name);
        if (!value.is_boolean()) wrong(name, "true or false");
        return value.get<bool>();
    }
    std::vector<float> floats(const std::string& name) {
        const Json& value = take(name);
        std::vector<float> out;
        if (!value.is_string() || !from_base64(value.get_ref<const std::string&>(), out)) wrong(name, "float32 numbers in base64");
        return out;
    }
    std::vector<int> ids(const std::string& name) {
        std::vector<int> out;
        if (!has(name)) return out;
        const Json& value = take(name);
        if (!value.is_array()) wrong(name, "a list of token ids");
        for (const Json& id : value) {
            if (!id.is_number_integer() || (id.is_number_unsigned() && id.get<uint64_t>() > 0x7fffffff) || id.get<int64_t>() < 0)
                wrong(name, "a list of token ids");
            out.push_back(int(id.get<int64_t>()));
        }
        return out;
    }
    template <typename T> T word(const std::string& name, const std::map<std::string, T>& words, T otherwise) {
        if (!has(name)) return otherwise;
        const auto found = words.find(text(name));
        if (found == words.end()) wrong(name, "one of the words that --help lists");
        return found->second;
    }
    void skip(const std::string& name) { taken_.insert(name); }
    void done() const {
        for (const auto& [name, value] : data_.items())
            if (!taken_.count(name)) throw Error("unknown field " + Json(name.substr(0, 60)).dump(-1, ' ', true), "see edgespec-runtime --help");
    }

  private:
    const Json& take(const std::string& name) {
        taken_.insert(name);
        if (!has(name)) throw Error("field " + name + " is missing", "see edgespec-runtime --help");
        return data_.at(name);
    }
    [[noreturn]] static void wrong(const std::string& name, const std::string& what) { throw Error(name + " must be " + what, "see edgespec-runtime --help"); }

    const Json& data_;
    std::set<std::string> taken_;
};

// The manifest, of a bundle that this binary can run.
Manifest ours(Manifest manifest, const BackendOptions& options) {
    if (manifest.format != BACKEND_FORMAT)
        throw Error("the bundle's graphs are of format " + manifest.format + ", this runtime runs " + BACKEND_FORMAT,
                    "start " + std::string(manifest.format == "executorch" ? "edgespec-runtime-executorch" : "edgespec-runtime") + ", or let edgespec generate start it");
    if (!options.qnn.folder.empty() && (manifest.device != "npu" || manifest.format != "onnx"))
        throw Error("the bundle's graphs are " + manifest.format + " for " + manifest.device + ", not for an NPU", "export it again with --device npu");
    return manifest;
}

class Server : public Listener {
  public:
    explicit Server(const Options& options)
        : lines_(input()), bundle_(ours(read_manifest(options.bundle, options.backend.qnn.compiled), options.backend)), backend_(open_backend(options.bundle, options.backend)),
          costs_(options.table.empty() ? default_costs(bundle_) : read_costs(options.table, bundle_)), options_(options) {
        const auto start = Clock::now();
        target_ = std::make_unique<Model>(*bundle_.model("target"), *backend_);
        if (const ModelEntry* draft = bundle_.model("draft")) draft_ = std::make_unique<Model>(*draft, *backend_);
        if (bundle_.vision) eye_ = std::make_unique<Eye>(*bundle_.vision, *backend_);
        const ModelEntry& t = target_->entry;
        say({{"event", "ready"}, {"protocol", 1}, {"version", EDGESPEC_VERSION}, {"bundle", options.bundle}, {"draft", bool(draft_)}, {"vision", bool(eye_)},
             {"positions", t.positions}, {"slots", t.slots()}, {"policy", t.policy}, {"widths", t.widths("verify")}, {"threads", options.backend.threads},
             {"stop_ids", bundle_.stop_ids}, {"table", costs_.name}, {"load_s", std::chrono::duration<double>(Clock::now() - start).count()},
             {"bytes_rss", rss_now()}});
    }

    int run() {
        while (!quit_) {
            const auto line = lines_.take();
            if (!line) break;
            answer(*line);
        }
        return 0;
    }

    // Listener: the events of the request that runs.
    void prompt(int tokens, double seconds, const std::vector<CallRecord>& calls) override {
        Json event = {{"id", id_}, {"event", "prompt"}, {"tokens", tokens}, {"time_s", seconds}};
        if (trace_) event["calls"] = record(calls);
        say(event);
    }
    void round(const Round& r, const std::vector<CallRecord>& calls) override {
        Json event = {{"id", id_}, {"event", "round"}, {"tokens", r.tokens}, {"drafted", r.drafted}, {"accepted", r.accepted}};
        if (trace_) {
            event["entropy"] = r.entropy, event["lambda"] = r.lambda, event["stop"] = r.stop, event["drafter"] = r.drafter;
            event["calls"] = record(calls);
        }
        say(event);
    }
    bool cancelled() override {
        const auto line = lines_.take_if([&](const std::string& text) {
            if (text.size() > LONGEST_CANCEL || text.find("\"cancel\"") == std::string::npos) return false;
            const Json data = parse_json(text);
            return data.is_object() && data.value("op", Json()) == "cancel" && data.value("request", Json()) == id_;
        });
        if (!line) return false;
        say({{"id", parse_json(*line).value("id", Json())}, {"event", "done"}});
        return true;
    }

  private:
    void answer(const std::string& line) {
        id_ = nullptr;
        try {
            reply(line);
        } catch (const std::bad_alloc&) {
            say({{"id", id_}, {"event", "error"}, {"error", "not enough memory"}, {"hint", "close a session, or use a bundle with a smaller budget"}});
        }
    }

    void reply(const std::string& line) {
        try {
            const Json data = parse_json(line);
            if (!data.is_object()) throw Error("a request is one JSON object a line of at most 64 MiB", "see edgespec-runtime --help");
            const Json id = data.value("id", Json());
            if (!id.is_string() && !id.is_number_integer()) throw Error("a request's id is a text or a whole number", "see edgespec-runtime --help");
            Fields fields(data);
            if (id.is_string()) fields.text("id");
            else fields.whole("id", 0, INT64_MIN, INT64_MAX);
            id_ = id;
            const std::string op = fields.text("op");
            if (!Spare::hold() && op != "close" && op != "sessions" && op != "quit") throw std::bad_alloc();
            Json event = perform(op, fields);
            event["id"] = id_, event["event"] = "done";
            say(event);
        } catch (const Error& e) {
            say({{"id", id_}, {"event", "error"}, {"error", e.message}, {"hint", e.hint}});
        }
    }

    Json perform(const std::string& op, Fields& f) {
        if (op == "open") return open(f);
        if (op == "close") return close(f);
        if (op == "sessions") return list(f);
        if (op == "generate") return generate(f);
        if (op == "look") return look(f);
        if (op == "truncate") return truncate(f);
        if (op == "snapshot" || op == "restore") return keep(op, f);
        if (op == "tune") return tune(f);
        if (op == "check") return f.done(), Json{{"difference", width_difference(*target_)}};
        if (op == "cancel") {
            f.skip("request");
            return f.done(), Json::object();  // its request has ended already
        }
        if (op == "quit") return f.done(), quit_ = true, Json::object();
        throw Error("unknown op " + Json(op.substr(0, 60)).dump(-1, ' ', true), "see edgespec-runtime --help");
    }

    Conversation& session(const std::string& name) {
        const auto found = sessions_.find(name);
        if (found == sessions_.end()) throw Error("no session is called " + Json(name.substr(0, 60)).dump(-1, ' ', true), "open it first");
        return *found->second;
    }

    Json open(Fields& f) {
        const std::string name = f.text("session");
        const int64_t most = f.whole("picture_bytes", MOST_FEATURES, 0, INT64_MAX);
        f.done();
        if (sessions_.count(name)) throw Error("session " + Json(name.substr(0, 60)).dump(-1, ' ', true) + " is open already", "choose another name, or close it");
        auto made = std::make_unique<Conversation>(*target_, draft_.get(), eye_ ? &eye_->entry : nullptr, most);
        if (!Spare::hold()) throw std::bad_alloc();  // the others need it
        const int64_t bytes = made->bytes();
        sessions_[name] = std::move(made);
        return {{"session", name}, {"bytes", bytes}};
    }
    Json close(Fields& f) {
        const std::string name = f.text("session");
        f.done();
        session(name);
        sessions_.erase(name);
        return {{"session", name}};
    }
    Json list(Fields& f) {
        f.done();
        Json out = Json::array();
        for (const auto& [name, c] : sessions_) out.push_back({{"session", name}, {"tokens", c->history().size()}, {"bytes", c->bytes()}});
        return {{"sessions", out}};
    }
    Json truncate(Fields& f) {
        Conversation& c = session(f.text("session"));
        const int64_t tokens = f.whole("tokens", -1, 0, int64_t(c.history().size()));
        f.done();
        if (tokens < 0) throw Error("field tokens is missing", "see edgespec-runtime --help");
        c.truncate(int(tokens));
        return {{"tokens", tokens}};
    }
    Json keep(const std::string& op, Fields& f) {
        Conversation& c = session(f.text("session"));
        const std::string path = f.text("path");
        f.done();
        if (op == "snapshot") return {{"bytes", save(c, bundle_.identity, path)}};
        restore(c, bundle_.identity, path);
        return {{"tokens", c.history().size()}};
    }
    Json tune(Fields& f) {
        const int runs = int(f.whole("runs", 20, 1, 10000));
        f.done();
        const auto ran = [&](int run) { say({{"id", id_}, {"event", "run"}, {"run", run}}); };  // it may take minutes
        return {{"table", measure(*target_, draft_.get(), runs, options_.backend.threads, ran)}};
    }

    Json look(Fields& f) {
        Conversation& c = session(f.text("session"));
        if (!eye_) throw Error("the bundle reads no images", "export a vision-language model");
        const std::vector<float> pixels = f.floats("pixels");
        f.done();
        const int64_t rows = int64_t(c.pictured) + int64_t(c.heard.waiting.size()) / target_->entry.hidden;
        if (!target_->entry.compact && rows + eye_->entry.rows > target_->entry.positions)
            throw Error("the pictures are more rows than the model's " + std::to_string(target_->entry.positions) + " positions", "show fewer");
        c.looks.reserve(c.looks.size() + 1);
        c.looks.push_back(eye_->look(pixels, c.heard.waiting, c.drafted.waiting));
        return {{"rows", eye_->entry.rows}};
    }

    Json generate(Fields& f) {
        Conversation& c = session(f.text("session"));
        const Shown shown(c);
        Request r;
        r.tokens = f.ids("tokens");
        r.stop_ids = f.has("stop_ids") ? f.ids("stop_ids") : bundle_.stop_ids;
        r.max_new_tokens = int(f.whole("max_new_tokens", 128, 0, 1 << 30));
        r.sampling.temperature = f.number("temperature", 0, 0, 100);
        r.sampling.top_k = int(f.whole("top_k", 0, 0, 1 << 30));
        r.sampling.top_p = f.number("top_p", 1, 1e-6, 1);
        r.sampling.min_p = f.number("min_p", 0, 0, 1);
        r.sampling.repetition_penalty = f.number("repetition_penalty", 1, 0.01, 100);
        r.sampling.seed = uint64_t(f.whole("seed", 0, 0, INT64_MAX));
        using D = Drafter;
        r.drafter = f.word<D>("drafter", {{"auto", D::both}, {"both", D::both}, {"draft", D::draft}, {"ngram", D::ngram}, {"none", D::none}}, D::both);
        if (r.drafter == D::draft && !draft_) throw Error("the bundle has no draft model", "export with --draft, or use another drafter");
        r.rule = f.word<Rule>("stop_rule", {{"cost", Rule::cost}, {"adaedl", Rule::adaedl}, {"confidence", Rule::confidence}, {"fixed", Rule::fixed}}, Rule::cost);
        r.draft_tokens = int(f.whole("draft_tokens", 0, 0, 1 << 20));
        r.threshold = f.number("threshold", 0.5, 0, 1);
        r.lambda = f.number("lambda", 0.7, 0, 1);
        r.acceptance = f.number("acceptance", 0.9, 0, 1);
        trace_ = f.flag("trace");
        f.done();
        return figures(edgespec::generate(c, r, costs_, *this));
    }

    Json figures(const Summary& s) const {
        const double emitted = std::max(0, s.tokens_new - 1);  // the first token is the prompt's
        const double be = s.verify_calls ? emitted / s.verify_calls : 0, gamma = s.verify_calls ? double(s.draft_calls) / s.verify_calls : 0;
        const double c = draft_ ? double(draft_->entry.bytes_read()) / double(std::max<int64_t>(1, target_->entry.bytes_read())) : 0;
        Json stats = {{"tokens_prompt", s.tokens_prompt}, {"tokens_new", s.tokens_new}, {"rounds", s.rounds}, {"tokens_drafted", s.drafted},
                      {"tokens_accepted", s.accepted}, {"drafted_by_position", s.drafted_by_position}, {"accepted_by_position", s.accepted_by_position},
                      {"verify_calls", s.verify_calls}, {"draft_calls", s.draft_calls}, {"time_prompt_s", s.prompt_s}, {"time_decode_s", s.decode_s},
                      {"time_first_token_s", s.prompt_s}, {"time_graphs_s", s.graphs_s}, {"tokens_per_s", s.decode_s > 0 ? emitted / s.decode_s : 0},
                      {"block_efficiency", be}, {"c", c}, {"gamma", gamma}, {"mbsu", be / (1 + c * gamma)}, {"bytes_rss", rss_now()}, {"bytes_rss_peak", rss_peak()}, {"table", costs_.name}};
        return {{"reason", s.reason}, {"stats", std::move(stats)}};
    }

    Spare spare_;
    Lines& lines_;
    Manifest bundle_;
    std::unique_ptr<Backend> backend_;
    Costs costs_;
    Options options_;
    std::unique_ptr<Model> target_, draft_;
    std::unique_ptr<Eye> eye_;
    std::map<std::string, std::unique_ptr<Conversation>> sessions_;
    Json id_;
    bool trace_ = false, quit_ = false;
};

}  // namespace

std::FILE* events() {
    static std::FILE* const out = [] {
        const int own = ::dup(STDOUT_FILENO);
        std::FILE* file = own < 0 ? nullptr : ::fdopen(own, "w");
        if (file) ::dup2(STDERR_FILENO, STDOUT_FILENO);
        return file ? file : stdout;
    }();
    return out;
}

int serve(const Options& options) {
    Server server(options);
    return server.run();
}

}  // namespace edgespec
