/* The refinement on the CPU: what one iteration of `jrs.export.refinement`'s graph computes, in four passes over the
 * grid, each for one thread's planes. docs/refinement.md has the equations; the graph says why they are as they are.
 *
 * Images and fields are float32 in C order, components one after the other, (3,X,Y,Z). Windows and kernels are
 * separable: a plane is worked on along z and y row by row, while these lie in the cache, and the planes around it are
 * kept in a ring for the sums along x. `scratch` is the caller's; nothing here allocates or keeps a state.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define REACH 2 /* voxels from a window's centre to its side */
#define SIDE (2 * REACH + 1)
#define WINDOW (1.0f / (SIDE * SIDE * SIDE))
#define PARTS 8 /* running sums of a row: one a lane, and the same whatever the registers' width */

static inline int64_t slot(int64_t plane, int64_t size)
{
    return ((plane % size) + size) % size;
}

static inline int64_t clamped(int64_t i, int64_t n)
{
    return i < 0 ? 0 : i > n - 1 ? n - 1 : i;
}

/* Planes `start` to `stop` of `channels` of an image at x + u(x), the border repeated: out (channels, shape). */
WIDE EXPORT void jrs_warp(const float *data, const int64_t *shape, int64_t lanes, int64_t channels, const float *u,
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

/* Room for three quantities of a plane, whose sums over SIDE x SIDE voxels are wanted: a row of each, with zeros at
 * both ends, and the last SIDE rows of each summed along z. */
typedef struct {
    int64_t ny, nz, plane;
    float *lines[3], *rings[3], *zeros, *spare;
} bench_t;

/* Takes 20 rows and 12 floats of the scratch. */
INLINED bench_t set_up(const int64_t *shape, float **scratch)
{
    bench_t b = {shape[1], shape[2], shape[1] * shape[2], {NULL}, {NULL}, *scratch, NULL};
    float *next = b.zeros + b.nz;
    for (int q = 0; q < 3; q++) {
        b.lines[q] = next;
        next += b.nz + 2 * REACH;
    }
    memset(b.zeros, 0, (size_t)(next - b.zeros) * sizeof(float));
    for (int q = 0; q < 3; q++) {
        b.rings[q] = next;
        next += SIDE * b.nz;
    }
    b.spare = next;
    *scratch = next + b.nz;
    return b;
}

INLINED void sum_line(const float *RESTRICT line, int64_t nz, float *RESTRICT out)
{
    APART
    for (int64_t k = 0; k < nz; k++)
        out[k] = line[k] + line[k + 1] + line[k + 2] + line[k + 3] + line[k + 4];
}

INLINED void sum_rows(const float *const *rows, int64_t nz, float *RESTRICT out)
{
    const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *e = rows[4];
    APART
    for (int64_t k = 0; k < nz; k++)
        out[k] = a[k] + b[k] + c[k] + d[k] + e[k];
}

/* The bench's lines are row j of three quantities, nothing from row ny on: their sums along z, and, REACH rows behind,
 * those of the plane, to out (3,ny,nz). */
INLINED void slide(const bench_t *b, int64_t j, float *RESTRICT out)
{
    const float *rows[SIDE];
    for (int q = 0; q < 3; q++) {
        if (j < b->ny)
            sum_line(b->lines[q], b->nz, b->rings[q] + j % SIDE * b->nz);
        if (j < REACH)
            continue;
        for (int64_t t = 0; t < SIDE; t++) {
            int64_t row = j - 2 * REACH + t;
            rows[t] = row < 0 || row >= b->ny ? b->zeros : b->rings[q] + row % SIDE * b->nz;
        }
        sum_rows(rows, b->nz, out + q * b->plane + (j - REACH) * b->nz);
    }
}

/* A row of each of three quantities in the five planes of a ring around the middle one. */
typedef struct {
    const float *planes[3][SIDE];
} around_t;

INLINED around_t around(const float *ring, int64_t middle, int64_t plane, int64_t row)
{
    around_t a;
    for (int64_t q = 0; q < 3; q++)
        for (int64_t t = 0; t < SIDE; t++)
            a.planes[q][t] = ring + (slot(middle - REACH + t, SIDE) * 3 + q) * plane + row;
    return a;
}

/* The mean of a quantity over the window at voxel k of the row. */
INLINED float mean(const around_t *a, int q, int64_t k)
{
    const float *const *p = a->planes[q];
    return (p[0][k] + p[1][k] + p[2][k] + p[3][k] + p[4][k]) * WINDOW;
}

/* The sum of a row, in the same order on every processor. */
INLINED double total(const float *row, int64_t n)
{
    float parts[PARTS] = {0.0f};
    int64_t k = 0;
    for (; k + PARTS <= n; k += PARTS)
        for (int l = 0; l < PARTS; l++)
            parts[l] += row[k + l];
    double sum = 0.0;
    for (int l = 0; l < PARTS; l++)
        sum += (double)parts[l];
    for (; k < n; k++)
        sum += (double)row[k];
    return sum;
}

/* Planes `start` to `stop` of what belongs to the fixed image f alone, for weights w: 1 / (a window's mean weight),
 * 0 where that is below `least`; the window's mean of f, and 1 / (its variance + floor). `found` (X) counts the windows
 * that are compared. scratch: 15 planes, 20 rows and 12 floats. */
WIDE EXPORT void jrs_windows(const int64_t *shape, int64_t start, int64_t stop, const float *f, const float *w,
                             float least, float floor_, float *scratch, float *inverse, float *f_mean,
                             float *f_precision, double *found)
{
    bench_t b = set_up(shape, &scratch);
    float *ring = scratch, *RESTRICT one = b.lines[0] + REACH, *RESTRICT two = b.lines[1] + REACH;
    float *RESTRICT three = b.lines[2] + REACH;
    int64_t ny = b.ny, nz = b.nz, plane = b.plane;
    for (int64_t p = start - REACH; p < stop + REACH; p++) {
        float *sums = ring + slot(p, SIDE) * 3 * plane;
        if (p < 0 || p >= shape[0])
            memset(sums, 0, (size_t)(3 * plane) * sizeof(float));
        else
            for (int64_t j = 0; j < ny + REACH; j++) {
                const float *here = f + p * plane + j * nz, *share = w + p * plane + j * nz;
                APART
                for (int64_t k = 0; j < ny && k < nz; k++) {
                    one[k] = share[k];
                    two[k] = share[k] * here[k];
                    three[k] = share[k] * here[k] * here[k];
                }
                slide(&b, j, sums);
            }
        int64_t q = p - REACH;
        if (q < start)
            continue;
        int64_t count = 0;
        for (int64_t j = 0; j < ny; j++) {
            around_t a = around(ring, q, plane, j * nz);
            float *RESTRICT shares = inverse + q * plane + j * nz, *RESTRICT means = f_mean + q * plane + j * nz;
            float *RESTRICT precisions = f_precision + q * plane + j * nz;
            APART
            for (int64_t k = 0; k < nz; k++) {
                float amount = mean(&a, 0, k);
                float share = amount > least ? 1.0f / amount : 0.0f;
                float middle = mean(&a, 1, k) * share, variance = mean(&a, 2, k) * share - middle * middle;
                shares[k] = share;
                means[k] = middle;
                precisions[k] = 1.0f / ((variance > 0.0f ? variance : 0.0f) + floor_);
                count += amount > least;
            }
        }
        found[q] = (double)count;
    }
}

/* Planes `start` to `stop` of the force that raises the squared local correlation of f with the moved image m, added
 * to force (3, shape), or put there if it is the `first`; `similarity` (X) gets the planes' sums of that correlation.
 * scratch: 30 planes, 20 rows and 12 floats. */
WIDE EXPORT void jrs_force(const int64_t *shape, int64_t start, int64_t stop, const float *f, const float *m,
                           const float *w, const float *inverse, const float *f_mean, const float *f_precision,
                           float floor_, float smallest, int first, float *scratch, float *force, double *similarity)
{
    bench_t b = set_up(shape, &scratch);
    int64_t nx = shape[0], ny = b.ny, nz = b.nz, plane = b.plane, apart = nx * plane;
    float *moments = scratch, *ring = moments + 3 * SIDE * plane, *RESTRICT spare = b.spare;
    float *RESTRICT one = b.lines[0] + REACH, *RESTRICT two = b.lines[1] + REACH, *RESTRICT three = b.lines[2] + REACH;
    for (int64_t p = start - 2 * REACH; p < stop + 2 * REACH; p++) {
        /* The windows' moments along z and y. */
        float *sums = moments + slot(p, SIDE) * 3 * plane;
        if (p < 0 || p >= nx)
            memset(sums, 0, (size_t)(3 * plane) * sizeof(float));
        else
            for (int64_t j = 0; j < ny + REACH; j++) {
                int64_t row = p * plane + j * nz;
                const float *here = m + row, *there = f + row, *share = w + row;
                APART
                for (int64_t k = 0; j < ny && k < nz; k++) {
                    float part = share[k] * here[k];
                    one[k] = part;
                    two[k] = part * here[k];
                    three[k] = part * there[k];
                }
                slide(&b, j, sums);
            }
        /* Two planes behind, what each window asks for: a, b and c. */
        int64_t q = p - REACH;
        if (q < start - REACH)
            continue;
        float *asked = ring + slot(q, SIDE) * 3 * plane;
        if (q < 0 || q >= nx) {
            memset(asked, 0, (size_t)(3 * plane) * sizeof(float));
        } else {
            double sum = 0.0;
            for (int64_t j = 0; j < ny + REACH; j++) {
                if (j < ny) {
                    around_t at = around(moments, q, plane, j * nz);
                    int64_t row = q * plane + j * nz;
                    const float *share = inverse + row, *fm = f_mean + row, *fp = f_precision + row;
                    APART
                    for (int64_t k = 0; k < nz; k++) {
                        float middle = mean(&at, 0, k) * share[k];
                        float variance = mean(&at, 1, k) * share[k] - middle * middle;
                        variance = variance > 0.0f ? variance : 0.0f;
                        float covariance = mean(&at, 2, k) * share[k] - middle * fm[k];
                        float ratio = covariance * fp[k] / (variance + floor_);
                        float a = ratio * share[k];
                        float c = a * covariance / (variance > smallest ? variance : smallest);
                        one[k] = a;
                        two[k] = c;
                        three[k] = a * fm[k] - c * middle;
                        spare[k] = ratio * covariance;
                    }
                    sum += total(spare, nz);
                }
                slide(&b, j, asked);
            }
            if (q >= start && q < stop)
                similarity[q] = first ? sum : similarity[q] + sum;
        }
        /* Another two behind, what a voxel's windows ask of it. */
        int64_t s = q - REACH;
        if (s < start)
            continue;
        const float *before = m + clamped(s - 1, nx) * plane, *after = m + clamped(s + 1, nx) * plane;
        for (int64_t j = 0; j < ny; j++) {
            around_t of = around(ring, s, plane, j * nz);
            const float *here = m + s * plane, *centre = here + j * nz;
            const float *there = f + s * plane + j * nz, *share = w + s * plane + j * nz;
            const float *left = here + clamped(j - 1, ny) * nz, *right = here + clamped(j + 1, ny) * nz;
            float *RESTRICT x = force + s * plane + j * nz, *RESTRICT y = x + apart, *RESTRICT z = y + apart;
            one[-1] = centre[0];
            memcpy(one, centre, (size_t)nz * sizeof(float));
            one[nz] = centre[nz - 1];
            APART
            for (int64_t k = 0; k < nz; k++)
                spare[k] = share[k] * (there[k] * mean(&of, 0, k) - centre[k] * mean(&of, 1, k) - mean(&of, 2, k));
            if (first) {
                memset(x, 0, (size_t)nz * sizeof(float));
                memset(y, 0, (size_t)nz * sizeof(float));
                memset(z, 0, (size_t)nz * sizeof(float));
            }
            APART
            for (int64_t k = 0; k < nz; k++) {
                x[k] += spare[k] * (after[j * nz + k] - before[j * nz + k]);
                y[k] += spare[k] * (right[k] - left[k]);
                z[k] += spare[k] * (one[k + 1] - one[k - 1]);
            }
        }
        one[-1] = one[nz] = 0.0f;
    }
}

#if defined(__GNUC__)
typedef float lanes_t __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float)), may_alias));
#else
typedef float lanes_t;
#endif
#define LANES ((int64_t)(sizeof(lanes_t) / sizeof(float)))
#define POINTER ((int64_t)sizeof(void *) / (int64_t)sizeof(float)) /* in floats */

/* out[k] = the sum over t of kernel[t] * rows[t][k]: `many` times LANES voxels from k on, summed in registers. */
INLINED void convolve_at(const float *const *rows, const float *kernel, int64_t size, int64_t k, int many, float *out)
{
    lanes_t sums[4];
    for (int l = 0; l < many; l++)
        sums[l] = kernel[0] * *(const lanes_t *)(rows[0] + k + l * LANES);
    for (int64_t t = 1; t < size; t++)
        for (int l = 0; l < many; l++)
            sums[l] += kernel[t] * *(const lanes_t *)(rows[t] + k + l * LANES);
    for (int l = 0; l < many; l++)
        *(lanes_t *)(out + k + l * LANES) = sums[l];
}

/* out (n) = the sum over t of kernel[t] * rows[t]; `out` is none of the rows. */
INLINED void convolve(const float *const *rows, const float *kernel, int64_t size, int64_t n, float *out)
{
    int64_t k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES)
        convolve_at(rows, kernel, size, k, 4, out);
    for (; k + LANES <= n; k += LANES)
        convolve_at(rows, kernel, size, k, 1, out);
    if (k < n && n >= LANES) {
        convolve_at(rows, kernel, size, n - LANES, 1, out); /* some of them again */
        return;
    }
    for (; k < n; k++) {
        float sum = kernel[0] * rows[0][k];
        for (int64_t t = 1; t < size; t++)
            sum += kernel[t] * rows[t][k];
        out[k] = sum;
    }
}

/* Row j of plane p of component c of u + d + (d . grad) u, which is d + u(x + d) to first order; d = scale * update.
 * `line` has room for one voxel more at either end. */
INLINED void composed_row(const int64_t *shape, int64_t p, int64_t j, int64_t c, const float *u, const float *update,
                          float scale, float *RESTRICT line, float *RESTRICT out)
{
    int64_t nx = shape[0], ny = shape[1], nz = shape[2], plane = ny * nz, apart = nx * plane;
    const float *own = u + c * apart + j * nz, *d = update + p * plane + j * nz;
    const float *dx = d, *dy = d + apart, *dz = d + 2 * apart, *added = d + c * apart;
    const float half = 0.5f * scale;
    const float *before = own + clamped(p - 1, nx) * plane, *here = own + p * plane;
    const float *after = own + clamped(p + 1, nx) * plane;
    const float *left = here + (clamped(j - 1, ny) - j) * nz, *right = here + (clamped(j + 1, ny) - j) * nz;
    line[0] = here[0];
    memcpy(line + 1, here, (size_t)nz * sizeof(float));
    line[nz + 1] = here[nz - 1];
    APART
    for (int64_t k = 0; k < nz; k++)
        out[k] = here[k] + scale * added[k] +
                 half * (dx[k] * (after[k] - before[k]) + dy[k] * (right[k] - left[k]) + dz[k] * (line[k + 2] - line[k]));
}

/* Planes `start` to `stop` of a field (3, shape) convolved along each axis with `kernel`, the border repeated. With an
 * `update` the field is first composed with scale * update. `largest` (X), if given, gets each plane's largest squared
 * length. scratch, aligned for pointers: 2 radius + 2 planes, 2 rows and 6 radius + 4 floats. */
WIDE EXPORT void jrs_smooth(const int64_t *shape, int64_t start, int64_t stop, const float *field, const float *update,
                            float scale, const float *kernel, int64_t radius, float *scratch, float *out,
                            float *largest)
{
    int64_t nx = shape[0], ny = shape[1], nz = shape[2], plane = ny * nz, apart = nx * plane, size = 2 * radius + 1;
    const float **from = (const float **)scratch;
    float *line = scratch + size * POINTER, *spare = line + nz + 2 * radius;
    float *rows = spare + nz + 2, *ring = rows + plane;
    for (int64_t c = 0; c < 3; c++)
        for (int64_t p = start - radius; p < stop + radius; p++) {
            int64_t source = clamped(p, nx);
            for (int64_t j = 0; j < ny; j++) {
                float *middle = line + radius;
                if (update)
                    composed_row(shape, source, j, c, field, update, scale, spare, middle);
                else
                    memcpy(middle, field + c * apart + source * plane + j * nz, (size_t)nz * sizeof(float));
                for (int64_t k = 0; k < radius; k++) {
                    line[k] = middle[0];
                    middle[nz + k] = middle[nz - 1];
                }
                for (int64_t t = 0; t < size; t++)
                    from[t] = line + t;
                convolve(from, kernel, size, nz, rows + j * nz);
            }
            float *smoothed = ring + slot(p, size) * plane;
            for (int64_t j = 0; j < ny; j++) {
                for (int64_t t = 0; t < size; t++)
                    from[t] = rows + clamped(j - radius + t, ny) * nz;
                convolve(from, kernel, size, nz, smoothed + j * nz);
            }
            int64_t q = p - radius;
            if (q < start)
                continue;
            for (int64_t t = 0; t < size; t++)
                from[t] = ring + slot(q - radius + t, size) * plane;
            convolve(from, kernel, size, plane, out + c * apart + q * plane);
        }
    if (!largest)
        return;
    for (int64_t q = start; q < stop; q++) {
        const float *x = out + q * plane, *y = x + apart, *z = y + apart;
        float most[PARTS] = {0.0f};
        int64_t n = 0;
        for (; n + PARTS <= plane; n += PARTS)
            for (int l = 0; l < PARTS; l++) {
                float square = x[n + l] * x[n + l] + y[n + l] * y[n + l] + z[n + l] * z[n + l];
                most[l] = square > most[l] ? square : most[l];
            }
        for (; n < plane; n++) {
            float square = x[n] * x[n] + y[n] * y[n] + z[n] * z[n];
            most[0] = square > most[0] ? square : most[0];
        }
        for (int l = 1; l < PARTS; l++)
            most[0] = most[l] > most[0] ? most[l] : most[0];
        largest[q] = most[0];
    }
}
