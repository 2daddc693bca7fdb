#include "context.h"

#include <algorithm>

namespace edgespec {

Context::Context(const ModelEntry& m) : rows_(size_t(m.context_rows)), hidden_(size_t(m.hidden)) {
    if (!rows_) return;
    place_.assign(size_t(m.vocab), NOWHERE);
    for (const int id : m.head_ids) place_[size_t(id)] = OWN;
    ids_.assign(rows_, -1);
    columns_.resize(rows_ * hidden_);  // zeros: a masked column must be finite
}

void Context::follow(const std::vector<int>& text) {
    if (!rows_) return;
    for (; followed_ < text.size(); ++followed_) {
        const int token = text[followed_];
        if (token < 0) continue;  // a row of a picture
        int32_t& place = place_[size_t(token)];
        if (place == OWN) continue;
        if (place == NOWHERE && tokens_.size() < rows_) {
            place = int32_t(tokens_.size());
            tokens_.push_back(token), met_.push_back(0);
        } else if (place == NOWHERE) {
            place = int32_t(std::min_element(met_.begin(), met_.end()) - met_.begin());
            place_[size_t(tokens_[size_t(place)])] = NOWHERE;
            tokens_[size_t(place)] = token;
        }
        met_[size_t(place)] = int(followed_);
    }
}

void Context::forget(int tokens) {
    if (followed_ <= size_t(std::max(0, tokens))) return;
    for (const int token : tokens_) place_[size_t(token)] = NOWHERE;
    followed_ = 0;
    tokens_.clear(), met_.clear();
    std::fill(ids_.begin(), ids_.end(), -1);
}

std::vector<int> Context::stale(int most) const {
    std::vector<int> out;
    for (size_t slot = 0; slot < tokens_.size() && int(out.size()) < most; ++slot)
        if (ids_[slot] != tokens_[slot]) out.push_back(int(slot));
    return out;
}

void Context::fill(int slot, const float* row) {
    for (size_t i = 0; i < hidden_; ++i) columns_[i * rows_ + size_t(slot)] = row[i];
    ids_[size_t(slot)] = tokens_[size_t(slot)];
}

}  // namespace edgespec
