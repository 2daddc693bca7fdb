#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace edgespec {

const Kernels* kernels() {
#if defined(__x86_64__)
    static const Kernels* found = [] {
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
        if (wide) return &AVX512;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &AVX2 : nullptr;
    }();
    return found;
#else
    return nullptr;
#endif
}

size_t int8_size(const Kernels& kernels, int64_t k, int64_t n) { return size_t(up(n, kernels.tile()) * up(k, kernels.group)); }

void pack_int8(const Kernels& kernels, const uint8_t* codes, int64_t k, int64_t n, uint8_t* made) {
    const int64_t tile = kernels.tile(), group = kernels.group, depth = up(k, group);
    for (int64_t column = 0; column < n; column += tile) {
        uint8_t* out = made + column * depth;
        const int64_t columns = std::min(tile, n - column);
        for (int64_t i = 0; i < k; ++i) {
            uint8_t* at = out + i / group * group * tile + i % group;
            const uint8_t* from = codes + i * n + column;
            for (int64_t c = 0; c < columns; ++c) at[c * group] = from[c] ^ 128;
        }
    }
}

void unpack_int8(const Kernels& kernels, const Weight& w, int64_t output, float* made) {
    const int64_t tile = kernels.tile(), group = kernels.group;
    const uint8_t* at = w.packed + output / tile * tile * up(w.k, group) + output % tile * group;
    for (int64_t i = 0; i < w.k; ++i) made[i] = float(int8_t(at[i / group * group * tile + i % group])) * w.scale[output];
}

size_t int4_size(const Kernels& kernels, int64_t n, int64_t blocks) { return size_t(up(n, kernels.tile()) * blocks) * (BLOCK / 2 + sizeof(float)); }

void pack_int4(const Kernels& kernels, const uint8_t* codes, const float* scale, int64_t n, int64_t blocks, uint8_t* made) {
    const int64_t lanes = kernels.lanes, vector = lanes * (BLOCK / 2 + int64_t(sizeof(float)));
    for (int64_t output = 0; output < n; ++output) {
        const int64_t tile = output / kernels.tile(), half = output % kernels.tile() / lanes, lane = output % lanes;
        for (int64_t b = 0; b < blocks; ++b) {
            uint8_t* out = made + ((tile * blocks + b) * 2 + half) * vector;
            const uint8_t* from = codes + (output * blocks + b) * (BLOCK / 2);
            const auto code = [&](int64_t i) { return uint8_t(i % 2 ? from[i / 2] >> 4 : from[i / 2] & 15); };
            for (int64_t i = 0; i < BLOCK / 2; ++i) out[i / 4 * 4 * lanes + lane * 4 + i % 4] = uint8_t(code(i) | code(i + BLOCK / 2) << 4);
            std::memcpy(out + BLOCK / 2 * lanes + lane * int64_t(sizeof(float)), scale + output * blocks + b, sizeof(float));
        }
    }
}

float* scratch(size_t floats) {
    thread_local std::vector<float> room;
    if (room.size() < floats) room.resize(floats);
    return room.data();
}

size_t int4_bytes(const Weight& w) { return size_t(up(w.blocks * int64_t(sizeof(Int4Block)), 64)); }

void with_sums(const Weight& w, const float* x, float* out) {
    const int64_t blocks = blocks_of(w.k), extra = sum_blocks(w.k) * BLOCK;
    std::memset(out + w.k, 0, size_t(w.blocks * BLOCK - w.k) * sizeof(float));
    std::memcpy(out, x, size_t(w.k) * sizeof(float));
    float* sums = out + blocks * BLOCK;
    for (int64_t b = 0; b < blocks; ++b) {
        float parts[8] = {};
        for (int64_t i = 0; i < BLOCK; ++i) parts[i % 8] += out[b * BLOCK + i];
        sums[b] = sums[b + extra] = ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
    }
}

}  // namespace edgespec
