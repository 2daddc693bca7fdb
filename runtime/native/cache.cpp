#include "cache.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace edgespec {

Cache::Cache(const ModelEntry& model) : model_(model) {
    for (const int bucket : model.buckets) {
        int64_t rows = 0;
        for (const GraphSpec& g : model.graphs)
            if (g.step() && g.bucket == bucket)
                for (const TensorSpec& t : g.inputs)
                    if (t.name == "keys_0") rows = t.shape[2];
        rows_.push_back(rows);
    }
    row_ = model.head_dim * bytes_of(model.cached);
    size_ = *std::max_element(rows_.begin(), rows_.end()) * model.kv_heads * row_;
    data_ = std::make_unique<char[]>(size_t(2 * model.layers * size_));  // zeros: a masked row must be finite
    queries_.resize(size_t(model.layers * model.query_floats()));
    if (model.carries) carried_.resize(size_t(model.layers * model.carried_floats()));
}

// Under `rows` a masked row still takes part, times zero, and ExecuTorch's graphs add a call's rows to the free slots:
// what is forgotten must not stay.
void Cache::clear() {
    count_ = position_ = settled_ = 0, bucket_ = 0;
    std::fill(carried_.begin(), carried_.end(), 0.0f);
    if (model_.contract == "rows") std::memset(data_.get(), 0, size_t(2 * model_.layers * size_));
}

void Cache::roll_back(int rows) {
    count_ -= rows, position_ -= rows;
    forget(this->rows(), rows);
}

void Cache::committed() {
    count_ = settled_ = model_.budget;
    forget(rows(), rows());
}

void Cache::forget(int64_t rows, int64_t most) {
    if (model_.contract == "rows")
        for (int layer = 0; layer < 2 * model_.layers; ++layer)
            for (int head = 0; head < model_.kv_heads; ++head)
                std::memset(data_.get() + layer * size_ + (head * rows + count_) * row_, 0, size_t(std::min(rows - count_, most) * row_));
}

bool Cache::fit(int rows) {
    size_t bucket = bucket_;
    while (bucket + 1 < rows_.size() && model_.buckets[bucket] + model_.block < rows) ++bucket;
    if (bucket == bucket_) return false;
    if (rows_[bucket] != rows_[bucket_]) relay(rows_[bucket_], rows_[bucket]);
    bucket_ = bucket;
    return true;
}

void Cache::relay(int64_t from, int64_t to) {
    for (int layer = 0; layer < 2 * model_.layers; ++layer)
        for (int head = model_.kv_heads - 1; head > 0; --head) {  // from the last: heads move apart
            char* buffer = data_.get() + layer * size_;
            std::memmove(buffer + head * to * row_, buffer + head * from * row_, size_t(count_ * row_));
        }
    forget(to, to);
}

void Cache::append(Layers layers, int rows, int width, const void* new_keys, const void* new_values, const float* new_queries) {
    if (new_keys) {
        for (int values = 0; values < 2; ++values)
            for (int layer = 0; layer < layers.count; ++layer)
                for (int head = 0; head < model_.kv_heads; ++head) {
                    const char* from = static_cast<const char*>(values ? new_values : new_keys) + (int64_t(layer) * model_.kv_heads + head) * width * row_;
                    std::memcpy(buffer(values, layers.first + layer) + (head * this->rows() + count_) * row_, from, size_t(rows * row_));
                }
    }
    const int64_t row = int64_t(model_.heads) * model_.head_dim;
    for (int r = 0; new_queries && r < rows; ++r) {
        const int left = (model_.slots() - count_ - r - 1) % model_.block, at = model_.queries - 1 - left;  // left: rows of the block after it
        for (int layer = 0; at >= 0 && layer < layers.count; ++layer)
            std::memcpy(queries(layers.first + layer) + at * row, new_queries + (int64_t(r) * layers.count + layer) * row, size_t(row) * sizeof(float));
    }
}

void Cache::keep(int layer, const int32_t* keep) {
    const int64_t n = model_.budget;
    for (int head = 0; head < model_.kv_heads; ++head) {
        const auto place = [&](int64_t i) { return keep ? int64_t(keep[head * n + i]) : model_.block + i; };
        for (int64_t i = 0; i < n; ++i)
            if (place(i) < i || place(i) >= model_.slots() || (i && place(i) <= place(i - 1)))
                throw Error("the commit graph chose rows that are not in order", "export the bundle again");
        for (int64_t i = 0, run; i < n; i += run) {  // neighbours move together
            for (run = 1; i + run < n && place(i + run) == place(i) + run;) ++run;
            for (int values = 0; place(i) != i && values < 2; ++values) {
                char* at = buffer(values, layer) + head * rows() * row_;
                std::memmove(at + i * row_, at + place(i) * row_, size_t(run * row_));
            }
        }
    }
}

void Cache::replace_keys(int layer, const float* keys) {
    const int64_t each = model_.budget * row_;
    for (int head = 0; head < model_.kv_heads; ++head)
        std::memcpy(buffer(false, layer) + head * rows() * row_, reinterpret_cast<const char*>(keys) + head * each, size_t(each));
}

void Cache::save(std::vector<char>& out) const {
    out.clear();
    if (!count_) return;
    out.reserve(size_t(saved_bytes(count_)));
    for (int layer = 0; layer < 2 * model_.layers; ++layer)
        for (int head = 0; head < model_.kv_heads; ++head) {
            const char* from = data_.get() + layer * size_ + head * rows() * row_;
            out.insert(out.end(), from, from + count_ * row_);
        }
    for (const std::vector<float>* beside : {&queries_, &carried_}) {
        const char* from = reinterpret_cast<const char*>(beside->data());
        out.insert(out.end(), from, from + beside->size() * sizeof(float));
    }
}

void Cache::load(const std::vector<char>& rows, int count, int position) {
    clear();
    if (!count) return;  // an empty vector has no data
    fit(count);
    const char* from = rows.data();
    for (int layer = 0; layer < 2 * model_.layers; ++layer)
        for (int head = 0; head < model_.kv_heads; ++head, from += count * row_)
            std::memcpy(data_.get() + layer * size_ + head * this->rows() * row_, from, size_t(count * row_));
    for (std::vector<float>* beside : {&queries_, &carried_}) {
        const size_t bytes = beside->size() * sizeof(float);
        if (bytes) std::memcpy(beside->data(), from, bytes);
        from += bytes;
    }
    count_ = count;
    position_ = position;
    settled_ = model_.carries ? count / model_.block * model_.block : evicted() ? model_.budget : 0;
}

}  // namespace edgespec
