// The one draft/verify loop. Knows models, laws and rules; nothing of protocols or files.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "drafting.h"
#include "model.h"
#include "sampling.h"

namespace edgespec {

// What a model was told: a row of a picture is a token below 0, -1 - i for the i-th. `features` are the rows' but for the first
// `gone` ones, which are kept no longer; `waiting` are those of pictures that the next words show.
struct Text {
    std::vector<int> tokens;
    std::vector<float> features, waiting;
    size_t gone = 0;
};

constexpr int64_t MOST_FEATURES = 256 << 20;  // 27 images of a LLaVA-7B

// A conversation: every token so far, and the caches that have absorbed a beginning of it. The draft has it without pictures,
// or with fewer rows of each.
class Conversation {
  public:
    // Of each model's features as many bytes stay as `most_features`, but those that are yet to be absorbed: the oldest go.
    Conversation(Model& target, Model* draft, const VisionEntry* vision = nullptr, int64_t most_features = MOST_FEATURES);

    // An Error where rows of pictures would have to be absorbed anew that are kept no longer.
    void truncate(int tokens);
    int64_t bytes() const;

    // What was said, and pictures that wait for it: they take the places of the image's token, and must be as many.
    void hear(const std::vector<int>& tokens);
    void push(int token);
    void see();                  // a row of a picture
    void resize(size_t tokens);  // of the history; no cache follows

    const std::vector<int>& history() const { return heard.tokens; }
    const std::vector<int>& said() const { return drafted.tokens; }

    void unsee();  // the pictures that wait
    size_t fewer(size_t rows) const;  // that the draft sees of so many rows of pictures

    Text heard, drafted;  // by the target and by the draft
    size_t pictured = 0;  // rows of pictures in the history
    std::vector<CallRecord> looks;
    const VisionEntry* vision;
    State target;
    std::optional<State> draft;

  private:
    size_t rows_before(int tokens) const;  // of pictures
    bool full(const Text& text) const;     // more features than stay
    void forget(Text& text, int hidden, int rows, size_t absorbed) const;

    int64_t most_features_;
};

// Pictures belong to the words that come next, whatever becomes of these.
struct Shown {
    explicit Shown(Conversation& c) : conversation(c) {}
    ~Shown() { conversation.unsee(); }
    Shown(const Shown&) = delete;
    Shown& operator=(const Shown&) = delete;
    Conversation& conversation;
};

enum class Drafter { none, draft, ngram, both };

struct Request {
    std::vector<int> tokens, stop_ids;
    int max_new_tokens = 128, draft_tokens = 0;  // 0: as many as the widest verify holds
    Sampling sampling;
    Drafter drafter = Drafter::both;
    Rule rule = Rule::cost;
    double threshold = 0.5, lambda = 0.7, acceptance = 0.9;
};

struct Round {
    std::vector<int> tokens;     // emitted
    std::vector<double> entropy; // nats, of the laws that the draft model drew from
    int drafted = 0, accepted = 0;
    double lambda = 0;
    const char *drafter = "none", *stop = "none";  // stop: cap, cost, entropy, confidence, room, none
};

struct Summary {
    const char* reason = "length";  // stop, length, cancelled, positions
    int tokens_prompt = 0, tokens_new = 0, rounds = 0, drafted = 0, accepted = 0, verify_calls = 0, draft_calls = 0;
    std::vector<int> drafted_by_position, accepted_by_position;
    double prompt_s = 0, decode_s = 0, graphs_s = 0;
};

// Who listens. `calls` are the round's graph calls.
class Listener {
  public:
    virtual ~Listener() = default;
    virtual void prompt(int tokens, double seconds, const std::vector<CallRecord>& calls) = 0;
    virtual void round(const Round& round, const std::vector<CallRecord>& calls) = 0;
    virtual bool cancelled() = 0;
};

// Absorb the request's tokens and generate. An Error leaves the conversation as far as it came, and usable.
Summary generate(Conversation& conversation, const Request& request, const Costs& costs, Listener& listener);

}  // namespace edgespec
