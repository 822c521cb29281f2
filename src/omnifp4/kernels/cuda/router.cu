// Router of a decode step: logits, softmax, top-k, and the list of experts that have tokens, in one launch.
//
// Logits are rounded to BF16 as the stock router's are; of equal logits the lower expert wins.
// Block (x, y) computes experts 16 x .. 16 x + 15 over part y of the columns. The last block to finish chooses - unless
// SINGLE: for one token the kernels after this choose by themselves, and this one normalises the residual stream.
//
// Constants: HIDDEN, EXPERTS (<= 256), TOPK, NT, PARTS, CHUNKS (of a part), SINGLE, NORMALISE_TOPK, FP4 (order that
// gate_up's weights ask for). HIDDEN = PARTS * CHUNKS * 128. 16 warps: CHUNKS * NT of them multiply.

#define WARPS 16
#define TOKENS (8 * NT)
#define PER_LANE ((EXPERTS + 31) / 32)
#define PER_WARP ((TOKENS + WARPS - 1) / WARPS)

struct Active {
    int expert, first, count, unused;
};

#if !SINGLE
// counts: entries of `active`, and experts that have tokens. An expert with more than eight has several entries.
DEVICE void choose(const float* logits, const int4* rows, int m, int* experts, float* weights, int* places, Active* active,
                   int* slots, int* counts) {
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    __shared__ u32 routed[EXPERTS];
    __shared__ u8 position[EXPERTS][TOKENS];
    __shared__ int first_slot[EXPERTS];
    for (u32 i = threadIdx.x; i < EXPERTS; i += WARPS * 32) routed[i] = 0;
    __syncthreads();
    // A warp's tokens side by side: their loads and reductions wait together.
    float value[PER_WARP][PER_LANE];
    u32 key[PER_WARP][PER_LANE], mine[PER_WARP] = {}, best[PER_WARP] = {};
    bool there[PER_WARP];
#pragma unroll
    for (int t = 0; t < PER_WARP; t++) {
        const int token = t * WARPS + warp;
        there[t] = token < m && rows[token].x >= 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const u32 e = i * 32 + lane;
            value[t][i] = 0.f;
            if (there[t] && e < EXPERTS) {
#pragma unroll
                for (int p = 0; p < PARTS; p++) value[t][i] += __ldcg(logits + (p * m + token) * EXPERTS + e);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < PER_WARP; t++)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const u32 e = i * 32 + lane;
            value[t][i] = rounded(value[t][i]);
            key[t][i] = e < EXPERTS ? logit_key(value[t][i], e) : 0;
        }
#pragma unroll
    for (int s = 0; s < TOPK; s++)
#pragma unroll
        for (int t = 0; t < PER_WARP; t++) {
            u32 top = key[t][0];
#pragma unroll
            for (int i = 1; i < PER_LANE; i++) top = max(top, key[t][i]);
            top = __reduce_max_sync(FULL, top);
            if (s == 0) best[t] = top;
            if (lane == s) mine[t] = top;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (key[t][i] == top) key[t][i] = 0;
        }
#pragma unroll
    for (int t = 0; t < PER_WARP; t++) {
        const int token = t * WARPS + warp;
        const float most = key_logit(best[t]);
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) all += i * 32 + lane < EXPERTS ? __expf(value[t][i] - most) : 0.f;
        all = warp_sum(all);
        float weight = lane < TOPK ? __expf(key_logit(mine[t]) - most) / all : 0.f;
#if NORMALISE_TOPK
        weight /= warp_sum(weight);
#endif
        if (lane < TOPK && token < m) {
            const u32 e = key_expert(mine[t]);
            // An idle row has no experts.
            experts[token * TOPK + lane] = there[t] ? (int)e : -1;
            weights[token * TOPK + lane] = there[t] ? rounded(weight) : 0.f;
            if (there[t]) {
                atomicOr(&routed[e], 1u << token);
                position[e][token] = (u8)lane;
            }
        }
    }
    __syncthreads();
    if (warp == 0) {
        // Where each expert's slots and entries begin: summed together, entries in the upper half.
        int before = 0, busy = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const u32 e = i * 32 + lane;
            const int count = e < EXPERTS ? __popc(routed[e]) : 0;
            const int own = count | (count + 7) / 8 << 16;
            int upto = own;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const int other = __shfl_up_sync(FULL, upto, d);
                if (lane >= d) upto += other;
            }
            const int start = before + upto - own, slot = start & 0xffff, entry = start >> 16;
            if (e < EXPERTS) first_slot[e] = slot;
            for (int t = 0; t < count; t += 8)
                *(int4*)(active + entry + t / 8) = make_int4((int)e, slot + t, min(8, count - t), 0);
            before += __shfl_sync(FULL, upto, 31);
            busy += __popc(__ballot_sync(FULL, count > 0));
        }
        if (lane == 0) counts[0] = before >> 16, counts[1] = busy;
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
        int at = first_slot[e];
        for (u32 left = routed[e]; left; left &= left - 1) {
            const int token = __ffs(left) - 1, slot = token * TOPK + position[e][token];
            slots[at] = slot;
            places[slot] = at++;
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
router(const u16* __restrict__ weights,  // [EXPERTS, HIDDEN]
       const u16* x,                     // [m, HIDDEN], natural; the residual stream if SINGLE
       const u16* __restrict__ norm_weight, float eps,
       u16* normed_out,                  // [1, HIDDEN] for gate_up if SINGLE
       const int4* rows,                 // [m] slot of each row first; below 0: idle
       float* logits, u32* done,         // [PARTS, m, EXPERTS]; blocks that are done, 0 before and after
       int* experts, float* expert_weights, int* places, Active* active, int* slots, int* counts, int m) {
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    const int first = blockIdx.x * 16, part = blockIdx.y;
    const u32 chunk = warp % CHUNKS, tile = warp / CHUNKS;
    __shared__ float sums[CHUNKS][16][TOKENS + 1];
    __shared__ bool last;
    RowBF16 r0, r1;
    if (tile < NT) {
        r0 = load_bf16(weights + (i64)min(first + (int)g, EXPERTS - 1) * HIDDEN, part * CHUNKS + chunk, tig);
        r1 = load_bf16(weights + (i64)min(first + (int)g + 8, EXPERTS - 1) * HIDDEN, part * CHUNKS + chunk, tig);
    }
#if SINGLE
    __shared__ float scratch[WARPS];
    __shared__ uint4 normed[CHUNKS * 16];
#define GROUPS (HIDDEN / 8)
#define OWN ((GROUPS + WARPS * 32 - 1) / (WARPS * 32))
    uint4 own[OWN], norm_weights[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * WARPS * 32 + threadIdx.x;
        if (group / (CHUNKS * 16) == part) norm_weights[i] = load(norm_weight + group * 8);
    }
#endif
    wait_for_previous();
    let_next_start();
#if SINGLE
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * WARPS * 32 + threadIdx.x;
        own[i] = make_uint4(0, 0, 0, 0);
        if (group < GROUPS) own[i] = load(x + group * 8);
        const u32 v[4] = {own[i].x, own[i].y, own[i].z, own[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) squares += low(v[j]) * low(v[j]) + high(v[j]) * high(v[j]);
    }
    const float inverse = rsqrtf(block_sum<WARPS>(squares, scratch) / HIDDEN + eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * WARPS * 32 + threadIdx.x;
        // Each part of the columns is left for gate_up by the first block that has it.
        if (group / (CHUNKS * 16) != part) continue;
        const uint4 w = norm_weights[i];
        const uint4 v = make_uint4(norm_pair(own[i].x, inverse, w.x), norm_pair(own[i].y, inverse, w.y),
                                   norm_pair(own[i].z, inverse, w.z), norm_pair(own[i].w, inverse, w.w));
        normed[group - part * (CHUNKS * 16)] = v;
#if FP4
        if (blockIdx.x == 0) *(uint4*)(normed_out + fp4_group(group) * 8) = in_fp4_order(v);
#else
        if (blockIdx.x == 0) *(uint4*)(normed_out + group * 8) = v;
#endif
    }
    __syncthreads();
#endif
    if (tile < NT) {
        float acc[1][4] = {{0.f, 0.f, 0.f, 0.f}};
        u32 xs[1][16];
        const u32 token = tile * 8 + g;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const u32 at = chunk * 128 + q * 32 + tig * 8;
            uint4 v = make_uint4(0, 0, 0, 0);
#if SINGLE
            v = normed[at / 8];
#else
            if (token < m) v = load(x + (i64)token * HIDDEN + part * (CHUNKS * 128) + at);
#endif
            xs[0][4 * q] = v.x, xs[0][4 * q + 1] = v.y, xs[0][4 * q + 2] = v.z, xs[0][4 * q + 3] = v.w;
        }
        dot_bf16<1>(acc, r0, r1, xs);
        sums[chunk][g][tile * 8 + 2 * tig] = acc[0][0];
        sums[chunk][g][tile * 8 + 2 * tig + 1] = acc[0][1];
        sums[chunk][g + 8][tile * 8 + 2 * tig] = acc[0][2];
        sums[chunk][g + 8][tile * 8 + 2 * tig + 1] = acc[0][3];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 16 * m; i += WARPS * 32) {
        const u32 row = i % 16, token = i / 16;
        if (first + row >= EXPERTS) continue;
        float sum = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) sum += sums[c][row][token];
        __stcg(logits + (part * m + token) * EXPERTS + first + row, sum);
    }
#if !SINGLE
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(done, 1u) == gridDim.x * gridDim.y - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) *done = 0;
    choose(logits, rows, m, experts, expert_weights, places, active, slots, counts);
#endif
}
