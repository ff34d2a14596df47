/* What the kernels share: a volume, and its trilinear value at a point. */
#ifndef JRS_KERNELS_H
#define JRS_KERNELS_H

#include <stdint.h>

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* A function in two versions, of which the loader takes the one for the processor at hand: with AVX2 and FMA where it
 * has them. (`arch=` of a processor would ask for that very one; of a level, for what the level holds.) What it calls
 * has to be inlined into both. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VERSIONS 2
#define WIDE __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define VERSIONS 1
#define WIDE
#endif
#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif
#define RESTRICT __restrict

/* The next loop writes nothing that a later round of it reads: more than a compiler can tell of many pointers. */
#if defined(__clang__)
#define APART _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define APART _Pragma("GCC ivdep")
#else
#define APART
#endif

typedef struct {
    const float *data;
    int64_t shape[3];
    int64_t lanes;
} volume_t;

/* Index of the lower corner along one axis, 0 or 1 to the upper one, and the share of the upper one. */
INLINED int64_t corner(float x, int64_t n, int64_t *next, float *share)
{
    float top = (float)(n - 1);
    x = x > 0.0f ? x : 0.0f; /* NaN becomes 0 */
    x = x < top ? x : top;
    int64_t low = (int64_t)x;
    if (low > n - 2)
        low = n > 1 ? n - 2 : 0;
    *next = n > 1;
    *share = x - (float)low;
    return low;
}

INLINED int within(const volume_t *v, float x, float y, float z)
{
    return x >= -0.5f && x <= (float)v->shape[0] - 0.5f && y >= -0.5f && y <= (float)v->shape[1] - 0.5f &&
           z >= -0.5f && z <= (float)v->shape[2] - 0.5f;
}

/* The value at a point, `lanes` of them. */
INLINED void value_at(const volume_t *v, float x, float y, float z, float *out)
{
    int64_t di, dj, dk;
    float a, b, c;
    int64_t i = corner(x, v->shape[0], &di, &a);
    int64_t j = corner(y, v->shape[1], &dj, &b);
    int64_t k = corner(z, v->shape[2], &dk, &c);
    int64_t row = v->shape[2] * v->lanes, plane = v->shape[1] * row;
    const float *p = v->data + i * plane + j * row + k * v->lanes;
    const float *q = p + dj * row, *r = p + di * plane, *s = r + dj * row;
    dk *= v->lanes;
    float w00 = (1.0f - a) * (1.0f - b), w01 = (1.0f - a) * b, w10 = a * (1.0f - b), w11 = a * b;
    float d = 1.0f - c;
    if (v->lanes == 1) {
        out[0] = d * (w00 * p[0] + w01 * q[0] + w10 * r[0] + w11 * s[0]) +
                 c * (w00 * p[dk] + w01 * q[dk] + w10 * r[dk] + w11 * s[dk]);
        return;
    }
    for (int l = 0; l < 4; l++)
        out[l] = d * (w00 * p[l] + w01 * q[l] + w10 * r[l] + w11 * s[l]) +
                 c * (w00 * p[dk + l] + w01 * q[dk + l] + w10 * r[dk + l] + w11 * s[dk + l]);
}

#endif
