// Kernels for x86-64 with AVX-512 VNNI. Compiled with its flags and without contraction of products and sums.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels_attend.h"
#include "kernels_vectors.h"

namespace edgespec {
namespace {

constexpr int64_t LANES = 16, TILE = 2 * LANES, GROUP = 4;

__mmask16 first(int64_t count) { return count >= LANES ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1); }

// NaN if any number is not finite, else 0: what a row's scale is added, for a maximum may drop a NaN.
float fault(const float* x, int64_t k) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += LANES) sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_maskz_loadu_ps(first(k - i), x + i), _mm512_setzero_ps()));
    return _mm512_reduce_add_ps(sum);
}

size_t int8_bytes(const Weight& w) { return sizeof(Int8Row) + size_t(up(w.k, 64)); }

void int8_row(const Weight& w, const float* x, uint8_t* made) {
    __m512 most = _mm512_set1_ps(x[0]), least = most;
    for (int64_t i = 0; i < w.k; i += LANES) {
        const __mmask16 some = first(w.k - i);
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, some, x + i));
        least = _mm512_min_ps(least, _mm512_mask_loadu_ps(least, some, x + i));
    }
    const float low = _mm512_reduce_min_ps(least), scale = (_mm512_reduce_max_ps(most) - low) * (1 / 255.f), nan = fault(x, w.k);
    const Int8Row head{scale + nan, low + nan, {}};
    std::memcpy(made, &head, sizeof head);
    const __m512 step = _mm512_set1_ps(scale > 0 ? scale : 1), base = _mm512_set1_ps(low);
    for (int64_t i = 0; i < up(w.k, 64); i += LANES) {
        const __mmask16 some = first(w.k - i);
        const __m512i u = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_sub_ps(some, _mm512_maskz_loadu_ps(some, x + i), base), step));
        _mm_store_si128(reinterpret_cast<__m128i*>(made + sizeof head + i), _mm512_cvtusepi32_epi8(u));
    }
}

// R rows of one tile.
template <int R>
void int8_tile(const Weight& w, const Rows& rows, int64_t row, int64_t output, float* y) {
    const int64_t depth = up(w.k, GROUP);
    const uint8_t* codes = w.packed + output * depth;
    const uint8_t* x = rows.data + size_t(row) * rows.bytes + sizeof(Int8Row);
    __m512i sum[R][2];
    for (auto& r : sum) r[0] = r[1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < depth; i += GROUP, codes += GROUP * TILE) {
        const __m512i v0 = _mm512_loadu_si512(codes), v1 = _mm512_loadu_si512(codes + 64);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + size_t(r) * rows.bytes + i, sizeof four);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], _mm512_set1_epi32(four), v0);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], _mm512_set1_epi32(four), v1);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        Int8Row head;
        std::memcpy(&head, x + size_t(r) * rows.bytes - sizeof head, sizeof head);
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            const int64_t at = output + j * LANES;
            const __mmask16 some = first(w.n - at);
            if (!some) continue;
            const __m512 main = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][j]), _mm512_maskz_loadu_ps(some, w.scale + at));
            const __m512 low = _mm512_mul_ps(_mm512_set1_ps(head.low), _mm512_maskz_loadu_ps(some, w.sums + at));
            _mm512_mask_storeu_ps(y + (row + r) * w.n + at, some, _mm512_add_ps(_mm512_mul_ps(main, _mm512_set1_ps(head.scale)), low));
        }
    }
}

void int8_tiles(const Weight& w, const Rows& rows, int64_t begin, int64_t end, float* y) {
    static constexpr decltype(&int8_tile<1>) of[] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>, int8_tile<5>, int8_tile<6>, int8_tile<7>, int8_tile<8>};
    for (int64_t output = begin * TILE; output < std::min(w.n, end * TILE); output += TILE)
        for (int64_t row = 0, count; row < rows.count; row += count) {
            count = rows.count - row > 8 ? 6 : rows.count - row;
            of[count - 1](w, rows, row, output, y);
        }
}

void int4_row(const Weight& w, const float* given, uint8_t* made) {
    float* x = scratch(size_t(w.blocks * BLOCK));
    with_sums(w, given, x);
    for (int64_t b = 0; b < w.blocks; ++b) {
        const __m512 low = _mm512_loadu_ps(x + b * BLOCK), high = _mm512_loadu_ps(x + b * BLOCK + LANES);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        const __m512 turn = _mm512_set1_ps(most > 0 ? 127 / most : 0);
        const auto coded = [&](__m512 v) {  // what is no number must not overflow the sum
            return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, turn)), _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
        };
        const __m512i q0 = coded(low), q1 = coded(high);
        Int4Block block;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.q), _mm512_cvtsepi32_epi8(q0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.q + LANES), _mm512_cvtsepi32_epi8(q1));
        block.start = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1));
        block.scale = most / 127 + fault(x + b * BLOCK, BLOCK);
        std::memcpy(made + b * int64_t(sizeof block), &block, sizeof block);
    }
}

// R rows of one tile.
template <int R>
void int4_tile(const Weight& w, const Rows& rows, int64_t row, int64_t output, float* y) {
    constexpr int64_t VECTOR = LANES * (BLOCK / 2 + int64_t(sizeof(float)));
    const __m512i nibble = _mm512_set1_epi8(15);
    const uint8_t* codes = w.packed + output / LANES * w.blocks * VECTOR;
    const auto* x = rows.data + size_t(row) * rows.bytes;
    __m512 sum[R][2];
    for (auto& r : sum) r[0] = r[1] = _mm512_setzero_ps();
    for (int64_t b = 0; b < w.blocks; ++b, codes += 2 * VECTOR) {
        __m512i dot[R][2], other[R][2];
        const auto block = [&](int r) { return reinterpret_cast<const Int4Block*>(x + size_t(r) * rows.bytes) + b; };
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            dot[r][0] = dot[r][1] = _mm512_set1_epi32(block(r)->start);
            other[r][0] = other[r][1] = _mm512_setzero_si512();
        }
#pragma GCC unroll 16
        for (int g = 0; g < 4; ++g)
#pragma GCC unroll 16
            for (int j = 0; j < 2; ++j) {
                const __m512i stored = _mm512_loadu_si512(codes + j * VECTOR + g * 64);
                const __m512i low = _mm512_and_si512(stored, nibble), high = _mm512_and_si512(_mm512_srli_epi16(stored, 4), nibble);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    int32_t near, far;
                    std::memcpy(&near, block(r)->q + 4 * g, sizeof near);
                    std::memcpy(&far, block(r)->q + 4 * g + BLOCK / 2, sizeof far);
                    auto& second = R < 4 ? other[r][j] : dot[r][j];  // two chains where rows are too few to fill the units
                    dot[r][j] = _mm512_dpbusd_epi32(dot[r][j], low, _mm512_set1_epi32(near));
                    second = _mm512_dpbusd_epi32(second, high, _mm512_set1_epi32(far));
                }
            }
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            const __m512 scale = _mm512_loadu_ps(codes + j * VECTOR + 4 * 64);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const __m512i whole = R < 4 ? _mm512_add_epi32(dot[r][j], other[r][j]) : dot[r][j];
                sum[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scale, _mm512_set1_ps(block(r)->scale)), sum[r][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) _mm512_mask_storeu_ps(y + (row + r) * w.n + output + j * LANES, first(w.n - output - j * LANES), sum[r][j]);
}

void int4_tiles(const Weight& w, const Rows& rows, int64_t begin, int64_t end, float* y) {
    static constexpr decltype(&int4_tile<1>) of[] = {int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>, int4_tile<5>, int4_tile<6>};
    for (int64_t output = begin * TILE; output < std::min(w.n, end * TILE); output += TILE)
        for (int64_t row = 0, count; row < rows.count; row += count) {
            count = rows.count - row > 6 ? 4 : rows.count - row;
            of[count - 1](w, rows, row, output, y);
        }
}

struct Vector16 {
    static constexpr int64_t LANES = 16;
    __m512 v;
    Vector16() = default;
    Vector16(__m512 given) : v(given) {}
    explicit Vector16(float x) : v(_mm512_set1_ps(x)) {}
    static Vector16 load(const float* x) { return _mm512_loadu_ps(x); }
    void store(float* x) const { _mm512_storeu_ps(x, v); }
    friend Vector16 operator+(Vector16 a, Vector16 b) { return _mm512_add_ps(a.v, b.v); }
    friend Vector16 operator-(Vector16 a, Vector16 b) { return _mm512_sub_ps(a.v, b.v); }
    friend Vector16 operator*(Vector16 a, Vector16 b) { return _mm512_mul_ps(a.v, b.v); }
    friend Vector16 operator/(Vector16 a, Vector16 b) { return _mm512_div_ps(a.v, b.v); }
    friend Vector16 fma(Vector16 a, Vector16 b, Vector16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
    friend Vector16 max(Vector16 a, Vector16 b) { return _mm512_max_ps(a.v, b.v); }
    friend Vector16 min(Vector16 a, Vector16 b) { return _mm512_min_ps(a.v, b.v); }
    friend Vector16 round(Vector16 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    Vector16 times_two_to(Vector16 n) const {
        const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
        return _mm512_mul_ps(v, _mm512_castsi512_ps(power));
    }
    Vector16 zero_where_less(Vector16 x, Vector16 limit) const { return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), _mm512_setzero_ps()); }
    Vector16 with_sign_of(Vector16 x) const {
        const __m512i sign = _mm512_set1_epi32(int(0x80000000));
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(sign, _mm512_castps_si512(v)), _mm512_and_si512(sign, _mm512_castps_si512(x.v))));
    }
    // Minus infinity where j is not from `from` to `to`.
    Vector16 only_within(Vector16 j, Vector16 from, Vector16 to) const {
        const __mmask16 seen = _mm512_cmp_ps_mask(j.v, from.v, _CMP_GE_OQ) & _mm512_cmp_ps_mask(j.v, to.v, _CMP_LE_OQ);
        return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), seen, v);
    }
};

// Few queries fill a shorter vector; a lane computes the same in any.
void attend_any(const Attention& a, int64_t unit) {
    const int64_t queries = a.rows * (a.heads / a.kv_heads);
    queries <= Vector4::LANES ? attend<Vector4>(a, unit) : queries <= Vector8::LANES ? attend<Vector8>(a, unit) : attend<Vector16>(a, unit);
}

}  // namespace

const Kernels AVX512{{int8_bytes, int8_row, int8_tiles}, {int4_bytes, int4_row, int4_tiles}, attend_any, LANES, GROUP};

}  // namespace edgespec
#endif
