#include "onnx_table.h"

#include <charconv>

#include "error.h"

namespace edgespec {
namespace {

// Field numbers of onnx.proto.
enum : uint32_t {
    MODEL_GRAPH = 7, GRAPH_INITIALIZER = 5, TENSOR_DIMS = 1, TENSOR_TYPE = 2, TENSOR_NAME = 8, TENSOR_EXTERNAL = 13,
    TENSOR_LOCATION = 14, ENTRY_KEY = 1, ENTRY_VALUE = 2
};
enum : uint32_t { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

struct Span {
    const uint8_t *at, *end;
};

[[noreturn]] void damaged() { throw Error("a graph file is damaged", "export the bundle again, or copy it again"); }

uint64_t varint(Span& s) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (s.at == s.end) damaged();
        const uint8_t byte = *s.at++;
        value |= uint64_t(byte & 127) << shift;
        if (byte < 128) return value;
    }
    damaged();
}

struct Field {
    uint32_t number, wire;
    uint64_t value;  // of a varint
    Span bytes;
};

bool next(Span& s, Field& f) {
    if (s.at == s.end) return false;
    const uint64_t tag = varint(s);
    f = {uint32_t(tag >> 3), uint32_t(tag & 7), 0, {s.at, s.at}};
    uint64_t length = 0;
    if (f.wire == VARINT) f.value = varint(s);
    else if (f.wire == FIXED64) length = 8;
    else if (f.wire == FIXED32) length = 4;
    else if (f.wire == BYTES) length = varint(s);
    else damaged();
    if (length > uint64_t(s.end - s.at)) damaged();
    f.bytes = {s.at, s.at + length};
    s.at += length;
    return true;
}

std::string text(Span s) { return {reinterpret_cast<const char*>(s.at), size_t(s.end - s.at)}; }

int64_t decimal(const std::string& digits) {
    int64_t value = -1;
    const auto end = digits.data() + digits.size();
    const auto [stop, fault] = std::from_chars(digits.data(), end, value);
    if (fault != std::errc() || stop != end || value < 0) damaged();
    return value;
}

bool external(Span s, External& out) {
    bool outside = false;
    for (Field f; next(s, f);) {
        if (f.number == TENSOR_DIMS && f.wire == VARINT) out.shape.push_back(int64_t(f.value));
        if (f.number == TENSOR_DIMS && f.wire == BYTES)
            for (Span dims = f.bytes; dims.at != dims.end;) out.shape.push_back(int64_t(varint(dims)));
        if (f.number == TENSOR_TYPE) out.type = int(f.value);
        if (f.number == TENSOR_NAME) out.name = text(f.bytes);
        if (f.number == TENSOR_LOCATION) outside = f.value == 1;
        if (f.number != TENSOR_EXTERNAL || f.wire != BYTES) continue;
        std::string key, value;
        Span entry = f.bytes;
        for (Field part; next(entry, part);) (part.number == ENTRY_KEY ? key : value) = text(part.bytes);
        if (key == "location") out.file = value;
        if (key == "offset") out.offset = decimal(value);
        if (key == "length") out.bytes = decimal(value);
    }
    return outside;
}

}  // namespace

std::vector<External> external_arrays(const uint8_t* data, size_t size) {
    std::vector<External> out;
    Span model{data, data + size};
    for (Field f; next(model, f);) {
        if (f.number != MODEL_GRAPH || f.wire != BYTES) continue;
        Span graph = f.bytes;
        for (Field g; next(graph, g);) {
            External found;
            if (g.number == GRAPH_INITIALIZER && g.wire == BYTES && external(g.bytes, found)) out.push_back(std::move(found));
        }
    }
    return out;
}

}  // namespace edgespec
