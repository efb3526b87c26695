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

/* Of a bfloat16 that is not negative, which is its own rank. */
static inline float number_of(int16_t rank) {
    uint32_t bits = (uint32_t)(uint16_t)rank << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Of each segment with pairs, k or more: 1 at the k largest, of those that are the same at the first. */
int64_t top_of_segments(int64_t threads, const float *values, const int64_t *offsets, int64_t segments, int64_t k,
                        uint8_t *chosen) {
    int64_t done = 0, longest = 1;
    for (int64_t t = 0; t < segments; t++)
        longest = offsets[t + 1] - offsets[t] > longest ? offsets[t + 1] - offsets[t] : longest;
#pragma omp parallel num_threads(threads)
    {
        int32_t *rank = malloc(longest * sizeof(int32_t));
#pragma omp for reduction(+ : done)
        for (int64_t t = 0; t < segments; t++) {
            int64_t first = offsets[t], n = offsets[t + 1] - first, missing = k;
            if (rank == NULL) continue;
            done++;
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
    }
    return done == segments;
}

/* Rows of rounded pre-activations: as `_possible` in `certain.py`, which says why, does it in NumPy. A row's features take `most` places, of which `counts` says how
   many it needs, ascending; none where it is left open. */
int64_t possible_top(int64_t threads, const int16_t *pre, int64_t rows, int64_t m, int64_t k, int64_t groups,
                     const float *error, const float *length, const float *most_off, const float *norms,
                     const float *errors, const float *bias_errors, float stored, int64_t most, int64_t *features,
                     int64_t *counts) {
    int64_t words = (m + 63) / 64, done = 0;
#pragma omp parallel num_threads(threads)
    {
        int64_t *place = malloc(m * (sizeof(int64_t) + 2 * sizeof(int32_t) + 3 * sizeof(int16_t)) + 8 * words);
        uint64_t *possible = (uint64_t *)(place + m); /* a bit a feature */
        int32_t *least = (int32_t *)(possible + words), *largest = least + m;
        int16_t *rank = (int16_t *)(largest + m), *maximum = rank + m, *found = maximum + m;
#pragma omp for reduction(+ : done)
        for (int64_t t = 0; t < rows; t++) {
            if (place == NULL) continue;
            done++;
            counts[t] = 0;
            maxima_bfloat16(pre + t * m, m, groups, rank, maximum);
            float reached = number_of(kth_bfloat16(maximum, groups, k));
            float bound = reached - 2 * (1 + 4 * stored) * most_off[t] - 4 * stored * reached;
            if (!(reached > 0 && bound > 0)) continue;
            int64_t n = reaching_bfloat16(rank, maximum, m, groups, (int16_t)(bits_of(bound) >> 16), found, place);
            if (n > most) continue;
            for (int64_t i = 0; i < n; i++) {
                float value = number_of(found[i]);
                float off = error[t] * norms[place[i]] + length[t] * errors[place[i]];
                off += bias_errors[place[i]] + stored * value;
                least[i] = rank_float32(bits_of(value - off));
                largest[i] = rank_float32(bits_of(value + off));
            }
            int32_t kth = kth_float32(least, n, k);
            memset(possible, 0, words * sizeof(uint64_t));
            for (int64_t i = 0; i < n; i++) possible[place[i] / 64] |= (uint64_t)(largest[i] >= kth) << place[i] % 64;
            for (int64_t word = 0; word < words; word++)
                for (uint64_t left = possible[word]; left; left &= left - 1)
                    features[t * most + counts[t]++] = word * 64 + __builtin_ctzll(left);
        }
        free(place);
    }
    return done == rows;
}
