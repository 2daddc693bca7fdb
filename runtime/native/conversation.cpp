#include <algorithm>

#include "error.h"
#include "loop.h"

namespace edgespec {

Conversation::Conversation(Model& t, Model* d, const VisionEntry* v) : vision(v), target(t) {
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

void Conversation::resize(size_t tokens) {
    const auto gone = heard.tokens.begin() + int64_t(tokens);
    const auto rows = size_t(std::count_if(gone, heard.tokens.end(), [](int token) { return token < 0; }));
    const size_t words = heard.tokens.size() - tokens - rows, fewer = rows ? rows / size_t(vision->rows) * size_t(vision->draft_rows) : 0;
    pictured -= rows;
    heard.tokens.resize(tokens);
    heard.features.resize(heard.features.size() - rows * size_t(target.entry().hidden));
    drafted.tokens.resize(drafted.tokens.size() - words - fewer);
    if (fewer) drafted.features.resize(drafted.features.size() - fewer * size_t(draft->entry().hidden));
}

}  // namespace edgespec
