// RMSNorm between the matrices of a decode step, with what has to be added first.
//
// Constants: HIDDEN, THREADS, TOPK (0: nothing to add; else the outputs of the token's experts are added by weight).

#define GROUPS (HIDDEN / 8)
#define OWN ((GROUPS + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(u16* residual,                  // [m, HIDDEN]; written if TOPK
     const u16* slot_outputs,            // [m * TOPK, HIDDEN]
     const int* experts,                 // [m, TOPK]; below 0: no expert
     const float* expert_weights,        // [m, TOPK]
     const u16* __restrict__ weight, float eps,
     u16* natural, u16* fp4_order) {     // [m, HIDDEN] each; null: not wanted
    __shared__ float scratch[THREADS / 32];
    const i64 token = blockIdx.x;
    uint4 own[OWN], factors[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * THREADS + threadIdx.x;
        if (group < GROUPS) factors[i] = load(weight + group * 8);
    }
#if TOPK
    // The router was three kernels ago: its choice is complete. A slot without an expert holds what it held before.
    float slot_weight[TOPK];
#pragma unroll
    for (int s = 0; s < TOPK; s++) slot_weight[s] = __ldcg(expert_weights + token * TOPK + s);
    bool there[TOPK];
#pragma unroll
    for (int s = 0; s < TOPK; s++) there[s] = __ldcg(experts + token * TOPK + s) >= 0;
#endif
    wait_for_previous();
    let_next_start();
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * THREADS + threadIdx.x;
        if (group >= GROUPS) continue;
        own[i] = load(residual + token * HIDDEN + group * 8);
        u32 v[4] = {own[i].x, own[i].y, own[i].z, own[i].w};
#if TOPK
        uint4 outputs[TOPK];
#pragma unroll
        for (int s = 0; s < TOPK; s++) outputs[s] = load(slot_outputs + (token * TOPK + s) * HIDDEN + group * 8);
        float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < TOPK; s++) {
            if (!there[s]) continue;
            const float w = slot_weight[s];
            const u32 p[4] = {outputs[s].x, outputs[s].y, outputs[s].z, outputs[s].w};
#pragma unroll
            for (int j = 0; j < 4; j++) sum[2 * j] += w * low(p[j]), sum[2 * j + 1] += w * high(p[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = pack(low(v[j]) + rounded(sum[2 * j]), high(v[j]) + rounded(sum[2 * j + 1]));
        own[i] = make_uint4(v[0], v[1], v[2], v[3]);
        *(uint4*)(residual + token * HIDDEN + group * 8) = own[i];
#endif
#pragma unroll
        for (int j = 0; j < 4; j++) squares += low(v[j]) * low(v[j]) + high(v[j]) * high(v[j]);
    }
    const float inverse = rsqrtf(block_sum<THREADS / 32>(squares, scratch) / HIDDEN + eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u32 group = i * THREADS + threadIdx.x;
        if (group >= GROUPS) continue;
        const uint4 w = factors[i];
        const uint4 v = make_uint4(norm_pair(own[i].x, inverse, w.x), norm_pair(own[i].y, inverse, w.y),
                                   norm_pair(own[i].z, inverse, w.z), norm_pair(own[i].w, inverse, w.w));
        if (natural) *(uint4*)(natural + token * HIDDEN + group * 8) = v;
        if (fp4_order) *(uint4*)(fp4_order + token * HIDDEN + fp4_group(group) * 8) = in_fp4_order(v);
    }
}

// The residual stream of each row starts as the embedding of its token; where the row stands is noted for the layers.
extern "C" __global__ void __launch_bounds__(THREADS)
embed(const u16* __restrict__ table,     // [vocabulary, HIDDEN]
      const int* rows,                   // slot of each row; below 0: none
      const int* tokens, const int* lengths, const int* shifts,  // of each slot; shift: rotary position minus length
      u16* residual, int4* places) {     // [m]: slot, length, rotary position
    wait_for_previous();
    let_next_start();
    const i64 row = blockIdx.x;
    const int slot = rows[row];
    if (threadIdx.x == 0)
        places[row] = slot < 0 ? make_int4(-1, 0, 0, 0) : make_int4(slot, lengths[slot], lengths[slot] + shifts[slot], 0);
    const i64 token = slot < 0 ? 0 : tokens[slot];
    for (u32 group = threadIdx.x; group < GROUPS; group += THREADS)
        *(uint4*)(residual + row * HIDDEN + group * 8) = load_once(table + token * HIDDEN + group * 8);
}
