// Laws of the next token, and exact speculative sampling between a target's and a draft's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgespec {

struct Sampling {
    double temperature = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
    int top_k = 0;  // 0: all
    uint64_t seed = 0;

    bool greedy() const { return temperature == 0; }
    bool plain_greedy() const { return greedy() && repetition_penalty == 1; }  // the graph's argmax decides
};

// Counter-based uniform numbers (splitmix64): a seed gives the same ones everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    double uniform();  // [0, 1)

  private:
    uint64_t state_;
};

// Tokens already in the conversation, for the repetition penalty.
class Seen {
  public:
    explicit Seen(int vocab) : count_(size_t(vocab)) {}
    void add(int token) { if (!count_[size_t(token)]++) ids_.push_back(token); }
    void remove(int token);  // the newest first
    const std::vector<int>& ids() const { return ids_; }

  private:
    std::vector<int> count_, ids_;
};

// A distribution over tokens: ascending ids, probabilities that sum to 1.
struct Law {
    std::vector<int> ids;
    std::vector<double> p;

    double of(int token) const;
    int draw(double u) const;  // u uniform
};

// The law really sampled from a row of logits. As Transformers does: repetition penalty, temperature, top-k,
// top-p, min-p. `head_ids` are the tokens of the logits' rows (empty: row i is token i). Temperature 0 gives
// the most likely token all of it. `context_ids` are the tokens of the rows after the head's own, in any order; `n`
// counts these rows too. An Error where a logit is not a number.
void law_of(const float* logits, int n, const std::vector<int>& head_ids, const Sampling& sampling, const std::vector<int>& seen, Law& out,
            const std::vector<int>& context_ids = {});

// Speculative sampling (arXiv 2211.17192): keep the drafted token with probability min(1, p/q).
bool accepts(const Law& target, const Law& draft, int token, double u);

// The law after a refusal, max(0, p - q) normalised; the target's own where that is zero everywhere.
void residual(const Law& target, const Law& draft, Law& out);

}  // namespace edgespec
