// grid_sample_3d.cu for the host: the CUDA words defined away, threads run one after the other.
#define JRS_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__

typedef _Float16 half_bits;
static inline float widen(float value) { return value; }
static inline float widen(half_bits value) { return (float)value; }
static inline void store(float* to, float value) { *to = value; }
static inline void store(half_bits* to, float value) { *to = (half_bits)value; }

struct Index {
    long long x;
};
static Index blockIdx, blockDim, threadIdx;

#include KERNEL

template <typename T, typename Kernel>
static void launch(Kernel kernel, const T* volume, const float* coords, const int* sizes, T* out) {
    const int total = sizes[5];
    blockDim.x = 128;
    for (blockIdx.x = 0; blockIdx.x * blockDim.x < total; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
            kernel(volume, coords, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], total, out);
        }
    }
}

extern "C" void run_fp32(const float* volume, const float* coords, const int* sizes, float* out) {
    launch(jrs_grid_sample_3d_fp32, volume, coords, sizes, out);
}
extern "C" void run_fp16(const half_bits* volume, const float* coords, const int* sizes, half_bits* out) {
    launch(jrs_grid_sample_3d_fp16, volume, coords, sizes, out);
}
