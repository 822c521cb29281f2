// What the decode kernels share: BF16 arithmetic, matrix instructions, FP4 fragments, dependent launches.
//
// No header is included, so that NVRTC needs no toolkit on the machine. BF16 travels as its bits: u16, or two in a u32.
//
// All products go through mma.m16n8k16 with the weights as the 16 rows and the tokens as the 8 columns: at one token
// seven columns idle, which costs nothing where the weights' bytes are the limit. Any order of the k positions is right
// as long as weights and activations agree, so each lane takes k positions that lie together in memory:
// a lane owns 32 of the 128 positions of a chunk, as four groups of eight.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define WARP 32
#define FULL 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)

// ---------------------------------------------------------------- dependent launches (Hopper and later)

// Waits until the kernels before this one are complete and their writes are visible.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start. Always called after wait_for_previous(): a kernel that has started therefore knows that
// the kernel before the previous one is complete.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- BF16

DEVICE float low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float wide(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u32 pack(float lo, float hi) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}
DEVICE u16 narrow(float value) { return (u16)pack(value, 0.f); }
DEVICE float rounded(float value) { return low(pack(value, 0.f)); }

// Products of two pairs; the fused form exists from compute capability 8.0 on, and adding -0 changes nothing.
DEVICE u32 multiply(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// Where element i (0 to 7) of a group of eight stands in FP4 order: pairs (0,4) (1,5) (2,6) (3,7), as the codes of one
// 32-bit word come apart.
DEVICE u32 fp4_place(u32 i) { return i < 4 ? 2 * i : 2 * i - 7; }
// Where group n of eight stands in FP4 order: of the 16 groups of a chunk, those that four lanes read at once lie
// together, so that a token's part of a load is 64 bytes and the banks serve it in one go.
DEVICE u32 fp4_group(u32 n) { return (n & ~15u) | (n & 3) << 2 | (n >> 2 & 3); }

// ---------------------------------------------------------------- memory

// 16 bytes that are read once: weights, cache.
DEVICE uint4 load_once(const void* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}
// Written by an earlier kernel or block: not through the read-only path.
DEVICE uint4 load_shared_result(const void* at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}
DEVICE uint4 load(const void* at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

// ---------------------------------------------------------------- matrix instruction

DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- weight fragments

// 32 codes of one row and the two block scales over them. Codes unpack to value * 2^-8: the caller's factor holds the
// other 2^8. That keeps every product exact: a code times an E4M3 scale has at most six significant bits.
struct RowFP4 {
    uint4 codes;
    u32 scales;
};

DEVICE RowFP4 load_fp4(const u8* codes, const u8* scales, u32 chunk, u32 tig) {
    RowFP4 row;
    row.codes = load_once(codes + chunk * 64 + tig * 16);
    row.scales = *(const u16*)(scales + chunk * 8 + tig * 2);
    return row;
}

// E4M3 bits of a scale (not negative) to a pair of BF16, scale * 2^118 twice. As float bits, the byte at bit 20 is the
// scale times 2^-120, subnormals included.
DEVICE u32 scale_pair(u32 byte) {
    float s = __uint_as_float(byte << 20) * 0x1p119f * 0x1p119f;
    u32 bits = __float_as_uint(s);
    return __byte_perm(bits, bits, 0x3232);
}

// Pair `p` of a word: codes p and p + 4. E2M1 bits shifted to a BF16's exponent are the value times 2^-126.
template <int p>
DEVICE u32 unpack(u32 word, u32 scale) {
    u32 t = word << (4 * (3 - p));
    u32 raw = (t & 0x80008000u) | ((t >> 6) & 0x01c001c0u);
    return multiply(raw, scale);
}

// Adds 16 rows (r0: row g, r1: row g + 8) times up to 8 * tiles tokens over one chunk.
template <int tiles>
DEVICE void dot_fp4(float (&acc)[tiles][4], const RowFP4& r0, const RowFP4& r1, const u32 (&x)[tiles][16]) {
    u32 s0[2] = {scale_pair(r0.scales & 0xff), scale_pair(r0.scales >> 8)};
    u32 s1[2] = {scale_pair(r1.scales & 0xff), scale_pair(r1.scales >> 8)};
    const u32 w0[4] = {r0.codes.x, r0.codes.y, r0.codes.z, r0.codes.w};
    const u32 w1[4] = {r1.codes.x, r1.codes.y, r1.codes.z, r1.codes.w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        u32 a0 = unpack<0>(w0[q], s0[q >> 1]), a1 = unpack<0>(w1[q], s1[q >> 1]);
        u32 a2 = unpack<1>(w0[q], s0[q >> 1]), a3 = unpack<1>(w1[q], s1[q >> 1]);
#pragma unroll
        for (int t = 0; t < tiles; t++) mma(acc[t], a0, a1, a2, a3, x[t][4 * q], x[t][4 * q + 1]);
        a0 = unpack<2>(w0[q], s0[q >> 1]), a1 = unpack<2>(w1[q], s1[q >> 1]);
        a2 = unpack<3>(w0[q], s0[q >> 1]), a3 = unpack<3>(w1[q], s1[q >> 1]);
#pragma unroll
        for (int t = 0; t < tiles; t++) mma(acc[t], a0, a1, a2, a3, x[t][4 * q + 2], x[t][4 * q + 3]);
    }
}

// 32 BF16 weights of one row: groups of eight, 64 bytes apart, so that four lanes read whole sectors.
struct RowBF16 {
    uint4 group[4];
};

DEVICE RowBF16 load_bf16(const u16* row, u32 chunk, u32 tig) {
    RowBF16 r;
#pragma unroll
    for (int q = 0; q < 4; q++) r.group[q] = load_once(row + chunk * 128 + q * 32 + tig * 8);
    return r;
}

template <int tiles>
DEVICE void dot_bf16(float (&acc)[tiles][4], const RowBF16& r0, const RowBF16& r1, const u32 (&x)[tiles][16]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
        for (int t = 0; t < tiles; t++) {
            mma(acc[t], r0.group[q].x, r1.group[q].x, r0.group[q].y, r1.group[q].y, x[t][4 * q], x[t][4 * q + 1]);
            mma(acc[t], r0.group[q].z, r1.group[q].z, r0.group[q].w, r1.group[q].w, x[t][4 * q + 2], x[t][4 * q + 3]);
        }
    }
}

// The weights of a matrix in either form: FP4 is a compile-time constant of the file.
#if FP4
typedef RowFP4 Row;
// Bytes of a row of k weights, and of its scales.
#define ROW_BYTES(k) ((k) / 2)
#define SCALE_BYTES(k) ((k) / 16)
DEVICE Row load_row(const u8* weights, const u8* scales, i64 row, int k, u32 chunk, u32 tig) {
    return load_fp4(weights + row * ROW_BYTES(k), scales + row * SCALE_BYTES(k), chunk, tig);
}
template <int tiles>
DEVICE void dot(float (&acc)[tiles][4], const Row& r0, const Row& r1, const u32 (&x)[tiles][16]) {
    dot_fp4<tiles>(acc, r0, r1, x);
}
#define PLACE(i) fp4_place(i)
#define GROUP_PLACE(n) fp4_group(n)
#else
typedef RowBF16 Row;
#define ROW_BYTES(k) ((k) * 2)
#define SCALE_BYTES(k) 0
DEVICE Row load_row(const u8* weights, const u8*, i64 row, int k, u32 chunk, u32 tig) {
    return load_bf16((const u16*)(weights + row * ROW_BYTES(k)), chunk, tig);
}
template <int tiles>
DEVICE void dot(float (&acc)[tiles][4], const Row& r0, const Row& r1, const u32 (&x)[tiles][16]) {
    dot_bf16<tiles>(acc, r0, r1, x);
}
#define PLACE(i) (i)
#define GROUP_PLACE(n) (n)
#endif
// Where a lane's group q of a chunk's activations stands.
DEVICE u32 x_offset(u32 chunk, u32 q, u32 tig) { return chunk * 128 + q * 32 + tig * 8; }

// A lane's activations of one chunk from memory of 16-byte groups; a column without a token reads zeros.
DEVICE void load_x(u32 (&x)[16], const u16* row, bool there, u32 chunk, u32 tig) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there) v = load(row + x_offset(chunk, q, tig));
        x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
    }
}

// ---------------------------------------------------------------- order of logits

// Keys that order BF16 logits as their values; of equal logits the lower expert is greater. NaN stands anywhere.
DEVICE u32 logit_key(float logit, u32 expert) {
    const u32 bits = __float_as_uint(logit) >> 16;
    return ((bits & 0x8000u ? ~bits : bits | 0x8000u) << 16) | (0xffffu - expert);
}
DEVICE u32 key_expert(u32 key) { return 0xffffu - (key & 0xffffu); }
DEVICE float key_logit(u32 key) {
    const u32 bits = key >> 16;
    return __uint_as_float((bits & 0x8000u ? bits & 0x7fffu : ~bits & 0xffffu) << 16);
}

// ---------------------------------------------------------------- sums

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(FULL, v, i);
    return v;
}

// Sum over a block, known to every thread. `scratch` holds a float per warp; ends with a barrier before it is read.
template <int warps>
DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < warps; w++) sum += scratch[w];
    return sum;
}

// RMSNorm of a pair as Transformers rounds it: the normalised value to BF16, then its product with the weight.
DEVICE u32 norm_pair(u32 pair, float inverse, u32 weight) {
    return multiply(pack(low(pair) * inverse, high(pair) * inverse), weight);
}

// Eight natural neighbours to the order that the next matrix reads.
DEVICE uint4 in_fp4_order(uint4 v) {
    return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                      __byte_perm(v.y, v.w, 0x7632));
}
