#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"

namespace edgespec {
namespace {

struct Candidate {
    int row;
    double score;
};

bool likelier(const Candidate& a, const Candidate& b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// The candidates in order of falling score, as far as the filters let any through.
void filter(std::vector<Candidate>& all, const Sampling& s) {
    if (s.top_k > 0 && size_t(s.top_k) < all.size()) {
        std::nth_element(all.begin(), all.begin() + s.top_k, all.end(), likelier);
        all.resize(size_t(s.top_k));
    }
    if (s.top_p >= 1 && s.min_p <= 0) return;
    const double top = std::max_element(all.begin(), all.end(), [](auto& a, auto& b) { return a.score < b.score; })->score;
    double total = 0;
    for (const Candidate& c : all) total += std::exp(c.score - top);
    if (s.top_p < 1) {  // the fewest that reach top_p together; sorted as far as needed
        size_t sorted = 0, kept = 0;
        for (double sum = 0; kept < all.size() && (kept == 0 || sum < s.top_p * total); ++kept) {
            if (kept == sorted) {
                const size_t until = std::min(all.size(), std::max<size_t>(64, 4 * sorted));
                std::partial_sort(all.begin() + long(sorted), all.begin() + long(until), all.end(), likelier);
                sorted = until;
            }
            sum += std::exp(all[kept].score - top);
        }
        all.resize(kept);
    }
    if (s.min_p > 0) all.erase(std::remove_if(all.begin(), all.end(), [&](auto& c) { return std::exp(c.score - top) < s.min_p; }), all.end());
}

}  // namespace

double Random::uniform() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void Seen::remove(int token) {
    if (--count_[size_t(token)] == 0) ids_.erase(std::find(ids_.rbegin(), ids_.rend(), token).base() - 1);
}

double Law::of(int token) const {
    const auto at = std::lower_bound(ids.begin(), ids.end(), token);
    return at != ids.end() && *at == token ? p[size_t(at - ids.begin())] : 0;
}

int Law::draw(double u) const {
    double sum = 0;
    size_t last = 0;
    for (size_t i = 0; i < p.size(); ++i) {
        if (p[i] <= 0) continue;
        last = i;
        if ((sum += p[i]) > u) break;
    }
    return ids[last];  // rounding may leave the sum a hair below u: the last possible token then
}

void law_of(const float* logits, int n, const std::vector<int>& head_ids, const Sampling& s, const std::vector<int>& seen, Law& out,
            const std::vector<int>& context_ids) {
    const int own = n - int(context_ids.size());
    const auto token_of = [&](int row) { return row >= own ? context_ids[size_t(row - own)] : head_ids.empty() ? row : head_ids[size_t(row)]; };
    const auto row_of = [&](int token) {
        if (head_ids.empty()) return token;
        const auto at = std::lower_bound(head_ids.begin(), head_ids.end(), token);
        if (at != head_ids.end() && *at == token) return int(at - head_ids.begin());
        const auto further = std::find(context_ids.begin(), context_ids.end(), token);
        return further == context_ids.end() ? -1 : own + int(further - context_ids.begin());
    };
    static thread_local std::vector<Candidate> all;
    all.resize(size_t(n));
    for (int i = 0; i < n; ++i) {
        if (!std::isfinite(logits[i])) throw Error("the model computed a logit that is not a number", "run edgespec check on the bundle");
        all[size_t(i)] = {i, logits[i]};
    }
    if (s.repetition_penalty != 1)
        for (const int token : seen) {
            const int row = row_of(token);
            if (row < 0) continue;
            double& score = all[size_t(row)].score;
            score = score < 0 ? score * s.repetition_penalty : score / s.repetition_penalty;
        }
    if (s.greedy()) {
        all[0] = *std::min_element(all.begin(), all.end(), likelier);
        all.resize(1);
    } else {
        for (Candidate& c : all) c.score /= s.temperature;
        filter(all, s);
    }
    const auto before = [&](auto& a, auto& b) { return token_of(a.row) < token_of(b.row); };
    if (!std::is_sorted(all.begin(), all.end(), before)) std::sort(all.begin(), all.end(), before);
    double top = all[0].score, total = 0;
    for (const Candidate& c : all) top = std::max(top, c.score);
    out.ids.resize(all.size());
    out.p.resize(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
        out.ids[i] = token_of(all[i].row);
        total += out.p[i] = std::exp(all[i].score - top);
    }
    for (double& p : out.p) p /= total;
}

bool accepts(const Law& target, const Law& draft, int token, double u) { return u * draft.of(token) < target.of(token); }

void residual(const Law& target, const Law& draft, Law& out) {
    out.ids = target.ids;
    out.p.resize(target.p.size());
    double total = 0;
    size_t at = 0;
    for (size_t i = 0; i < target.ids.size(); ++i) {
        while (at < draft.ids.size() && draft.ids[at] < target.ids[i]) ++at;
        const double q = at < draft.ids.size() && draft.ids[at] == target.ids[i] ? draft.p[at] : 0;
        total += out.p[i] = std::max(0.0, target.p[i] - q);
    }
    // Equal laws refuse nothing but by rounding; then any draw from the target's law is right.
    if (!(total > 0)) out.p = target.p, total = 1;
    for (double& p : out.p) p /= total;
}

}  // namespace edgespec
