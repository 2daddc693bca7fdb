// Prompt lookup, the cost rule and AdaEDL's controller, against cases done by hand.
#include "drafting.h"

#include "testing.h"

using namespace edgespec;

static void lookup() {
    using V = std::vector<int>;
    Lookup l = look_up({1, 2, 3, 9, 1, 2, 3, 8, 7, 2, 3}, 3);
    CHECK(l.matched == 2 && (l.drafts == V{8, 7, 2}));  // the latest place of "2 3"
    l = look_up({1, 2, 3, 9, 5, 2, 3, 8, 7, 1, 2, 3}, 2);
    CHECK(l.matched == 3 && (l.drafts == V{9, 5}));  // the longer match wins over the later one
    l = look_up({4, 1, 2, 1, 2}, 5);
    CHECK(l.matched == 2 && (l.drafts == V{1, 2, 1, 2, 1}));  // a text that repeats itself goes on
    CHECK(look_up({1, 2, 3, 4}, 4).matched == 0);
    CHECK(look_up({}, 4).matched == 0 && look_up({1}, 4).matched == 0 && look_up({1, 1, 1}, 0).drafts.empty());
    CHECK(look_up({1, 1, 1, 1}, 2).drafts == (V{1, 1}));
    CHECK(look_up({1, 2, -1, 5, 1, 2}, 3).matched == 0);  // a picture is no draft
    CHECK(look_up({1, 2, 7, -1, 5, 1, 2}, 3).drafts == (V{7}));
    CHECK(look_up({1, 2, 7, 3, 1, 2, -1, 1, 2}, 3).drafts == (V{7, 3, 1}));
}

static void lengths() {
    Costs c;
    c.verify = {{1, 1.0}, {2, 1.1}, {4, 1.3}, {8, 2.0}};
    CHECK(c.width_for(1) == 1 && c.width_for(3) == 4 && c.width_for(5) == 8 && c.width_for(9) == 0);
    CHECK(best_length(c, 1, 0, 0.1, 0, 7) == 0);     // nothing is ever accepted
    CHECK(best_length(c, 1, 1, 0, 0, 7) == 7);       // everything is, for nothing
    CHECK(best_length(c, 1, 1, 0, 0, 5) == 5);       // 6 - 2.0 beats 4 - 1.3
    CHECK(best_length(c, 3, 1, 0, 0, 5) == 3);       // where time is dear, it does not: 4 - 3.9, and 6 - 6
    CHECK(best_length(c, 1, 0.5, 0, 0, 7) == 3);     // 1.875 - 1.3 beats 1.5 - 1.1 and 1.99 - 2.0
    CHECK(best_length(c, 1, 0.5, 0.5, 0, 7) == 0);   // a dear draft: 1.5 - 1.6
    CHECK(best_length(c, 1, 0.5, 0.1, 1, 7) == 0);   // much to catch up: 1.875 - 2.6
    CHECK(best_length(c, 1, 0.9, 0.05, 0, 7) == 7);  // 5.695 - 2.35 beats 3.439 - 1.45
    Rate rate(c);
    CHECK(std::abs(rate.value() - 1) < 1e-12);
    for (int i = 0; i < 200; ++i) rate.learn(3, 1.5);
    CHECK(std::abs(rate.value() - 2) < 1e-3);
    c.draft = 0.1, c.draft_prefill = 1;
    CHECK(!c.by_prefill(19, 128) && c.by_prefill(21, 128) && std::abs(c.catching_up(10, 128) - 0.5) < 1e-12 && std::abs(c.catching_up(200, 128) - 2) < 1e-12);
}

static void lengths_after_some_drafts() {
    Costs c;
    c.verify = {{1, 1.0}, {2, 1.1}, {4, 1.3}, {8, 2.0}};
    CHECK(best_length(c, 1, 0.5, 0.1, 0, 7, {0.05}) == 1);        // one that will be refused: whatever follows is lost
    CHECK(best_length(c, 1, 0.5, 0.1, 0, 7, {0.99}) == 3);        // a sure one: go on as if from the start
    CHECK(best_length(c, 1, 0.9, 0.01, 0, 7, {0.9, 0.9, 0.1}) == 3);
    CHECK(best_length(c, 1, 0.9, 0.01, 0, 7, {1, 1, 1}) == 7);    // 7.1 - 2.07 beats 4 - 1.33
    CHECK(best_length(c, 1, 0.9, 0.01, 0, 4, {1, 1, 1, 1}) == 4);  // never below what is drafted
    for (const double rate : {0.5, 1.0, 1.7})  // against the definition
        for (const double a : {0.2, 0.5, 0.8, 0.95})
            for (const std::vector<double>& known : std::vector<std::vector<double>>{{}, {0.3}, {0.9, 0.6}}) {
                const auto worth = [&](int g) {
                    double expected = 1, p = 1;
                    for (int i = 0; i < g; ++i) expected += p *= i < int(known.size()) ? known[size_t(i)] : a;
                    return expected - rate * (c.of(g + 1) + g * 0.07);
                };
                int best = int(known.size());
                for (int g = best + 1; g <= 7; ++g)
                    if (worth(g) > worth(best)) best = g;
                CHECK(best_length(c, rate, a, 0.07, 0, 7, known) == best);
            }
}

static void entropy_tells_acceptance() {
    EntropyAcceptance a;
    CHECK(a.value(0.0) > a.value(0.5) && a.value(0.5) > a.value(1.5) && a.value(1.5) > a.value(3) && a.value(3) > a.value(9) && a.value(9) > 0);
    const double sure = a.value(0.1);
    for (int i = 0; i < 60; ++i) a.learn(2.5, true), a.learn(0.5, false);
    CHECK(a.value(2.1) > 0.8 && a.value(0.9) < 0.2 && a.value(0.1) == sure);
}

static void acceptance() {
    Acceptance a(0.6);
    CHECK(std::abs(a.value() - 0.6) < 1e-12);
    for (int i = 0; i < 20; ++i) a.learn(0, 4);
    CHECK(a.value() < 0.1);
    const double low = a.value();
    for (int i = 0; i < 100; ++i) a.forget();
    CHECK(a.value() > 0.4 && low < 0.4);  // tried again one day
    for (int i = 0; i < 20; ++i) a.learn(4, 4);
    CHECK(a.value() > 0.9);

    Acceptance patient(0.5, 4, 0.95, 0.985);  // the loop's, of a draft model
    patient.learn(0, 1), patient.learn(0, 1);
    CHECK(patient.value() > 0.3);
    for (int i = 0; i < 18; ++i) patient.learn(0, 1);
    CHECK(patient.value() < 0.15);
    for (int i = 0; i < 100; ++i) patient.forget();
    CHECK(patient.value() > 0.25);
}

static void adaedl() {
    AdaEdl a(0.7, 0.9);
    CHECK(!a.stops(0) && !a.stops(0.44) && a.stops(0.46));  // 1 - sqrt(0.2 H) < 0.7 from H = 0.45
    a.learn(0, 4, 7);  // AR 0.45 < 0.9
    CHECK(std::abs(a.lambda() - (0.9 * 0.7 + 0.1 * 0.71)) < 1e-12);
    AdaEdl b(0.7, 1.0);
    b.learn(4, 4, 7);  // AR 1, not the cap
    CHECK(std::abs(b.lambda() - (0.9 * 0.7 + 0.1 * 0.69)) < 1e-12);
    AdaEdl c(0.7, 1.0);
    c.learn(7, 7, 7);
    CHECK(std::abs(c.lambda() - 0.7) < 1e-12);
    c.learn(0, 0, 7);
    CHECK(std::abs(c.lambda() - 0.7) < 1e-12);
}

int main() { lookup(), lengths(), lengths_after_some_drafts(), entropy_tells_acceptance(), acceptance(), adaedl(); }
