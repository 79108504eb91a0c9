// Which experts a token visits, and its copies on the way to them.
#pragma once

#include "vectors.h"

namespace {

constexpr int MAX_EXPERTS = 1024;

// Index of the largest, the first among equals; a NaN counts as larger than anything.
inline int64_t largest(const float* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
        if (x[i] > x[best] || (x[i] != x[i] && x[best] == x[best])) best = i;
    return best;
}

// The `chosen` experts of each of n tokens by their scores [n, E] plus bias [E] (or null), best first, lower index
// first among equals; if `groups` is above 1 only of the `kept` groups whose two best scores (best, if `pairs` is 0)
// add up to most. ids [n, chosen]; weights [n, chosen]: their scores, divided by the sum if `normalised`, times
// `factor`.
void choose_experts(const float* scores, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t E,
                    int64_t chosen, int64_t groups, int64_t kept, int64_t pairs, int64_t normalised, float factor) {
    const int64_t size = E / groups;
    for (int64_t t = 0; t < n; ++t, scores += E, ids += chosen, weights += chosen) {
        float biased[MAX_EXPERTS], of_group[MAX_EXPERTS];
        for (int64_t e = 0; e < E; ++e) biased[e] = scores[e] + (bias ? bias[e] : 0);
        if (groups > 1) {
            for (int64_t g = 0; g < groups; ++g) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t e = g * size; e < (g + 1) * size; ++e)
                    if (biased[e] > first) {
                        second = first;
                        first = biased[e];
                    } else if (biased[e] > second)
                        second = biased[e];
                of_group[g] = pairs ? first + second : first;
            }
            for (int64_t k = 0; k < kept; ++k) of_group[largest(of_group, groups)] = -INFINITY;
            for (int64_t e = 0; e < E; ++e)
                if (of_group[e / size] != -INFINITY) biased[e] = -INFINITY;
        }
        float total = 0;
        for (int64_t k = 0; k < chosen; ++k) {
            ids[k] = largest(biased, E);
            biased[ids[k]] = -INFINITY;
            total += weights[k] = scores[ids[k]];
        }
        for (int64_t k = 0; k < chosen; ++k)
            weights[k] = (normalised ? weights[k] / (total + 1e-20f) : weights[k]) * factor;
    }
}

// The rows of x [n, D] on their way to experts: copies of them, grouped by expert, with the weight of each, how many
// each of E experts gets, and where the answer to each choice will lie.
void group_rows(const bf16* x, const int64_t* ids, const float* weights, bf16* rows, float* row_weights,
                int64_t* counts, int64_t* places, int64_t n, int64_t chosen, int64_t D, int64_t E) {
    int64_t begin[MAX_EXPERTS], at = 0;
    std::memset(counts, 0, E * sizeof(int64_t));
    for (int64_t i = 0; i < n * chosen; ++i) ++counts[ids[i]];
    for (int64_t e = 0; e < E; at += counts[e++]) begin[e] = at;
    for (int64_t i = 0; i < n * chosen; ++i) {
        places[i] = begin[ids[i]]++;
        row_weights[places[i]] = weights[i];
        std::memcpy(rows + places[i] * D, x + i / chosen * D, D * sizeof(bf16));
    }
}

}  // namespace
