// Attention of a call's rows over the cache, the same for each instruction set; V is its vector of floats. Lanes are queries: those
// of a key-value head, row after row, so that a row's sums go the same way in a call of any width.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

namespace edgespec {

// e^x for x <= 0, within 2 units in the last place (the polynomial of degree 6 on half an octave around 0); NaN stays NaN.
template <class V>
V exponential(V x) {
    const V n = round(x * V(1.44269504f));
    const V r = fma(n, V(1.42860677e-6f), fma(n, V(-0.693148613f), x));
    V p(1.f / 720);
    for (const float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = fma(p, r, V(c));
    return p.times_two_to(n).zero_where_less(x, V(-87));
}

template <class V>
void attend(const Attention& a, int64_t unit) {
    constexpr int64_t N = V::LANES;
    constexpr int64_t BATCH = 8;  // of a value's numbers that are summed in registers
    const int64_t group = a.heads / a.kv_heads, queries = a.rows * group, vectors = up(queries, N) / N;
    const int64_t kv = unit / vectors, first = unit % vectors * N, count = std::min(N, queries - first), d = a.head_dim;
    const float *keys = a.keys + kv * a.slots * d, *values = a.values + kv * a.slots * d;
    const int64_t low_row = first / group, high_row = (first + count - 1) / group;
    const int64_t begin = a.window > 0 ? std::max<int64_t>(0, a.count + low_row - a.window + 1) : 0, end = std::min(a.slots, a.count + high_row + 1);

    float *turned = scratch(size_t((2 * d + std::max<int64_t>(0, end - begin)) * N)), *sums = turned + d * N, *scores = sums + d * N;
    float row_of[N], from[N];
    for (int64_t lane = 0; lane < N; ++lane) {
        const int64_t query = first + std::min(lane, count - 1), row = query / group, head = kv * group + query % group;
        row_of[lane] = float(a.count + row);
        from[lane] = a.window > 0 ? row_of[lane] - float(a.window) + 1 : 0;
        const float* q = a.queries + (row * a.heads + head) * d;
        for (int64_t i = 0; i < d; ++i) turned[i * N + lane] = q[i] * a.scale;
    }
    const V last = V::load(row_of), earliest = V::load(from);

    V most(-std::numeric_limits<float>::infinity());
    const auto finish = [&](int64_t j, V score) {
        if (a.softcap > 0) {  // tanh from e to the minus twice
            const V x = score * V(1 / a.softcap), e = exponential(min(x, V(0) - x) * V(2)), t = (V(1) - e) / (V(1) + e);
            score = t.with_sign_of(x) * V(a.softcap);
        }
        if (j > a.count + low_row || (a.window > 0 && j < a.count + high_row - a.window + 1)) score = score.only_within(V(float(j)), earliest, last);
        score.store(scores + (j - begin) * N);
        most = max(score, most);
    };
    constexpr int64_t KEYS = 4;  // that share a load of the queries' numbers
    const auto dots = [&](int64_t j, auto keys_of) {
        constexpr int64_t some = decltype(keys_of)::value;
        V even[some], odd[some];
        for (int64_t k = 0; k < some; ++k) even[k] = odd[k] = V(0);
        int64_t i = 0;
        for (; i + 2 <= d; i += 2) {
            const V x = V::load(turned + i * N), y = V::load(turned + (i + 1) * N);
#pragma GCC unroll 4
            for (int64_t k = 0; k < some; ++k) {
                even[k] = fma(V(keys[(j + k) * d + i]), x, even[k]);
                odd[k] = fma(V(keys[(j + k) * d + i + 1]), y, odd[k]);
            }
        }
        for (int64_t k = 0; k < some; ++k) {
            if (i < d) even[k] = fma(V(keys[(j + k) * d + i]), V::load(turned + i * N), even[k]);
            finish(j + k, even[k] + odd[k]);
        }
    };
    int64_t next = begin;
    for (; next + KEYS <= end; next += KEYS) dots(next, std::integral_constant<int64_t, KEYS>());
    for (; next < end; ++next) dots(next, std::integral_constant<int64_t, 1>());

    V total(0);
    for (int64_t j = begin; j < end; ++j) {
        float* at = scores + (j - begin) * N;
        const V p = exponential(V::load(at) - most);
        p.store(at);
        total = total + p;
    }
    const V share = V(1) / total;
    for (int64_t i = 0; i < d; i += BATCH) {
        V sum[BATCH];
        for (V& s : sum) s = V(0);
        const int64_t some = std::min(BATCH, d - i);
        if (some == BATCH) {
            for (int64_t j = begin; j < end; ++j) {
                const V p = V::load(scores + (j - begin) * N);
#pragma GCC unroll 8
                for (int64_t b = 0; b < BATCH; ++b) sum[b] = fma(V(values[j * d + i + b]), p, sum[b]);
            }
        } else {
            for (int64_t j = begin; j < end; ++j)
                for (int64_t b = 0; b < some; ++b) sum[b] = fma(V(values[j * d + i + b]), V::load(scores + (j - begin) * N), sum[b]);
        }
        for (int64_t b = 0; b < some; ++b) (sum[b] * share).store(sums + (i + b) * N);
    }
    for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t row = (first + lane) / group, head = kv * group + (first + lane) % group;
        float* out = a.out + (row * a.heads + head) * d;
        for (int64_t i = 0; i < d; ++i) out[i] = sums[i * N + lane];
    }
}

}  // namespace edgespec
