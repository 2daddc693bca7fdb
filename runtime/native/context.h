// Which tokens a draft's context rows hold: the text's most recent ones that its own head lacks. Knows ids and slots;
// the rows themselves are looked up by the model's `context` graph.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.h"

namespace edgespec {

class Context {
  public:
    explicit Context(const ModelEntry& model);

    // Go through what the text has gained, token by token: one that the head lacks takes the next free slot, or that of
    // the token not met for longest. So slots depend on the text alone, however it was chunked or drafted.
    void follow(const std::vector<int>& text);
    // Of the text no more than the first tokens stand; if more were followed, all are followed anew.
    void forget(int tokens);

    const std::vector<int>& tokens() const { return tokens_; }  // of the filled slots
    // Slots whose column is not their token's yet, at most so many; and what makes one so.
    std::vector<int> stale(int most) const;
    void fill(int slot, const float* row);

    float* columns() { return columns_.data(); }  // [hidden,R]
    int32_t* ids() { return ids_.data(); }        // [R]: absolute token ids, -1 where the slot is not filled
    int64_t bytes() const { return int64_t(columns_.size() + ids_.size() + place_.size()) * 4; }

  private:
    enum : int32_t { OWN = -2, NOWHERE = -1 };

    size_t rows_, hidden_, followed_ = 0;
    std::vector<int32_t> place_;     // of a token: its slot, or that the head has a row of its own
    std::vector<int> tokens_, met_;  // of a slot: its token, and where in the text that was met last
    std::vector<float> columns_;
    std::vector<int32_t> ids_;
};

}  // namespace edgespec
