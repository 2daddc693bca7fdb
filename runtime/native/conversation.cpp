#include <algorithm>

#include "error.h"
#include "loop.h"

namespace edgespec {

Conversation::Conversation(Model& t, Model* d, const VisionEntry* v, int64_t most) : vision(v), target(t), most_features_(most) {
    for (Text* text : {&heard, &drafted}) text->tokens.reserve(size_t(t.entry.positions) + 1);
    if (d) draft.emplace(*d);
}

int64_t Conversation::bytes() const {
    return target.bytes() + (draft ? draft->bytes() : 0) + int64_t((heard.features.size() + drafted.features.size()) * sizeof(float));
}

void Conversation::truncate(int tokens) {
    const std::vector<int>& all = heard.tokens;
    if (tokens < int(all.size()) && all[size_t(tokens)] < 0 && (-1 - all[size_t(tokens)]) % vision->rows)
        throw Error(std::to_string(tokens) + " tokens end inside a picture", "truncate before it, or behind");
    const size_t absorbed = rows_before(target.position_after(tokens));
    if (absorbed < heard.gone && absorbed < rows_before(tokens))
        throw Error("pictures among the first " + std::to_string(tokens) + " tokens would be absorbed again, and are kept no longer", "go back less far or to the start, or open the session with more picture_bytes");
    unsee();
    resize(size_t(tokens));
    target.cut(tokens);
    if (draft) draft->cut(int(drafted.tokens.size()));
}

void Conversation::unsee() {
    for (Text* text : {&heard, &drafted}) text->waiting.clear();
    looks.clear();
}

void Conversation::hear(const std::vector<int>& tokens) {
    for (Text* text : {&heard, &drafted}) {  // all memory first: half a text would be none
        text->tokens.reserve(text->tokens.size() + tokens.size());
        text->features.insert(text->features.end(), text->waiting.begin(), text->waiting.end());
        text->waiting.clear();
    }
    if (full(heard)) forget(heard, target.entry().hidden, vision->rows, rows_before(target.cache.position()));
    // The draft may be far behind; what it can absorb no more ends its proposals, and no text.
    if (full(drafted)) forget(drafted, draft->entry().hidden, vision->draft_rows, fewer(pictured));
    for (const int token : tokens) vision && token == vision->token ? see() : push(token);
}

void Conversation::push(int token) {
    for (Text* text : {&heard, &drafted}) text->tokens.push_back(token);
}

void Conversation::see() {
    const auto rows = size_t(vision->rows), fewer = size_t(vision->draft_rows);
    if (pictured % rows == 0)
        for (size_t i = 0; i < fewer; ++i) drafted.tokens.push_back(-1 - int(pictured / rows * fewer + i));
    heard.tokens.push_back(-1 - int(pictured++));
}

size_t Conversation::rows_before(int tokens) const {
    return vision ? size_t(std::count_if(heard.tokens.begin(), heard.tokens.begin() + tokens, [](int token) { return token < 0; })) : 0;
}

size_t Conversation::fewer(size_t rows) const { return vision ? rows / size_t(vision->rows) * size_t(vision->draft_rows) : 0; }

bool Conversation::full(const Text& text) const { return int64_t(text.features.size() * sizeof(float)) > most_features_; }

// At most half stays, so that a picture is moved once for many that come.
void Conversation::forget(Text& text, int hidden, int rows, size_t absorbed) const {
    const size_t all = text.gone + text.features.size() / size_t(hidden), kept = size_t(most_features_) / 2 / sizeof(float) / size_t(hidden);
    const size_t gone = std::min(absorbed, all - std::min(all, kept)) / size_t(rows) * size_t(rows);
    if (gone <= text.gone) return;
    text.features.erase(text.features.begin(), text.features.begin() + int64_t((gone - text.gone) * size_t(hidden)));
    text.gone = gone;
}

void Conversation::resize(size_t tokens) {
    const size_t rows = pictured - rows_before(int(tokens)), words = heard.tokens.size() - tokens - rows;
    const auto shorten = [](Text& text, size_t fewer, size_t left, int hidden) {
        text.tokens.resize(text.tokens.size() - fewer);
        text.gone = std::min(text.gone, left);
        text.features.resize((left - text.gone) * size_t(hidden));
    };
    pictured -= rows;
    shorten(heard, words + rows, pictured, target.entry().hidden);
    shorten(drafted, words + fewer(rows), fewer(pictured), draft ? draft->entry().hidden : 0);
}

}  // namespace edgespec
