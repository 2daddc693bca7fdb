#include "loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "error.h"

namespace edgespec {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int HORIZON = 24;  // rounds over which catching up must pay, or as many as there were: what has gone on goes on
// Of the draft model's acceptance: two refusals are no reason to give it up for a hundred tokens, twenty are. Trying it
// again is dear, since it must catch up first. Played over 65 texts and three tables of costs, and over drafts that are bad.
constexpr double WEIGHT_DRAFT = 4, DECAY_DRAFT = 0.95, REST_DRAFT = 0.985;
constexpr double PRIOR_NGRAM[] = {0.45, 0.55, 0.65, 0.75};  // by tokens matched: 2, 3, 4, 5

double seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

bool pictured(const int* tokens, int rows) { return std::any_of(tokens, tokens + rows, [](int token) { return token < 0; }); }

class Loop {
  public:
    Loop(Conversation& c, const ModelEntry& target, const ModelEntry* draft, const Request& r, const Costs& costs, Listener& l)
        : c_(c), target_(target), draft_(draft), r_(r), costs_(costs), listener_(l), random_(r.sampling.seed), seen_(target.vocab),
          adaedl_(r.lambda, r.acceptance), model_(costs.acceptance, WEIGHT_DRAFT, DECAY_DRAFT, REST_DRAFT), rate_(costs) {
        c_.target.trace = &calls_;
        if (c_.draft) c_.draft->trace = &calls_;
        widest_ = costs.verify.rbegin()->first;
        cap_ = std::min(r.draft_tokens > 0 ? r.draft_tokens : widest_ - 1, widest_ - 1);
        summary_.drafted_by_position.resize(size_t(cap_));
        summary_.accepted_by_position.resize(size_t(cap_));
        laws_.resize(size_t(cap_));
        for (const double prior : PRIOR_NGRAM) ngram_.emplace_back(prior);
    }

    // A round that failed half-way leaves nothing behind: what nobody was told did not happen.
    ~Loop() {
        if (!settled_) c_.resize(c_.history().size() - round_.tokens.size());
        c_.target.trace = nullptr;
        if (!c_.draft) return;
        c_.draft->trace = nullptr;
        c_.draft->cut(int(c_.said().size()));
    }

    Summary run() {
        const auto start = Clock::now();
        for (const CallRecord& look : c_.looks) summary_.prompt_s += look.us * 1e-6;
        calls_.swap(c_.looks);
        const Result last = absorb();
        if (!last.logits) return summary_.reason = "cancelled", summary_;
        summary_.tokens_prompt = int(r_.tokens.size());
        if (r_.max_new_tokens > 0) emit(choose(target_law(last, 0)));
        summary_.prompt_s += seconds(start);
        const auto begun = Clock::now();
        report_prompt();
        while (r_.max_new_tokens > 0 && !ended()) round();
        summary_.decode_s = seconds(begun);
        return summary_;
    }

  private:
    // The prompt, block by block, and the tokens that the target has not absorbed yet; the last row's result.
    Result absorb() {
        c_.hear(r_.tokens);
        if (!r_.sampling.plain_greedy())
            for (const int token : c_.history()) seen_.add(token < 0 ? c_.vision->token : token);
        Result last;
        const int block = target_.widths("prefill").back(), all = int(c_.history().size());
        while (c_.target.cache.position() < all) {
            if (listener_.cancelled()) return {};
            const int at = c_.target.cache.position(), rows = std::min({block, all - at, c_.target.room()});
            const int* tokens = &c_.history()[size_t(at)];
            const bool seen = pictured(tokens, rows);
            // A few tokens go through a narrow graph, where one gives the same bits.
            const int narrow = costs_.widths_agree && !seen ? costs_.width_for(rows) : 0;
            const char* kind = seen ? "embeds" : narrow == 0 ? "prefill" : narrow == 1 ? "decode" : "verify";
            last = c_.target.call(kind, narrow ? narrow : block, tokens, rows, c_.heard.features.data(), int64_t(c_.heard.gone));
            if (narrow) last.logits += int64_t(rows - 1) * target_.head_rows, last.argmax += rows - 1;
            c_.target.accept(rows);
            c_.target.commit_if_full();
        }
        return last;
    }

    bool ended() {
        if (std::find(r_.stop_ids.begin(), r_.stop_ids.end(), c_.history().back()) != r_.stop_ids.end()) return summary_.reason = "stop", true;
        if (summary_.tokens_new >= r_.max_new_tokens) return summary_.reason = "length", true;
        if (c_.target.room() < 1) return summary_.reason = "positions", true;
        if (listener_.cancelled()) return summary_.reason = "cancelled", true;
        return false;
    }

    void emit(int token) {
        c_.push(token);
        if (!r_.sampling.plain_greedy()) seen_.add(token);
        round_.tokens.push_back(token);
        ++summary_.tokens_new;
    }

    void round() {
        const int most = std::min({cap_, c_.target.room() - 1, r_.max_new_tokens - summary_.tokens_new - 1});
        round_.drafter = "none", round_.stop = "none";
        drafts_.clear();
        if (most > 0) draft(most);
        verify();
        settle();
        report();
    }

    void draft(int most) {
        if (r_.drafter == Drafter::ngram || r_.drafter == Drafter::both) {
            Lookup found = look_up(c_.said(), most);
            for (Acceptance& a : ngram_) a.forget();
            if (found.matched > 0) {
                matched_ = std::min(size_t(found.matched - 2), ngram_.size() - 1);
                const int most_found = int(found.drafts.size());
                const int take = r_.rule == Rule::cost ? best_length(costs_, rate_.value(), ngram_[matched_].value(), 0, 0, most_found) : most_found;
                if (take > 0) {
                    drafts_.assign(found.drafts.begin(), found.drafts.begin() + take);
                    round_.drafter = "ngram", round_.stop = take < most_found ? "cost" : "cap";
                    return;
                }
            }
        }
        if (c_.draft && (r_.drafter == Drafter::draft || r_.drafter == Drafter::both)) draft_by_model(most);
    }

    void draft_by_model(int most) {
        State& state = *c_.draft;
        const int pending = int(c_.said().size()) - state.cache.position();
        double extra = 0;
        known_.clear();
        if (r_.rule == Rule::cost) {
            extra = costs_.catching_up(pending - 1, draft_->widths("prefill").back()) / std::max(HORIZON, summary_.rounds);
            const int length = best_length(costs_, rate_.value(), model_.value(), costs_.draft, extra, most);
            model_.forget();
            if (length == 0) { round_.stop = "cost"; return; }
        }
        round_.stop = "cap";
        if (!catch_up(state)) { round_.stop = "room"; return; }
        state.follow(c_.said());
        round_.drafter = "draft";
        while (int(drafts_.size()) < most) {
            const int first = drafts_.empty() ? state.cache.position() : 0;
            const int* tokens = drafts_.empty() ? &c_.said()[size_t(first)] : &drafts_.back();
            const int rows = drafts_.empty() ? int(c_.said().size()) - first : 1;
            if (state.room() < rows) { round_.stop = "room"; break; }
            const Result r = state.call("draft", draft_->widths("draft").back(), tokens, rows);
            ++summary_.draft_calls;
            state.accept(rows);
            if (drafts_.empty()) state.commit_if_full();
            const double entropy = r.entropy[rows - 1];
            if (!std::isfinite(entropy)) throw Error("the draft computed an entropy that is not a number", "run edgespec check on the bundle");
            if (r_.rule == Rule::adaedl && !drafts_.empty() && adaedl_.stops(entropy)) { round_.stop = "entropy"; break; }
            round_.entropy.push_back(entropy);
            drafts_.push_back(draw_draft(r, rows - 1));
            if (r_.rule == Rule::cost) {  // decided by laws alone, before the next token is drawn
                known_.push_back(by_entropy_.value(entropy));
                const int here = int(drafts_.size());
                if (here < most && best_length(costs_, rate_.value(), model_.value(), costs_.draft, extra, most, known_) == here) { round_.stop = "cost"; break; }
            }
            if (r_.rule == Rule::confidence && r.top[(rows - 1) * r.top_k] < r_.threshold) { round_.stop = "confidence"; break; }
        }
        for (const int token : drafts_)
            if (!r_.sampling.plain_greedy()) seen_.remove(token);
    }

    // Let the draft absorb the conversation but for its last one or two tokens.
    bool catch_up(State& state) {
        const int all = int(c_.said().size()), block = draft_->widths("prefill").back(), width = draft_->widths("draft").back();
        for (int left; (left = all - state.cache.position()) > 1 && (left > 2 || state.room() < left || c_.said()[size_t(all - left)] < 0);) {
            const int* tokens = &c_.said()[size_t(state.cache.position())];
            const bool wide = costs_.by_prefill(left - 1, block) || pictured(tokens, std::min(left - 1, width));
            const int rows = std::min({left - 1, wide ? block : width, state.room()});
            if (rows < 1) return false;  // past the draft's last position
            if (std::any_of(tokens, tokens + rows, [&](int token) { return token < 0 && size_t(-1 - token) < c_.drafted.gone; })) return false;
            const char* kind = pictured(tokens, rows) ? "embeds" : rows > width ? "prefill" : "draft";
            state.call(kind, *kind == 'd' ? width : block, tokens, rows, c_.drafted.features.data(), int64_t(c_.drafted.gone));
            ++summary_.draft_calls;
            state.accept(rows);
            state.commit_if_full();
        }
        return state.room() > 0;
    }

    int draw_draft(const Result& r, int row) {
        const size_t i = drafts_.size();
        if (r_.sampling.plain_greedy()) return checked(r.argmax[row]);
        const std::vector<int>& context = c_.draft->context.tokens();
        const int rows = draft_->head_rows + int(context.size());
        law_of(r.logits + row * r.columns, rows, draft_->head_ids, r_.sampling, seen_.ids(), laws_[i], context);
        const int token = laws_[i].draw(random_.uniform());
        seen_.add(token);
        return token;
    }

    void verify() {
        settled_ = false;
        const int k = int(drafts_.size()), width = costs_.width_for(k + 1);
        rows_.assign(1, c_.history().back());
        rows_.insert(rows_.end(), drafts_.begin(), drafts_.end());
        const Result r = c_.target.call(width == 1 ? "decode" : "verify", width, rows_.data(), k + 1);
        ++summary_.verify_calls;
        round_.drafted = k, round_.accepted = 0;
        const bool lookup = *round_.drafter == 'n' && k > 0;
        for (int i = 0; i <= k; ++i) {
            const Law& law = target_law(r, i);
            int token = choose_or_accept(law, i, k, lookup);
            emit(token);
            const bool kept = i < k && token == drafts_[size_t(i)];
            if (i < k) ++summary_.drafted_by_position[size_t(i)];
            if (!kept) break;
            ++round_.accepted, ++summary_.accepted_by_position[size_t(i)];
            if (std::find(r_.stop_ids.begin(), r_.stop_ids.end(), token) != r_.stop_ids.end()) break;
        }
    }

    // Row i's token: the draft's where it is accepted, else one from what is left of the target's law.
    int choose_or_accept(const Law& law, int i, int k, bool lookup) {
        if (r_.sampling.greedy() || i == k) return choose(law);
        const int token = drafts_[size_t(i)];
        if (lookup) laws_[size_t(i)] = {{token}, {1.0}};  // a lookup proposes one token for sure
        const Law& proposal = laws_[size_t(i)];
        if (accepts(law, proposal, token, random_.uniform())) return token;
        residual(law, proposal, left_);
        return left_.draw(random_.uniform());
    }

    const Law& target_law(const Result& r, int row) {
        if (r_.sampling.plain_greedy()) {
            const int best = checked(r.argmax[row]);
            if (target_.head_ids.empty() && !std::isfinite(r.logits[int64_t(row) * target_.head_rows + best]))
                throw Error("the model computed a logit that is not a number", "run edgespec check on the bundle");
            law_.ids.assign(1, best), law_.p.assign(1, 1.0);
        } else {
            law_of(r.logits + int64_t(row) * target_.head_rows, target_.head_rows, target_.head_ids, r_.sampling, seen_.ids(), law_);
        }
        return law_;
    }

    int choose(const Law& law) { return law.ids.size() == 1 ? law.ids[0] : law.draw(random_.uniform()); }

    int checked(int token) const {
        if (token < 0 || token >= target_.vocab) throw Error("a graph gave token " + std::to_string(token) + ", which the vocabulary lacks", "run edgespec check on the bundle");
        return token;
    }

    // Count the rows whose tokens stand, and take the draft's others back.
    void settle() {
        const int emitted = int(round_.tokens.size());
        rate_.learn(emitted, costs_.of(round_.drafted + 1) + (*round_.drafter == 'd' ? round_.drafted * costs_.draft : 0));
        settled_ = true;
        c_.target.accept(emitted);
        c_.target.commit_if_full();
        if (c_.draft) {
            const int stand = int(c_.said().size()) - 1, ahead = c_.draft->cache.position() - stand;
            if (ahead > 0) c_.draft->cache.roll_back(ahead);
            c_.draft->commit_if_full();
        }
        if (round_.drafted > 0 && *round_.drafter == 'n') ngram_[matched_].learn(round_.accepted, round_.drafted);
        if (round_.drafted > 0 && *round_.drafter == 'd') {
            model_.learn(round_.accepted, round_.drafted);
            for (int i = 0; i < std::min(round_.drafted, round_.accepted + 1); ++i) by_entropy_.learn(round_.entropy[size_t(i)], i < round_.accepted);
            adaedl_.learn(round_.accepted, round_.drafted, cap_);
        }
    }

    void count() {
        for (const CallRecord& call : calls_) summary_.graphs_s += call.us * 1e-6;
    }
    void report_prompt() {
        count();
        listener_.prompt(summary_.tokens_prompt, summary_.prompt_s, calls_);
        round_.lambda = adaedl_.lambda();
        calls_.clear();
        if (!round_.tokens.empty()) listener_.round(round_, calls_);
        round_ = {};
    }
    void report() {
        ++summary_.rounds;
        summary_.drafted += round_.drafted;
        summary_.accepted += round_.accepted;
        round_.lambda = adaedl_.lambda();
        count();
        listener_.round(round_, calls_);
        calls_.clear();
        round_.tokens.clear(), round_.entropy.clear();
        round_.drafted = round_.accepted = 0;
    }

    Conversation& c_;
    const ModelEntry& target_;
    const ModelEntry* draft_;
    const Request& r_;
    const Costs& costs_;
    Listener& listener_;
    Random random_;
    Seen seen_;
    AdaEdl adaedl_;
    Acceptance model_;
    EntropyAcceptance by_entropy_;
    Rate rate_;
    std::vector<double> known_;  // of this round's drafts
    std::vector<Acceptance> ngram_;
    size_t matched_ = 0;
    int widest_ = 0, cap_ = 0;
    bool settled_ = true;
    std::vector<int> drafts_, rows_;
    std::vector<Law> laws_;
    Law law_, left_;
    std::vector<CallRecord> calls_;
    Round round_;
    Summary summary_;
};

}  // namespace

Summary generate(Conversation& c, const Request& r, const Costs& costs, Listener& listener) {
    const ModelEntry& target = c.target.entry();
    for (const int token : r.tokens)
        if (token < 0 || token >= target.vocab)
            throw Error("token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(target.vocab), "encode with the bundle's tokenizer");
    const auto slots = c.vision ? std::count(r.tokens.begin(), r.tokens.end(), c.vision->token) : 0;
    if (const auto rows = int64_t(c.heard.waiting.size()) / target.hidden; slots != rows)
        throw Error("the tokens have places for " + std::to_string(slots) + " rows of pictures, and " + std::to_string(rows) + " wait", "look at as many pictures as the tokens show, just before them");
    for (auto at = r.tokens.begin(); slots && (at = std::find(at, r.tokens.end(), c.vision->token)) != r.tokens.end();) {
        const auto end = std::find_if(at, r.tokens.end(), [&](int token) { return token != c.vision->token; });
        if ((end - at) % c.vision->rows) throw Error(std::to_string(end - at) + " rows stand together, and a picture has " + std::to_string(c.vision->rows), "let nothing stand inside a picture");
        at = end;
    }
    const int64_t all = int64_t(c.history().size()) + int64_t(r.tokens.size());
    if (all == 0) throw Error("the prompt is empty", "give at least one token");
    if (!target.compact && all > target.positions)
        throw Error(std::to_string(all) + " tokens are more than the " + std::to_string(target.positions) + " positions that the model was trained on", "shorten the prompt, truncate the conversation, or export with --positions compact");
    if (target.policy == "none" && all > target.slots())
        throw Error(std::to_string(all) + " tokens are more than the " + std::to_string(target.slots()) + " slots of a cache without eviction", "export with --policy keydiff, or with a larger --budget");
    if (r.tokens.empty() && c.target.cache.position() == int(c.history().size())) c.truncate(int(c.history().size()));
    return Loop(c, target, c.draft ? &c.draft->entry() : nullptr, r, costs, listener).run();
}

}  // namespace edgespec
