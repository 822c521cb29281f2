// Attention of a decode step over a paged cache: q/k norm, rotary embedding and cache write of the new token included.
//
// A block takes the query heads of one key/value head and a stretch of the context; its warps take 16 tokens at a time.
// Tokens of earlier steps are read before the previous kernel is waited for; the new token stays outside the tiles and
// joins when the warps' parts are added up.
// With several stretches, the last block of a (row, key/value head) to finish adds up their parts in fixed order.
//
// Constants: HEADS, KV_HEADS, HEAD_DIM (64 or 128), PAGE (tokens, a multiple of 16), WARPS, SPLITS, MIN_STRETCH, QK_NORM,
// FP4 (order that o_proj's weights ask for).

#define GROUP (HEADS / KV_HEADS)  // <= 16
#define GROUP_ABOVE_8 (HEADS > 8 * KV_HEADS)
#define PARTS (HEAD_DIM / 32)     // 16-byte pieces of a key that a lane takes
#define HALF (HEAD_DIM / 2)
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define PAIRS (HALF / 32)         // rotary pairs of a lane

// What the norm and the rotary embedding of a head multiply with, of one lane: elements lane + 32 i of both halves.
struct HeadFactors {
    float norm[2][PAIRS], cosine[PAIRS], sine[PAIRS];
};

DEVICE HeadFactors load_factors(const u16* norm_weight, const u16* cosine, const u16* sine) {
    const u32 lane = threadIdx.x & 31;
    HeadFactors f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
#if QK_NORM
        f.norm[0][i] = wide(norm_weight[i * 32 + lane]), f.norm[1][i] = wide(norm_weight[HALF + i * 32 + lane]);
#endif
        f.cosine[i] = wide(cosine[i * 32 + lane]), f.sine[i] = wide(sine[i * 32 + lane]);
    }
    return f;
}

// Norm and rotary embedding of one head by one warp.
DEVICE void prepare_head(const u16* from, const HeadFactors& f, float eps, u16* to) {
    const u32 lane = threadIdx.x & 31;
    float a[PAIRS], b[PAIRS], squares = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        a[i] = wide(from[i * 32 + lane]), b[i] = wide(from[HALF + i * 32 + lane]);
        squares += a[i] * a[i] + b[i] * b[i];
    }
#if QK_NORM
    const float inverse = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        a[i] = rounded(rounded(a[i] * inverse) * f.norm[0][i]);
        b[i] = rounded(rounded(b[i] * inverse) * f.norm[1][i]);
    }
#endif
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        to[i * 32 + lane] = narrow(rounded(a[i] * f.cosine[i]) - rounded(b[i] * f.sine[i]));
        to[HALF + i * 32 + lane] = narrow(rounded(b[i] * f.cosine[i]) + rounded(a[i] * f.sine[i]));
    }
}

struct Tile {
    uint4 k[2][PARTS], v[4][HEAD_DIM / 64];
};

DEVICE void load_keys(Tile& tile, const u16* keys, i64 base, u32 g, u32 tig) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int c = 0; c < PARTS; c++)
            tile.k[j][c] = load_once(keys + base + (j * 8 + g) * HEAD_DIM + c * 32 + tig * 8);
}

DEVICE void load_values(Tile& tile, const u16* values, i64 base, int tokens, u32 g, u32 tig) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int token = 2 * tig + (j & 1) + (j >> 1) * 8;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 64; c++) {
            // Behind the end may be anything, and zero times NaN is NaN.
            tile.v[j][c] = make_uint4(0, 0, 0, 0);
            if (token < tokens) tile.v[j][c] = load_once(values + base + token * HEAD_DIM + c * 64 + g * 8);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
attention(const u16* qkv,                // [m, QKV]
          const u16* __restrict__ q_norm, const u16* __restrict__ k_norm, float eps,
          const u16* __restrict__ cosine, const u16* __restrict__ sine,  // [positions, HALF]
          const int4* places,            // [m] slot (below 0: idle), tokens in the cache before this one, rotary position
          const int* __restrict__ pages, int pages_per_slot,  // [slots, pages_per_slot]
          u16* keys, u16* values,        // [pages, KV_HEADS, PAGE, HEAD_DIM] of this layer
          float* parts, float* tops, u32* done,  // [m, KV_HEADS, SPLITS, GROUP, HEAD_DIM]; [.., GROUP, 2]; [m, KV_HEADS]
          u16* out,                      // [m, HEADS * HEAD_DIM]
          float scale) {                 // of the scores, times log2(e)
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    const int kv = blockIdx.x, split = blockIdx.y, row = blockIdx.z;
    __shared__ u16 queries[GROUP][HEAD_DIM], new_key[HEAD_DIM], new_value[HEAD_DIM];
    __shared__ __align__(16) float o[WARPS][GROUP][HEAD_DIM];
    __shared__ float top[WARPS + 1][GROUP], total[WARPS][GROUP];
    __shared__ bool last;
    // The places were written before the previous kernel began.
    const uint4 here = load_shared_result(places + row);
    const int slot = (int)here.x, before = (int)here.y, all = before + 1;
    const int stretch = max((all + SPLITS * PAGE - 1) / (SPLITS * PAGE) * PAGE, MIN_STRETCH);
    const int splits = (all + stretch - 1) / stretch;
    if (slot < 0 || split >= splits) {
        wait_for_previous();
        let_next_start();
        return;
    }
    const bool has_new = split == splits - 1;
    const int begin = split * stretch, end = min(before, begin + stretch);
    const int* table = pages + (i64)slot * pages_per_slot;
    int t0 = begin + warp * 16;
    Tile tile;
    auto base_of = [&](int token) { return (((i64)table[token / PAGE] * KV_HEADS + kv) * PAGE + token % PAGE) * HEAD_DIM; };
    if (t0 < end) {
        const i64 base = base_of(t0);
        load_keys(tile, keys, base, g, tig), load_values(tile, values, base, end - t0, g, tig);
    }
    const i64 position = (int)here.z;
    const i64 new_page = has_new ? table[before / PAGE] : 0;
    // Factors before the wait too: behind it only what the previous kernel wrote is read.
    const u16 *c = cosine + position * HALF, *s = sine + position * HALF;
    const HeadFactors for_query = load_factors(q_norm, c, s);
    HeadFactors for_key = for_query;
    if (has_new && warp == WARPS - 1) for_key = load_factors(k_norm, c, s);
    wait_for_previous();
    let_next_start();
    const u16* mine = qkv + (i64)row * QKV;
    const i64 new_at = ((new_page * KV_HEADS + kv) * PAGE + before % PAGE) * HEAD_DIM;
    if (has_new && warp == 0)
        for (u32 i = lane; i < HEAD_DIM; i += 32)
            new_value[i] = mine[(HEADS + KV_HEADS + kv) * HEAD_DIM + i], values[new_at + i] = new_value[i];
#pragma unroll
    for (int h = 0; h < (GROUP + WARPS - 1) / WARPS; h++)
        if (h * WARPS + warp < GROUP)
            prepare_head(mine + (kv * GROUP + h * WARPS + warp) * HEAD_DIM, for_query, eps, queries[h * WARPS + warp]);
    if (has_new && warp == WARPS - 1) {
        prepare_head(mine + (HEADS + kv) * HEAD_DIM, for_key, eps, new_key);
        __syncwarp();
        for (u32 i = lane; i < HEAD_DIM; i += 32) keys[new_at + i] = new_key[i];
    }
    __syncthreads();

    u32 q[PARTS][4], q8[PARTS][4];  // heads g and g + 8
#pragma unroll
    for (int c = 0; c < PARTS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[c][i] = g < GROUP ? *(const u32*)&queries[g][c * 32 + tig * 8 + 2 * i] : 0u;
            q8[c][i] = 0u;
#if GROUP_ABOVE_8
            if (g + 8 < GROUP) q8[c][i] = *(const u32*)&queries[g + 8][c * 32 + tig * 8 + 2 * i];
#endif
        }

    float acc[HEAD_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

#pragma unroll 1
    while (t0 < end) {
        // A tile's registers are loaded again as soon as they are used.
        const int next = t0 + WARPS * 16;
        const i64 next_base = next < end ? base_of(next) : 0;
        float s[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] = 0.f;
#pragma unroll
            for (int c = 0; c < PARTS; c++) {
                mma(s[j], q[c][0], q8[c][0], q[c][1], q8[c][1], tile.k[j][c].x, tile.k[j][c].y);
                mma(s[j], q[c][2], q8[c][2], q[c][3], q8[c][3], tile.k[j][c].z, tile.k[j][c].w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] = t0 + j * 8 + 2 * (int)tig + (i & 1) < end ? s[j][i] * scale : -INFINITY;
        }
        if (next < end) load_keys(tile, keys, next_base, g, tig);
        // Column pairs (0, 1) belong to head g, (2, 3) to head g + 8.
        u32 p[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            now = fmaxf(now, most[h]);  // finite: a tile's first token is there
            const float shrink = exp2f(most[h] - now);
            most[h] = now;
            float e[4];
#pragma unroll
            for (int i = 0; i < 4; i++) e[i] = exp2f(s[i >> 1][2 * h + (i & 1)] - now);
            sum[h] = sum[h] * shrink + ((e[0] + e[1]) + (e[2] + e[3]));
            p[h][0] = pack(e[0], e[1]), p[h][1] = pack(e[2], e[3]);
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) acc[n][2 * h] *= shrink, acc[n][2 * h + 1] *= shrink;
        }
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 64; c++) {
            const uint4 &a = tile.v[0][c], &b = tile.v[1][c], &d = tile.v[2][c], &f = tile.v[3][c];
            const u32 v0[4] = {a.x, a.y, a.z, a.w}, v1[4] = {b.x, b.y, b.z, b.w};
            const u32 v2[4] = {d.x, d.y, d.z, d.w}, v3[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 pick = j & 1 ? 0x7632 : 0x5410;
                mma(acc[c * 8 + j], p[0][0], p[1][0], p[0][1], p[1][1], __byte_perm(v0[j / 2], v1[j / 2], pick),
                    __byte_perm(v2[j / 2], v3[j / 2], pick));
            }
        }
        t0 = next;
        if (t0 < end) load_values(tile, values, next_base, end - t0, g, tig);
    }

    // Lane holds head g (and g + 8): dimension c * 64 + column * 8 + j of tile c * 8 + j, columns 2 tig and 2 tig + 1.
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(FULL, sum[h], 1);
        sum[h] += __shfl_xor_sync(FULL, sum[h], 2);
        const int head = g + 8 * h;
        if (head >= GROUP) continue;
        if (tig == 0) top[warp][head] = most[h], total[warp][head] = sum[h];
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            o[warp][head][(n / 8) * 64 + (2 * tig) * 8 + n % 8] = acc[n][2 * h];
            o[warp][head][(n / 8) * 64 + (2 * tig + 1) * 8 + n % 8] = acc[n][2 * h + 1];
        }
    }
    // The new token's score with each head.
    for (int h = warp; h < GROUP; h += WARPS) {
        float s = 0.f;
        if (has_new)
            for (u32 i = lane; i < HEAD_DIM; i += 32) s += wide(queries[h][i]) * wide(new_key[i]);
        s = warp_sum(s);
        if (lane == 0) top[WARPS][h] = has_new ? s * scale : -INFINITY;
    }
    __syncthreads();
    const i64 place = ((i64)row * KV_HEADS + kv) * SPLITS;
#pragma unroll
    for (u32 base = 0; base < GROUP * HEAD_DIM; base += WARPS * 128) {
        const u32 i = base + threadIdx.x * 4;
        if (i >= GROUP * HEAD_DIM) continue;
        const u32 head = i / HEAD_DIM, d = i % HEAD_DIM;
        float m = top[WARPS][head], t = 0.f, x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, top[w][head]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float f = exp2f(top[w][head] - m);
            const float4 part = *(const float4*)&o[w][head][d];
            t += f * total[w][head];
            x[0] += f * part.x, x[1] += f * part.y, x[2] += f * part.z, x[3] += f * part.w;
        }
        if (has_new) {
            const float f = exp2f(top[WARPS][head] - m);
            t += f;
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] += f * wide(new_value[d + j]);
        }
        if (splits == 1) {
            u16* to = out + (i64)row * (HEADS * HEAD_DIM) + GROUP_PLACE(((kv * GROUP + head) * HEAD_DIM + d) / 8) * 8;
#pragma unroll
            for (int j = 0; j < 4; j++) to[PLACE(d % 8 + j)] = narrow(x[j] / t);
        } else {
            __stcg((float4*)(parts + (place + split) * (GROUP * HEAD_DIM) + i), make_float4(x[0], x[1], x[2], x[3]));
            if (d == 0) {
                __stcg(tops + ((place + split) * GROUP + head) * 2, m);
                __stcg(tops + ((place + split) * GROUP + head) * 2 + 1, t);
            }
        }
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(done + row * KV_HEADS + kv, 1u) == (u32)splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) done[row * KV_HEADS + kv] = 0;
    // Factors of all parts first, then the sums: no load waits for another.
    float(*factors)[SPLITS] = (float(*)[SPLITS])o;  // the warps' own sums have been read
    for (u32 head = warp; head < GROUP; head += WARPS) {
        float m = -INFINITY, t = 0.f, tops_here[(SPLITS + 31) / 32], totals_here[(SPLITS + 31) / 32];
#pragma unroll
        for (int i = 0; i < (SPLITS + 31) / 32; i++) {
            const int w = i * 32 + (int)lane;
            tops_here[i] = w < splits ? __ldcg(tops + ((place + w) * GROUP + head) * 2) : -INFINITY;
            totals_here[i] = w < splits ? __ldcg(tops + ((place + w) * GROUP + head) * 2 + 1) : 0.f;
            m = fmaxf(m, tops_here[i]);
        }
#pragma unroll
        for (int i = 16; i; i >>= 1) m = fmaxf(m, __shfl_xor_sync(FULL, m, i));
#pragma unroll
        for (int i = 0; i < (SPLITS + 31) / 32; i++) t += exp2f(tops_here[i] - m) * totals_here[i];
        t = warp_sum(t);
#pragma unroll
        for (int i = 0; i < (SPLITS + 31) / 32; i++)
            if (i * 32 + lane < SPLITS) factors[head][i * 32 + lane] = exp2f(tops_here[i] - m) / t;
    }
    __syncthreads();
#pragma unroll
    for (u32 base = 0; base < GROUP * HEAD_DIM; base += WARPS * 128) {
        const u32 i = base + threadIdx.x * 4;
        if (i >= GROUP * HEAD_DIM) continue;
        const u32 head = i / HEAD_DIM, d = i % HEAD_DIM;
        float x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
        for (int w = 0; w < splits; w++) {
            const float4 part = __ldcg((const float4*)(parts + (place + w) * (GROUP * HEAD_DIM) + i));
            const float f = factors[head][w];
            x[0] += f * part.x, x[1] += f * part.y, x[2] += f * part.z, x[3] += f * part.w;
        }
        u16* to = out + (i64)row * (HEADS * HEAD_DIM) + GROUP_PLACE(((kv * GROUP + head) * HEAD_DIM + d) / 8) * 8;
#pragma unroll
        for (int j = 0; j < 4; j++) to[PLACE(d % 8 + j)] = narrow(x[j]);
    }
}

// Many tokens of one prompt: q/k norm and rotary embedding in place, keys and values into the cache.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
place_heads(u16* qkv,                    // [tokens, QKV]
            const u16* __restrict__ q_norm, const u16* __restrict__ k_norm, float eps,
            const u16* __restrict__ cosine, const u16* __restrict__ sine,  // [tokens, HALF]
            const int* __restrict__ table,  // [pages] of the slot
            u16* keys, u16* values, int first) {  // the first token's place in the slot
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const i64 token = blockIdx.x;
    const int place = first + (int)token;
    wait_for_previous();
    let_next_start();
    u16* mine = qkv + token * QKV;
    const u16 *c = cosine + token * HALF, *s = sine + token * HALF;
    const HeadFactors for_query = load_factors(q_norm, c, s), for_key = load_factors(k_norm, c, s);
    for (int h = warp; h < HEADS + 2 * KV_HEADS; h += WARPS) {
        u16* head = mine + h * HEAD_DIM;
        if (h < HEADS) {
            prepare_head(head, for_query, eps, head);
            continue;
        }
        const int kv = (h - HEADS) % KV_HEADS;
        const i64 at = (((i64)table[place / PAGE] * KV_HEADS + kv) * PAGE + place % PAGE) * HEAD_DIM;
        if (h < HEADS + KV_HEADS) {
            prepare_head(head, for_key, eps, head);
            __syncwarp();
            for (u32 i = lane; i < HEAD_DIM; i += 32) keys[at + i] = head[i];
        } else {
            for (u32 i = lane; i < HEAD_DIM; i += 32) values[at + i] = head[i];
        }
    }
}
