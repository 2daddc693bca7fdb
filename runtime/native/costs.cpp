#include "costs.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "json.h"

namespace edgespec {

int Costs::width_for(int rows) const {
    int best = 0;
    for (const auto& [width, cost] : verify)
        if (width >= rows && (best == 0 || cost < verify.at(best))) best = width;
    return best;
}

double Costs::catching_up(int tokens, int block) const {
    return std::min(double(tokens / 2) * draft, double((tokens + block - 1) / block) * draft_prefill);
}

bool Costs::by_prefill(int tokens, int block) const { return double((tokens + 1) / 2) * draft > double((tokens + block - 1) / block) * draft_prefill; }

Costs default_costs(const Manifest& bundle, bool widths_agree) {
    Costs out;
    const ModelEntry& target = *bundle.model("target");
    const double more = bundle.device == "cpu" ? 0.1 : 0.01;
    const std::vector<int> widths = target.widths("verify");
    out.widths_agree = widths_agree && target.widths_agree;
    // Where widths differ in their last bits, every call has one width, or speculation would change the text.
    for (const int width : widths)
        if (out.widths_agree || width == widths.back()) out.verify[width] = 1 + more * (width - 1);
    if (out.widths_agree && !target.widths("decode").empty()) out.verify[1] = 1;
    if (const ModelEntry* draft = bundle.model("draft")) {
        out.draft = double(draft->bytes_read()) / double(std::max<int64_t>(1, target.bytes_read()));
        out.draft_prefill = out.draft * (1 + more * (draft->widths("prefill").back() - 1));
    }
    return out;
}

Costs read_costs(const std::string& file, const Manifest& bundle) {
    const char* const hint = "measure it again: edgespec tune BUNDLE";
    const auto data = parse_json(read_file(file, 1 << 20, hint));
    if (!data.is_object() || !data.contains("verify") || !data["verify"].is_object()) throw Error(file + " is no table of call costs", hint);
    const auto agree = data.value("widths_agree", nlohmann::json(true));
    if (!agree.is_boolean()) throw Error(file + " does not say whether widths agree", hint);
    Costs out = default_costs(bundle, agree.get<bool>());
    out.name = file.substr(file.rfind('/') + 1);
    if (data.contains("name")) {  // one that was predicted is called after its profile
        if (!data["name"].is_string() || data["name"].get_ref<const std::string&>().size() > 256) throw Error(file + " has a name that is no short text", hint);
        out.name = data["name"].get<std::string>();
    }
    const auto cost = [&](const nlohmann::json& value) {
        const double us = value.is_number() ? value.get<double>() : -1;
        if (!(us > 0) || !std::isfinite(us)) throw Error(file + " holds a cost that is no positive number", hint);
        return us;
    };
    for (auto& [width, us] : out.verify) {
        const std::string key = std::to_string(width);
        if (!data["verify"].contains(key)) throw Error(file + " lacks the cost of width " + key, hint);
        us = cost(data["verify"][key]);
    }
    if (bundle.model("draft")) {
        out.draft_prefill /= out.draft;  // where the table does not say, as much as the guess has it
        out.draft = cost(data.value("draft", nlohmann::json()));
        out.draft_prefill = data.contains("draft_prefill") ? cost(data["draft_prefill"]) : out.draft * out.draft_prefill;
    }
    if (data.contains("acceptance")) {
        out.acceptance = data["acceptance"].is_number() ? data["acceptance"].get<double>() : -1;
        if (!(out.acceptance >= 0 && out.acceptance <= 1)) throw Error(file + " holds an acceptance that is not from 0 to 1", hint);
    }
    return out;
}

}  // namespace edgespec
