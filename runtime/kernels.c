/* Trilinear sampling, resampling through a displacement field, a field's inverse and determinants, the sums of mutual
 * information and its derivative, for one thread's share. Python splits the work (jrs.runtime.native); nothing here
 * allocates, locks or keeps a state.
 *
 * Volumes are float32 in C order, (X,Y,Z) with `lanes` = 1, or (X,Y,Z,4) with `lanes` = 4: the channels of a voxel
 * beside one another, so that one load fetches all of a corner. Coordinates are voxel indices of the volume that is
 * sampled. A point further than half a voxel outside takes the value `outside`, as in ITK, or with `border` that of
 * the nearest voxel.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include "kernels.h"

/* Coordinates of a row are worked out this many at a time. */
#define CHUNK 256

/* The value of a field (4 lanes) at a point and its derivative along each axis, the latter [axis][lane]. */
INLINED void value_and_slope(const volume_t *v, float x, float y, float z, float *out, float slope[3][4])
{
    int64_t di, dj, dk;
    float a, b, c;
    int64_t i = corner(x, v->shape[0], &di, &a);
    int64_t j = corner(y, v->shape[1], &dj, &b);
    int64_t k = corner(z, v->shape[2], &dk, &c);
    int64_t row = v->shape[2] * 4, plane = v->shape[1] * row;
    const float *p = v->data + i * plane + j * row + k * 4;
    const float *q = p + dj * row, *r = p + di * plane, *s = r + dj * row;
    dk *= 4;
    for (int l = 0; l < 4; l++) {
        /* Along z first, then y, then x. */
        float p0 = p[l], p1 = p[dk + l] - p0, q0 = q[l], q1 = q[dk + l] - q0;
        float r0 = r[l], r1 = r[dk + l] - r0, s0 = s[l], s1 = s[dk + l] - s0;
        float pp = p0 + c * p1, qq = q0 + c * q1, rr = r0 + c * r1, ss = s0 + c * s1;
        float pz = p1 + b * (q1 - p1), rz = r1 + b * (s1 - r1);
        float near = pp + b * (qq - pp), far = rr + b * (ss - rr);
        out[l] = near + a * (far - near);
        slope[0][l] = far - near;
        slope[1][l] = (qq - pp) + a * ((ss - rr) - (qq - pp));
        slope[2][l] = pz + a * (rz - pz);
    }
}

/* Planes `start` to `stop` of a field laid out for sampling, out (X,Y,Z,4): `linear` (3x3) times the vectors
 * (3, shape), continued by `more` voxels each way with the border's value, times one window an axis. */
WIDE EXPORT void jrs_lay_out(const float *vectors, const int64_t *shape, const int64_t *more, const double *linear,
                        const float *along, const float *across, const float *up, int64_t start, int64_t stop,
                        float *out)
{
    int64_t ny = shape[1] + 2 * more[1], nz = shape[2] + 2 * more[2], apart = shape[0] * shape[1] * shape[2];
    float m[9];
    for (int n = 0; n < 9; n++)
        m[n] = (float)linear[n];
    for (int64_t i = start; i < stop; i++)
        for (int64_t j = 0; j < ny; j++) {
            int64_t x = i - more[0], y = j - more[1];
            x = x < 0 ? 0 : x > shape[0] - 1 ? shape[0] - 1 : x;
            y = y < 0 ? 0 : y > shape[1] - 1 ? shape[1] - 1 : y;
            const float *row = vectors + (x * shape[1] + y) * shape[2];
            float *to = out + (i * ny + j) * nz * 4, window = along[i] * across[j];
            for (int64_t k = 0; k < nz; k++) {
                int64_t z = k - more[2];
                z = z < 0 ? 0 : z > shape[2] - 1 ? shape[2] - 1 : z;
                float w = window * up[k], a = row[z], b = row[apart + z], c = row[2 * apart + z];
                to[4 * k] = w * (m[0] * a + m[1] * b + m[2] * c);
                to[4 * k + 1] = w * (m[3] * a + m[4] * b + m[5] * c);
                to[4 * k + 2] = w * (m[6] * a + m[7] * b + m[8] * c);
                to[4 * k + 3] = 0.0f;
            }
        }
}

/* Sample at n points: coordinates `stride` floats apart axis by axis, values likewise channel by channel. */
WIDE EXPORT void jrs_sample(const float *data, const int64_t *shape, int64_t lanes, int64_t channels, const float *coords,
                       int64_t coords_stride, int64_t n, int border, float outside, float *out, int64_t out_stride)
{
    volume_t v = {data, {shape[0], shape[1], shape[2]}, lanes};
    float values[4];
    for (int64_t m = 0; m < n; m++) {
        float x = coords[m], y = coords[coords_stride + m], z = coords[2 * coords_stride + m];
        if (border || within(&v, x, y, z)) {
            value_at(&v, x, y, z, values);
            for (int64_t l = 0; l < channels; l++)
                out[l * out_stride + m] = values[l];
        } else {
            for (int64_t l = 0; l < channels; l++)
                out[l * out_stride + m] = outside;
        }
    }
}

/* Coordinates of `count` voxels of a row from voxel k on: (3, CHUNK) = base * (i, j, k, 1) + linear * u(where). */
INLINED void row_coords(const double *base, const volume_t *field, const double *where, const double *linear,
                              double i, double j, int64_t k, int64_t count, float coords[3][CHUNK])
{
    for (int axis = 0; axis < 3; axis++) {
        const double *m = base + 4 * axis;
        double start = m[0] * i + m[1] * j + m[3] + m[2] * (double)k;
        for (int64_t t = 0; t < count; t++)
            coords[axis][t] = (float)(start + m[2] * (double)t);
    }
    if (!field->data)
        return;
    double at[3], l[9];
    for (int axis = 0; axis < 3; axis++)
        at[axis] = where[4 * axis] * i + where[4 * axis + 1] * j + where[4 * axis + 3] + where[4 * axis + 2] * (double)k;
    for (int m = 0; m < 9; m++)
        l[m] = linear[m];
    float l32[9];
    for (int m = 0; m < 9; m++)
        l32[m] = (float)l[m];
    for (int64_t t = 0; t < count; t++) {
        float x = (float)(at[0] + where[2] * (double)t);
        float y = (float)(at[1] + where[6] * (double)t);
        float z = (float)(at[2] + where[10] * (double)t);
        if (!within(field, x, y, z))
            continue;
        float u[4];
        value_at(field, x, y, z, u);
        coords[0][t] += l32[0] * u[0] + l32[1] * u[1] + l32[2] * u[2];
        coords[1][t] += l32[3] * u[0] + l32[4] * u[1] + l32[5] * u[2];
        coords[2][t] += l32[6] * u[0] + l32[7] * u[1] + l32[8] * u[2];
    }
}

/* Planes `start` to `stop` of a target of `shape` voxels, whose voxel (i,j,k) lies at
 *
 *     base * (i, j, k, 1) + linear * u(where * (i, j, k, 1))
 *
 * of the source (3x4, 3x3 and 3x4 matrices in rows; `field` NULL: no u). Without a source, `out` becomes these
 * coordinates (3, shape), otherwise the values there (channels, shape); its channels lie `out_stride` apart and its
 * first plane is plane 0 of the target. With `parts` above 1 every voxel is the mean of so many regular samples
 * inside it along each axis; (i,j,k) then counts those.
 */
WIDE EXPORT void jrs_pull(const int64_t *shape, int64_t start, int64_t stop, const double *base, const float *field_data,
                     const int64_t *field_shape, const double *where, const double *linear, const float *source_data,
                     const int64_t *source_shape, int64_t lanes, int64_t channels, int border, float outside,
                     const int64_t *parts, float *out, int64_t out_stride)
{
    volume_t field = {field_data, {1, 1, 1}, 4}, source = {source_data, {1, 1, 1}, lanes};
    float coords[3][CHUNK], values[4];
    float scale = 1.0f / (float)(parts[0] * parts[1] * parts[2]);
    int64_t per_chunk = CHUNK / parts[2];
    int single = parts[0] * parts[1] * parts[2] == 1;
    for (int axis = 0; axis < 3; axis++) {
        if (field_data)
            field.shape[axis] = field_shape[axis];
        if (source_data)
            source.shape[axis] = source_shape[axis];
    }
    for (int64_t i = start; i < stop; i++)
        for (int64_t j = 0; j < shape[1]; j++) {
            float *row = out + (i * shape[1] + j) * shape[2];
            for (int64_t k = 0; k < shape[2]; k += per_chunk) {
                int64_t count = shape[2] - k < per_chunk ? shape[2] - k : per_chunk;
                if (!source_data) {
                    row_coords(base, &field, where, linear, (double)i, (double)j, k, count, coords);
                    for (int axis = 0; axis < 3; axis++)
                        for (int64_t t = 0; t < count; t++)
                            row[axis * out_stride + k + t] = coords[axis][t];
                    continue;
                }
                if (!single)
                    for (int64_t l = 0; l < channels; l++)
                        for (int64_t t = 0; t < count; t++)
                            row[l * out_stride + k + t] = 0.0f;
                for (int64_t a = 0; a < parts[0]; a++)
                    for (int64_t b = 0; b < parts[1]; b++) {
                        row_coords(base, &field, where, linear, (double)(i * parts[0] + a), (double)(j * parts[1] + b),
                                   k * parts[2], count * parts[2], coords);
                        for (int64_t t = 0; t < count * parts[2]; t++) {
                            float x = coords[0][t], y = coords[1][t], z = coords[2][t];
                            if (border || within(&source, x, y, z))
                                value_at(&source, x, y, z, values);
                            else
                                for (int l = 0; l < 4; l++)
                                    values[l] = outside;
                            if (single)
                                for (int64_t l = 0; l < channels; l++)
                                    row[l * out_stride + k + t] = values[l];
                            else
                                for (int64_t l = 0; l < channels; l++)
                                    row[l * out_stride + k + t / parts[2]] += values[l] * scale;
                        }
                    }
            }
        }
}

/* Planes `start` to `stop` of det(F + dD) / det(F), out (shape): F (3x3) is the linear part of the grid that the
 * vectors D (3, shape) lie on, dD their differences along the array's axes, central, one-sided at the ends. */
WIDE EXPORT void jrs_jacobian(const float *vectors, const int64_t *shape, const double *linear, int64_t start, int64_t stop,
                         float *out)
{
    int64_t row = shape[2], plane = shape[1] * row, apart = shape[0] * plane;
    double f = linear[0] * (linear[4] * linear[8] - linear[5] * linear[7]) -
               linear[1] * (linear[3] * linear[8] - linear[5] * linear[6]) +
               linear[2] * (linear[3] * linear[7] - linear[4] * linear[6]);
    float m[9], scale = (float)(1.0 / f);
    for (int n = 0; n < 9; n++)
        m[n] = (float)linear[n];
    for (int64_t i = start; i < stop; i++)
        for (int64_t j = 0; j < shape[1]; j++) {
            int64_t up[2] = {i + 1 < shape[0] ? plane : 0, j + 1 < shape[1] ? row : 0};
            int64_t down[2] = {i > 0 ? plane : 0, j > 0 ? row : 0};
            float share[2];
            for (int axis = 0; axis < 2; axis++)
                share[axis] = up[axis] && down[axis] ? 0.5f : 1.0f;
            const float *at = vectors + i * plane + j * row;
            float *to = out + i * plane + j * row;
            for (int64_t k = 0; k < row; k++) {
                int64_t next = k + 1 < row, before = k > 0;
                float half = next && before ? 0.5f : 1.0f, g[3][3];
                for (int c = 0; c < 3; c++) {
                    const float *p = at + c * apart + k;
                    g[c][0] = m[3 * c] + share[0] * (p[up[0]] - p[-down[0]]);
                    g[c][1] = m[3 * c + 1] + share[1] * (p[up[1]] - p[-down[1]]);
                    g[c][2] = m[3 * c + 2] + half * (p[next] - p[-before]);
                }
                to[k] = scale * (g[0][0] * (g[1][1] * g[2][2] - g[1][2] * g[2][1]) -
                                 g[0][1] * (g[1][0] * g[2][2] - g[1][2] * g[2][0]) +
                                 g[0][2] * (g[1][0] * g[2][1] - g[1][1] * g[2][0]));
            }
        }
}

INLINED float squared(const float *r)
{
    return r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
}

/* u and its slopes at z + v, voxels of the field; zero outside unless `border`, where it goes on as it is. */
INLINED void field_at(const volume_t *field, int border, const float *z, const float *v, float *u,
                            float slope[3][4])
{
    float q[3] = {z[0] + v[0], z[1] + v[1], z[2] + v[2]};
    if (border || within(field, q[0], q[1], q[2])) {
        value_and_slope(field, q[0], q[1], q[2], u, slope);
        /* Beyond the last voxel the value stays, and slopes would mislead. */
        for (int axis = 0; axis < 3; axis++)
            if (q[axis] < 0.0f || q[axis] > (float)(field->shape[axis] - 1))
                slope[axis][0] = slope[axis][1] = slope[axis][2] = 0.0f;
        return;
    }
    u[0] = u[1] = u[2] = 0.0f;
    for (int axis = 0; axis < 3; axis++)
        slope[axis][0] = slope[axis][1] = slope[axis][2] = 0.0f;
}

/* Newton's step -(1 + du)^-1 r; where the field folds or nearly so, -r. */
INLINED void newton(float slope[3][4], const float *r, float *step)
{
    float a = 1.0f + slope[0][0], b = slope[1][0], c = slope[2][0];
    float d = slope[0][1], e = 1.0f + slope[1][1], f = slope[2][1];
    float g = slope[0][2], h = slope[1][2], i = 1.0f + slope[2][2];
    float ca = e * i - f * h, cb = f * g - d * i, cc = d * h - e * g;
    float det = a * ca + b * cb + c * cc;
    if (!(det > 0.1f)) {
        for (int axis = 0; axis < 3; axis++)
            step[axis] = -r[axis];
        return;
    }
    float s = -1.0f / det;
    step[0] = s * (ca * r[0] + (c * h - b * i) * r[1] + (b * f - c * e) * r[2]);
    step[1] = s * (cb * r[0] + (a * i - c * g) * r[1] + (c * d - a * f) * r[2]);
    step[2] = s * (cc * r[0] + (b * g - a * h) * r[1] + (a * e - b * d) * r[2]);
}

/* v with v + u(z + v) = 0, from where `v` starts; returns the squared length of what is left, voxels.
 *
 * Newton's method on the trilinear field, each step halved until it comes nearer. In a fold the nearest that was
 * found is kept.
 */
INLINED float solved(const volume_t *field, int border, const float *z, float tolerance, int evaluations, float *v)
{
    float u[4], slope[3][4], r[3], step[3], tried[3], share = 1.0f;
    field_at(field, border, z, v, u, slope);
    for (int axis = 0; axis < 3; axis++)
        r[axis] = v[axis] + u[axis];
    float best = squared(r);
    newton(slope, r, step);
    for (int n = 1; n < evaluations && best > tolerance * tolerance && share > 0.01f; n++) {
        for (int axis = 0; axis < 3; axis++)
            tried[axis] = v[axis] + share * step[axis];
        field_at(field, border, z, tried, u, slope);
        for (int axis = 0; axis < 3; axis++)
            r[axis] = tried[axis] + u[axis];
        float found = squared(r);
        if (found < best) {
            best = found;
            for (int axis = 0; axis < 3; axis++)
                v[axis] = tried[axis];
            newton(slope, r, step);
            share = 1.0f;
        } else {
            share *= 0.5f;
        }
    }
    return best;
}

/* The same from two starts, `v` and the field's own value, the first as a rule from a neighbour. */
INLINED float solved_from(const volume_t *field, int border, const float *z, float tolerance, int evaluations, float *v)
{
    float left = solved(field, border, z, tolerance, evaluations, v);
    if (left <= tolerance * tolerance)
        return left;
    float again[3], u[4], slope[3][4], none[3] = {0.0f, 0.0f, 0.0f};
    field_at(field, border, z, none, u, slope);
    for (int axis = 0; axis < 3; axis++)
        again[axis] = -u[axis];
    float other = solved(field, border, z, tolerance, evaluations, again);
    if (!(other < left))
        return left;
    for (int axis = 0; axis < 3; axis++)
        v[axis] = again[axis];
    return other;
}

/* Planes `start` to `stop` of a grid whose voxel (i,j,k) lies at z = where * (i,j,k,1), voxels of the field:
 * out = base * (i,j,k,1) + linear * v with v + u(z + v) = 0. */
WIDE EXPORT void jrs_invert(const int64_t *shape, int64_t start, int64_t stop, const float *field_data,
                       const int64_t *field_shape, const double *where, const double *base, const double *linear,
                       int border, float tolerance, int evaluations, float *out, int64_t out_stride)
{
    volume_t field = {field_data, {field_shape[0], field_shape[1], field_shape[2]}, 4};
    float z[3], v[3], m[9];
    for (int n = 0; n < 9; n++)
        m[n] = (float)linear[n];
    for (int64_t i = start; i < stop; i++)
        for (int64_t j = 0; j < shape[1]; j++) {
            float *row = out + (i * shape[1] + j) * shape[2];
            v[0] = v[1] = v[2] = 0.0f;
            for (int64_t k = 0; k < shape[2]; k++) {
                double o[3];
                for (int axis = 0; axis < 3; axis++) {
                    const double *w = where + 4 * axis, *b = base + 4 * axis;
                    z[axis] = (float)(w[0] * (double)i + w[1] * (double)j + w[2] * (double)k + w[3]);
                    o[axis] = b[0] * (double)i + b[1] * (double)j + b[2] * (double)k + b[3];
                }
                float left = solved_from(&field, border, z, tolerance, evaluations, v);
                for (int axis = 0; axis < 3; axis++)
                    row[axis * out_stride + k] = (float)(o[axis] + (double)(m[3 * axis] * v[0] + m[3 * axis + 1] * v[1] +
                                                                           m[3 * axis + 2] * v[2]));
                if (left > 1.0f) /* a fold: no start for a neighbour */
                    v[0] = v[1] = v[2] = 0.0f;
            }
        }
}

/* The same at n points z (3, n); v (3, n) is the start and the result, `left` (n) what remains of v + u(z + v). */
WIDE EXPORT void jrs_invert_points(const float *field_data, const int64_t *field_shape, const float *points, int64_t stride,
                              int64_t n, int border, float tolerance, int evaluations, float *v, float *left)
{
    volume_t field = {field_data, {field_shape[0], field_shape[1], field_shape[2]}, 4};
    for (int64_t m = 0; m < n; m++) {
        float z[3] = {points[m], points[stride + m], points[2 * stride + m]};
        float found[3] = {v[m], v[stride + m], v[2 * stride + m]};
        left[m] = solved_from(&field, border, z, tolerance, evaluations, found);
        for (int axis = 0; axis < 3; axis++)
            v[axis * stride + m] = found[axis];
    }
}

/* n samples of an image (one lane) at x (3, n), which `where` (3x4) leads to its voxels: their values and the values'
 * derivatives along the voxels' axes as moved (4, n), -1 and zeros half a voxel outside and further; and their joint
 * histogram, added to out (bins, bins). A row is a sample's bin of the other image; over its columns a cubic B-spline
 * spreads the value, which has to lie at least one bin from the ends. */
WIDE EXPORT void jrs_count(const float *data, const int64_t *shape, const double *where, const float *x, int64_t x_stride,
                      const uint8_t *rows, int64_t n, int64_t bins, float *moved, int64_t moved_stride, double *out)
{
    volume_t v = {data, {shape[0], shape[1], shape[2]}, 1};
    int64_t row = shape[2], plane = shape[1] * row;
    float w[12];
    for (int m = 0; m < 12; m++)
        w[m] = (float)where[m];
    for (int64_t m = 0; m < n; m++) {
        float at[3], a, b, c, *to = moved + m;
        for (int axis = 0; axis < 3; axis++)
            at[axis] = w[4 * axis] * x[m] + w[4 * axis + 1] * x[x_stride + m] + w[4 * axis + 2] * x[2 * x_stride + m] +
                       w[4 * axis + 3];
        to[0] = -1.0f;
        to[moved_stride] = to[2 * moved_stride] = to[3 * moved_stride] = 0.0f;
        if (!within(&v, at[0], at[1], at[2]))
            continue;
        int64_t di, dj, dk;
        int64_t i = corner(at[0], shape[0], &di, &a), j = corner(at[1], shape[1], &dj, &b);
        int64_t k = corner(at[2], shape[2], &dk, &c);
        const float *p = data + i * plane + j * row + k;
        const float *q = p + dj * row, *r = p + di * plane, *s = r + dj * row;
        /* Along z first, then y, then x. */
        float p1 = p[dk] - p[0], q1 = q[dk] - q[0], r1 = r[dk] - r[0], s1 = s[dk] - s[0];
        float pp = p[0] + c * p1, qq = q[0] + c * q1, rr = r[0] + c * r1, ss = s[0] + c * s1;
        float pz = p1 + b * (q1 - p1), rz = r1 + b * (s1 - r1);
        float near = pp + b * (qq - pp), far = rr + b * (ss - rr), value = near + a * (far - near);
        if (!(value >= 1.0f && value < (float)(bins - 2))) /* no number, or no bin for it */
            continue;
        to[0] = value;
        to[moved_stride] = far - near;
        to[2 * moved_stride] = (qq - pp) + a * ((ss - rr) - (qq - pp));
        to[3 * moved_stride] = pz + a * (rz - pz);
        int64_t low = (int64_t)value;
        float t = value - (float)low, u = 1.0f - t, t2 = t * t, t3 = t2 * t;
        double *cells = out + rows[m] * bins + low - 1;
        cells[0] += u * u * u / 6.0f;
        cells[1] += (3.0f * t3 - 6.0f * t2 + 4.0f) / 6.0f;
        cells[2] += (-3.0f * t3 + 3.0f * t2 + 3.0f * t + 1.0f) / 6.0f;
        cells[3] += t3 / 6.0f;
    }
}

/* The sum over such samples of s grad (x, 1)^T, added to out (3,4): s is the derivative of the spline's mean over a row
 * of `table` (bins, bins) by the value. */
WIDE EXPORT void jrs_slope(const float *moved, int64_t moved_stride, const float *x, int64_t x_stride, const uint8_t *rows,
                      int64_t n, int64_t bins, const float *table, double *out)
{
    for (int64_t m = 0; m < n; m++) {
        float q = moved[m];
        if (!(q >= 0.0f))
            continue;
        int64_t low = (int64_t)q;
        float t = q - (float)low, r = 1.0f - t, t2 = t * t;
        const float *l = table + rows[m] * bins + low - 1;
        float s = 0.5f * (-r * r * l[0] + (3.0f * t2 - 4.0f * t) * l[1] + (-3.0f * t2 + 2.0f * t + 1.0f) * l[2] +
                          t2 * l[3]);
        for (int axis = 0; axis < 3; axis++) {
            double force = s * moved[(axis + 1) * moved_stride + m];
            out[4 * axis] += force * x[m];
            out[4 * axis + 1] += force * x[x_stride + m];
            out[4 * axis + 2] += force * x[2 * x_stride + m];
            out[4 * axis + 3] += force;
        }
    }
}

/* Whether the version with FMA runs, which rounds a * b + c once; -1 where there is one version alone. */
WIDE EXPORT int64_t jrs_wide(const float *abc)
{
    return VERSIONS > 1 ? abc[0] * abc[1] + abc[2] != 0.0f : -1;
}

/* What Python expects of the functions above: to be raised in both with every change that a caller would notice. */
EXPORT int64_t jrs_version(void)
{
    return 2;
}

/* Nothing to import: the functions above are called through ctypes. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
