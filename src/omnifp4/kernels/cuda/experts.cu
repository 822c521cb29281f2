// Routed experts of a decode step. The router has listed the experts that have tokens, in entries of at most eight
// tokens; their rows, one entry after the other, are shared out evenly among as many teams of warps as the GPU holds at
// once, so every weight is read once from memory (an expert with more than eight tokens is read again from the L2 cache)
// and nothing is sorted. With one token (SINGLE) there is no list: each block finds the experts from the logits.
//
// Constants: FP4, HIDDEN, INNER, TOPK, EXPERTS, SINGLE, ROUTER_PARTS, NORMALISE_TOPK.
// gate_up_one: UNITS (8 features each), WARPS, CHUNKS, BLOCKS_PER_SM.
// down_one: S_SPLIT warps a slot, S_CHUNKS; INNER = S_SPLIT * S_CHUNKS * 128.
// gate_up (with U_) and down (with D_): BLOCKS_PER_SM, and of `stream`: SLICES, CHUNKS, TEAMS, STAGES, RUN.

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
        out[(i64)blockIdx.y * INNER + GROUP_PLACE((first + i) / 8) * 8 + PLACE(i % 8)] = narrow(silu * up);
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
// Several tokens: teams of warps stream. The work is a list of tiles: 32 rows of an entry of the router's list (an
// expert and at most eight of its tokens). The teams take turns, `run` tiles each time: so they all read from the same
// stretch of memory, which is what DRAM is fast at. Each warp of a team takes a slice of the columns and keeps the
// entry's activations of that slice in registers. Weights come by
// asynchronous copies, 16 rows a stage, several stages ahead, into shared memory of the warp that will read them, and
// scales, a tile at a time, into memory of the team: no registers are held for what is under way. Every request takes
// whole lines of 128 bytes where a row has them: half lines cost the L2 cache as much. After a tile the team adds up its
// warps' sums: one barrier, since two sets of sums take turns.

#define STAGE_ROWS 16
#define TILE_ROWS 32
#define TOKEN_SUMS 20                    // floats from a token's sums to the next one's: no bank twice in a store
#define HALF_SUMS (8 * TOKEN_SUMS + 16)  // of 16 rows; the halves of a tile fall into different banks
#define MOST_TOKENS 32
#define MOST_SLOTS (MOST_TOKENS * TOPK)
#define MOST_ENTRIES ((EXPERTS < MOST_SLOTS ? EXPERTS : MOST_SLOTS) + MOST_SLOTS / 8)

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int ahead>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(ahead) : "memory");
}
DEVICE uint4 load_shared16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
DEVICE u32 load_shared4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
template <int threads>
DEVICE void team_barrier(u32 team) {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(threads) : "memory");
}

#define COLUMN_BYTES(columns) (FP4 ? (columns) / 2 : (columns) * 2)
#define PIECES(chunks) (COLUMN_BYTES((chunks) * 128) / 64)  // of 16 bytes, of a lane and row
#if FP4
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

// Adds 16 rows times eight tokens over a lane's 32 columns of a chunk.
DEVICE void dot_chunk(float (&acc)[4], const uint4& row0, const uint4& row1, u32 scales0, u32 scales1, const u32 (&x)[16]) {
    const u32 s0 = both_scales(scales0), s1 = both_scales(scales1);
    const u32 w0[4] = {row0.x, row0.y, row0.z, row0.w}, w1[4] = {row1.x, row1.y, row1.z, row1.w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        u32 a[4], b[4];
        unpack_word(a, w0[q], __byte_perm(s0, s0, q < 2 ? 0x1010 : 0x3232));
        unpack_word(b, w1[q], __byte_perm(s1, s1, q < 2 ? 0x1010 : 0x3232));
        mma(acc, a[0], b[0], a[1], b[1], x[4 * q], x[4 * q + 1]);
        mma(acc, a[2], b[2], a[3], b[3], x[4 * q + 2], x[4 * q + 3]);
    }
}
#endif

// Shared memory: of a warp and stage; sums of a team, in floats; from a row's scales to the next row's, an odd number of
// 16 bytes where rows are whole pieces, so that eight rows fall into different banks; scales of a team.
#define STAGE_BYTES(chunks) (2 * PIECES(chunks) * 512)
#define TEAM_SUMS(slices) (2 * (slices) * 2 * HALF_SUMS)
#define SCALE_STRIDE(k) (SCALE_BYTES(k) + (SCALE_BYTES(k) % 32 == 0 && FP4 ? 16 : 0))
#define SCALE_SETS(stages) ((stages) / 2 + 1)
#define TEAM_SCALES(k, stages) (SCALE_SETS(stages) * TILE_ROWS * SCALE_STRIDE(k))

// The router's list in shared memory.
struct Routes {
    Active entries[MOST_ENTRIES];
    int slots[MOST_SLOTS];
    int count;
};

// Every block reads the list whole: one wait for memory instead of one for each thing that depends on another.
// All loads are asked for before the first is stored.
template <int threads>
DEVICE void load_routes(Routes& to, const int* counts, const Active* active, int most_entries, const int* slots, int most_slots) {
    constexpr int entry_turns = (MOST_ENTRIES + threads - 1) / threads, slot_turns = (MOST_SLOTS + threads - 1) / threads;
    Active entries[entry_turns];
    int own_slots[slot_turns];
    const int count = __ldcg(counts);
#pragma unroll
    for (int n = 0; n < slot_turns; n++) {
        const int i = n * threads + threadIdx.x;
        own_slots[n] = i < most_slots ? __ldcg(slots + i) : 0;
    }
#pragma unroll
    for (int n = 0; n < entry_turns; n++) {
        const int i = n * threads + threadIdx.x;
        if (i < most_entries) entries[n] = load_active(active, i);
    }
#pragma unroll
    for (int n = 0; n < slot_turns; n++) {
        const int i = n * threads + threadIdx.x;
        if (i < most_slots) to.slots[i] = own_slots[n];
    }
#pragma unroll
    for (int n = 0; n < entry_turns; n++) {
        const int i = n * threads + threadIdx.x;
        if (i < most_entries) to.entries[i] = entries[n];
    }
    if (threadIdx.x == 0) to.count = count;
    __syncthreads();
}

// Streams this team's tiles.
//
// K = slices * chunks * 128 columns; chunks is 1 or 2. teams of `slices` warps in a block. stages under way or in use.
// units: stages of an entry, a multiple of 2 run. run: tiles that a team takes at a time. step: rows from a unit to the
// next. second: rows from row g to row g + 8 of the matrix instruction; 8, or a tile has 16 rows in two places. early:
// the weights may be read before the kernel ahead of this one is complete.
// first_row(expert): of the weights. x_row(entry, column): where the activations of a column begin.
// target(entry, token): where the token's results go. finish(target, unit, row, sum): a warp has a token's 32 rows.
template <int K, int slices, int chunks, int teams, int stages, int run, int units, int step, int second, bool early,
          typename FirstRow, typename XRow, typename Target, typename Finish>
DEVICE void stream(const u8* weights, const u8* scales, const float* factors, const Routes& routes, const u16* x,
                   FirstRow first_row, XRow x_row, Target target, Finish finish) {
    // Copies to places that do not begin a line of 128 bytes cost a seventh of the bandwidth.
    extern __shared__ __align__(128) uint4 shared[];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x & 31, g = lane >> 2, tig = lane & 3;
    const u32 team = warp / slices, slice = warp % slices, thread = slice * WARP + lane;
    constexpr u32 entry_runs = units / 2 / run;
    const u32 runs = routes.count * entry_runs, all_teams = gridDim.x * teams, number = blockIdx.x * teams + team;
    if (number >= runs) {
        if (early) wait_for_previous(), let_next_start();
        return;
    }
    constexpr u32 ring_bytes = stages * STAGE_BYTES(chunks);
    const u32 stage_memory = shared_address(shared), scale_memory = stage_memory + teams * slices * ring_bytes;
    const u32 ring = stage_memory + warp * ring_bytes, scale_ring = scale_memory + team * TEAM_SCALES(K, stages);
    float* const sums = (float*)((u8*)shared + teams * slices * ring_bytes + teams * TEAM_SCALES(K, stages)) + team * TEAM_SUMS(slices);

    // What is copied next: stage `unit` of run `next`. A row's slice takes the 16 bytes of so many lanes.
    // A request fills shared memory lane after lane: places out of order cost a tenth of the bandwidth. Instead, lanes
    // of odd rows fetch the other 64 bytes of their 128, so that two rows are read back from different banks.
    constexpr u32 row_lanes = PIECES(chunks) * 4, row_count = WARP / row_lanes;
    constexpr bool crossed = row_lanes >= 8;
    u32 next = number, unit = 0;
    const u32 first_lane_row = lane / row_lanes;
    const u32 piece = lane % row_lanes ^ (crossed ? first_lane_row % 2 * 4 : 0);
    weights += (i64)first_lane_row * ROW_BYTES(K) + slice * (row_lanes * 16) + piece * 16;
    // Where one request is one row, every second request is of an odd row.
    const int other_half = crossed && row_count == 1 ? (piece & 4 ? -64 : 64) : 0;
    u32 to = ring + lane * 16;
    const u32 to_end = to + ring_bytes;
    const u8* from;
#if FP4
    // Of a tile's scales a thread takes 16 bytes. The two places of 16 rows each are whole in memory.
    constexpr u32 half_scales = STAGE_ROWS * SCALE_BYTES(K);
    const u32 own = thread * 16;
    const bool has_scales = own < 2 * half_scales;
    scales += own < half_scales ? (i64)own : (i64)(second == 8 ? 16 : second) * SCALE_BYTES(K) + own - half_scales;
    u32 scale_to = scale_ring + own + (SCALE_STRIDE(K) == SCALE_BYTES(K) ? 0 : own / SCALE_BYTES(K) * 16);
    const u32 scale_end = scale_to + TEAM_SCALES(K, stages);
    const u8* scales_from;
#endif
    auto locate = [&] {
        const i64 row = first_row(routes.entries[next / entry_runs].expert) + (i64)(next % entry_runs * (2 * run)) * step;
        from = weights + row * ROW_BYTES(K);
#if FP4
        scales_from = scales + row * SCALE_BYTES(K);
#endif
    };
    locate();
    // One stage; `first` of a tile brings its scales too.
    auto copy_next = [&](bool first) {
        if (next < runs) {
#pragma unroll
            for (u32 i = 0; i < STAGE_ROWS / row_count; i++) {
                const u32 row = i * row_count, r = row / 8;
                copy16(to + i * 512, from + (row % 8 + (i64)r * second) * ROW_BYTES(K) + (i % 2 ? other_half : 0));
            }
            to = to + STAGE_BYTES(chunks) == to_end ? to_end - ring_bytes : to + STAGE_BYTES(chunks);
            from += step * ROW_BYTES(K);
#if FP4
            if (first) {
                if (has_scales) copy16(scale_to, scales_from);
                scale_to = scale_to + TILE_ROWS * SCALE_STRIDE(K) == scale_end ? scale_end - TEAM_SCALES(K, stages)
                                                                              : scale_to + TILE_ROWS * SCALE_STRIDE(K);
                scales_from += 2 * step * SCALE_BYTES(K);
            }
#endif
            if (++unit == 2 * run) {
                unit = 0, next += all_teams;
                if (next < runs) locate();
            }
        }
        end_of_copies();
    };
#pragma unroll
    for (int s = 0; s < stages - 1; s++) copy_next(s % 2 == 0);
    if (early) wait_for_previous(), let_next_start();

    // Columns without a token are left as they are: their sums go nowhere.
    u32 xs[chunks][16] = {};
    // A warp finishes a token; in a large team another one each time, since most entries have few tokens.
    constexpr bool turns = slices > 4;
    constexpr u32 passes = (8 + slices - 1) / slices;
    Active entry = routes.entries[number / entry_runs];
    float factor = 1.f;
    auto open_entry = [&] {
        if (FP4) factor = factors[entry.expert];
        if ((int)g >= entry.count) return;
        const u16* at = x + x_row(entry, g);
#pragma unroll
        for (int c = 0; c < chunks; c++) load_x(xs[c], at, true, slice * chunks + c, tig);
    };
    open_entry();
    __syncwarp();
    // Of row g: the even pieces of 64 bytes, and from there the odd ones.
    const u32 lane_reads = g * (row_lanes * 16) + tig * 16 + (crossed ? g % 2 * 64 : 0);
    const u32 odd_piece = crossed && g % 2 ? -64 : 64;
    const u32 read_end = ring + ring_bytes + lane_reads;
    u32 read = ring + lane_reads, set = 0, first_token = slice, now = number, tile = 0;
#if FP4
    u32 scale_set = 0;
    const u32 scales_at = scale_ring + g * SCALE_STRIDE(K) + slice * (chunks * 8) + (tig >> 1) * 4;
    const u32 pick = tig & 1 ? 0x4342 : 0x4140;
#endif
    wait_for_copies<stages - 2>();
    team_barrier<slices * WARP>(team);
#pragma unroll 1
    for (;;) {
        float* const mine = sums + set + slice * (2 * HALF_SUMS) + 2 * tig * TOKEN_SUMS + g;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half) {  // the first half was waited for ahead of the barrier
                wait_for_copies<stages - 2>();
                __syncwarp();
            }
            uint4 pieces[2][PIECES(chunks)];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int p = 0; p < PIECES(chunks); p++) pieces[r][p] = load_shared16(read + r * (PIECES(chunks) * 512) + p / 2 * 128 + (p % 2 ? odd_piece : 0));
#if FP4
            u32 bytes[2][chunks];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int c = 0; c < chunks; c++)
                    bytes[r][c] = __byte_perm(load_shared4(scales_at + scale_set + (half * step + r * (24 - step)) * SCALE_STRIDE(K) + c * 8), 0, pick);
#endif
            read = read + STAGE_BYTES(chunks) == read_end ? read_end - ring_bytes : read + STAGE_BYTES(chunks);
            copy_next(stages % 2 == 0 ? half == 1 : half == 0);  // into the stage that was read in the last round
            float acc[chunks][4] = {};
#if FP4
#pragma unroll
            for (int c = 0; c < chunks; c++) dot_chunk(acc[c], pieces[0][c], pieces[1][c], bytes[0][c], bytes[1][c], xs[c]);
#else
#pragma unroll
            for (int c = 0; c < chunks; c++)
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    const uint4 &a = pieces[0][c * 4 + q], &b = pieces[1][c * 4 + q];
                    mma(acc[c], a.x, b.x, a.y, b.y, xs[c][4 * q], xs[c][4 * q + 1]);
                    mma(acc[c], a.z, b.z, a.w, b.w, xs[c][4 * q + 2], xs[c][4 * q + 3]);
                }
#endif
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float sum = acc[0][i];
#pragma unroll
                for (int c = 1; c < chunks; c++) sum += acc[c][i];
                mine[half * HALF_SUMS + (i & 1) * TOKEN_SUMS + (i >> 1) * 8] = sum;
            }
        }
        // The next entry's activations are asked for before this one's sums are added up.
        const Active done = entry;
        const float done_factor = factor;
        const u32 done_unit = now % entry_runs * (2 * run) + 2 * tile;
        if (++tile == run) {
            tile = 0, now += all_teams;
            if (now < runs) {
                entry = routes.entries[now / entry_runs];
                if (entry.first != done.first) open_entry();
                __syncwarp();  // lanes without a token are back before the barrier
            }
        }
        wait_for_copies<stages - 2>();  // the next tile's scales, which others read
        team_barrier<slices * WARP>(team);
#pragma unroll
        for (u32 p = 0; p < passes; p++) {
            const u32 token = first_token + p * slices;
            if (token >= (u32)done.count) break;
            const float* all = sums + set + (lane >> 4) * HALF_SUMS + token * TOKEN_SUMS + (lane & 15);
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < slices; w++) sum += all[w * (2 * HALF_SUMS)];
            finish(target(done, token), done_unit + (lane >> 4), lane & 15, sum * done_factor);
        }
        if (now >= runs) return;
        set = TEAM_SUMS(slices) / 2 - set;
#if FP4
        scale_set = scale_set == (SCALE_SETS(stages) - 1) * TILE_ROWS * SCALE_STRIDE(K) ? 0 : scale_set + TILE_ROWS * SCALE_STRIDE(K);
#endif
        if (turns) first_token = first_token == slices - 1 ? 0 : first_token + 1;
    }
}

extern "C" __global__ void __launch_bounds__(U_SLICES * U_TEAMS * WARP, U_BLOCKS_PER_SM)
gate_up(const u8* __restrict__ weights,     // [experts, 2 INNER, HIDDEN]
        const u8* __restrict__ scales,
        const float* __restrict__ factors,  // one per expert
        const int* counts, const Active* active, int most_entries,
        const int* slots, int most_slots,   // in order of expert: token * TOPK + position
        const u16* x,                       // [tokens, HIDDEN], in the order that the weights ask for
        u16* out) {                         // [slots, INNER] by place in `slots`, in the order that `down` asks for
    __shared__ Routes routes;
    wait_for_previous();
    let_next_start();
    load_routes<U_SLICES * U_TEAMS * WARP>(routes, counts, active, most_entries, slots, most_slots);
    stream<HIDDEN, U_SLICES, U_CHUNKS, U_TEAMS, U_STAGES, U_RUN, INNER / 8, 8, INNER, false>(
        weights, scales, factors, routes, x, [](int expert) { return (i64)expert * (2 * INNER); },
        [&](const Active& entry, u32 column) { return (u32)routes.slots[entry.first + column] / TOPK * HIDDEN; },
        [](const Active& entry, u32 token) { return (u32)(entry.first + token) * INNER; },
        [&](u32 to, u32 unit, u32 row, float sum) {
            // Rows 0 to 7 are gates, 8 to 15 what they gate.
            const float value = rounded(sum), up = __shfl_down_sync(FULL, value, 8);
            if (row < 8) out[to + GROUP_PLACE(unit) * 8 + PLACE(row)] = narrow(rounded(value / (1.f + __expf(-value))) * up);
        });
}

extern "C" __global__ void __launch_bounds__(D_SLICES * D_TEAMS * WARP, D_BLOCKS_PER_SM)
down(const u8* __restrict__ weights,     // [experts, HIDDEN, INNER]
     const u8* __restrict__ scales, const float* __restrict__ factors,
     const int* counts, const Active* active, int most_entries, const int* slots, int most_slots,
     const u16* x,                       // gate_up's result
     u16* out) {                         // [tokens * TOPK, HIDDEN] by slot, natural
    // The router was two kernels ago: its list is complete.
    __shared__ Routes routes;
    load_routes<D_SLICES * D_TEAMS * WARP>(routes, counts, active, most_entries, slots, most_slots);
    stream<INNER, D_SLICES, D_CHUNKS, D_TEAMS, D_STAGES, D_RUN, HIDDEN / 16, 16, 8, true>(
        weights, scales, factors, routes, x, [](int expert) { return (i64)expert * HIDDEN; },
        [](const Active& entry, u32 column) { return (u32)(entry.first + column) * INNER; },
        [&](const Active& entry, u32 token) { return (u32)routes.slots[entry.first + token] * HIDDEN; },
        [&](u32 to, u32 unit, u32 row, float sum) { out[to + unit * 16 + row] = narrow(sum); });
}
#endif
