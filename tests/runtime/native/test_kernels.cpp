// Products of coded weights, and attention, on each instruction set that this processor has, against sums done one by one.
#include "kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "testing.h"

using namespace edgespec;

namespace {

std::mt19937 dice(1);

float number() { return std::uniform_real_distribution<float>(-1, 1)(dice); }

struct Made {
    int64_t k, n, count;
    std::vector<uint8_t> codes, packed;
    std::vector<float> scale, sums, x;
    Weight weight;
};

Made made(const Kernels& kernels, bool int8, int64_t k, int64_t n, int64_t count) {
    Made m{k, n, count, {}, {}, {}, {}, {}, {}};
    const int64_t blocks = blocks_of(k) + 2 * sum_blocks(k);
    m.codes.resize(size_t(int8 ? k * n : n * blocks * BLOCK / 2));
    m.scale.resize(size_t(int8 ? n : n * blocks));
    m.sums.resize(size_t(n));
    m.x.resize(size_t(count * k));
    for (auto& c : m.codes) c = uint8_t(dice());
    for (auto* all : {&m.scale, &m.sums, &m.x})
        for (auto& v : *all) v = number();
    m.packed.resize(int8 ? int8_size(kernels, k, n) : int4_size(kernels, n, blocks));
    if (int8) pack_int8(kernels, m.codes.data(), k, n, m.packed.data());
    else pack_int4(kernels, m.codes.data(), m.scale.data(), n, blocks, m.packed.data());
    m.weight = {n, k, blocks, m.packed.data(), m.scale.data(), m.sums.data()};
    return m;
}

// y [count][n] of rows from..from+count, in one call.
std::vector<float> multiply(const Kernels& kernels, bool int8, const Made& m, int64_t from, int64_t count) {
    const Product& product = int8 ? kernels.int8 : kernels.int4;
    const size_t bytes = size_t(up(int64_t(product.row_bytes(m.weight)), 64));
    std::vector<uint8_t> room(bytes * size_t(count) + 64);
    auto* rows = reinterpret_cast<uint8_t*>(up(reinterpret_cast<int64_t>(room.data()), 64));
    for (int64_t r = 0; r < count; ++r) product.row(m.weight, m.x.data() + (from + r) * m.k, rows + size_t(r) * bytes);
    std::vector<float> y(size_t(count * m.n), -77.f);
    const int64_t tiles = up(m.n, kernels.tile()) / kernels.tile();
    for (int64_t t = 0; t < tiles; ++t) product.tiles(m.weight, {rows, bytes, count}, t, t + 1, y.data());
    return y;
}

// As the function's body has it: rows to 8 bits over their own range, the sum exact, then one rounding after the other.
float int8_by_hand(const Made& m, int64_t r, int64_t output) {
    const float* x = m.x.data() + r * m.k;
    const float low = *std::min_element(x, x + m.k), step = (*std::max_element(x, x + m.k) - low) * (1 / 255.f);
    int sum = 0;
    for (int64_t i = 0; i < m.k; ++i) sum += int(std::clamp(std::nearbyintf((x[i] - low) / step), 0.f, 255.f)) * (int(m.codes[size_t(i * m.n + output)]) - 128);
    volatile float main = float(sum) * m.scale[size_t(output)], scaled = main * step, rest = low * m.sums[size_t(output)];
    return scaled + rest;
}

// In double precision, with x as it is: coded in 8 bits, each of its numbers is off by at most a 254th of its block's largest.
std::pair<double, double> int4_by_hand(const Made& m, int64_t r, int64_t output) {
    std::vector<float> x(size_t(m.weight.blocks * BLOCK));
    with_sums(m.weight, m.x.data() + r * m.k, x.data());
    double sum = 0, slack = 1e-4;
    for (int64_t b = 0; b < m.weight.blocks; ++b) {
        float most = 0;
        double weights = 0;
        for (int64_t i = 0; i < BLOCK; ++i) {
            const uint8_t two = m.codes[size_t(((output * m.weight.blocks + b) * BLOCK + i) / 2)];
            const double w = (int(i % 2 ? two >> 4 : two & 15) - 8) * double(m.scale[size_t(output * m.weight.blocks + b)]);
            sum += w * double(x[size_t(b * BLOCK + i)]);
            weights += std::abs(w);
            most = std::max(most, std::abs(x[size_t(b * BLOCK + i)]));
        }
        slack += weights * double(most) / 253;
    }
    return {sum, slack};
}

void products(const Kernels& kernels) {
    for (const auto& [k, n, count] : std::vector<std::array<int64_t, 3>>{{64, 64, 1}, {30, 7, 9}, {33, 100, 3}, {577, 33, 5}, {96, 65, 21}, {1, 1, 2}, {1056, 17, 8}}) {
        for (const bool int8 : {true, false}) {
            const Made m = made(kernels, int8, k, n, count);
            const auto y = multiply(kernels, int8, m, 0, count);
            for (int64_t r = 0; r < count; ++r) {
                const auto alone = multiply(kernels, int8, m, r, 1);
                CHECK(std::equal(alone.begin(), alone.end(), y.begin() + r * n));  // a row has the same bits at any width
                for (int64_t c = 0; c < n; ++c) {
                    const float got = y[size_t(r * n + c)];
                    if (int8 && k > 1) CHECK(got == int8_by_hand(m, r, c));
                    if (!int8) CHECK(std::abs(double(got) - int4_by_hand(m, r, c).first) <= int4_by_hand(m, r, c).second);
                }
            }
        }
    }
}

void rows_of_one_number(const Kernels& kernels) {
    Made m = made(kernels, true, 40, 5, 1);
    std::fill(m.x.begin(), m.x.end(), 3.f);  // no range: the sums alone
    const auto y = multiply(kernels, true, m, 0, 1);
    for (int64_t c = 0; c < m.n; ++c) CHECK(y[size_t(c)] == 3.f * m.sums[size_t(c)]);
    m = made(kernels, false, 40, 5, 1);
    std::fill(m.x.begin(), m.x.end(), 0.f);
    for (const float v : multiply(kernels, false, m, 0, 1)) CHECK(v == 0);
}

// What is no number must reach the logits, whose check stops the text.
void faults(const Kernels& kernels) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()})
        for (const bool int8 : {true, false})
            for (const size_t place : {0, 17, 39}) {
                Made m = made(kernels, int8, 40, 5, 2);
                m.x[place] = bad;
                const auto y = multiply(kernels, int8, m, 0, 2);
                for (int64_t c = 0; c < m.n; ++c) CHECK(!std::isfinite(y[size_t(c)]) && std::isfinite(y[size_t(m.n + c)]));
            }
}

void lookups(const Kernels& kernels) {
    const Made m = made(kernels, true, 37, 70, 1);
    std::vector<float> row(37);
    for (int64_t output = 0; output < m.n; ++output) {
        unpack_int8(kernels, m.weight, output, row.data());
        for (int64_t i = 0; i < m.k; ++i) CHECK(row[size_t(i)] == (float(m.codes[size_t(i * m.n + output)]) - 128) * m.scale[size_t(output)]);
    }
}

// Attention of all rows of a call of a's shape, or of some in a call of their own; keys and values beyond what a row sees are NaN.
struct Attended {
    std::vector<float> queries, keys, values, out;
    Attention a;
    Attended(Attention given) : a(given) {
        queries.resize(size_t(a.rows * a.heads * a.head_dim));
        keys.resize(size_t(a.kv_heads * a.slots * a.head_dim));
        values.resize(keys.size());
        for (auto* all : {&queries, &keys, &values})
            for (auto& v : *all) v = number();
        for (int64_t h = 0; h < a.kv_heads; ++h)
            for (int64_t j = a.count + a.rows; j < a.slots; ++j)
                for (int64_t i = 0; i < a.head_dim; ++i) keys[size_t((h * a.slots + j) * a.head_dim + i)] = values[size_t((h * a.slots + j) * a.head_dim + i)] = NAN;
    }

    std::vector<float> rows(const Kernels& kernels, int64_t first, int64_t count) {
        Attention part = a;
        part.rows = count, part.count = a.count + first;
        std::vector<float> made(size_t(count * a.heads * a.head_dim), -77.f);
        part.queries = queries.data() + first * a.heads * a.head_dim, part.keys = keys.data(), part.values = values.data(), part.out = made.data();
        for (int64_t u = 0; u < kernels.units(part); ++u) kernels.attend(part, u);
        return made;
    }

    // In double precision.
    double by_hand(int64_t row, int64_t head, int64_t i) const {
        const int64_t kv = head / (a.heads / a.kv_heads), end = a.count + row + 1, begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
        double total = 0, sum = 0;
        for (int64_t j = begin; j < end; ++j) {
            double score = 0;
            for (int64_t c = 0; c < a.head_dim; ++c) score += double(queries[size_t((row * a.heads + head) * a.head_dim + c)]) * double(keys[size_t((kv * a.slots + j) * a.head_dim + c)]);
            score *= double(a.scale);
            if (a.softcap > 0) score = double(a.softcap) * std::tanh(score / double(a.softcap));
            total += std::exp(score);
            sum += std::exp(score) * double(values[size_t((kv * a.slots + j) * a.head_dim + i)]);
        }
        return sum / total;
    }
};

void attention(const Kernels& kernels) {
    for (const Attention& shape : std::vector<Attention>{
             {1, 9, 3, 64, 40, 17, -1, 0.125f, 0, {}, {}, {}, {}}, {8, 9, 3, 64, 300, 200, -1, 0.125f, 0, {}, {}, {}, {}}, {5, 4, 4, 20, 33, 0, -1, 2.f, 0, {}, {}, {}, {}},
             {7, 8, 1, 16, 64, 50, 12, 5.f, 0, {}, {}, {}, {}}, {21, 6, 2, 10, 64, 30, 3, 9.f, 4.f, {}, {}, {}, {}}, {2, 2, 1, 3, 9, 7, -1, 60.f, 0, {}, {}, {}, {}}}) {
        Attended made(shape);
        const auto whole = made.rows(kernels, 0, shape.rows);
        const int64_t wide = shape.heads * shape.head_dim;
        for (int64_t row = 0; row < shape.rows; ++row) {
            const auto alone = made.rows(kernels, row, 1);
            CHECK(std::equal(alone.begin(), alone.end(), whole.begin() + row * wide));
            for (int64_t c = 0; c < wide; ++c) CHECK(std::abs(double(whole[size_t(row * wide + c)]) - made.by_hand(row, c / shape.head_dim, c % shape.head_dim)) < 1e-5);
        }
    }
}

void faults_of_attention(const Kernels& kernels) {
    for (const bool key : {true, false}) {
        Attended made({2, 3, 1, 8, 16, 6, -1, 0.3f, 0, {}, {}, {}, {}});
        (key ? made.keys : made.values)[size_t(7 * 8 + 2)] = NAN;  // the second row's own slot
        const auto out = made.rows(kernels, 0, 2);
        bool lost = false;
        for (int64_t c = 0; c < 24; ++c) lost = lost || std::isnan(out[size_t(24 + c)]);
        CHECK(lost);
    }
}

}  // namespace

int main() {
    std::vector<const Kernels*> here;
#if defined(__x86_64__)
    if (kernels()) here.push_back(&AVX2);
    if (kernels() == &AVX512) here.push_back(&AVX512);
#endif
    for (const Kernels* k : here) {
        products(*k);
        rows_of_one_number(*k);
        faults(*k);
        lookups(*k);
        attention(*k);
        faults_of_attention(*k);
    }
    if (here.empty()) std::puts("no kernels for this processor: nothing was tested");
    return 0;
}
