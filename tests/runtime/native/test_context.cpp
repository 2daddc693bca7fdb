// Context rows: their tokens are the text's last ones that the head lacks, in slots that depend on the text alone; a row
// enters once; and a law over both kinds of rows is the softmax over the union.
#include "context.h"

#include <algorithm>
#include <set>

#include "fake.h"
#include "model.h"
#include "sampling.h"

using namespace edgespec;

static std::vector<int> text(int n, uint64_t seed) {
    std::vector<int> out;
    for (int i = 0; i < n; ++i) out.push_back(int(mix(seed, uint64_t(i)) % 12));
    return out;
}

// By definition: the last R different tokens that the head lacks.
static std::set<int> latest(const ModelEntry& m, const std::vector<int>& text) {
    std::set<int> out;
    for (size_t i = text.size(); i-- > 0 && int(out.size()) < m.context_rows;)
        if (!std::count(m.head_ids.begin(), m.head_ids.end(), text[i])) out.insert(text[i]);
    return out;
}

static void slots() {
    for (const int rows : {1, 2, 3, 7}) {
        const ModelEntry m = fake_model("draft", "append", "keydiff", 8, 4, {}, rows);
        FakeBackend backend(m);
        Model model(m, backend);
        for (uint64_t seed = 0; seed < 200; ++seed) {
            Random random(seed);
            State state(model), fresh(model);
            std::vector<int> whole = text(60, seed), now;
            for (int step = 0; step < 12; ++step) {
                if (random.uniform() < 0.3 && !now.empty()) {  // the text is cut and goes on otherwise
                    now.resize(size_t(random.uniform() * double(now.size())));
                    state.context.forget(int(now.size()));
                }
                for (int i = int(random.uniform() * 9); i > 0; --i) now.push_back(whole[size_t(random.uniform() * 60)]);
                state.follow(now);
                const std::vector<int>& tokens = state.context.tokens();
                CHECK(std::set<int>(tokens.begin(), tokens.end()) == latest(m, now) && tokens.size() == latest(m, now).size());
                for (int i = 0; i < rows; ++i) {
                    const int token = i < int(tokens.size()) ? tokens[size_t(i)] : -1;
                    CHECK(state.context.ids()[i] == token && (token < 0 || state.context.columns()[i] == float(token)));
                }
            }
            for (size_t i = 0; i < now.size(); i += 5) fresh.follow({now.begin(), now.begin() + long(std::min(now.size(), i + 5))});
            CHECK(fresh.context.tokens() == state.context.tokens());
        }
    }
}

// A call looks up what changed and nothing else.
static void lookups() {
    const ModelEntry m = fake_model("draft", "append", "keydiff", 8, 4, {}, 3);
    FakeBackend backend(m);
    Model model(m, backend);
    State state(model);
    std::vector<CallRecord> calls;
    state.trace = &calls;
    std::vector<int> now;
    const auto rows_looked_up = [&](std::vector<int> more) {
        now.insert(now.end(), more.begin(), more.end());
        calls.clear();
        state.follow(now);
        int rows = 0;
        for (const CallRecord& c : calls) {
            CHECK(std::string(c.kind) == "context" && c.width == 2);
            rows += c.rows;
        }
        return rows;
    };
    CHECK(rows_looked_up({1, 3, 4}) == 3 && calls.size() == 2);
    CHECK(rows_looked_up({0, 2, 3, 1}) == 0);
    CHECK(rows_looked_up({7}) == 1 && (state.context.tokens() == std::vector<int>{1, 3, 7}));  // 4 was met least lately
    CHECK(rows_looked_up({8, 7, 10}) == 2 && (state.context.tokens() == std::vector<int>{10, 8, 7}));
    CHECK(state.context.bytes() == (3 + 3 + 12) * 4);
    const ModelEntry none = fake_model("draft", "append", "keydiff", 8, 4);
    CHECK(Context(none).bytes() == 0);
}

static void law_over_both() {
    const std::vector<int> head{0, 2, 5}, context{9, 1, 7};
    const float logits[] = {1, 2, 3, 1.5f, 0.5f, 2.5f, 99};  // the seventh belongs to a slot that is not filled
    Sampling s;
    s.temperature = 0.7;
    Law law;
    law_of(logits, 6, head, s, {}, law, context);
    CHECK((law.ids == std::vector<int>{0, 1, 2, 5, 7, 9}));
    const double by_id[] = {1, 0.5, 2, 3, 2.5, 1.5};
    double total = 0;
    for (const double x : by_id) total += std::exp(x / 0.7);
    for (size_t i = 0; i < 6; ++i) CHECK(std::abs(law.p[i] - std::exp(by_id[i] / 0.7) / total) < 1e-12);
    CHECK(law.of(7) == law.p[4] && law.of(3) == 0);
    s.top_k = 2;
    law_of(logits, 6, head, s, {}, law, context);
    CHECK((law.ids == std::vector<int>{5, 7}));
    s.top_k = 0, s.repetition_penalty = 2;
    law_of(logits, 6, head, s, {7, 5, 3}, law, context);  // 3 has no row
    CHECK(std::abs(std::log(law.of(7) / law.of(9)) - (1.25 - 1.5) / 0.7) < 1e-12);
    CHECK(std::abs(std::log(law.of(5) / law.of(9)) - (1.5 - 1.5) / 0.7) < 1e-12);
}

int main() { slots(), lookups(), law_over_both(); }
