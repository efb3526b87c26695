/* Sums over the active pairs of a sparse dictionary: `cpu_products.py` says what each function computes. In GCC's vector
   types, which Clang has too.

   Every sum has one order and one thread: results are the same for any number of threads. Functions give 0 where there
   is no memory, else 1. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define SLAB_VECTORS 4 /* sums that stay in registers */
#define SLAB (LANES * SLAB_VECTORS)

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

static inline vector load(const float *from) { return *(const vector *)from; }

static inline float total(vector of) {
    half sum = ((half *)&of)[0] + ((half *)&of)[1];
    quarter rest = ((quarter *)&sum)[0] + ((quarter *)&sum)[1];
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

static inline float dot(const float *x, const float *row, int64_t d) {
    vector sum = {0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) sum += load(x + c) * load(row + c);
    float rest = 0;
    for (; c < d; c++) rest += x[c] * row[c];
    return total(sum) + rest;
}

/* Four of `dot`, with the same bits: what is read of `x` serves four rows. */
static inline void four_dots(const float *x, const float *const row[4], int64_t d, float *out) {
    vector sum[4] = {{0}, {0}, {0}, {0}};
    float rest[4] = {0, 0, 0, 0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        vector part = load(x + c);
        for (int i = 0; i < 4; i++) sum[i] += part * load(row[i] + c);
    }
    for (; c < d; c++)
        for (int i = 0; i < 4; i++) rest[i] += x[c] * row[i][c];
    for (int i = 0; i < 4; i++) out[i] = total(sum[i]) + rest[i];
}

static inline void dots(const float *x, const int64_t *index, int64_t n, const float *w, int64_t stride, int64_t d,
                        float *out) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        const float *row[4];
        for (int i = 0; i < 4; i++) row[i] = w + index[p + i] * stride;
        four_dots(x, row, d, out + p);
    }
    for (; p < n; p++) out[p] = dot(x, w + index[p] * stride, d);
}

/* out += Σ_p v_p w[index_p] */
static inline void add_rows(const float *v, const int64_t *index, int64_t n, const float *w, int64_t stride, int64_t d,
                            float *restrict out) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        const float *row[4];
        for (int i = 0; i < 4; i++) row[i] = w + index[p + i] * stride;
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            vector sum = load(out + c);
            for (int i = 0; i < 4; i++) sum += v[p + i] * load(row[i] + c);
            *(vector *)(out + c) = sum;
        }
        for (; c < d; c++)
            for (int i = 0; i < 4; i++) out[c] += v[p + i] * row[i][c];
    }
    for (; p < n; p++)
        for (int64_t c = 0; c < d; c++) out[c] += v[p] * w[index[p] * stride + c];
}

int64_t row_dots(int64_t threads, const float *a, int64_t a_stride, const int64_t *index,
                 const int64_t *offsets, int64_t tokens, const float *w, int64_t w_stride, int64_t d, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t p = offsets[t];
        dots(a + t * a_stride, index + p, offsets[t + 1] - p, w, w_stride, d, out + p);
    }
    return 1;
}

int64_t segment_sums(int64_t threads, const float *v, const int64_t *index, const int64_t *starts,
                     int64_t segments, int64_t n, const float *w, int64_t w_stride, int64_t d, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < segments; i++) {
        memset(out + i * d, 0, d * sizeof(float));
        int64_t p = starts[i], stop = i + 1 < segments ? starts[i + 1] : n;
        add_rows(v + p, index + p, stop - p, w, w_stride, d, out + i * d);
    }
    return 1;
}

/* The rows of a token are in the cache when they are read for the second time. */
int64_t segment_errors(int64_t threads, const float *v, const int64_t *index, const int64_t *offsets,
                       int64_t tokens, const float *w, int64_t w_stride, int64_t d, const float *bias, const float *y,
                       int64_t y_stride, float *error, float *squared, float *products) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t p = offsets[t], n = offsets[t + 1] - p;
        float *e = error + t * d;
        for (int64_t c = 0; c < d; c++) e[c] = bias[c] - y[t * y_stride + c];
        add_rows(v + p, index + p, n, w, w_stride, d, e);
        squared[t] = dot(e, e, d);
        dots(e, index + p, n, w, w_stride, d, products + p);
    }
    return 1;
}

/* Long segments: what all rows have of a slab of columns is copied to where it lies together, and the cache holds it. */
int64_t long_segment_sums(int64_t threads, const float *v, const int64_t *index, const int64_t *starts,
                          int64_t segments, int64_t n, const float *a, int64_t a_stride, int64_t rows, int64_t d,
                          float *out) {
    float *slab = calloc((rows + 1) * SLAB, sizeof(float)); /* none asked for may give none */
    if (slab == NULL) return 0;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < d; first += SLAB) {
        int64_t width = d - first < SLAB ? d - first : SLAB;
#pragma omp for
        for (int64_t t = 0; t < rows; t++) memcpy(slab + t * SLAB, a + t * a_stride + first, width * sizeof(float));
#pragma omp for
        for (int64_t j = 0; j < segments; j++) {
            int64_t stop = j + 1 < segments ? starts[j + 1] : n;
            vector sum[SLAB_VECTORS] = {{0}};
            for (int64_t p = starts[j]; p < stop; p++)
                for (int i = 0; i < SLAB_VECTORS; i++) sum[i] += v[p] * load(slab + index[p] * SLAB + i * LANES);
            memcpy(out + j * d + first, sum, width * sizeof(float));
        }
    }
    free(slab);
    return 1;
}

int64_t value_sums(int64_t threads, const float *v, const int64_t *starts, int64_t segments, int64_t n,
                   float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < segments; i++) {
        int64_t stop = i + 1 < segments ? starts[i + 1] : n;
        float sum = 0;
        for (int64_t p = starts[i]; p < stop; p++) sum += v[p];
        out[i] = sum;
    }
    return 1;
}

/* Counting sort of pairs by feature: `starts`, zeros, has a number more than there are features. */
int64_t order_pairs(int64_t threads, const int64_t *index, const int64_t *offsets, int64_t tokens, int64_t m, int64_t *starts,
                    int64_t *order, int64_t *token) {
    (void)threads; /* one is enough */
    for (int64_t p = offsets[0]; p < offsets[tokens]; p++) starts[index[p] + 1]++;
    for (int64_t j = 0; j < m; j++) starts[j + 1] += starts[j];
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t p = offsets[t]; p < offsets[t + 1]; p++) {
            int64_t place = starts[index[p]]++;
            order[place] = p;
            token[place] = t;
        }
    memmove(starts + 1, starts, m * sizeof(int64_t)); /* each is now where the next one starts */
    starts[0] = 0;
    return 1;
}
