// Who drafts how many tokens: prompt lookup, and the rules that stop a draft. Knows counts and probabilities, no graphs.
#pragma once

#include <string>
#include <vector>

#include "costs.h"

namespace edgespec {

enum class Rule { cost, adaedl, confidence, fixed };

struct Lookup {
    int matched = 0;         // tokens of the text's end that occurred before
    std::vector<int> drafts; // what followed them
};

// Prompt lookup: the latest earlier place of the longest end (`least` to `most` tokens) of the text.
Lookup look_up(const std::vector<int>& text, int most_drafts, int least = 2, int most = 5);

// How likely a drafted token is accepted: successes over trials, both decayed, drawn to a prior. Decay goes on
// where nothing is tried, so a drafter that was given up is tried again after a while.
class Acceptance {
  public:
    // `weight`: trials that the prior counts as. `decay`, `rest`: what is left of the evidence after a trial, and after
    // a round without one.
    explicit Acceptance(double prior, double weight = 1, double decay = 0.85, double rest = 0.97)
        : prior_(prior), weight_(weight), decay_(decay), rest_(rest) {}
    double value() const { return (accepted_ + weight_ * prior_) / (tried_ + weight_); }
    void learn(int accepted, int drafted);
    void forget() { accepted_ *= rest_, tried_ *= rest_; }

  private:
    double prior_, weight_, decay_, rest_, accepted_ = 0, tried_ = 0;
};

// How likely a draft model's token is accepted by the entropy H (nats) of the distribution it comes from: evidence by classes of
// entropy, each drawn to e^(-H/3) at first. That fits what the demo's draft does on prompts that no figure is taken from (97, 87, 65,
// 40 and 17 % in the five classes, 5,600 places); AdaEDL's bound 1 - sqrt(0.2 H) lies up to 20 points below.
class EntropyAcceptance {
  public:
    EntropyAcceptance();
    double value(double entropy) const { return classes_[of(entropy)].value(); }
    void learn(double entropy, bool accepted) { classes_[of(entropy)].learn(accepted, 1); }

  private:
    static size_t of(double entropy);

    std::vector<Acceptance> classes_;
};

// Tokens for a unit of a table's time, of late: what time is worth. It begins as plain decoding.
class Rate {
  public:
    explicit Rate(const Costs& costs) : tokens_(WEIGHT), spent_(WEIGHT * costs.of(1)) {}
    double value() const { return tokens_ / spent_; }
    void learn(int tokens, double spent);

  private:
    static constexpr double WEIGHT = 8, DECAY = 0.95;  // rounds that the beginning counts as; what is left of the past after one
    double tokens_, spent_;
};

// How many drafts are worth their time: argmax over g >= |known| of E - rate (verify(g + 1) + g draft + extra), E = 1 + p_1 +
// p_1 p_2 + ... `known`: p of the tokens drafted already; p is `acceptance` for every further one. `extra`: what the drafter must
// catch up first. To gain most tokens in all its time a text must ask of each token what the whole gives for its time (renewal
// reward), not what this round gives: where drafts are good, a round's own rate stops them too early.
int best_length(const Costs& costs, double rate, double acceptance, double draft, double extra, int most, const std::vector<double>& known = {});

// AdaEDL's controller (arXiv 2410.18351, equations 6 to 8).
class AdaEdl {
  public:
    AdaEdl(double lambda, double acceptance) : lambda_(lambda), acceptance_(acceptance) {}
    // Stop before the next token of a draft whose distribution has this entropy (nats)? Never before the first.
    bool stops(double entropy) const;
    void learn(int accepted, int drafted, int cap);
    double lambda() const { return lambda_; }

  private:
    static constexpr double GAMMA = 0.2, TARGET = 0.9;
    double lambda_, acceptance_;
};

}  // namespace edgespec
