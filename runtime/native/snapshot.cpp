#include "snapshot.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "error.h"

namespace edgespec {
namespace {

constexpr char MAGIC[8] = {'e', 'd', 'g', 'e', 's', 'n', 'a', 'p'};
constexpr uint32_t VERSION = 5;
const char* const HINT = "use a snapshot that this bundle's session wrote";

// magic, version, bundle, tokens, rows of pictures, and of the target's and the draft's those that are gone; then for target and draft: count, position, bytes; then all tokens, the
// other rows' features, all bytes; a checksum.
struct Header {
    char magic[8];
    uint32_t version, tokens;
    uint64_t bundle, rows, gone, gone_draft;
    struct Part { uint32_t count, position; uint64_t bytes; } target, draft;
};

struct File {
    std::FILE* at;
    uint64_t sum = fnv1a(nullptr, 0);

    File(const std::string& path, const char* mode) : at(std::fopen(path.c_str(), mode)) {}
    ~File() { if (at) std::fclose(at); }
    bool write(const void* data, size_t bytes) {
        if (!bytes) return true;  // an empty vector has no data
        sum = fnv1a(data, bytes, sum);
        return std::fwrite(data, 1, bytes, at) == bytes;
    }
    bool read(void* data, size_t bytes) {
        if (!bytes) return true;
        const bool whole = std::fread(data, 1, bytes, at) == bytes;
        if (whole) sum = fnv1a(data, bytes, sum);
        return whole;
    }
};

Header::Part part(const State& state, std::vector<char>& bytes) {
    state.cache.save(bytes);
    return {uint32_t(state.cache.count()), uint32_t(state.cache.position()), bytes.size()};
}

void check(const Header::Part& p, const State& state, uint32_t tokens, const std::string& path) {
    const ModelEntry& m = state.entry();
    const bool filled = p.count == p.position || (m.policy != "none" && p.position > p.count && p.count >= uint32_t(m.budget));
    if (p.position > tokens || p.count > uint32_t(m.slots()) || !filled || p.bytes != uint64_t(state.cache.saved_bytes(int(p.count))))
        throw Error(path + " is damaged: its sizes make no sense", HINT);
}

}  // namespace

int64_t save(const Conversation& c, uint64_t bundle, const std::string& path) {
    std::vector<char> target, draft;
    Header h{};
    std::memcpy(h.magic, MAGIC, sizeof MAGIC);
    h.version = VERSION, h.tokens = uint32_t(c.history().size()), h.bundle = bundle, h.rows = c.pictured, h.gone = c.heard.gone, h.gone_draft = c.drafted.gone;
    h.target = part(c.target, target);
    if (c.draft) h.draft = part(*c.draft, draft);
    const std::vector<float>&heard = c.heard.features, &drafted = c.drafted.features;
    const std::string temporary = path + "." + std::to_string(::getpid());
    bool written = false;
    {
        File file(temporary, "wb");
        if (!file.at) throw Error(path + " cannot be written: " + std::strerror(errno), "choose another path");
        written = file.write(&h, sizeof h) && file.write(c.history().data(), c.history().size() * sizeof(int)) &&
                  file.write(heard.data(), heard.size() * sizeof(float)) && file.write(drafted.data(), drafted.size() * sizeof(float)) && file.write(target.data(), target.size()) && file.write(draft.data(), draft.size());
        const uint64_t sum = file.sum;
        written = written && file.write(&sum, sizeof sum) && std::fflush(file.at) == 0 && ::fsync(::fileno(file.at)) == 0;
    }
    if (!written || std::rename(temporary.c_str(), path.c_str()) != 0) {
        const std::string why = std::strerror(errno);
        std::remove(temporary.c_str());
        throw Error(path + " cannot be written: " + why, "free some space, or choose another path");
    }
    return int64_t(sizeof h + c.history().size() * sizeof(int) + (heard.size() + drafted.size()) * sizeof(float) + target.size() + draft.size() + sizeof(uint64_t));
}

void restore(Conversation& c, uint64_t bundle, const std::string& path) {
    struct stat found {};
    const bool regular = ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);  // a pipe would wait to be opened
    File file(regular ? path : "", "rb");
    if (!file.at) throw Error(path + " cannot be read", HINT);
    Header h{};
    if (!file.read(&h, sizeof h) || std::memcmp(h.magic, MAGIC, sizeof MAGIC) != 0) throw Error(path + " is no snapshot", HINT);
    if (h.version != VERSION) throw Error(path + " is of version " + std::to_string(h.version), h.version > VERSION ? "update edgespec" : HINT);
    if (h.bundle != bundle) throw Error(path + " is of another bundle", HINT);
    // Before any of it is believed: a text is bounded, or by what the file holds.
    const int64_t most = c.target.entry().compact ? int64_t(found.st_size) / int64_t(sizeof(int)) : c.target.entry().positions + 1;
    const uint64_t bytes_row = uint64_t(c.target.entry().hidden) * sizeof(float);
    if (int64_t(h.tokens) > most || h.rows > h.tokens || h.gone > h.rows || h.rows - h.gone > uint64_t(found.st_size) / bytes_row) throw Error(path + " is damaged: its sizes make no sense", HINT);
    check(h.target, c.target, h.tokens, path);
    if (c.draft) check(h.draft, *c.draft, h.tokens, path);
    else if (h.draft.bytes) throw Error(path + " is of a bundle with a draft", HINT);
    std::vector<int> history(h.tokens);
    const uint64_t fewer = c.fewer(size_t(h.rows));
    if (h.gone_draft > fewer) throw Error(path + " is damaged: its sizes make no sense", HINT);
    std::vector<float> features(size_t((h.rows - h.gone) * bytes_row / sizeof(float))), drafted(fewer ? size_t(fewer - h.gone_draft) * size_t(c.draft->entry().hidden) : 0);
    std::vector<char> target(h.target.bytes), draft(h.draft.bytes);
    uint64_t sum = 0;
    bool whole = file.read(history.data(), history.size() * sizeof(int)) && file.read(features.data(), features.size() * sizeof(float)) &&
                 file.read(drafted.data(), drafted.size() * sizeof(float)) && file.read(target.data(), target.size()) &&
                 file.read(draft.data(), draft.size());
    const uint64_t expected = file.sum;
    whole = whole && file.read(&sum, sizeof sum) && sum == expected && std::fgetc(file.at) == EOF;
    if (!whole) throw Error(path + " is damaged: its checksum does not fit", HINT);
    uint64_t rows = 0, words = 0, absorbed = 0;  // rows of pictures follow one another
    for (const int token : history) {
        if (rows + words == h.target.position) absorbed = rows;
        const bool row = c.vision && token == -1 - int64_t(rows);
        if (!row && c.vision && rows % uint64_t(c.vision->rows)) throw Error(path + " is damaged: a picture in it is cut short", HINT);
        if (!row && (token < 0 || token >= c.target.entry().vocab)) throw Error(path + " holds a token outside the vocabulary", HINT);
        rows += row, words += !row;
    }
    if (rows != h.rows || (h.target.position < h.tokens && absorbed < h.gone) || (c.vision && rows % uint64_t(c.vision->rows)) || (c.draft && h.draft.position > words + fewer))
        throw Error(path + " is damaged: its sizes make no sense", HINT);
    c.truncate(0);
    c.heard.features = std::move(features), c.drafted.features = std::move(drafted);
    c.heard.gone = size_t(h.gone), c.drafted.gone = size_t(h.gone_draft);
    for (const int token : history) token < 0 ? c.see() : c.push(token);
    c.target.cache.load(target, int(h.target.count), int(h.target.position));
    if (!c.draft) return;
    c.draft->cache.load(draft, int(h.draft.count), int(h.draft.position));
    c.draft->context.forget(0);  // it follows from the tokens
}

}  // namespace edgespec
