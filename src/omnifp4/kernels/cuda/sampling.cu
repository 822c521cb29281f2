// The next token of every row from its logits, and what follows from it: the slot's state for the next step.
//
// Constants: VOCABULARY, BLOCKS (that share a row's logits), CANDIDATES (of `draw`, sorted, the greatest first).

// State of the slots. A row's new token is left for the host in `recent`; below 0: its logits are not numbers.
struct Slots {
    int *tokens, *lengths, *made, *recent;
    u8* seen;  // [slots, VOCABULARY], for the repetition penalty; null: not kept
};

DEVICE void commit(const Slots& slots, int row, int slot, int token, bool finite) {
    slots.recent[row] = finite ? token : -1;
    slots.tokens[slot] = token;
    slots.lengths[slot] += 1;
    slots.made[slot] += 1;
    if (slots.seen) slots.seen[(i64)slot * VOCABULARY + token] = 1;
}

// Keys order BF16 values as numbers do, NaN above all; of equal values the lower index is greater.
DEVICE u64 value_key(u32 bits, u32 index) {
    const u32 order = bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
    return ((u64)((bits & 0x7fffu) > 0x7f80u ? 0xffffu : order) << 32) | (0xffffffffu - index);
}

DEVICE u64 block_most(u64 key, u64* scratch) {
#pragma unroll
    for (int i = 16; i; i >>= 1) key = max(key, __shfl_xor_sync(FULL, key, i));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = key;
    __syncthreads();
    for (u32 w = 0; w < blockDim.x / 32; w++) key = max(key, scratch[w]);
    return key;
}

// The greatest logit of each block's share.
extern "C" __global__ void __launch_bounds__(256)
greatest(const u16* logits, const int* rows, u64* found) {  // [m, VOCABULARY], [m], [m, BLOCKS]
    __shared__ u64 scratch[8];
    wait_for_previous();
    let_next_start();
    const i64 row = blockIdx.y;
    if (rows[row] < 0) return;
    u64 key = 0;
    for (u32 group = blockIdx.x * 256 + threadIdx.x; group < VOCABULARY / 8; group += BLOCKS * 256) {
        const uint4 v = load(logits + row * VOCABULARY + group * 8);
        const u32 p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            key = max(key, value_key(p[j] & 0xffffu, group * 8 + 2 * j));
            key = max(key, value_key(p[j] >> 16, group * 8 + 2 * j + 1));
        }
    }
    key = block_most(key, scratch);
    if (threadIdx.x == 0) found[row * BLOCKS + blockIdx.x] = key;
}

// Takes the greatest logit of each row.
extern "C" __global__ void __launch_bounds__(32)
take(const u64* found, const int* rows, int* tokens, int* lengths, int* made, int* recent, u8* seen) {
    wait_for_previous();
    let_next_start();
    const int row = blockIdx.x, slot = rows[row];
    if (slot < 0) return;
    u64 key = 0;
    for (u32 i = threadIdx.x; i < BLOCKS; i += 32) key = max(key, found[row * BLOCKS + i]);
#pragma unroll
    for (int i = 16; i; i >>= 1) key = max(key, __shfl_xor_sync(FULL, key, i));
    const Slots slots = {tokens, lengths, made, recent, seen};
    // 0xff80 orders as positive infinity: not a number that a sound model gives.
    if (threadIdx.x == 0) commit(slots, row, slot, (int)(0xffffffffu - (u32)key), (u32)(key >> 32) < 0xff80u);
}

// Noise that depends on the sequence's seed, its step and the token alone, whatever else is in the batch.
DEVICE float gumbel(u64 seed, u32 step, u32 token) {
    u64 z = seed + 0x9e3779b97f4a7c15ull * (((u64)step << 32) + token + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float u = ((u32)(z >> 40) + 0.5f) * 0x1p-24f;
    return -__logf(-__logf(u));
}

// Draws from the candidates of each row: top-k, then the smallest set whose probability reaches top-p, then one of it.
extern "C" __global__ void __launch_bounds__(1024)
draw(const float* values, const i64* indices,  // [m, CANDIDATES] logits after the penalty, descending
     const int* rows, const float* temperatures, const int* top_ks, const float* top_ps, const u64* seeds,  // per slot
     int* tokens, int* lengths, int* made, int* recent, u8* seen) {
    __shared__ float scratch[32];
    __shared__ u64 keys[32];
    __shared__ float carried;
    wait_for_previous();
    let_next_start();
    const int row = blockIdx.x, slot = rows[row];
    if (slot < 0) return;
    const float* value = values + (i64)row * CANDIDATES;
    const i64* index = indices + (i64)row * CANDIDATES;
    const float temperature = temperatures[slot], top_p = top_ps[slot], most = value[0];
    const u32 step = made[slot], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u64 seed = seeds[slot];
    int count = top_ks[slot] > 0 ? min(top_ks[slot], CANDIDATES) : CANDIDATES;
    const bool greedy = temperature <= 0.f;
    const float inverse = greedy ? 1.f : 1.f / temperature;
    float total = 0.f;
    for (int i = threadIdx.x; i < count; i += 1024) total += __expf((value[i] - most) * inverse);
    total = block_sum<32>(total, scratch);
    if (threadIdx.x == 0) carried = 0.f;
    __syncthreads();
    u64 best = 0;
    for (int base = 0; base < count; base += 1024) {
        const int i = base + threadIdx.x;
        const float scaled = i < count ? (value[i] - most) * inverse : -INFINITY;
        const float p = i < count ? __expf(scaled) / total : 0.f;
        // Probability of all candidates before this one.
        float upto = p;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const float other = __shfl_up_sync(FULL, upto, d);
            if (lane >= d) upto += other;
        }
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
        float before = carried + upto - p;
        for (u32 w = 0; w < warp; w++) before += scratch[w];
        if (i < count && (i == 0 || before < top_p || top_p >= 1.f)) {
            const u32 token = (u32)index[i];
            const float score = greedy ? scaled : scaled + gumbel(seed, step, token);
            const u32 bits = __float_as_uint(score);
            const u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
            best = max(best, ((u64)order << 32) | (0xffffffffu - token));
        }
        __syncthreads();
        if (threadIdx.x == 1023) carried = before + p;
        __syncthreads();
    }
    best = block_most(best, keys);
    const Slots slots = {tokens, lengths, made, recent, seen};
    const bool finite = most < INFINITY && most > -INFINITY;
    if (threadIdx.x == 0) commit(slots, row, slot, finite ? (int)(0xffffffffu - (u32)best) : 0, finite);
}
