// Kernels for x86-64 with AVX2 and FMA. Compiled with its flags and without contraction of products and sums.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels_attend.h"
#include "kernels_vectors.h"

namespace edgespec {
namespace {

constexpr int64_t LANES = 8, TILE = 2 * LANES, GROUP = 2;

// For loads and stores of the first few lanes.
__m256i first(int64_t count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::clamp<int64_t>(count, 0, LANES))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

float fold(__m256 v, __m128 (*with)(__m128, __m128)) {
    __m128 four = with(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = with(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(with(four, _mm_movehdup_ps(four)));
}
__m128 sum_of(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
__m128 most_of(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
__m128 least_of(__m128 a, __m128 b) { return _mm_min_ps(a, b); }

// NaN if any number is not finite, else 0: what a row's scale is added, for a maximum may drop a NaN.
float fault(const float* x, int64_t k) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < k; i += LANES) sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_maskload_ps(x + i, first(k - i)), _mm256_setzero_ps()));
    return fold(sum, sum_of);
}

// A code of 8 bits stands in 16.
size_t int8_bytes(const Weight& w) { return sizeof(Int8Row) + size_t(up(2 * w.k, 64)); }

void int8_row(const Weight& w, const float* x, uint8_t* made) {
    __m256 most = _mm256_set1_ps(x[0]), least = most;
    for (int64_t i = 0; i < w.k; i += LANES) {
        const __m256i some = first(w.k - i);
        const __m256 v = _mm256_blendv_ps(_mm256_set1_ps(x[0]), _mm256_maskload_ps(x + i, some), _mm256_castsi256_ps(some));
        most = _mm256_max_ps(most, v);
        least = _mm256_min_ps(least, v);
    }
    const float low = fold(least, least_of), scale = (fold(most, most_of) - low) * (1 / 255.f), nan = fault(x, w.k);
    const Int8Row head{scale + nan, low + nan, {}};
    std::memcpy(made, &head, sizeof head);
    const __m256 step = _mm256_set1_ps(scale > 0 ? scale : 1), base = _mm256_set1_ps(low);
    for (int64_t i = 0; i < up(2 * w.k, 64) / 2; i += LANES) {
        const __m256i some = first(w.k - i);
        const __m256 raised = _mm256_and_ps(_mm256_sub_ps(_mm256_maskload_ps(x + i, some), base), _mm256_castsi256_ps(some));
        const __m256i u = _mm256_max_epi32(_mm256_min_epi32(_mm256_cvtps_epi32(_mm256_div_ps(raised, step)), _mm256_set1_epi32(255)), _mm256_setzero_si256());
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
        _mm_store_si128(reinterpret_cast<__m128i*>(made + sizeof head + 2 * i), _mm256_castsi256_si128(words));
    }
}

// R rows of one tile.
template <int R>
void int8_tile(const Weight& w, const Rows& rows, int64_t row, int64_t output, float* y) {
    const int64_t depth = up(w.k, GROUP);
    const uint8_t* codes = w.packed + output * depth;
    const uint8_t* x = rows.data + size_t(row) * rows.bytes + sizeof(Int8Row);
    __m256i sum[R][2];
    for (auto& r : sum) r[0] = r[1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < depth; i += GROUP, codes += GROUP * TILE) {
        const __m256i v0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m256i v1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, x + size_t(r) * rows.bytes + 2 * i, sizeof two);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(_mm256_set1_epi32(two), v0));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(_mm256_set1_epi32(two), v1));
        }
    }
    for (int r = 0; r < R; ++r) {
        Int8Row head;
        std::memcpy(&head, x + size_t(r) * rows.bytes - sizeof head, sizeof head);
        for (int j = 0; j < 2; ++j) {
            const int64_t at = output + j * LANES;
            if (at >= w.n) continue;
            const __m256i some = first(w.n - at);
            const __m256 main = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][j]), _mm256_maskload_ps(w.scale + at, some));
            const __m256 low = _mm256_mul_ps(_mm256_set1_ps(head.low), _mm256_maskload_ps(w.sums + at, some));
            _mm256_maskstore_ps(y + (row + r) * w.n + at, some, _mm256_add_ps(_mm256_mul_ps(main, _mm256_set1_ps(head.scale)), low));
        }
    }
}

void int8_tiles(const Weight& w, const Rows& rows, int64_t begin, int64_t end, float* y) {
    static constexpr decltype(&int8_tile<1>) of[] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>};
    for (int64_t output = begin * TILE; output < std::min(w.n, end * TILE); output += TILE)
        for (int64_t row = 0, count; row < rows.count; row += count) {
            count = rows.count - row > 4 ? rows.count - row == 5 ? 3 : 4 : rows.count - row;
            of[count - 1](w, rows, row, output, y);
        }
}

void int4_row(const Weight& w, const float* given, uint8_t* made) {
    float* x = scratch(size_t(w.blocks * BLOCK));
    with_sums(w, given, x);
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int64_t b = 0; b < w.blocks; ++b) {
        const float* from = x + b * BLOCK;
        __m256 most = _mm256_setzero_ps();
        for (int64_t i = 0; i < BLOCK; i += LANES) most = _mm256_max_ps(most, _mm256_and_ps(_mm256_loadu_ps(from + i), absolute));
        const float largest = fold(most, most_of);
        const __m256 turn = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
        int32_t q[BLOCK];
        for (int64_t i = 0; i < BLOCK; i += LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), turn)));
        Int4Block block;
        block.start = 0;
        for (int64_t i = 0; i < BLOCK; ++i) {
            block.q[i] = int8_t(q[i]);
            block.start -= 8 * block.q[i];
        }
        block.scale = largest / 127 + fault(from, BLOCK);
        std::memcpy(made + b * int64_t(sizeof block), &block, sizeof block);
    }
}

// R rows of one tile. A block's products of one output, 16 pairs of at most 2 * 15 * 127, halved among two words, fit 16 bits.
template <int R>
void int4_tile(const Weight& w, const Rows& rows, int64_t row, int64_t output, float* y) {
    constexpr int64_t VECTOR = LANES * (BLOCK / 2 + int64_t(sizeof(float)));
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t* codes = w.packed + output / LANES * w.blocks * VECTOR;
    const auto* x = rows.data + size_t(row) * rows.bytes;
    __m256 sum[R][2];
    for (auto& r : sum) r[0] = r[1] = _mm256_setzero_ps();
    for (int64_t b = 0; b < w.blocks; ++b)
        for (int j = 0; j < 2; ++j, codes += VECTOR) {
            const auto block = [&](int r) { return reinterpret_cast<const Int4Block*>(x + size_t(r) * rows.bytes) + b; };
            __m256i dot[R];
            for (auto& d : dot) d = _mm256_setzero_si256();
#pragma GCC unroll 16
            for (int g = 0; g < 4; ++g) {
                const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * 32));
                const __m256i low = _mm256_and_si256(stored, nibble), high = _mm256_and_si256(_mm256_srli_epi16(stored, 4), nibble);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    int32_t near, far;
                    std::memcpy(&near, block(r)->q + 4 * g, sizeof near);
                    std::memcpy(&far, block(r)->q + 4 * g + BLOCK / 2, sizeof far);
                    dot[r] = _mm256_add_epi16(dot[r], _mm256_maddubs_epi16(low, _mm256_set1_epi32(near)));
                    dot[r] = _mm256_add_epi16(dot[r], _mm256_maddubs_epi16(high, _mm256_set1_epi32(far)));
                }
            }
            const __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(codes + 4 * 32));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const __m256i whole = _mm256_add_epi32(_mm256_madd_epi16(dot[r], ones), _mm256_set1_epi32(block(r)->start));
                sum[r][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scale, _mm256_set1_ps(block(r)->scale)), sum[r][j]);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) {
            const int64_t at = output + j * LANES;
            if (at < w.n) _mm256_maskstore_ps(y + (row + r) * w.n + at, first(w.n - at), sum[r][j]);
        }
}

void int4_tiles(const Weight& w, const Rows& rows, int64_t begin, int64_t end, float* y) {
    static constexpr decltype(&int4_tile<1>) of[] = {int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>};
    for (int64_t output = begin * TILE; output < std::min(w.n, end * TILE); output += TILE)
        for (int64_t row = 0, count; row < rows.count; row += count) {
            count = rows.count - row > 4 ? rows.count - row == 5 ? 3 : 4 : rows.count - row;
            of[count - 1](w, rows, row, output, y);
        }
}

// Few queries fill a shorter vector; a lane computes the same in any.
void attend_any(const Attention& a, int64_t unit) {
    a.rows * (a.heads / a.kv_heads) <= Vector4::LANES ? attend<Vector4>(a, unit) : attend<Vector8>(a, unit);
}

}  // namespace

const Kernels AVX2{{int8_bytes, int8_row, int8_tiles}, {int4_bytes, int4_row, int4_tiles}, attend_any, LANES, GROUP};

}  // namespace edgespec
#endif
