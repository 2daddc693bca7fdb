// The little that a native test needs: a failed check says where and what, and the program ends with 1.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "error.h"

#define CHECK(what) \
    do { \
        if (!(what)) std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), std::exit(1); \
    } while (0)

// The message of the Error that `act` throws, empty where it throws none.
template <typename F>
std::string error_of(F act) {
    try {
        act();
    } catch (const edgespec::Error& e) {
        return e.message;
    }
    return "";
}

// Are these counts draws from this law? Chi-square, refused at a chance of about 1 in a million.
inline bool drawn_from(const std::vector<double>& law, const std::vector<int>& counts) {
    double n = 0, chi = 0;
    int freedom = -1;
    for (const int c : counts) n += c;
    for (size_t i = 0; i < law.size(); ++i) {
        if (law[i] <= 0 && counts[i] > 0) return false;
        if (law[i] <= 0) continue;
        chi += (counts[i] - n * law[i]) * (counts[i] - n * law[i]) / (n * law[i]);
        ++freedom;
    }
    if (freedom < 1) return true;
    // Wilson and Hilferty: the cube root is nearly normal.
    const double z = (std::cbrt(chi / freedom) - (1 - 2.0 / (9 * freedom))) / std::sqrt(2.0 / (9 * freedom));
    return z < 4.75;
}
