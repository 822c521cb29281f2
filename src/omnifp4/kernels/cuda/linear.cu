// Linear layer of a decode step: out[m, n] = x[m, k] . w[n, k].
//
// Constants: FP4, K, NT (8 tokens each), UNITS (16 rows each, per block), WARPS, CHUNKS (128 columns each, per warp),
// NORM (x is the residual stream of one token, normalised here), RESIDUAL (add to the residual stream), BLOCKS_PER_SM.
// K = WARPS * CHUNKS * 128. Each warp takes its columns of all the block's rows; the block then adds up the warps.

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
linear(const u8* __restrict__ weights,  // codes [n, K / 2], or BF16 [n, K]
       const u8* __restrict__ scales,   // E4M3 [n, K / 16]
       const float* __restrict__ factors,  // tensor scale * 2^8, one per 16 rows
       const u16* x,                    // [m, K], in the order that the weights ask for; natural if NORM
       const u16* __restrict__ norm_weight, float eps,
       const u16* residual,             // [m, n], may be out
       u16* out,                        // [m, n], natural
       int m, int n) {
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    const i64 first_row = (i64)blockIdx.x * (UNITS * 16);
    extern __shared__ float shared[];
    float(*sums)[UNITS * 16][NT * 8 + 1] = (float(*)[UNITS * 16][NT * 8 + 1])shared;  // of each warp
#if NORM
    __shared__ float scratch[WARPS];
    __shared__ uint4 normed[K / 8];
#endif

    Row rows[UNITS][2][CHUNKS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        // The last block may reach behind the matrix: it reads the last rows again and stores nothing.
        i64 r = min(first_row + u * 16, (i64)n - 16) + g;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            rows[u][0][c] = load_row(weights, scales, r, K, warp * CHUNKS + c, tig);
            rows[u][1][c] = load_row(weights, scales, r + 8, K, warp * CHUNKS + c, tig);
        }
    }
    // What the first output of this thread needs beside the sums; loaded now, it does not delay the end.
    const i64 own_row = min(first_row + threadIdx.x % (UNITS * 16), (i64)n - 1);
    const u32 own_token = threadIdx.x / (UNITS * 16);
    const float own_factor = FP4 ? factors[own_row / 16] : 1.f;
#if NORM
    uint4 norm_weights[(CHUNKS + 1) / 2];
#pragma unroll
    for (int i = 0; i < (CHUNKS + 1) / 2; i++)
        if (i * 32 + lane < CHUNKS * 16) norm_weights[i] = load(norm_weight + (warp * (CHUNKS * 16) + i * 32 + lane) * 8);
#endif
    wait_for_previous();
    let_next_start();
#if RESIDUAL
    const float own_residual = own_token < m ? wide(residual[(i64)own_token * n + own_row]) : 0.f;
#endif

#if NORM
    // A thread's own eight columns lie in its warp's chunks: only the sum of squares crosses warps.
    uint4 own[(CHUNKS + 1) / 2];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < (CHUNKS + 1) / 2; i++) {
        u32 group = warp * (CHUNKS * 16) + i * 32 + lane;
        own[i] = make_uint4(0, 0, 0, 0);
        if (i * 32 + lane < CHUNKS * 16) own[i] = load(x + group * 8);
        const u32 v[4] = {own[i].x, own[i].y, own[i].z, own[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) squares += low(v[j]) * low(v[j]) + high(v[j]) * high(v[j]);
    }
    float inverse = rsqrtf(block_sum<WARPS>(squares, scratch) / K + eps);
#pragma unroll
    for (int i = 0; i < (CHUNKS + 1) / 2; i++) {
        u32 group = warp * (CHUNKS * 16) + i * 32 + lane;
        if (i * 32 + lane < CHUNKS * 16) {
            const uint4 w = norm_weights[i];
            uint4 v = make_uint4(norm_pair(own[i].x, inverse, w.x), norm_pair(own[i].y, inverse, w.y),
                                 norm_pair(own[i].z, inverse, w.z), norm_pair(own[i].w, inverse, w.w));
#if FP4
            v = in_fp4_order(v);
#endif
            normed[GROUP_PLACE(group)] = v;
        }
    }
    __syncwarp();
#endif

    float acc[UNITS][NT][4];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[u][t][i] = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        u32 xs[NT][16];
#pragma unroll
        for (int t = 0; t < NT; t++) {
#if NORM
#pragma unroll
            for (int q = 0; q < 4; q++) {
                uint4 v = normed[x_offset(warp * CHUNKS + c, q, tig) / 8];
                xs[t][4 * q] = v.x, xs[t][4 * q + 1] = v.y, xs[t][4 * q + 2] = v.z, xs[t][4 * q + 3] = v.w;
            }
#else
            u32 token = t * 8 + g;
            load_x(xs[t], x + (i64)token * K, token < m, warp * CHUNKS + c, tig);
#endif
        }
#pragma unroll
        for (int u = 0; u < UNITS; u++) dot<NT>(acc[u], rows[u][0][c], rows[u][1][c], xs);
    }

#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int t = 0; t < NT; t++) {
            sums[warp][u * 16 + g][t * 8 + 2 * tig] = acc[u][t][0];
            sums[warp][u * 16 + g][t * 8 + 2 * tig + 1] = acc[u][t][1];
            sums[warp][u * 16 + g + 8][t * 8 + 2 * tig] = acc[u][t][2];
            sums[warp][u * 16 + g + 8][t * 8 + 2 * tig + 1] = acc[u][t][3];
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < UNITS * 16 * m; i += WARPS * 32) {
        u32 row = i % (UNITS * 16), token = i / (UNITS * 16);
        i64 at = first_row + row;
        if (at >= n) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][row][token];
#if FP4
        sum *= i == threadIdx.x ? own_factor : factors[at / 16];
#endif
#if RESIDUAL
        sum = rounded(sum) + (i == threadIdx.x ? own_residual : wide(residual[(i64)token * n + at]));
#endif
        out[(i64)token * n + at] = narrow(sum);
    }
}
