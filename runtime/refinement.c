/* The refinement on the CPU: what one iteration of `jrs.export.refinement`'s graph computes, in four passes over the
 * grid, each for one thread's planes. docs/refinement.md has the equations; the graph says why they are as they are.
 *
 * Images and fields are float32 in C order, components one after the other, (3,X,Y,Z). Windows and kernels are
 * separable: a plane is worked on along z and y while it lies in the cache, and the planes around it are kept in a ring
 * for the sums along x. `scratch` is the caller's; nothing here allocates or keeps a state.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* Twice the speed where the processor has wide registers; the loader chooses. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("arch=haswell", "default")))
#define INLINED static inline __attribute__((always_inline))
#else
#define WIDE
#define INLINED static inline
#endif

#define REACH 2 /* voxels from a window's centre to its side */
#define SIDE (2 * REACH + 1)
#define WINDOW (1.0f / (SIDE * SIDE * SIDE))

static inline int64_t slot(int64_t plane, int64_t size)
{
    return ((plane % size) + size) % size;
}

static inline int64_t clamped(int64_t i, int64_t n)
{
    return i < 0 ? 0 : i > n - 1 ? n - 1 : i;
}

/* Planes `start` to `stop` of `channels` of an image at x + u(x), the border repeated: out (channels, shape). */
EXPORT void jrs_warp(const float *data, const int64_t *shape, int64_t lanes, int64_t channels, const float *u,
                     int64_t start, int64_t stop, float *out)
{
    volume_t v = {data, {shape[0], shape[1], shape[2]}, lanes};
    int64_t apart = shape[0] * shape[1] * shape[2];
    float values[4];
    for (int64_t i = start; i < stop; i++)
        for (int64_t j = 0; j < shape[1]; j++) {
            int64_t row = (i * shape[1] + j) * shape[2];
            for (int64_t k = 0; k < shape[2]; k++) {
                const float *d = u + row + k;
                value_at(&v, (float)i + d[0], (float)j + d[apart], (float)k + d[2 * apart], values);
                for (int64_t l = 0; l < channels; l++)
                    out[l * apart + row + k] = values[l];
            }
        }
}

/* Sums of a plane (ny,nz) over SIDE x SIDE voxels, zeros outside. `line` has nz + 2 REACH floats, its ends zero. */
INLINED void sum_plane(const float *in, int64_t ny, int64_t nz, float *line, float *rows, const float *zeros,
                       float *out)
{
    for (int64_t j = 0; j < ny; j++) {
        float *to = rows + j * nz;
        memcpy(line + REACH, in + j * nz, (size_t)nz * sizeof(float));
        for (int64_t k = 0; k < nz; k++)
            to[k] = line[k] + line[k + 1] + line[k + 2] + line[k + 3] + line[k + 4];
    }
    for (int64_t j = 0; j < ny; j++) {
        const float *a = j >= 2 ? rows + (j - 2) * nz : zeros, *b = j >= 1 ? rows + (j - 1) * nz : zeros;
        const float *c = rows + j * nz;
        const float *d = j + 1 < ny ? rows + (j + 1) * nz : zeros, *e = j + 2 < ny ? rows + (j + 2) * nz : zeros;
        float *to = out + j * nz;
        for (int64_t k = 0; k < nz; k++)
            to[k] = a[k] + b[k] + c[k] + d[k] + e[k];
    }
}

/* The sizes of a plane, and the room to sum one in. */
typedef struct {
    int64_t ny, nz, plane;
    float *line, *rows, *zeros, *product;
} bench_t;

INLINED bench_t set_up(const int64_t *shape, float **scratch)
{
    bench_t b = {shape[1], shape[2], shape[1] * shape[2], NULL, NULL, NULL, NULL};
    b.line = *scratch;
    b.zeros = b.line + b.nz + 2 * REACH;
    b.rows = b.zeros + b.nz;
    b.product = b.rows + b.plane;
    *scratch = b.product + b.plane;
    memset(b.line, 0, (size_t)(2 * b.nz + 2 * REACH) * sizeof(float));
    return b;
}

/* The mean over windows at voxel n of the middle of five planes; the quantities of a ring lie `plane` apart. */
#define MEAN(r, n) ((r[0][n] + r[1][n] + r[2][n] + r[3][n] + r[4][n]) * WINDOW)

INLINED void around(const float *ring, int64_t quantities, int64_t quantity, int64_t middle, int64_t plane,
                    const float **planes)
{
    for (int64_t t = 0; t < SIDE; t++)
        planes[t] = ring + (slot(middle - REACH + t, SIDE) * quantities + quantity) * plane;
}

/* Planes `start` to `stop` of what belongs to the fixed image f alone, for weights w: 1 / (a window's mean weight),
 * 0 where that is below `least`; the window's mean of f, and 1 / (its variance + floor). `found` (X) counts the windows
 * that are compared. scratch: 17 planes, 2 rows and 4 floats. */
WIDE EXPORT void jrs_windows(const int64_t *shape, int64_t start, int64_t stop, const float *f, const float *w,
                             float least, float floor_, float *scratch, float *inverse, float *f_mean,
                             float *f_precision, double *found)
{
    bench_t b = set_up(shape, &scratch);
    float *ring = scratch;
    const float *amounts[SIDE], *means[SIDE], *squares[SIDE];
    for (int64_t p = start - REACH; p < stop + REACH; p++) {
        float *sums = ring + slot(p, SIDE) * 3 * b.plane;
        if (p < 0 || p >= shape[0]) {
            memset(sums, 0, (size_t)(3 * b.plane) * sizeof(float));
        } else {
            const float *here = f + p * b.plane, *share = w + p * b.plane;
            sum_plane(share, b.ny, b.nz, b.line, b.rows, b.zeros, sums);
            for (int64_t n = 0; n < b.plane; n++)
                b.product[n] = share[n] * here[n];
            sum_plane(b.product, b.ny, b.nz, b.line, b.rows, b.zeros, sums + b.plane);
            for (int64_t n = 0; n < b.plane; n++)
                b.product[n] = share[n] * here[n] * here[n];
            sum_plane(b.product, b.ny, b.nz, b.line, b.rows, b.zeros, sums + 2 * b.plane);
        }
        int64_t q = p - REACH;
        if (q < start)
            continue;
        around(ring, 3, 0, q, b.plane, amounts);
        around(ring, 3, 1, q, b.plane, means);
        around(ring, 3, 2, q, b.plane, squares);
        int64_t count = 0;
        for (int64_t n = 0; n < b.plane; n++) {
            float amount = MEAN(amounts, n);
            float share = amount > least ? 1.0f / amount : 0.0f;
            float mean = MEAN(means, n) * share, variance = MEAN(squares, n) * share - mean * mean;
            inverse[q * b.plane + n] = share;
            f_mean[q * b.plane + n] = mean;
            f_precision[q * b.plane + n] = 1.0f / ((variance > 0.0f ? variance : 0.0f) + floor_);
            count += amount > least;
        }
        found[q] = (double)count;
    }
}

/* Planes `start` to `stop` of the force that raises the squared local correlation of f with the moved image m, added
 * to force (3, shape), or put there if it is the `first`; `similarity` (X) gets the planes' sums of that correlation.
 * scratch: 35 planes, 2 rows and 4 floats. */
WIDE EXPORT void jrs_force(const int64_t *shape, int64_t start, int64_t stop, const float *f, const float *m,
                           const float *w, const float *inverse, const float *f_mean, const float *f_precision,
                           float floor_, float smallest, int first, float *scratch, float *force, double *similarity)
{
    bench_t b = set_up(shape, &scratch);
    int64_t nx = shape[0], ny = b.ny, nz = b.nz, plane = b.plane, apart = nx * plane;
    float *moments = scratch, *parts = moments + 3 * SIDE * plane, *ring = parts + 3 * plane;
    const float *r0[SIDE], *r1[SIDE], *r2[SIDE];
    for (int64_t p = start - 2 * REACH; p < stop + 2 * REACH; p++) {
        /* The windows' moments along z and y. */
        float *sums = moments + slot(p, SIDE) * 3 * plane;
        if (p < 0 || p >= nx) {
            memset(sums, 0, (size_t)(3 * plane) * sizeof(float));
        } else {
            const float *here = m + p * plane, *there = f + p * plane, *share = w + p * plane;
            for (int64_t n = 0; n < plane; n++)
                b.product[n] = share[n] * here[n];
            sum_plane(b.product, ny, nz, b.line, b.rows, b.zeros, sums);
            for (int64_t n = 0; n < plane; n++)
                b.product[n] = share[n] * here[n] * here[n];
            sum_plane(b.product, ny, nz, b.line, b.rows, b.zeros, sums + plane);
            for (int64_t n = 0; n < plane; n++)
                b.product[n] = share[n] * here[n] * there[n];
            sum_plane(b.product, ny, nz, b.line, b.rows, b.zeros, sums + 2 * plane);
        }
        /* Two planes behind, what each window asks for: a, b and c. */
        int64_t q = p - REACH;
        if (q < start - REACH)
            continue;
        float *asked = ring + slot(q, SIDE) * 3 * plane;
        if (q < 0 || q >= nx) {
            memset(asked, 0, (size_t)(3 * plane) * sizeof(float));
        } else {
            around(moments, 3, 0, q, plane, r0);
            around(moments, 3, 1, q, plane, r1);
            around(moments, 3, 2, q, plane, r2);
            const float *share = inverse + q * plane, *fm = f_mean + q * plane, *fp = f_precision + q * plane;
            double total = 0.0;
            for (int64_t j = 0; j < ny; j++) {
                float row = 0.0f;
                for (int64_t n = j * nz; n < (j + 1) * nz; n++) {
                    float mean = MEAN(r0, n) * share[n], variance = MEAN(r1, n) * share[n] - mean * mean;
                    variance = variance > 0.0f ? variance : 0.0f;
                    float covariance = MEAN(r2, n) * share[n] - mean * fm[n];
                    float ratio = covariance * fp[n] / (variance + floor_);
                    float a = ratio * share[n], c = a * covariance / (variance > smallest ? variance : smallest);
                    parts[n] = a;
                    parts[plane + n] = c;
                    parts[2 * plane + n] = a * fm[n] - c * mean;
                    row += ratio * covariance;
                }
                total += (double)row;
            }
            if (q >= start && q < stop)
                similarity[q] = first ? total : similarity[q] + total;
            for (int64_t quantity = 0; quantity < 3; quantity++)
                sum_plane(parts + quantity * plane, ny, nz, b.line, b.rows, b.zeros, asked + quantity * plane);
        }
        /* Another two behind, what a voxel's windows ask of it. */
        int64_t s = q - REACH;
        if (s < start)
            continue;
        around(ring, 3, 0, s, plane, r0);
        around(ring, 3, 1, s, plane, r1);
        around(ring, 3, 2, s, plane, r2);
        const float *here = m + s * plane, *there = f + s * plane, *share = w + s * plane;
        for (int64_t n = 0; n < plane; n++)
            b.product[n] = share[n] * (there[n] * MEAN(r0, n) - here[n] * MEAN(r1, n) - MEAN(r2, n));
        const float *before = m + clamped(s - 1, nx) * plane, *after = m + clamped(s + 1, nx) * plane;
        for (int64_t j = 0; j < ny; j++) {
            const float *slope = b.product + j * nz, *centre = here + j * nz;
            const float *left = here + clamped(j - 1, ny) * nz, *right = here + clamped(j + 1, ny) * nz;
            float *x = force + s * plane + j * nz, *y = x + apart, *z = y + apart;
            memcpy(b.line + REACH, centre, (size_t)nz * sizeof(float));
            b.line[REACH - 1] = centre[0];
            b.line[REACH + nz] = centre[nz - 1];
            if (first) {
                memset(x, 0, (size_t)nz * sizeof(float));
                memset(y, 0, (size_t)nz * sizeof(float));
                memset(z, 0, (size_t)nz * sizeof(float));
            }
            for (int64_t k = 0; k < nz; k++) {
                x[k] += slope[k] * (after[j * nz + k] - before[j * nz + k]);
                y[k] += slope[k] * (right[k] - left[k]);
                z[k] += slope[k] * (b.line[REACH + 1 + k] - b.line[REACH - 1 + k]);
            }
            b.line[REACH - 1] = b.line[REACH + nz] = 0.0f;
        }
    }
}

/* A plane (ny,nz) convolved along z and y with a kernel of 2 radius + 1 values, the border repeated. */
INLINED void smooth_plane(const float *in, int64_t ny, int64_t nz, const float *kernel, int64_t radius, float *line,
                          float *rows, float *out)
{
    for (int64_t j = 0; j < ny; j++) {
        const float *from = in + j * nz;
        float *to = rows + j * nz;
        for (int64_t k = 0; k < radius; k++) {
            line[k] = from[0];
            line[radius + nz + k] = from[nz - 1];
        }
        memcpy(line + radius, from, (size_t)nz * sizeof(float));
        for (int64_t k = 0; k < nz; k++)
            to[k] = kernel[radius] * line[radius + k];
        for (int64_t t = 0; t < radius; t++)
            for (int64_t k = 0; k < nz; k++)
                to[k] += kernel[t] * line[k + t] + kernel[2 * radius - t] * line[k + 2 * radius - t];
    }
    for (int64_t j = 0; j < ny; j++) {
        float *to = out + j * nz;
        for (int64_t k = 0; k < nz; k++)
            to[k] = kernel[radius] * rows[j * nz + k];
        for (int64_t t = 0; t < radius; t++) {
            const float *low = rows + clamped(j - radius + t, ny) * nz, *high = rows + clamped(j + radius - t, ny) * nz;
            for (int64_t k = 0; k < nz; k++)
                to[k] += kernel[t] * low[k] + kernel[2 * radius - t] * high[k];
        }
    }
}

/* Plane p of component c of u + d + (d . grad) u, which is d + u(x + d) to first order; d = scale * update. */
INLINED void composed_plane(const int64_t *shape, int64_t p, int64_t c, const float *u, const float *update,
                            float scale, float *line, float *out)
{
    int64_t nx = shape[0], ny = shape[1], nz = shape[2], plane = ny * nz, apart = nx * plane;
    const float *own = u + c * apart, *d = update + p * plane;
    const float half = 0.5f * scale;
    const float *before = own + clamped(p - 1, nx) * plane, *here = own + p * plane;
    const float *after = own + clamped(p + 1, nx) * plane;
    for (int64_t j = 0; j < ny; j++) {
        int64_t row = j * nz;
        const float *left = here + clamped(j - 1, ny) * nz, *right = here + clamped(j + 1, ny) * nz;
        line[0] = here[row];
        line[nz + 1] = here[row + nz - 1];
        memcpy(line + 1, here + row, (size_t)nz * sizeof(float));
        for (int64_t k = 0; k < nz; k++)
            out[row + k] = here[row + k] + scale * d[c * apart + row + k] +
                           half * (d[row + k] * (after[row + k] - before[row + k]) +
                                   d[apart + row + k] * (right[k] - left[k]) +
                                   d[2 * apart + row + k] * (line[k + 2] - line[k]));
    }
}

/* Planes `start` to `stop` of a field (3, shape) convolved along each axis with `kernel`, the border repeated. With an
 * `update` the field is first composed with scale * update. `largest` (X), if given, gets each plane's largest squared
 * length. scratch: 2 radius + 3 planes, one row and 2 radius + 2 floats. */
WIDE EXPORT void jrs_smooth(const int64_t *shape, int64_t start, int64_t stop, const float *field, const float *update,
                            float scale, const float *kernel, int64_t radius, float *scratch, float *out,
                            float *largest)
{
    int64_t nx = shape[0], ny = shape[1], nz = shape[2], plane = ny * nz, apart = nx * plane, size = 2 * radius + 1;
    float *line = scratch, *rows = line + nz + 2 * radius + 2, *composed = rows + plane, *ring = composed + plane;
    for (int64_t c = 0; c < 3; c++)
        for (int64_t p = start - radius; p < stop + radius; p++) {
            int64_t source = clamped(p, nx);
            const float *in = field + c * apart + source * plane;
            if (update) {
                composed_plane(shape, source, c, field, update, scale, line, composed);
                in = composed;
            }
            smooth_plane(in, ny, nz, kernel, radius, line, rows, ring + slot(p, size) * plane);
            int64_t q = p - radius;
            if (q < start)
                continue;
            float *to = out + c * apart + q * plane;
            const float *middle = ring + slot(q, size) * plane;
            for (int64_t n = 0; n < plane; n++)
                to[n] = kernel[radius] * middle[n];
            for (int64_t t = 0; t < radius; t++) {
                const float *low = ring + slot(q - radius + t, size) * plane;
                const float *high = ring + slot(q + radius - t, size) * plane;
                for (int64_t n = 0; n < plane; n++)
                    to[n] += kernel[t] * low[n] + kernel[2 * radius - t] * high[n];
            }
        }
    if (!largest)
        return;
    for (int64_t q = start; q < stop; q++) {
        const float *x = out + q * plane, *y = x + apart, *z = y + apart;
        float most = 0.0f;
        for (int64_t n = 0; n < plane; n++) {
            float square = x[n] * x[n] + y[n] * y[n] + z[n] * z[n];
            most = square > most ? square : most;
        }
        largest[q] = most;
    }
}
