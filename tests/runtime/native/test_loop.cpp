// The loop over a scripted model: text never depends on how it is drafted, chunked, continued, cut or restored, and
// sampled text has the plain loop's law.
#include "loop.h"

#include <unistd.h>

#include <fstream>

#include "fake.h"
#include "snapshot.h"
#include "widths.h"

using namespace edgespec;

struct Quiet : Listener {
    std::vector<Round> rounds;
    int cancel_after = -1, most_rows = 0;
    void prompt(int, double, const std::vector<CallRecord>& calls) override { see(calls); }
    void round(const Round& r, const std::vector<CallRecord>& calls) override { rounds.push_back(r), see(calls); }
    bool cancelled() override { return cancel_after >= 0 && int(rounds.size()) > cancel_after; }
    void see(const std::vector<CallRecord>& calls) {
        for (const CallRecord& c : calls) CHECK(c.rows >= 1 && (std::string(c.kind) == "commit" || std::string(c.kind) == "observe" || c.rows <= c.width));
    }
};

struct World {
    ModelEntry target_entry, draft_entry;
    FakeBackend target_backend{target_entry}, draft_backend{draft_entry};
    std::unique_ptr<Model> target, draft;
    Manifest bundle;
    Costs costs;

    World(const std::string& contract, const std::string& policy, int budget, int block, std::vector<int> buckets = {}, int context = 0)
        : target_entry(fake_model("target", contract, policy, budget, block, buckets)), draft_entry(fake_model("draft", contract, policy == "none" ? "keydiff" : policy, 8, 4, {}, context)) {
        target = std::make_unique<Model>(target_entry, target_backend);
        draft = std::make_unique<Model>(draft_entry, draft_backend);
        bundle.device = "cpu";
        bundle.models = {target_entry, draft_entry};
        costs = default_costs(bundle);
    }
    std::unique_ptr<Conversation> open() { return std::make_unique<Conversation>(*target, draft.get()); }
};

static std::vector<int> text(int n, uint64_t seed) {
    std::vector<int> out;
    for (int i = 0; i < n; ++i) out.push_back(int(mix(seed, uint64_t(i)) % 12));
    return out;
}

static Request request(std::vector<int> tokens, Drafter drafter, Rule rule, int cap = 0) {
    Request r;
    r.tokens = std::move(tokens), r.drafter = drafter, r.rule = rule, r.draft_tokens = cap, r.max_new_tokens = 60;
    return r;
}

static Summary run(World& w, Conversation& c, const Request& r) {
    Quiet quiet;
    const Summary s = generate(c, r, w.costs, quiet);
    int emitted = 0, accepted = 0;
    for (const Round& round : quiet.rounds) emitted += int(round.tokens.size()), accepted += round.accepted;
    CHECK(emitted == s.tokens_new && accepted == s.accepted);
    CHECK(c.target.cache.position() == int(c.history().size()) - 1);
    return s;
}

static const std::vector<Drafter> DRAFTERS{Drafter::none, Drafter::draft, Drafter::ngram, Drafter::both};
static const std::vector<Rule> RULES{Rule::cost, Rule::adaedl, Rule::confidence, Rule::fixed};

static const std::vector<std::pair<const char*, const char*>> WAYS{{"append", "keydiff"}, {"rows", "keydiff"}, {"append", "snapkv"}, {"append", "h2o"}, {"rows", "h2o"}};

static void lossless() {
    int accepted = 0, evicted = 0;
    for (const char* contract : {"append", "rows"})
        for (const char* policy : {"keydiff", "snapkv", "h2o", "none"})
            for (const auto& [budget, block] : std::vector<std::pair<int, int>>{{16, 8}, {9, 3}, {160, 16}})
                for (const int length : {1, 7, 40, 90}) {
                    if (std::string(policy) == "none" && length + 60 > budget + block) continue;
                    World w(contract, policy, budget, block, budget == 160 ? std::vector<int>{16, 48, 160} : std::vector<int>{}, length % 3 * 2);
                    auto plain = w.open();
                    run(w, *plain, request(text(length, 1), Drafter::none, Rule::fixed));
                    for (const Drafter drafter : DRAFTERS)
                        for (const Rule rule : RULES)
                            for (const int cap : {0, 1, 3}) {
                                auto c = w.open();
                                const Summary s = run(w, *c, request(text(length, 1), drafter, rule, cap));
                                CHECK(c->history() == plain->history());
                                CHECK(drafter != Drafter::none || s.drafted == 0);
                                accepted += s.accepted, evicted += c->target.cache.evicted();
                            }
                }
    CHECK(accepted > 1000 && evicted > 100);
}

// Greedy with a repetition penalty, too: drafted tokens count as seen in their own order.
static void penalised() {
    World w("append", "keydiff", 16, 8);
    Request r = request(text(20, 2), Drafter::none, Rule::fixed);
    r.sampling.repetition_penalty = 1.5;
    auto plain = w.open(), other = w.open(), bare = w.open();
    run(w, *plain, r);
    run(w, *bare, request(text(20, 2), Drafter::none, Rule::fixed));
    CHECK(bare->history() != plain->history());
    for (const Drafter drafter : DRAFTERS) {
        r.drafter = drafter;
        auto c = w.open();
        run(w, *c, r);
        CHECK(c->history() == plain->history());
    }
}

// The law of three sampled tokens is the plain loop's, whoever drafts.
static void exact_sampling(int context) {
    World w("append", "keydiff", 16, 8, {}, context);
    const std::vector<int> prompt = text(10, 3);
    std::map<std::vector<int>, double> law;
    Sampling s;
    s.temperature = 0.9, s.top_k = 4, s.top_p = 0.95, s.repetition_penalty = 1.2;
    // All texts of three tokens with their probabilities, by walking the tree with forced prompts.
    const auto next = [&](std::vector<int> tokens) {
        std::vector<int> seen;
        for (const int t : tokens)
            if (std::find(seen.begin(), seen.end(), t) == seen.end()) seen.push_back(t);
        Law out;
        const auto fresh = w.open();
        const float* row = nullptr;
        for (size_t i = 0; i < tokens.size(); ++i) {
            row = fresh->target.call("decode", 1, &tokens[i], 1).logits;
            fresh->target.accept(1);
            fresh->target.commit_if_full();
        }
        law_of(row, 12, {}, s, seen, out);
        return out;
    };
    const auto walk = [&](auto&& self, std::vector<int> tokens, double p) -> void {
        if (tokens.size() == prompt.size() + 3) {
            law[std::vector<int>(tokens.end() - 3, tokens.end())] += p;
            return;
        }
        const Law l = next(tokens);
        for (size_t i = 0; i < l.ids.size(); ++i) {
            std::vector<int> longer = tokens;
            longer.push_back(l.ids[i]);
            self(self, longer, p * l.p[i]);
        }
    };
    walk(walk, prompt, 1);
    std::vector<double> expected;
    std::map<std::vector<int>, size_t> place;
    for (const auto& [tokens, p] : law) place[tokens] = expected.size(), expected.push_back(p);
    for (const Drafter drafter : DRAFTERS)
        for (const Rule rule : {Rule::fixed, Rule::confidence, Rule::adaedl}) {
            std::vector<int> counts(expected.size());
            int drafted = 0;
            for (int seed = 0; seed < 6000; ++seed) {
                auto c = w.open();
                Request r = request(prompt, drafter, rule);
                r.sampling = s, r.sampling.seed = uint64_t(seed), r.max_new_tokens = 5;
                drafted += run(w, *c, r).drafted;
                const std::vector<int> got(c->history().begin() + long(prompt.size()), c->history().begin() + long(prompt.size()) + 3);
                CHECK(place.count(got));
                ++counts[place[got]];
            }
            CHECK(drawn_from(expected, counts));
            CHECK(drafter == Drafter::none || drafter == Drafter::ngram || drafted > 6000);
        }
}

// With context rows too: how a text came to be (chunks, turns, cuts, a snapshot) leaves no trace in what is proposed.
static void same_proposals() {
    const std::string path = "/tmp/edgespec-test-" + std::to_string(getpid()) + ".context";
    World w("append", "keydiff", 16, 8, {}, 3);
    const auto told = [&](Conversation& c) {
        Quiet quiet;
        Request r = request({}, Drafter::draft, Rule::fixed);
        r.sampling.temperature = 1, r.sampling.seed = 9;
        generate(c, r, w.costs, quiet);
        std::vector<std::vector<int>> out;
        for (const Round& round : quiet.rounds) {
            out.push_back(round.tokens);
            out.back().push_back(-round.accepted);
        }
        return out;
    };
    Request absorb = request(text(40, 9), Drafter::none, Rule::fixed);
    absorb.max_new_tokens = 0;
    auto whole = w.open();
    Quiet first;
    generate(*whole, absorb, w.costs, first);
    const auto wanted = told(*whole);
    CHECK(wanted.size() > 10);
    auto pieces = w.open();
    for (int i = 0; i < 40; i += 8) {
        Quiet quiet;
        generate(*pieces, request({absorb.tokens.begin() + i, absorb.tokens.begin() + i + 8}, Drafter::both, Rule::fixed), w.costs, quiet);
        pieces->truncate(i + 8);
    }
    CHECK(save(*pieces, 1, path) > 0);
    auto restored = w.open();
    Quiet quiet;
    generate(*restored, request(text(50, 8), Drafter::draft, Rule::fixed), w.costs, quiet);  // another text's rows
    restore(*restored, 1, path);
    unlink(path.c_str());
    CHECK(told(*pieces) == wanted && told(*restored) == wanted);
}

static void a_seed_repeats_its_text() {
    World w("rows", "keydiff", 16, 8, {}, 2);
    Request r = request(text(30, 4), Drafter::both, Rule::cost);
    r.sampling.temperature = 1;
    auto a = w.open(), b = w.open(), c = w.open();
    run(w, *a, r), run(w, *b, r);
    CHECK(a->history() == b->history());
    r.sampling.seed = 1;
    run(w, *c, r);
    CHECK(a->history() != c->history());
}

// Turns, truncation, cancelling and snapshots: the same as saying it all at once.
static void conversations() {
    const std::string path = "/tmp/edgespec-test-" + std::to_string(getpid()) + ".snap";
    for (const auto& [contract, policy] : WAYS) {
        World w(contract, policy, 16, 8, {8, 16}, 3);
        auto whole = w.open(), turns = w.open();
        const std::vector<int> first = text(25, 5), second = text(9, 6);
        run(w, *turns, request(first, Drafter::both, Rule::fixed));
        std::vector<int> all = turns->history();
        all.insert(all.end(), second.begin(), second.end());
        CHECK(save(*turns, 77, path) > 0);
        auto restored = w.open();
        restore(*restored, 77, path);
        run(w, *turns, request(second, Drafter::both, Rule::fixed));
        run(w, *restored, request(second, Drafter::ngram, Rule::fixed));
        run(w, *whole, request(all, Drafter::none, Rule::fixed));
        CHECK(turns->history() == whole->history() && restored->history() == whole->history());
        for (const int n : {int(turns->history().size()), int(turns->history().size()) - 1, int(all.size()), 26, 3, 1}) {
            auto cut = w.open();
            restore(*cut, 77, path);
            run(w, *cut, request(second, Drafter::both, Rule::fixed));
            cut->truncate(n);
            auto fresh = w.open();
            const std::vector<int> kept(whole->history().begin(), whole->history().begin() + n);
            run(w, *cut, request({}, Drafter::both, Rule::fixed));
            run(w, *fresh, request(kept, Drafter::none, Rule::fixed));
            CHECK(cut->history() == fresh->history());
        }
        CHECK(error_of([&] { restore(*whole, 78, path); }) == path + " is of another bundle");
        std::ifstream in(path, std::ios::binary);
        std::string good((std::istreambuf_iterator<char>(in)), {});
        Random random(3);
        const std::vector<int> before = whole->history();
        for (int i = 0; i < 2000; ++i) {
            std::string spoilt = good;
            if (i % 3 == 0) spoilt.resize(size_t(random.uniform() * double(good.size())));
            else spoilt[size_t(random.uniform() * double(good.size()))] ^= char(1 + int(random.uniform() * 255));
            std::ofstream(path, std::ios::binary) << spoilt;
            CHECK(error_of([&] { restore(*whole, 77, path); }) != "" && whole->history() == before);
        }
        unlink(path.c_str());
        CHECK(error_of([&] { restore(*whole, 77, path); }) != "");
        CHECK(error_of([&] { save(*whole, 77, "/nowhere/x"); }) != "");
    }
}

static void cancelling_and_faults() {
    World w("append", "keydiff", 16, 8);
    auto c = w.open(), plain = w.open();
    Quiet quiet;
    quiet.cancel_after = 3;
    const Summary s = generate(*c, request(text(30, 7), Drafter::both, Rule::fixed), w.costs, quiet);
    CHECK(std::string(s.reason) == "cancelled");
    run(w, *plain, request(text(30, 7), Drafter::none, Rule::fixed));
    const size_t had = c->history().size();
    Request more = request({}, Drafter::both, Rule::fixed);
    more.max_new_tokens = int(plain->history().size() - had);
    run(w, *c, more);
    CHECK(c->history() == plain->history());  // a cancelled conversation goes on as if nothing had been

    Quiet listener;
    const auto error = [&](Conversation& x, const Request& r) { return error_of([&] { generate(x, r, w.costs, listener); }); };
    auto d = w.open();
    CHECK(error(*d, request({}, Drafter::none, Rule::fixed)) == "the prompt is empty");
    CHECK(error(*d, request({12}, Drafter::none, Rule::fixed)) == "token 12 is outside the vocabulary of 12");
    CHECK(error(*d, request({-1}, Drafter::none, Rule::fixed)) != "");
    CHECK(error(*d, request(text(401, 1), Drafter::none, Rule::fixed)) == "401 tokens are more than the 400 positions that the model was trained on");
    CHECK(d->history().empty());
    for (Faults f : {Faults{40, -1, 0}, Faults{-1, 40, 0}, Faults{-1, -1, 100}}) {
        w.target_backend.faults = f;
        auto e = w.open();
        CHECK(error(*e, request(text(30, 7), Drafter::both, Rule::fixed)) != "");
        w.target_backend.faults = {};
        Request rest = request({}, Drafter::both, Rule::fixed);  // the conversation is not lost
        rest.max_new_tokens = int(plain->history().size() - e->history().size());
        run(w, *e, rest);
        CHECK(e->history() == plain->history());
    }
    w.draft_backend.faults.fail_at_position = 45;
    auto f = w.open();
    CHECK(error(*f, request(text(30, 7), Drafter::draft, Rule::fixed)) == "the fake fails here");
    w.draft_backend.faults = {};
    run(w, *f, [&] { Request r = request({}, Drafter::draft, Rule::fixed); r.max_new_tokens = int(plain->history().size() - f->history().size()); return r; }());
    CHECK(f->history() == plain->history());

    World none("append", "none", 16, 8);
    auto g = none.open();
    CHECK(error_of([&] { Quiet q; generate(*g, request(text(25, 1), Drafter::none, Rule::fixed), none.costs, q); }) == "25 tokens are more than the 24 slots of a cache without eviction");
    const Summary full = run(none, *g, request(text(10, 1), Drafter::both, Rule::fixed));
    CHECK(std::string(full.reason) == "positions" && g->history().size() == 25);
    auto h = w.open();
    Request last = request(text(395, 1), Drafter::both, Rule::fixed);
    CHECK(std::string(run(w, *h, last).reason) == "positions" && h->history().size() == 401);
}

// A masked row still takes part, times zero: one that is forgotten must not stay, it may be NaN.
static void forgotten_rows() {
    World w("rows", "keydiff", 16, 8);
    State state(*w.target);
    const int tokens[] = {1, 2, 3, 4};
    state.call("verify", 4, tokens, 4);
    state.accept(4);
    state.cache.roll_back(2);
    for (const bool values : {false, true}) {
        const float* rows = reinterpret_cast<const float*>(state.cache.buffer(values, 0));
        CHECK(rows[0] != 0 && rows[1] != 0 && rows[2] == 0 && rows[3] == 0);
    }
    state.cache.clear();
    for (const bool values : {false, true}) {
        const float* rows = reinterpret_cast<const float*>(state.cache.buffer(values, 0));
        CHECK(rows[0] == 0 && rows[1] == 0);
    }
}

static void stops() {
    World w("append", "keydiff", 16, 8);
    auto plain = w.open();
    run(w, *plain, request(text(5, 8), Drafter::none, Rule::fixed));
    Request r = request(text(5, 8), Drafter::none, Rule::fixed);
    for (const int stop : {plain->history()[10], plain->history()[20], plain->history()[33]})
        for (const Drafter drafter : DRAFTERS) {
            r.stop_ids = {stop}, r.drafter = drafter;
            auto c = w.open();
            const Summary s = run(w, *c, r);
            CHECK(std::string(s.reason) == "stop" && c->history().back() == stop);
            CHECK(std::count(c->history().begin() + 5, c->history().end(), stop) == 1);
            CHECK(std::equal(c->history().begin(), c->history().end(), plain->history().begin()));
        }
}

static void widths() {
    for (const auto& [contract, policy] : WAYS) {
        World w(contract, policy, 48, 16, {16, 48});
        CHECK(width_difference(*w.target) == "");
        World odd(contract, policy, 48, 16, {16, 48});
        odd.target_backend.faults.odd_width = 4;
        odd.target = std::make_unique<Model>(odd.target_entry, odd.target_backend);
        CHECK(width_difference(*odd.target) == "verify4-16 leaves decode1-16 in the logits of row 0");
    }
}

int main() { widths(), lossless(), penalised(), a_seed_repeats_its_text(), conversations(), cancelling_and_faults(), stops(), forgotten_rows(), same_proposals(), exact_sampling(0), exact_sampling(2); }
