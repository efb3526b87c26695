/* Which features are the largest: `cpu_selection.py` says what each function computes. */

#define BITS 16
#define INTEGER int16_t
#define COUNT uint16_t
#define INFINITE 0x7f80
#define NAME(of) of##_bfloat16
#include "cpu_top_of_rows.h"

#undef BITS
#undef INTEGER
#undef COUNT
#undef INFINITE
#undef NAME
#define BITS 32
#define INTEGER int32_t
#define COUNT uint32_t
#define INFINITE 0x7f800000
#define NAME(of) of##_float32
#include "cpu_top_of_rows.h"

static inline int32_t bits_of(float number) {
    int32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float number_of(int32_t bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Of each segment with pairs, k or more: 1 at the k largest, of those that are the same at the first. */
int64_t top_of_segments(int64_t begin, int64_t end, const float *values, const int64_t *offsets, int64_t k,
                        uint8_t *chosen) {
    int64_t longest = 1;
    for (int64_t t = begin; t < end; t++)
        longest = offsets[t + 1] - offsets[t] > longest ? offsets[t + 1] - offsets[t] : longest;
    int32_t *rank = malloc(longest * sizeof(int32_t));
    if (rank == NULL) return 0;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = offsets[t], n = offsets[t + 1] - first, missing = k;
        if (n == 0) continue;
        for (int64_t i = 0; i < n; i++) rank[i] = rank_float32(bits_of(values[first + i]));
        int32_t bound = kth_float32(rank, n, k);
        for (int64_t i = 0; i < n; i++) missing -= rank[i] > bound;
        for (int64_t i = 0; i < n; i++) {
            int same = rank[i] == bound && missing > 0;
            missing -= same;
            chosen[first + i] = same || rank[i] > bound;
        }
    }
    free(rank);
    return 1;
}

/* Rows of rounded pre-activations; see `certain.py`. A row's features take `most` places, of which `counts` says how
   many it needs, ascending; none where it is left open. */
int64_t possible_top(int64_t begin, int64_t end, const int16_t *pre, int64_t m, int64_t k, int64_t groups,
                     const float *error, const float *length, const float *most_off, const float *norms,
                     const float *errors, const float *bias_errors, float stored, int64_t most, int64_t *features,
                     int64_t *counts) {
    int64_t *place = malloc(m * (sizeof(int64_t) + 2 * sizeof(int32_t) + 3 * sizeof(int16_t)) + 8 * ((m + 63) / 64));
    if (place == NULL) return 0;
    uint64_t *possible = (uint64_t *)(place + m); /* a bit a feature */
    int32_t *least = (int32_t *)(possible + (m + 63) / 64);
    float *largest = (float *)(least + m);
    int16_t *rank = (int16_t *)(largest + m), *maximum = rank + m, *found = maximum + m;
    for (int64_t t = begin; t < end; t++) {
        counts[t] = 0;
        maxima_bfloat16(pre + t * m, m, groups, rank, maximum);
        float reached = number_of((int32_t)kth_bfloat16(maximum, groups, k) << 16);
        float bound = reached - 2 * (1 + 4 * stored) * most_off[t] - 4 * stored * reached;
        if (!(reached > 0 && bound > 0)) continue;
        int64_t n = reaching_bfloat16(rank, maximum, m, groups, (int16_t)(bits_of(bound) >> 16), found, place);
        if (n > most) continue;
        for (int64_t i = 0; i < n; i++) {
            int64_t feature = place[i];
            float value = number_of((int32_t)found[i] << 16);
            float off = error[t] * norms[feature] + length[t] * errors[feature];
            off += bias_errors[feature] + stored * value;
            least[i] = rank_float32(bits_of(value - off));
            largest[i] = value + off;
        }
        int32_t kth = kth_float32(least, n, k);
        memset(possible, 0, (m + 63) / 64 * sizeof(uint64_t));
        for (int64_t i = 0; i < n; i++)
            possible[place[i] / 64] |= (uint64_t)(rank_float32(bits_of(largest[i])) >= kth) << place[i] % 64;
        for (int64_t word = 0; word < (m + 63) / 64; word++)
            for (uint64_t left = possible[word]; left; left &= left - 1)
                features[t * most + counts[t]++] = word * 64 + __builtin_ctzll(left);
    }
    free(place);
    return 1;
}
