// What a call costs at each width: a frozen table, never a live clock, so that a seed repeats its text and trace.
#pragma once

#include <map>
#include <string>

#include "manifest.h"

namespace edgespec {

struct Costs {
    std::string name = "default";
    std::map<int, double> verify;  // by width, 1 is decode; only ratios matter
    double draft = 0;              // one call of the draft's step graph, and one of its prefill
    double draft_prefill = 0;
    bool widths_agree = false;     // else every call has the widest width
    double acceptance = 0.5;       // how likely the draft model's token is accepted, before anything is seen

    // The cheapest target call that holds so many rows; 0 where none does.
    int width_for(int rows) const;
    double of(int rows) const { return verify.at(width_for(rows)); }

    // What it costs the draft to absorb so many tokens, and whether by prefills (of `block` rows) rather than two by two.
    double catching_up(int tokens, int block) const;
    bool by_prefill(int tokens, int block) const;
};

// A guess without measurement: a call costs its weight bytes, and on a CPU a tenth more for every further row.
// `widths_agree`: what a test on this machine found, beside what the manifest says of the exporter's.
Costs default_costs(const Manifest& bundle, bool widths_agree = true);

// The table in a file that `tune` made, refused where it does not fit the bundle.
Costs read_costs(const std::string& file, const Manifest& bundle);

}  // namespace edgespec
