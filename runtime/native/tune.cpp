#include "tune.h"

#include <algorithm>
#include <optional>

#include "widths.h"

namespace edgespec {
namespace {

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
    return values[values.size() / 2];
}

}  // namespace

nlohmann::json measure(Model& target, Model* draft, int runs, int threads, const std::function<void(int)>& ran) {
    struct Timed {
        State& state;
        std::string kind;
        int width;
        std::vector<double> us;
    };
    State of_target(target);
    std::optional<State> of_draft;
    if (draft) of_draft.emplace(*draft);
    std::vector<Timed> all;
    if (!target.entry.widths("decode").empty()) all.push_back({of_target, "decode", 1, {}});
    for (const int width : target.entry.widths("verify")) all.push_back({of_target, "verify", width, {}});
    if (draft)
        for (const char* kind : {"draft", "prefill"}) all.push_back({*of_draft, kind, draft->entry.widths(kind).back(), {}});

    std::vector<CallRecord> calls;
    for (State* state : {&of_target, draft ? &*of_draft : nullptr}) {
        if (!state) continue;
        const int filled = std::min(state->entry().budget / 4, state->entry().positions - 1), block = state->entry().widths("prefill").back();
        const std::vector<int> tokens(size_t(block), 1);
        for (int left = filled, rows; left > 0; left -= rows) {
            rows = std::min({left, block, state->room()});
            state->call("prefill", block, tokens.data(), rows);
            state->accept(rows);
            state->commit_if_full();
        }
        state->trace = &calls;
    }
    for (int run = -1; run < runs; ++run) {  // the first is not counted
        for (Timed& t : all) {
            calls.clear();
            // A draft's call has one new token, whatever its width.
            const std::vector<int> ids(size_t(t.width), 1);
            t.state.call(t.kind, t.width, ids.data(), t.kind == "draft" ? 1 : std::min(t.width, t.state.room()));
            if (run >= 0) t.us.push_back(calls.back().us);
        }
        ran(run + 1);
    }
    nlohmann::json verify = nlohmann::json::object(), out = {{"threads", threads}, {"runs", runs}, {"widths_agree", width_difference(target).empty()}};
    for (Timed& t : all) (t.kind == "draft" ? out["draft"] : t.kind == "prefill" ? out["draft_prefill"] : verify[std::to_string(t.width)]) = median(t.us);
    out["verify"] = std::move(verify);
    return out;
}

}  // namespace edgespec
