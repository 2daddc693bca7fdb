// Vectors of 4 and 8 floats for kernels_attend.h, on x86-64 with AVX2 and FMA. Each file that is compiled for an instruction set
// has its own.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>

namespace edgespec {
namespace {

struct Vector4 {
    static constexpr int64_t LANES = 4;
    __m128 v;
    Vector4() = default;
    Vector4(__m128 given) : v(given) {}
    explicit Vector4(float x) : v(_mm_set1_ps(x)) {}
    static Vector4 load(const float* x) { return _mm_loadu_ps(x); }
    void store(float* x) const { _mm_storeu_ps(x, v); }
    friend Vector4 operator+(Vector4 a, Vector4 b) { return _mm_add_ps(a.v, b.v); }
    friend Vector4 operator-(Vector4 a, Vector4 b) { return _mm_sub_ps(a.v, b.v); }
    friend Vector4 operator*(Vector4 a, Vector4 b) { return _mm_mul_ps(a.v, b.v); }
    friend Vector4 operator/(Vector4 a, Vector4 b) { return _mm_div_ps(a.v, b.v); }
    friend Vector4 fma(Vector4 a, Vector4 b, Vector4 c) { return _mm_fmadd_ps(a.v, b.v, c.v); }
    friend Vector4 max(Vector4 a, Vector4 b) { return _mm_max_ps(a.v, b.v); }
    friend Vector4 min(Vector4 a, Vector4 b) { return _mm_min_ps(a.v, b.v); }
    friend Vector4 round(Vector4 a) { return _mm_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    Vector4 times_two_to(Vector4 n) const {
        const __m128i power = _mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n.v), _mm_set1_epi32(127)), 23);
        return _mm_mul_ps(v, _mm_castsi128_ps(power));
    }
    Vector4 zero_where_less(Vector4 x, Vector4 limit) const { return _mm_andnot_ps(_mm_cmp_ps(x.v, limit.v, _CMP_LT_OQ), v); }
    Vector4 with_sign_of(Vector4 x) const {
        const __m128 sign = _mm_set1_ps(-0.f);
        return _mm_or_ps(_mm_andnot_ps(sign, v), _mm_and_ps(sign, x.v));
    }
    // Minus infinity where j is not from `from` to `to`.
    Vector4 only_within(Vector4 j, Vector4 from, Vector4 to) const {
        const __m128 seen = _mm_and_ps(_mm_cmp_ps(j.v, from.v, _CMP_GE_OQ), _mm_cmp_ps(j.v, to.v, _CMP_LE_OQ));
        return _mm_blendv_ps(_mm_set1_ps(-std::numeric_limits<float>::infinity()), v, seen);
    }
};

struct Vector8 {
    static constexpr int64_t LANES = 8;
    __m256 v;
    Vector8() = default;
    Vector8(__m256 given) : v(given) {}
    explicit Vector8(float x) : v(_mm256_set1_ps(x)) {}
    static Vector8 load(const float* x) { return _mm256_loadu_ps(x); }
    void store(float* x) const { _mm256_storeu_ps(x, v); }
    friend Vector8 operator+(Vector8 a, Vector8 b) { return _mm256_add_ps(a.v, b.v); }
    friend Vector8 operator-(Vector8 a, Vector8 b) { return _mm256_sub_ps(a.v, b.v); }
    friend Vector8 operator*(Vector8 a, Vector8 b) { return _mm256_mul_ps(a.v, b.v); }
    friend Vector8 operator/(Vector8 a, Vector8 b) { return _mm256_div_ps(a.v, b.v); }
    friend Vector8 fma(Vector8 a, Vector8 b, Vector8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
    friend Vector8 max(Vector8 a, Vector8 b) { return _mm256_max_ps(a.v, b.v); }
    friend Vector8 min(Vector8 a, Vector8 b) { return _mm256_min_ps(a.v, b.v); }
    friend Vector8 round(Vector8 a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    Vector8 times_two_to(Vector8 n) const {
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(v, _mm256_castsi256_ps(power));
    }
    Vector8 zero_where_less(Vector8 x, Vector8 limit) const { return _mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), v); }
    Vector8 with_sign_of(Vector8 x) const {
        const __m256 sign = _mm256_set1_ps(-0.f);
        return _mm256_or_ps(_mm256_andnot_ps(sign, v), _mm256_and_ps(sign, x.v));
    }
    // Minus infinity where j is not from `from` to `to`.
    Vector8 only_within(Vector8 j, Vector8 from, Vector8 to) const {
        const __m256 seen = _mm256_and_ps(_mm256_cmp_ps(j.v, from.v, _CMP_GE_OQ), _mm256_cmp_ps(j.v, to.v, _CMP_LE_OQ));
        return _mm256_blendv_ps(_mm256_set1_ps(-std::numeric_limits<float>::infinity()), v, seen);
    }
};

}  // namespace
}  // namespace edgespec
