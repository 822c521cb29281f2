// What a CUDA compiler gives a kernel, for a host compiler: goes before a kernel source.
// Every memory access of the kernel reaches runtime.cpp through -fsanitize=thread, whose hooks are there.

#define __CUDA_ARCH__ 900
#define __device__ static
#define __forceinline__ inline
#define __global__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))

struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned int x, y, z; };
static inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern "C" {
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern char* emulated_dynamic;
enum { PLAIN, CACHED_GLOBALLY, READ_ONLY };  // ld, ld.cg, ld.nc
void emulated_load(const void* at, unsigned bytes, int kind, void* to);
void emulated_store(void* at, unsigned bytes, const void* from);
unsigned emulated_atomic(void* at, int is_or, unsigned value);
void emulated_fence();
void emulated_wait_for_previous();
void emulated_let_next_start();
void emulated_barrier(unsigned id, unsigned threads);
void emulated_syncwarp();
unsigned long long emulated_shuffle(const char* name, unsigned mask, int mode, unsigned long long value, unsigned lane);
unsigned emulated_ballot(unsigned mask, unsigned value);
unsigned emulated_reduce_max(unsigned mask, unsigned value);
void emulated_mma(float* sums, const unsigned* a, const unsigned* b);
unsigned emulated_shared_address(const void* at);
void emulated_load_shared(unsigned at, unsigned bytes, void* to);
void emulated_copy16(unsigned to, const void* from);
void emulated_end_of_copies();
void emulated_wait_for_copies(int ahead);
unsigned short emulated_narrow(double value);
float expf(float), logf(float), exp2f(float), sqrtf(float), fmaxf(float, float);
}

static inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }
static inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
static inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
static inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
static inline float __expf(float v) { return expf(v); }
static inline float __logf(float v) { return logf(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }

// CUDA's min and max of two types take their common one.
template <class A, class B> static inline auto min(A a, B b) { using C = decltype(true ? a : b); return (C)a < (C)b ? (C)a : (C)b; }
template <class A, class B> static inline auto max(A a, B b) { using C = decltype(true ? a : b); return (C)a > (C)b ? (C)a : (C)b; }

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned pick) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned nibble = pick >> (4 * i) & 15, byte = both >> (8 * (nibble & 7)) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}

static inline void __syncthreads() { emulated_barrier(0, 0); }
static inline void __syncwarp() { emulated_syncwarp(); }
static inline unsigned long long __cvta_generic_to_shared(const void* at) { return emulated_shared_address(at); }
static inline void __threadfence() { emulated_fence(); }

template <class T> struct Bits { using type = unsigned; };
template <> struct Bits<unsigned long long> { using type = unsigned long long; };
template <class T> static inline T emulated_shuffle_of(const char* name, unsigned mask, int mode, T value, unsigned lane) {
    using U = typename Bits<T>::type;
    return __builtin_bit_cast(T, (U)emulated_shuffle(name, mask, mode, __builtin_bit_cast(U, value), lane));
}
template <class T> static inline T __shfl_sync(unsigned m, T v, unsigned l) { return emulated_shuffle_of("__shfl_sync", m, 0, v, l); }
template <class T> static inline T __shfl_xor_sync(unsigned m, T v, unsigned l) { return emulated_shuffle_of("__shfl_xor_sync", m, 1, v, l); }
template <class T> static inline T __shfl_up_sync(unsigned m, T v, unsigned l) { return emulated_shuffle_of("__shfl_up_sync", m, 2, v, l); }
template <class T> static inline T __shfl_down_sync(unsigned m, T v, unsigned l) { return emulated_shuffle_of("__shfl_down_sync", m, 3, v, l); }
static inline unsigned __ballot_sync(unsigned mask, int value) { return emulated_ballot(mask, value != 0); }
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value) { return emulated_reduce_max(mask, value); }

template <class T> static inline T __ldcg(const T* at) {
    T value;
    emulated_load(at, sizeof(T), CACHED_GLOBALLY, &value);
    return value;
}
template <class T> static inline void __stcg(T* at, T value) { emulated_store(at, sizeof(T), &value); }
static inline unsigned atomicAdd(unsigned* at, unsigned value) { return emulated_atomic(at, 0, value); }
static inline unsigned atomicOr(unsigned* at, unsigned value) { return emulated_atomic(at, 1, value); }
