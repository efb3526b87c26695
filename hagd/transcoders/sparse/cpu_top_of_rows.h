/* For numbers of BITS bits, seen as INTEGER: all bits of a negative number but the sign turn round, and NaN becomes the
   largest, so that integers have the order of the numbers. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST ((INTEGER)(((int64_t)1 << (BITS - 1)) - 1))

static inline INTEGER NAME(rank)(INTEGER bits) {
    return (INTEGER)(bits & MOST) > INFINITE ? MOST : bits < 0 ? (INTEGER)(bits ^ MOST) : bits;
}

/* The k-th largest of n, bit by bit. */
static INTEGER NAME(kth)(const INTEGER *rank, int64_t n, int64_t k) {
    int64_t kth = -((int64_t)1 << (BITS - 1));
    for (int bit = BITS - 1; bit >= 0; bit--) {
        INTEGER higher = (INTEGER)(kth + ((int64_t)1 << bit));
        int64_t reach = 0;
        for (int64_t from = 0; from < n; from += INT16_MAX) { /* so many fit a narrow count, of which vectors hold more */
            int64_t to = n - from < INT16_MAX ? n : from + INT16_MAX;
            COUNT some = 0;
            for (int64_t i = from; i < to; i++) some += rank[i] >= higher;
            reach += some;
        }
        if (reach >= k) kth = higher;
    }
    return (INTEGER)kth;
}

/* Ranks `[m]` of a row, and the largest of each of so many groups of columns that lie `groups` apart. */
static void NAME(maxima)(const INTEGER *row, int64_t m, int64_t groups, INTEGER *restrict rank,
                         INTEGER *restrict maximum) {
    for (int64_t c = 0; c < m; c++) rank[c] = NAME(rank)(row[c]);
    memcpy(maximum, rank, groups * sizeof(INTEGER));
    for (int64_t first = groups; first < m; first += groups) {
        int64_t members = m - first < groups ? m - first : groups;
        for (int64_t i = 0; i < members; i++) maximum[i] = rank[first + i] > maximum[i] ? rank[first + i] : maximum[i];
    }
}

/* How many columns reach a bound, their ranks, and where they are, group by group. */
static int64_t NAME(reaching)(const INTEGER *rank, const INTEGER *maximum, int64_t m, int64_t groups, INTEGER bound,
                              INTEGER *restrict found, int64_t *restrict place) {
    int64_t n = 0;
    for (int64_t i = 0; i < groups; i++)
        if (maximum[i] >= bound)
            for (int64_t c = i; c < m; c += groups) {
                found[n] = rank[c];
                place[n] = c;
                n += rank[c] >= bound;
            }
    return n;
}

/* The k largest of each row of `[c, m]`. They reach the k-th largest of the groups' maxima; few others do. */
int64_t NAME(top_of_rows)(int64_t threads, const INTEGER *pre, int64_t rows, int64_t stride, int64_t m, int64_t k,
                          int64_t groups, INTEGER *values, int64_t *columns) {
    int64_t words = (m + 63) / 64, done = 0;
#pragma omp parallel num_threads(threads)
    {
        uint64_t *larger = malloc(2 * words * sizeof(uint64_t) + m * sizeof(int64_t) + 3 * m * sizeof(INTEGER));
        uint64_t *same = larger + words; /* both a bit a column */
        int64_t *place = (int64_t *)(same + words);
        INTEGER *rank = (INTEGER *)(place + m), *maximum = rank + m, *found = maximum + m;
#pragma omp for reduction(+ : done)
        for (int64_t row = 0; row < rows; row++) {
            if (larger == NULL) continue;
            const INTEGER *of = pre + row * stride;
            NAME(maxima)(of, m, groups, rank, maximum);
            int64_t n = NAME(reaching)(rank, maximum, m, groups, NAME(kth)(maximum, groups, k), found, place);
            INTEGER bound = NAME(kth)(found, n, k);
            memset(larger, 0, 2 * words * sizeof(uint64_t));
            int64_t missing = k;
            for (int64_t i = 0; i < n; i++) {
                uint64_t *set = found[i] > bound ? larger : same;
                set[place[i] / 64] |= (uint64_t)(found[i] >= bound) << place[i] % 64;
                missing -= found[i] > bound;
            }
            int64_t kept = row * k;
            for (int64_t word = 0; word < words; word++)
                for (uint64_t left = larger[word] | same[word]; left; left &= left - 1) {
                    if ((left & -left & same[word]) && missing-- <= 0) continue;
                    columns[kept] = word * 64 + __builtin_ctzll(left);
                    values[kept] = of[columns[kept]];
                    kept++;
                }
            done++;
        }
        free(larger);
    }
    return done == rows;
}

#undef MOST
