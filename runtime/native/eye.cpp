#include "eye.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "error.h"

namespace edgespec {

Eye::Eye(const VisionEntry& e, Backend& backend)
    : entry(e), graph_(backend.open(e.model, e.graph)), pixels_(size_t(e.graph.inputs[0].elements())), features_(size_t(e.graph.outputs[0].elements())) {
    std::vector<Buffer> made{{&e.graph.outputs[0], features_.data()}};
    if (e.draft_rows) {
        drafts_.resize(size_t(e.graph.outputs[1].elements()));
        made.push_back({&e.graph.outputs[1], drafts_.data()});
    }
    call_ = graph_->bind({{&e.graph.inputs[0], pixels_.data()}}, made);
}

CallRecord Eye::look(const std::vector<float>& pixels, std::vector<float>& features, std::vector<float>& drafts) {
    if (pixels.size() != pixels_.size())
        throw Error(std::to_string(pixels.size()) + " numbers are no picture of 3 x " + std::to_string(entry.size) + " x " + std::to_string(entry.size), "make it with the bundle's processor");
    const auto finite = [](const std::vector<float>& all) { return std::all_of(all.begin(), all.end(), [](float x) { return std::isfinite(x); }); };
    if (!finite(pixels)) throw Error("the picture holds a number that is not finite", "make it with the bundle's processor");
    std::copy(pixels.begin(), pixels.end(), pixels_.begin());
    const auto start = std::chrono::steady_clock::now();
    call_->run();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    if (!finite(features_) || !finite(drafts_)) throw Error("the image encoder computed a feature that is not a number", "run edgespec check on the bundle");
    features.reserve(features.size() + features_.size());  // all memory first: a model would be a picture ahead of the other
    drafts.reserve(drafts.size() + drafts_.size());
    features.insert(features.end(), features_.begin(), features_.end());
    drafts.insert(drafts.end(), drafts_.begin(), drafts_.end());
    return {"vision", "vision", entry.rows, entry.rows, took.count()};
}

}  // namespace edgespec
