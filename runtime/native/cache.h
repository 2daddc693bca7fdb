// A model's key-value cache in a session: fixed buffers, how far they are filled, and what leaves them.
// Design section 4: rows are only ever appended by a call and moved by a commit.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "manifest.h"

namespace edgespec {

class Cache {
  public:
    explicit Cache(const ModelEntry& model);

    char* buffer(bool values, int layer) const { return data_.get() + (int64_t(values) * model_.layers + layer) * size_; }
    // What the policy reads beside rows: the block's last queries [W,H,d], and the score that it carries [H,M].
    float* queries(int layer) { return queries_.data() + layer * model_.query_floats(); }
    float* carried(int layer) { return carried_.data() + layer * model_.carried_floats(); }
    int bucket() const { return model_.buckets[bucket_]; }
    int64_t rows() const { return rows_[bucket_]; }  // of every head's buffer: slots, and under `append` the widest call's rows
    int count() const { return count_; }
    int position() const { return position_; }
    // Rows before a commit, or before the end of a block that must be observed; no call may hold more.
    int free() const { return (model_.carries ? settled_ + model_.block : model_.slots()) - count_; }
    int removable() const { return count_ - settled_; }  // newest rows that nothing but themselves depends on
    bool evicted() const { return position_ != count_; }
    int64_t bytes() const { return 2 * int64_t(model_.layers) * size_ + bytes_policy(); }
    int64_t saved_bytes(int count) const { return count ? 2 * int64_t(model_.layers) * model_.kv_heads * row_ * count + bytes_policy() : 0; }

    void clear();
    // Re-lay for the smallest bucket whose slots hold this many rows; true where the layout changed.
    bool fit(int rows);
    // A run of layers, as many as a part of the model has.
    struct Layers {
        int first, count;
    };
    // Take the first `rows` rows of the last call for some layers L: under `rows` from [L,KV,width,d] of their type; where the policy
    // reads queries, those of the block's last rows from [width,L,H,d]. Then `grow` counts them, once for all layers.
    void append(Layers layers, int rows, int width, const void* new_keys, const void* new_values, const float* new_queries);
    void grow(int rows) { count_ += rows, position_ += rows; }
    // Forget the newest rows: those that a draft model absorbed and the target refused.
    void roll_back(int rows);
    // Keep the rows `keep` [KV,N] (ascending) of one layer; null keeps the newest N. Then `committed` once for all layers.
    void keep(int layer, const int32_t* keep);
    // The kept keys [KV,N,d] as a commit turned them; floats.
    void replace_keys(int layer, const float* keys);
    void committed();
    bool must_observe() const { return model_.carries && count_ == settled_ + model_.block && count_ < model_.slots(); }
    void observed() { settled_ = count_; }

    // The filled rows, layer by layer and head by head: [K|V, L, KV, count, d]; then queries and what is carried.
    void save(std::vector<char>& out) const;
    void load(const std::vector<char>& rows, int count, int position);

  private:
    int64_t bytes_policy() const { return int64_t((queries_.size() + carried_.size()) * sizeof(float)); }
    void relay(int64_t from, int64_t to);
    void forget(int64_t rows, int64_t most);  // so many behind the filled ones, in a layout of so many rows

    const ModelEntry& model_;
    std::vector<int64_t> rows_;
    int64_t row_, size_;  // bytes of a head's row, and of one layer's buffer in the largest bucket
    std::unique_ptr<char[]> data_;
    std::vector<float> queries_, carried_;
    size_t bucket_ = 0;
    int count_ = 0, position_ = 0;
    int settled_ = 0;  // rows at the last commit; where the policy carries a score, at the last block that it observed
};

}  // namespace edgespec
