// Laws against sums done by hand, and speculative sampling against the target's own law.
#include "sampling.h"

#include <algorithm>
#include <limits>

#include "testing.h"

using namespace edgespec;

static Law made(std::vector<float> logits, Sampling s, std::vector<int> seen = {}, std::vector<int> ids = {}) {
    Law law;
    law_of(logits.data(), int(logits.size()), ids, s, seen, law);
    double total = 0;
    for (const double p : law.p) total += p;
    CHECK(std::abs(total - 1) < 1e-12);
    return law;
}

static bool near(double a, double b) { return std::abs(a - b) < 1e-9; }

static void laws() {
    Sampling s;
    s.temperature = 1;
    const float l3 = float(std::log(3.0)), l2 = float(std::log(2.0));
    const std::vector<float> logits{l2, 0, l3, float(std::log(4.0))};  // 2 : 1 : 3 : 4
    Law law = made(logits, s);
    CHECK(std::abs(law.of(0) - 0.2) < 1e-6 && std::abs(law.of(3) - 0.4) < 1e-6);
    s.top_k = 2;
    law = made(logits, s);
    CHECK((law.ids == std::vector<int>{2, 3}) && std::abs(law.of(3) - 4.0 / 7) < 1e-6 && law.of(0) == 0);
    s.top_k = 0, s.top_p = 0.65;  // 0.4 + 0.3 reach it
    CHECK((made(logits, s).ids == std::vector<int>{2, 3}));
    s.top_p = 0.71;
    CHECK((made(logits, s).ids == std::vector<int>{0, 2, 3}));
    s.top_p = 1e-6;
    CHECK((made(logits, s).ids == std::vector<int>{3}));
    s.top_p = 1, s.min_p = 0.6;  // at least 0.6 of the largest
    CHECK((made(logits, s).ids == std::vector<int>{2, 3}));
    s.min_p = 0, s.temperature = 0.5;  // squares: 4 : 1 : 9 : 16
    CHECK(std::abs(made(logits, s).of(3) - 16.0 / 30) < 1e-6);
    s.temperature = 1, s.repetition_penalty = 2;
    law = made({2, -1, 0}, s, {0, 1});  // 1, -2, 0
    const double total = std::exp(1.0) + std::exp(-2.0) + 1;
    CHECK(near(law.of(0), std::exp(1.0) / total) && near(law.of(1), std::exp(-2.0) / total));
    law = made({2, -1, 0}, s, {5, 8}, {3, 5, 9});  // a trimmed head: its rows are the tokens 3, 5 and 9
    CHECK((law.ids == std::vector<int>{3, 5, 9}) && near(law.of(5), std::exp(-2.0) / (std::exp(2.0) + std::exp(-2.0) + 1)));
    s = {};
    CHECK((made({1, 3, 3, 2}, s).ids == std::vector<int>{1}));  // greedy; the first of equals
    CHECK(error_of([] { made({0, std::numeric_limits<float>::quiet_NaN()}, {}); }) != "");
}

static void wide_filter() {
    std::vector<float> logits(5000, 0.0f);  // top-p over many equal candidates: the first half of them, in order
    Sampling s;
    s.temperature = 1, s.top_p = 0.5;
    const Law law = made(logits, s);
    CHECK(law.ids.size() == 2500 && law.ids.front() == 0 && law.ids.back() == 2499);
}

// One speculative step over random pairs of laws is a draw from the target's.
static void exactness() {
    Random random(7);
    for (int trial = 0; trial < 30; ++trial) {
        std::vector<float> a(6), b(4);
        for (float& x : a) x = float(random.uniform() * 4);
        for (float& x : b) x = float(random.uniform() * 4);
        Sampling s;
        s.temperature = 0.3 + random.uniform(), s.top_k = trial % 3 ? 4 : 0, s.top_p = trial % 2 ? 0.9 : 1, s.repetition_penalty = 1.3;
        const std::vector<int> seen{1, 4};
        Law target, draft, left;
        law_of(a.data(), 6, {}, s, seen, target);
        law_of(b.data(), 4, {0, 2, 3, 5}, s, seen, draft);
        std::vector<int> counts(6);
        std::vector<double> law(6);
        for (int i = 0; i < 6; ++i) law[size_t(i)] = target.of(i);
        for (int i = 0; i < 40000; ++i) {
            int token = draft.draw(random.uniform());
            if (!accepts(target, draft, token, random.uniform())) {
                residual(target, draft, left);
                token = left.draw(random.uniform());
            }
            ++counts[size_t(token)];
        }
        CHECK(drawn_from(law, counts));
        const int likeliest = int(std::max_element(law.begin(), law.end()) - law.begin());
        counts[size_t(likeliest)] -= 2000, counts[size_t(target.ids[0] == likeliest ? target.ids[1] : target.ids[0])] += 2000;
        CHECK(!drawn_from(law, counts));  // the test can fail
    }
}

static void zero_residual() {
    const Law law{{1, 4}, {0.25, 0.75}};
    Law left;
    residual(law, law, left);
    CHECK(left.p == law.p);
    CHECK(law.draw(0) == 1 && law.draw(0.2499) == 1 && law.draw(0.25) == 4 && law.draw(std::nextafter(1.0, 0.0)) == 4);
    residual(law, Law{{4, 9}, {0.5, 0.5}}, left);
    CHECK(near(left.of(1), 0.5) && near(left.of(4), 0.5));
}

static void seen() {
    Seen s(10);
    s.add(3), s.add(5), s.add(3), s.remove(3);
    CHECK((s.ids() == std::vector<int>{3, 5}));
    s.remove(3);
    CHECK((s.ids() == std::vector<int>{5}));
}

int main() { laws(), wide_filter(), exactness(), zero_residual(), seen(); }
