// Products with coded weights, and attention, on processors whose instructions we use ourselves: the arithmetic of the operators
// Int8Linear and Int4Linear (exporters/forms.py) and Attend (exporters/lower_attention.py), a row of a call apart from all others,
// so that it has the same bits in a call of any width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgespec {

constexpr int64_t BLOCK = 32;  // inputs of an int4 block

// y = W x of n outputs and k inputs. `packed`: the codes (and int4's scales) as the kernels stream them. Of int8, `scale` is an
// output's, `sums` its own sum of weights; of int4, `blocks` hold the k inputs, then twice the factors of their sums.
struct Weight {
    int64_t n = 0, k = 0, blocks = 0;
    const uint8_t* packed = nullptr;
    const float *scale = nullptr, *sums = nullptr;
};

// Rows of x, each made ready by Product::row.
struct Rows {
    const uint8_t* data;
    size_t bytes;  // of one
    int64_t count;
};

// A row for int8 weights, x ~ scale u + low, u of 8 bits: the codes stand behind this head.
struct Int8Row {
    float scale, low;
    uint8_t unused[56];
};

// A block of a row for int4 weights, x ~ scale q, q of 8 bits; start is minus 8 times the sum of q, for a weight's code 8 is its 0.
struct Int4Block {
    int8_t q[BLOCK];
    int32_t start;
    float scale;
};

struct Product {
    size_t (*row_bytes)(const Weight&);
    void (*row)(const Weight&, const float* x, uint8_t* made);                         // quantises a row; made is 64-byte aligned
    void (*tiles)(const Weight&, const Rows&, int64_t first, int64_t last, float* y);  // y [count][n], outputs of tiles [first, last)
};

// What the rows of a call attend to: caches [kv_heads][slots][head_dim], which hold the rows themselves from `count` on. Row s sees
// the slots up to count + s, of these the last `window` if that is above 0. Queries and out lie [rows][heads][head_dim].
struct Attention {
    int64_t rows, heads, kv_heads, head_dim, slots, count, window;
    float scale, softcap;
    const float *queries, *keys, *values;
    float* out;
};

struct Kernels {
    Product int8, int4;
    void (*attend)(const Attention&, int64_t unit);  // a unit: so many queries of one key-value head as a vector has lanes
    int64_t lanes;  // outputs in a vector; a tile, which one worker computes at a time, is two of these
    int64_t group;  // an output's inputs that lie together in packed int8 codes
    int64_t tile() const { return 2 * lanes; }
    int64_t units(const Attention& a) const { return a.kv_heads * ((a.rows * (a.heads / a.kv_heads) + lanes - 1) / lanes); }
};

// What this processor can do; nullptr: leave it to ONNX Runtime.
const Kernels* kernels();
extern const Kernels AVX2, AVX512;  // of x86-64

// The stored codes [k][n] of int8, 128 for 0: a tile of outputs after the other, in it groups of inputs, in these the outputs'
// codes around 0. What lacks is 0, as made is when it is given, of so many bytes.
size_t int8_size(const Kernels&, int64_t k, int64_t n);
void pack_int8(const Kernels&, const uint8_t* codes, int64_t k, int64_t n, uint8_t* made);

// One output's weights [k], of packed int8 codes.
void unpack_int8(const Kernels&, const Weight&, int64_t output, float* made);

// The stored codes [n][blocks][16] and scales [n][blocks] of int4: a tile of outputs after the other, in it blocks, in these a
// vector of outputs after the other: their codes, input groups g and g + 4 of four in a byte's halves, then their scales.
size_t int4_size(const Kernels&, int64_t n, int64_t blocks);
void pack_int4(const Kernels&, const uint8_t* codes, const float* scale, int64_t n, int64_t blocks, uint8_t* made);

static inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
// Blocks of int4 codes: of k inputs, and of the factors of their sums.
static inline int64_t blocks_of(int64_t k) { return up(k, BLOCK) / BLOCK; }
static inline int64_t sum_blocks(int64_t k) { return up(blocks_of(k), BLOCK) / BLOCK; }

// The thread's own room, which grows to the largest wish. What is compiled for one instruction set must neither make templates of
// the standard library nor share inline functions: the linker might give its copies to all.
float* scratch(size_t floats);

size_t int4_bytes(const Weight&);  // of a made row

// An int4 row's inputs, x and twice the sums of its blocks, each up to whole blocks: [blocks][BLOCK].
void with_sums(const Weight&, const float* x, float* out);

}  // namespace edgespec
