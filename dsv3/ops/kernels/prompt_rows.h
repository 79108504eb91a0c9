// Where the rows of a prompt's tokens lie on their way to experts.
#pragma once

#include "routing.h"

namespace {

// Sets counts [E], multiples of `unit`; places [n, chosen], the row of each choice, grouped by expert and in the order
// of the tokens; and of each row its token and weight, 0 and 0 for padding. Returns how many rows there are.
int64_t place_rows(const int64_t* ids, const float* weights, float* row_weights, int64_t* tokens, int64_t* counts,
                   int64_t* places, int64_t n, int64_t chosen, int64_t E, int64_t unit) {
    int64_t next[MAX_EXPERTS], rows = 0;
    std::memset(counts, 0, E * sizeof(int64_t));
    for (int64_t i = 0; i < n * chosen; ++i) ++counts[ids[i]];
    for (int64_t e = 0; e < E; rows += counts[e++]) {
        next[e] = rows;
        const int64_t end = rows + counts[e];
        counts[e] = (counts[e] + unit - 1) / unit * unit;
        for (int64_t r = end; r < rows + counts[e]; ++r) row_weights[r] = tokens[r] = 0;
    }
    for (int64_t i = 0; i < n * chosen; ++i) {
        const int64_t r = places[i] = next[ids[i]]++;
        row_weights[r] = weights[i];
        tokens[r] = i / chosen;
    }
    return rows;
}

// scores [E] of each of T tokens x [T, D] with every row of `router` [E, D]: their products. D is a multiple of WIDTH.
template <int T>
inline void score_tokens(const bf16* x, const float* router, float* scores, int64_t D, int64_t E) {
    constexpr int OUTS = 4;
    for (int64_t e = 0; e < E; e += OUTS) {
        const int64_t last = E - e < OUTS ? E - e - 1 : OUTS - 1;
        Floats acc[T][OUTS] = {};
        for (int64_t d = 0; d < D; d += WIDTH)
            for (int t = 0; t < T; ++t)
                for (int k = 0; k < OUTS; ++k)
                    acc[t][k] += widen(x + t * D + d) * load<Floats>(router + (e + (k < last ? k : last)) * D + d);
        for (int t = 0; t < T; ++t)
            for (int k = 0; k <= last; ++k) scores[t * E + e + k] = sum(acc[t][k]);
    }
}

// Products into affinities: their sigmoids or, over a token's experts, their softmax.
inline void weigh_scores(float* scores, int64_t E, int64_t softmax) {
    float total = 0, most = softmax ? scores[largest(scores, E)] : 0;
    for (int64_t e = 0; e < E; ++e)
        total += scores[e] = softmax ? std::exp(scores[e] - most) : 1 / (1 + std::exp(-scores[e]));
    for (int64_t e = 0; softmax && e < E; ++e) scores[e] /= total;
}

}  // namespace
