// JrsGridSample3D: trilinear sampling of a volume (N,C,D,H,W) at absolute voxel indices (N,3,d,h,w), giving
// (N,C,d,h,w). The nearest border voxel outside; coordinate i along array axis i; a NaN coordinate takes index 0.
//
// Coordinates, weights and sums are FP32; volumes are FP32 or FP16 and the output has their type. One thread makes one
// output voxel: the eight offsets and weights are computed once and serve every channel, in groups of GROUP channels
// whose loads are all in flight before the first is used. Neighbouring threads lie along the last axis, so that the
// coordinates are read, and the output written, without gaps.
//
// Compiled at run time by NVRTC, so nothing is included: FP16 is converted by instruction, not by header. On a host
// (JRS_HOST, for tests) the same source is C++ with the CUDA words defined away.
//
// Arguments in the order of an ahead-of-time TensorRT plugin: inputs, scalars, outputs.

#ifndef JRS_HOST
typedef unsigned short half_bits;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(half_bits value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(half_bits* to, float value) {
    half_bits narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
    *to = narrow;
}
#endif

// Channels in flight at once. Offsets within a group are 32 bits wide: with four channels and 64 bits FP16 took twice
// as long (docs/gpu.md). A channel may hold up to 2^28 voxels, 645 along each side.
#define GROUP 8

// One axis: the two voxels around a coordinate, and the weight of the second. Comparisons with NaN are false, so a
// NaN falls to the lower border before anything is converted to an integer.
struct Between {
    int lower, upper;
    float weight;
};

__device__ __forceinline__ Between between(float coordinate, int size) {
    const float last = (float)(size - 1);
    float inside = coordinate > 0.0f ? coordinate : 0.0f;
    inside = inside < last ? inside : last;
    Between at;
    at.lower = (int)inside;
    at.upper = at.lower + 1 < size ? at.lower + 1 : at.lower;
    at.weight = inside - (float)at.lower;
    return at;
}

template <typename T>
__device__ __forceinline__ void sample(const T* __restrict__ volume, const float* __restrict__ coords, int channels,
                                       int depth, int height, int width, int points, int total, T* __restrict__ out,
                                       long long thread) {
    if (thread >= total) {
        return;
    }
    const int batch = (int)(thread / points);
    const int point = (int)(thread - (long long)batch * points);
    const float* at = coords + (long long)batch * 3 * points + point;
    const Between x = between(at[0], depth);
    const Between y = between(at[points], height);
    const Between z = between(at[2 * (long long)points], width);

    int offset[8];
    float weight[8];
    for (int corner = 0; corner < 8; ++corner) {
        const int i = corner & 4 ? x.upper : x.lower;
        const int j = corner & 2 ? y.upper : y.lower;
        const int k = corner & 1 ? z.upper : z.lower;
        offset[corner] = (i * height + j) * width + k;
        weight[corner] = (corner & 4 ? x.weight : 1.0f - x.weight) * (corner & 2 ? y.weight : 1.0f - y.weight) *
                         (corner & 1 ? z.weight : 1.0f - z.weight);
    }

    const int size = depth * height * width;
    const T* source = volume + (long long)batch * channels * size;
    T* target = out + (long long)batch * channels * points + point;
    int channel = 0;
    for (; channel + GROUP <= channels; channel += GROUP) {
        float sum[GROUP] = {0.0f};
#pragma unroll
        for (int corner = 0; corner < 8; ++corner) {
#pragma unroll
            for (int lane = 0; lane < GROUP; ++lane) {
                sum[lane] += weight[corner] * widen((source + lane * size)[offset[corner]]);
            }
        }
#pragma unroll
        for (int lane = 0; lane < GROUP; ++lane) {
            store(target + (long long)lane * points, sum[lane]);
        }
        source += (long long)GROUP * size;
        target += (long long)GROUP * points;
    }
    for (; channel < channels; ++channel) {
        float sum = 0.0f;
#pragma unroll
        for (int corner = 0; corner < 8; ++corner) {
            sum += weight[corner] * widen(source[offset[corner]]);
        }
        store(target, sum);
        source += size;
        target += points;
    }
}

#define JRS_KERNEL(NAME, TYPE)                                                                                       \
    extern "C" __global__ void NAME(const TYPE* __restrict__ volume, const float* __restrict__ coords, int channels, \
                                    int depth, int height, int width, int points, int total,                         \
                                    TYPE* __restrict__ out) {                                                        \
        sample<TYPE>(volume, coords, channels, depth, height, width, points, total, out,                             \
                     (long long)blockIdx.x * blockDim.x + threadIdx.x);                                              \
    }

JRS_KERNEL(jrs_grid_sample_3d_fp32, float)
JRS_KERNEL(jrs_grid_sample_3d_fp16, half_bits)
