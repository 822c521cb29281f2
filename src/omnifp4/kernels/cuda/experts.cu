// Routed experts of a decode step. The router has listed the experts that have tokens, in entries of at most eight
// tokens; their rows, one entry after the other, are shared out evenly among as many warps as the GPU holds at once, so
// every weight is read once from memory (an expert with more than eight tokens is read again from the L2 cache) and
// nothing is sorted. With one token (SINGLE) there is no list: each block finds the experts from the logits.
//
// Constants: FP4, HIDDEN, INNER, TOPK, EXPERTS, SINGLE, ROUTER_PARTS, NORMALISE_TOPK.
// gate_up_one: UNITS (8 features each), WARPS, CHUNKS, BLOCKS_PER_SM.
// down_one: S_SPLIT warps a slot, S_CHUNKS; INNER = S_SPLIT * S_CHUNKS * 128.
// gate_up, down (the latter's with D_): WARPS, BLOCKS_PER_SM, and of `stream`: RING, GROUP, X_AHEAD.

// An expert and at most eight of its tokens, as the router writes it: 16 bytes.
struct Active {
    int expert, first, count, unused;
};

DEVICE Active load_active(const Active* list, u32 at) {
    uint4 v = load_shared_result(list + at);
    Active a;
    a.expert = (int)v.x, a.first = (int)v.y, a.count = (int)v.z, a.unused = 0;
    return a;
}

#if SINGLE
// The token's experts in order of their logits, found by counting how many stand above each. Block-wide.
template <int threads>
DEVICE void rank_experts(const float* logits, u32 (&keys)[EXPERTS], u32 (&chosen)[TOPK]) {
    for (u32 e = threadIdx.x; e < EXPERTS; e += threads) {
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < ROUTER_PARTS; p++) sum += __ldcg(logits + p * EXPERTS + e);
        keys[e] = logit_key(rounded(sum), e);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < EXPERTS; e += threads) {
        const u32 mine = keys[e];
        int above = 0;
#pragma unroll 16
        for (int i = 0; i < EXPERTS; i++) above += keys[i] > mine;
        if (above < TOPK) chosen[above] = mine;
    }
    __syncthreads();
}
#endif

#if SINGLE
// One token: the block takes 8 UNITS features of one expert.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
gate_up_one(const u8* __restrict__ weights,     // [experts, 2 INNER, HIDDEN]
            const u8* __restrict__ scales,
            const float* __restrict__ factors,  // one per expert
            const float* logits,                // [ROUTER_PARTS, EXPERTS]
            const u16* x,                       // [HIDDEN], in the order that the weights ask for
            u16* out) {                         // [TOPK, INNER], in the order that `down_one` asks for
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    __shared__ float sums[WARPS][UNITS * 16];
    __shared__ u32 keys[EXPERTS], chosen[TOPK];
    wait_for_previous();
    let_next_start();
    u32 xs[CHUNKS][1][16];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) load_x(xs[c][0], x, true, warp * CHUNKS + c, tig);
    rank_experts<WARPS * 32>(logits, keys, chosen);
    const int expert = (int)key_expert(chosen[blockIdx.y]);
    const i64 base = (i64)expert * (2 * INNER);
    const u32 first = blockIdx.x * (UNITS * 8);
    Row rows[UNITS][2][CHUNKS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const i64 r = base + min(first + u * 8, (u32)INNER - 8) + g;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            rows[u][0][c] = load_row(weights, scales, r, HIDDEN, warp * CHUNKS + c, tig);
            rows[u][1][c] = load_row(weights, scales, r + INNER, HIDDEN, warp * CHUNKS + c, tig);
        }
    }
    const float factor = FP4 ? factors[expert] : 1.f;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        float acc[1][4] = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) dot<1>(acc, rows[u][0][c], rows[u][1][c], xs[c]);
        if (tig == 0) sums[warp][u * 16 + g] = acc[0][0], sums[warp][u * 16 + g + 8] = acc[0][2];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < UNITS * 8; i += WARPS * 32) {
        if (first + i >= INNER) continue;
        float gate = 0.f, up = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) gate += sums[w][i / 8 * 16 + i % 8], up += sums[w][i / 8 * 16 + i % 8 + 8];
        gate = rounded(gate * factor), up = rounded(up * factor);
        const float silu = rounded(gate / (1.f + __expf(-gate)));
        out[(i64)blockIdx.y * INNER + (first + i) / 8 * 8 + PLACE(i % 8)] = narrow(silu * up);
    }
}

// One token: the block takes 16 rows of all its experts, adds them up by weight, and adds the residual stream.
extern "C" __global__ void __launch_bounds__(TOPK * S_SPLIT * 32, 1)
down_one(const u8* __restrict__ weights, const u8* __restrict__ scales, const float* __restrict__ factors,
         const float* logits,            // [ROUTER_PARTS, EXPERTS]
         const u16* x,                   // [TOPK, INNER], gate_up's result
         u16* residual) {                // [HIDDEN], read and written
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    const u32 slot = warp / S_SPLIT, part = warp % S_SPLIT, first = blockIdx.x * 16;
    __shared__ float sums[TOPK * S_SPLIT][16], slot_weight[TOPK];
    __shared__ u32 keys[EXPERTS], chosen[TOPK];
    // The router was two kernels ago: it is complete.
    rank_experts<TOPK * S_SPLIT * 32>(logits, keys, chosen);
    const int expert = (int)key_expert(chosen[slot]);
    const i64 row = (i64)expert * HIDDEN + first + g;
    Row rows[2][S_CHUNKS];
#pragma unroll
    for (int c = 0; c < S_CHUNKS; c++) {
        rows[0][c] = load_row(weights, scales, row, INNER, part * S_CHUNKS + c, tig);
        rows[1][c] = load_row(weights, scales, row + 8, INNER, part * S_CHUNKS + c, tig);
    }
    const float factor = FP4 ? factors[expert] : 1.f;
    if (warp == 0) {
        const float most = key_logit(chosen[0]);
        float all = 0.f;
        for (u32 e = lane; e < EXPERTS; e += 32) all += __expf(key_logit(keys[e]) - most);
        all = warp_sum(all);
        float weight = lane < TOPK ? __expf(key_logit(chosen[lane < TOPK ? lane : 0]) - most) / all : 0.f;
#if NORMALISE_TOPK
        weight /= warp_sum(weight);
#endif
        if (lane < TOPK) slot_weight[lane] = rounded(weight);
    }
    wait_for_previous();
    let_next_start();
    const float own = threadIdx.x < 16 ? wide(residual[first + threadIdx.x]) : 0.f;
    u32 xs[S_CHUNKS][1][16];
#pragma unroll
    for (int c = 0; c < S_CHUNKS; c++) load_x(xs[c][0], x + (i64)slot * INNER, true, part * S_CHUNKS + c, tig);
    float acc[1][4] = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll
    for (int c = 0; c < S_CHUNKS; c++) dot<1>(acc, rows[0][c], rows[1][c], xs[c]);
    if (tig == 0) {  // column 0 is the token; the others hold the same
        sums[warp][g] = acc[0][0] * factor;
        sums[warp][g + 8] = acc[0][2] * factor;
    }
    __syncthreads();
    if (threadIdx.x < 16) {
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < TOPK; s++) {
            float y = 0.f;
#pragma unroll
            for (int p = 0; p < S_SPLIT; p++) y += sums[s * S_SPLIT + p][threadIdx.x];
            sum += slot_weight[s] * rounded(y);
        }
        residual[first + threadIdx.x] = narrow(own + rounded(sum));
    }
}
#else
// Several tokens: warps stream on their own, without a barrier or shared memory. The work is a list of items: 16 rows
// of an entry of the router's list (an expert and at most eight of its tokens). A warp takes an equal share of the list
// and computes its rows over all columns. Its weights go through a ring of registers: a chunk's place is loaded again
// as soon as the chunk is consumed, the next item's in the last round of an item, so that loads never cease.
// Activations come from the L1 cache, which holds the few rows of all warps, a chunk ahead.

#define ALL_WARPS (gridDim.x * (blockDim.x / WARP))

// 16 bytes, or what was there: predicated by hand, so that the loads stay between the arithmetic, in one basic block.
DEVICE void load_once_if(uint4& v, const void* at, bool wanted) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(at), "r"((u32)wanted));
}

#if FP4
// A pair of lanes takes whole sectors of codes and the scales over them in one word a chunk, so that one load brings
// the scales of GROUP chunks: of GROUP * 128 columns, lanes 0 and 1 take the first half.
struct Chunk {
    uint4 row[2];
};
DEVICE u32 lane_columns(u32 tig, int group) { return (tig >> 1) * (group * 64) + (tig & 1) * 32; }
DEVICE int chunk_columns(int chunk, int group) { return chunk / group * (group * 128) + chunk % group * 64; }

// The scales of GROUP chunks of two rows, as loaded.
template <int group>
struct Scales {
    u32 row[2][group];
};
template <int group>
DEVICE void load_scales(u32 (&to)[group], const u8* at, bool wanted) {
    if constexpr (group == 4)
        asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
                     : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
                     : "l"(at), "r"((u32)wanted));
    else if constexpr (group == 2)
        asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0,%1}, [%2];}"
                     : "+r"(to[0]), "+r"(to[1])
                     : "l"(at), "r"((u32)wanted));
    else
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
                     : "+r"(to[0])
                     : "l"(at), "r"((u32)wanted));
}

// Two of the four bytes to the low bytes of the halves. Volatile: done before the next scales come, or these would be
// copied, and the copy would wait for the load.
DEVICE u32 pick_scales(u32 bytes, u32 how) {
    u32 picked;
    asm volatile("prmt.b32 %0, %1, 0, %2;" : "=r"(picked) : "r"(bytes), "r"(how));
    return picked;
}

// Two E4M3 scales (not negative), in the low bytes of the halves, to BF16 times 2^118. As BF16 bits, the byte at bit 4
// is the scale times 2^-120, subnormals included.
DEVICE u32 both_scales(u32 bytes) { return multiply(multiply(bytes * 16u, 0x7b007b00u), 0x7b007b00u); }

// Eight codes to four pairs of BF16, as `unpack` does, in fewer instructions: one multiplication puts copies of a code
// where its sign and where its magnitude belong, and a mask keeps one bit group of each.
DEVICE void unpack_word(u32 (&pair)[4], u32 word, u32 scale) {
    const u32 down = word >> 6;
    const u32 keep = 0x81c081c0u;
    pair[0] = multiply(((word & 0x000f000fu) * 4160u) & keep, scale);
    pair[1] = multiply(((word & 0x00f000f0u) * 260u) & keep, scale);
    pair[2] = multiply(((down & 0x003c003cu) * 1040u) & keep, scale);
    pair[3] = multiply((word & 0x80008000u) | (down & 0x01c001c0u), scale);
}

DEVICE void dot_chunk(float (&acc)[4], const Chunk& w, u32 scales0, u32 scales1, const u32 (&x)[16]) {
    const u32 s0 = both_scales(scales0), s1 = both_scales(scales1);
    const u32 w0[4] = {w.row[0].x, w.row[0].y, w.row[0].z, w.row[0].w};
    const u32 w1[4] = {w.row[1].x, w.row[1].y, w.row[1].z, w.row[1].w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        u32 a[4], b[4];
        unpack_word(a, w0[q], __byte_perm(s0, s0, q < 2 ? 0x1010 : 0x3232));
        unpack_word(b, w1[q], __byte_perm(s1, s1, q < 2 ? 0x1010 : 0x3232));
        mma(acc, a[0], b[0], a[1], b[1], x[4 * q], x[4 * q + 1]);
        mma(acc, a[2], b[2], a[3], b[3], x[4 * q + 2], x[4 * q + 3]);
    }
}
#define X_GROUP 8  // from one group of eight activations of a lane to the next
#else
struct Chunk {
    RowBF16 row[2];
};
DEVICE u32 lane_columns(u32 tig, int) { return tig * 8; }
DEVICE int chunk_columns(int chunk, int) { return chunk * 128; }
#define X_GROUP 32
#endif

// Streams this warp's items of 16 rows over K columns.
//
// K: columns. ring: chunks under way, a divisor of K / 128. group: chunks whose scales come together, a divisor of ring.
// units: items of an entry. second: rows from row g to row g + 8 of the matrix instruction.
// x_ahead: load activations a chunk ahead if `ring` is even. early: the weights may be read before the kernel ahead of this one is complete.
// first_row(expert, unit): of the weights. x_row(entry): this lane's row of activations. open(entry): a new entry's
// results come next. finish(acc, expert, unit): a lane's sums, as the matrix instruction leaves them.
template <int K, int ring, int group, int units, int second, bool x_ahead, bool early, typename FirstRow, typename XRow,
          typename Open, typename Finish>
DEVICE void stream(const u8* weights, const u8* scales, const int* counts, const Active* active, const u16* x,
                   FirstRow first_row, XRow x_row, Open open, Finish finish) {
    const u32 lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    constexpr int rounds = K / 128 / ring;
    constexpr bool ahead = x_ahead && ring % 2 == 0;  // activations in two sets of registers
    if (!early) wait_for_previous(), let_next_start();
    const u32 items = __ldcg(counts) * units, warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const u32 begin = (u64)warp * items / ALL_WARPS;
    u32 left = (u32)((u64)(warp + 1) * items / ALL_WARPS) - begin;
    if (left == 0) {
        if (early) wait_for_previous(), let_next_start();
        return;
    }
    u32 place = begin / units, unit = begin - place * units;
    Active entry = load_active(active, place);
    int expert = entry.expert;

    Chunk held[ring] = {};
    bool more = true;
    const u8 *from, *scales_from;
    weights += (FP4 ? lane_columns(tig, group) / 2 : lane_columns(tig, group) * 2) + (u64)g * ROW_BYTES(K);
#if FP4
    Scales<group> coming[ring / group] = {};
    const u32 pick = tig & 1 ? 0x4342u : 0x4140u;
    scales += (tig >> 1) * (group * 4) + g * SCALE_BYTES(K);
#endif
    auto locate = [&] {
        const i64 row = first_row(expert, unit);
        from = weights + row * ROW_BYTES(K);
        if (FP4) scales_from = scales + row * SCALE_BYTES(K);
    };
    auto fetch = [&](int c) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#if FP4
            load_once_if(held[c].row[r], from + r * (second * ROW_BYTES(K)) + chunk_columns(c, group) / 2, more);
#else
#pragma unroll
            for (int q = 0; q < 4; q++)
                load_once_if(held[c].row[r].group[q],
                             from + r * (second * ROW_BYTES(K)) + (chunk_columns(c, group) + q * X_GROUP) * 2, more);
#endif
        }
    };
#if FP4
    auto fetch_scales = [&](int s) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            load_scales(coming[s].row[r], scales_from + r * (second * SCALE_BYTES(K)) + s * (group * 8), more);
    };
#endif
    locate();
#if FP4
#pragma unroll
    for (int s = 0; s < ring / group; s++) fetch_scales(s);
#endif
#pragma unroll
    for (int c = 0; c < ring; c++) fetch(c);
    if (early) wait_for_previous(), let_next_start();

    // Columns without a token are left as they are: their sums go nowhere.
    u32 xs[ahead ? 2 : 1][16] = {};
    const u16* x_from = x + x_row(entry) + lane_columns(tig, group);
    bool there = (int)g < entry.count;
    auto fetch_x = [&](u32(&to)[16], int c) {
        if (there) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const uint4 v = load(x_from + chunk_columns(c, group) + q * X_GROUP);
                to[4 * q] = v.x, to[4 * q + 1] = v.y, to[4 * q + 2] = v.z, to[4 * q + 3] = v.w;
            }
        }
    };
    if (ahead) fetch_x(xs[0], 0);
    open(entry);

#pragma unroll 1
    for (;;) {
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        const u32 now = unit;
        bool changed = false;
#pragma unroll 1
        for (int round = 0; round < rounds; round++) {
            const bool last = round == rounds - 1;
            if (!last) {
                from += chunk_columns(ring, group) / 2 * (FP4 ? 1 : 4);
                if (FP4) scales_from += ring * 8;
            } else {
                more = --left > 0;
                if (more) {
                    changed = ++unit == units;
                    if (changed) unit = 0, entry = load_active(active, ++place), expert = entry.expert;
                    locate();
                }
            }
#pragma unroll
            for (int c = 0; c < ring; c++) {
#if FP4
                u32 bytes[group][2];
                if (c % group == 0) {
#pragma unroll
                    for (int j = 0; j < group; j++) {
                        bytes[j][0] = pick_scales(coming[c / group].row[0][j], pick);
                        bytes[j][1] = pick_scales(coming[c / group].row[1][j], pick);
                    }
                    fetch_scales(c / group);
                }
#endif
                if (!ahead) fetch_x(xs[0], c);
                if (c == ring - 1) {
                    if (!last)
                        x_from += chunk_columns(ring, group);
                    else if (!changed)
                        x_from -= (rounds - 1) * chunk_columns(ring, group);
                    else
                        x_from = x + x_row(entry) + lane_columns(tig, group), there = (int)g < entry.count;
                    if (ahead) fetch_x(xs[0], 0);
                } else if (ahead) {
                    fetch_x(xs[(c + 1) % 2], c + 1);
                }
#if FP4
                dot_chunk(acc, held[c], bytes[c % group][0], bytes[c % group][1], xs[ahead ? c % 2 : 0]);
#else
                float sums[1][4] = {{acc[0], acc[1], acc[2], acc[3]}};
                u32 one[1][16];
#pragma unroll
                for (int i = 0; i < 16; i++) one[0][i] = xs[ahead ? c % 2 : 0][i];
                dot_bf16<1>(sums, held[c].row[0], held[c].row[1], one);
#pragma unroll
                for (int i = 0; i < 4; i++) acc[i] = sums[0][i];
#endif
                fetch(c);
            }
        }
        finish(acc, now);
        if (!more) return;
        if (changed) open(entry);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
gate_up(const u8* __restrict__ weights,     // [experts, 2 INNER, HIDDEN]
        const u8* __restrict__ scales,
        const float* __restrict__ factors,  // one per expert
        const int* counts, const Active* active,
        const int* slots,                   // in order of expert: token * TOPK + position
        const u16* x,                       // [tokens, HIDDEN], in the order that the weights ask for
        u16* out) {                         // [slots, INNER] by place in `slots`, in the order that `down` asks for
    const u32 lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    float factor = 1.f;
    u16* to = out;
    int count = 0;
    stream<HIDDEN, RING, GROUP, INNER / 8, INNER, X_AHEAD, false>(
        weights, scales, counts, active, x,
        [](int expert, u32 unit) { return (i64)(expert * (2 * INNER) + (int)unit * 8); },
        [&](const Active& entry) {
            return (u64)(u32)(__ldcg(slots + entry.first + min((int)g, entry.count - 1)) / TOPK) * HIDDEN;
        },
        [&](const Active& entry) {
            if (FP4) factor = factors[entry.expert];
            to = out + (u64)(u32)(entry.first + 2 * tig) * INNER + PLACE(g);
            count = entry.count - 2 * (int)tig;
        },
        [&](const float(&acc)[4], u32 unit) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const float gate = rounded(acc[t] * factor), up = rounded(acc[t + 2] * factor);
                const float silu = rounded(gate / (1.f + __expf(-gate)));
                if (t < count) to[t * INNER + unit * 8] = narrow(silu * up);
            }
        });
}

extern "C" __global__ void __launch_bounds__(D_WARPS * 32, D_BLOCKS_PER_SM)
down(const u8* __restrict__ weights,     // [experts, HIDDEN, INNER]
     const u8* __restrict__ scales, const float* __restrict__ factors,
     const int* counts, const Active* active, const int* slots,
     const u16* x,                       // gate_up's result
     u16* out) {                         // [tokens * TOPK, HIDDEN] by slot, natural
    const u32 lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    float factor = 1.f;
    u32 to[2] = {};
    int count = 0;
    // The router was two kernels ago: its list is complete.
    stream<INNER, D_RING, D_GROUP, HIDDEN / 16, 8, D_X_AHEAD, true>(
        weights, scales, counts, active, x,
        [](int expert, u32 unit) { return (i64)(expert * HIDDEN + (int)unit * 16); },
        [&](const Active& entry) { return (u64)(u32)(entry.first + g) * INNER; },
        [&](const Active& entry) {
            if (FP4) factor = factors[entry.expert];
            count = entry.count - 2 * (int)tig;
#pragma unroll
            for (int t = 0; t < 2; t++)
                if (t < count) to[t] = (u32)__ldcg(slots + entry.first + 2 * tig + t) * HIDDEN + g;
        },
        [&](const float(&acc)[4], u32 unit) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
                if (t >= count) continue;
                out[to[t] + unit * 16] = narrow(acc[t] * factor);
                out[to[t] + unit * 16 + 8] = narrow(acc[t + 2] * factor);
            }
        });
}
#endif
