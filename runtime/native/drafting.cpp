#include "drafting.h"

#include <algorithm>
#include <cmath>

namespace edgespec {

Lookup look_up(const std::vector<int>& text, int most_drafts, int least, int most) {
    Lookup best;
    const int n = int(text.size());
    for (int end = n - 1; end >= least && most_drafts > 0; --end) {  // text[..end) ends an earlier place
        int same = 0;
        while (same < most && same < end && text[size_t(end - 1 - same)] == text[size_t(n - 1 - same)]) ++same;
        if (same < least || same <= best.matched) continue;
        if (text[size_t(end)] < 0) continue;  // a picture stood there, which nobody says
        best.matched = same;
        best.drafts.clear();
        for (int i = 0; i < most_drafts; ++i) {  // a text that repeats itself goes on doing so
            const int next = end + i < n ? text[size_t(end + i)] : best.drafts[size_t(end + i - n)];
            if (next < 0) break;
            best.drafts.push_back(next);
        }
        if (same == most) break;
    }
    return best;
}

void Acceptance::learn(int accepted, int drafted) {
    const int tried = std::min(drafted, accepted + 1);  // those after the first refusal were never judged
    for (int i = 0; i < tried; ++i) {
        accepted_ = accepted_ * decay_ + (i < accepted);
        tried_ = tried_ * decay_ + 1;
    }
}

EntropyAcceptance::EntropyAcceptance() {
    for (const double typical : {0.1, 0.6, 1.5, 2.8, 4.5}) classes_.emplace_back(std::exp(-typical / 3), 8, 0.97);
}

size_t EntropyAcceptance::of(double entropy) {
    size_t place = 0;
    for (const double edge : {0.3, 1.0, 2.0, 3.5}) place += entropy >= edge;
    return place;
}

void Rate::learn(int tokens, double spent) {
    tokens_ = tokens_ * DECAY + tokens;
    spent_ = spent_ * DECAY + spent;
}

int best_length(const Costs& costs, double rate, double a, double draft, double extra, int most, const std::vector<double>& known) {
    int best = int(known.size());
    double expected = 1, power = 1;
    for (const double p : known) expected += power *= p;
    // Before the first draft the alternative is a plain call, with nothing to catch up.
    double worth = expected - rate * (costs.of(best + 1) + best * draft + (best == 0 ? 0 : extra));
    for (int g = best + 1; g <= most; ++g) {
        expected += power *= a;
        const double w = expected - rate * (costs.of(g + 1) + g * draft + extra);
        if (w > worth) best = g, worth = w;
    }
    return best;
}

bool AdaEdl::stops(double entropy) const { return 1 - std::sqrt(GAMMA * std::max(0.0, entropy)) < lambda_; }

void AdaEdl::learn(int accepted, int drafted, int cap) {
    if (drafted == 0) return;
    acceptance_ = 0.5 * acceptance_ + 0.5 * accepted / drafted;
    const double wanted = acceptance_ < TARGET ? lambda_ + 0.01 : accepted != cap ? lambda_ - 0.01 : lambda_;
    lambda_ = 0.9 * lambda_ + 0.1 * wanted;
}

}  // namespace edgespec
