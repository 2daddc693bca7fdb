// Where the arrays that an ONNX file keeps outside itself lie. Reads the protobuf wire format and nothing else of ONNX.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgespec {

struct External {
    std::string name, file;
    int type = 0;  // ONNX's number of the element type
    std::vector<int64_t> shape;
    int64_t offset = 0, bytes = 0;
};

// The external initializers of a serialized ModelProto; an Error where the bytes are none. Nothing outside
// [data, data + size) is read.
std::vector<External> external_arrays(const uint8_t* data, size_t size);

}  // namespace edgespec
