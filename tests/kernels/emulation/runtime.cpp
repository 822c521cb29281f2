// Runs the blocks of a CUDA kernel on a CPU, one after the other, and watches what its threads do.
//
// Every thread of a block is a fiber; a fiber runs until it waits: at a barrier, or for the other lanes of its warp.
// Who runs next is drawn from a seed. Watched are, and end a launch with a message:
//  - accesses outside of the buffers that the launch was given, of shared memory, or not aligned to their size;
//  - shared memory that is read before it is written, or while an asynchronous copy to it is under way;
//  - two threads' accesses of a byte, one of them a write, that no barrier orders (shuffles order no memory);
//  - global memory that another block of the launch wrote, without its fence and count; writes into what another read;
//  - reads of what the kernel ahead wrote, and any write, before the wait for it; ends without that wait; reads of it
//    through the read-only path, which asks for memory that nobody writes while the kernel is there;
//  - barriers and warp operations that not all reach, and copies that are never waited for.
// A read through the read-only path of what the same launch writes gives NaN: it may be anything.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

struct Index { u32 x, y, z; };
struct Buffer {
    u64 begin, end;
    u32 writable, read_only;  // read_only: the compiler may read it through the read-only path
    char name[40];
};

extern "C" {
Index threadIdx, blockIdx, blockDim, gridDim;
char* emulated_dynamic;
}

namespace {

constexpr u32 STACK_BYTES = 256 << 10, MOST_THREADS = 1024, MOST_WARPS = 32, MOST_DYNAMIC = 256 << 10;
constexpr u32 MANY = 0xffffffffu, MOST_STEPS = 200'000'000;
constexpr u32 STATIC_TAG = 0x02000000, DYNAMIC_TAG = 0x01000000;

struct Copy {
    char* to;
    u8 bytes[16];
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    char* stack = nullptr;
    bool begun, ended, waited, unfenced, sees_others;  // sees_others: fence after the count
    u32 write_epoch;                                     // of its last write to global memory
    u32 thread;
    const char* waits_at;
    std::vector<Copy> copies;              // since the last commit
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    const char* operation;
    u32 arrived, epoch, seen[MOST_WARPS];  // seen[v]: accesses of warp v before this epoch are ordered before ours
    u64 in[32], out[32];
    u32 argument[32], fragments[32][6];
    float sums[32][4];
};

struct Barrier {
    std::vector<u32> arrived;
    u32 expected = 0;
};

// A byte of shared memory. Epochs go on from block to block: those below `base` are of earlier blocks.
struct SharedByte {
    u32 write_epoch, write_thread;
    bool atomic, under_way;
    u32 read_epoch[MOST_WARPS], read_lane[MOST_WARPS];
};

// A byte of global memory that a launch wrote, or read where it may write.
struct GlobalByte {
    u32 write_launch, write_block, write_thread, write_epoch, read_launch, read_block;
    bool atomic;
};

Fiber fibers[MOST_THREADS];
Warp warps[MOST_WARPS];
Barrier barriers[16];
std::vector<u32> ready;
std::vector<SharedByte> shared_bytes;
struct Page {
    GlobalByte bytes[4096];
    u32 write_launch;  // the last one
};
std::unordered_map<u64, std::unique_ptr<Page>> pages;
jmp_buf scheduler;
ucontext_t unused;
Fiber* current;
u32 threads, warp_count, live, base = 1, launch_number, block_number, mode;
u64 random_state, steps;
bool failed, is_dependent, block_counted;
u32 count_thread, count_epoch;
std::string message;
const char* kernel_name;
const Buffer* buffers;
u32 buffer_count;
char *static_begin, *static_end;
u32 dynamic_bytes;
char* dynamic_memory;
void (*entry)(const u64*);
const u64* values;

u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((random_state >> 33) % below);
}

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

[[noreturn]] void fail(const char* format, ...) {
    char text[512], all[700];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    snprintf(all, sizeof all, "%s, block (%u, %u, %u), thread %u: %s", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z,
             current ? current->thread : 0, text);
    if (!failed) message = all;
    failed = true;
    to_scheduler();
}

void wait_at(const char* what) {
    current->waits_at = what;
    if (!_setjmp(current->at)) to_scheduler();
}

void release(u32 thread) {
    fibers[thread].waits_at = nullptr;
    ready.push_back(thread);
}

Warp& own_warp() { return warps[current->thread / 32]; }
u32 own_lane() { return current->thread % 32; }

// All lanes of the warp meet; the last to come computes.
template <class Compute>
void meet(const char* operation, Compute compute) {
    Warp& warp = own_warp();
    if (warp.arrived && strcmp(warp.operation, operation))
        fail("at %s while other lanes of its warp are at %s", operation, warp.operation);
    warp.operation = operation;
    if (++warp.arrived < 32) return wait_at(operation);
    warp.arrived = 0;
    compute(warp);
    const u32 first = current->thread / 32 * 32;
    for (u32 t = first; t < first + 32; t++)
        if (t != current->thread) release(t);
    if (mode == 0) {  // the last one has no advantage
        release(current->thread);
        if (!_setjmp(current->at)) to_scheduler();
    }
}

bool ordered(u32 thread, u32 epoch) {
    const u32 mine = current->thread / 32, theirs = thread / 32;
    if (thread == current->thread) return true;
    return epoch < (mine == theirs ? warps[mine].epoch : warps[mine].seen[theirs]);
}

void release_barrier(Barrier& barrier) {
    bool in[MOST_WARPS] = {};
    for (u32 t : barrier.arrived) in[t / 32] = true;
    u32 seen[MOST_WARPS];
    memset(seen, 0, sizeof seen);
    for (u32 w = 0; w < warp_count; w++)
        if (in[w]) {
            warps[w].epoch++;
            for (u32 v = 0; v < warp_count; v++) seen[v] = std::max(seen[v], warps[w].seen[v]);
        }
    for (u32 w = 0; w < warp_count; w++)
        if (in[w]) seen[w] = warps[w].epoch;
    for (u32 w = 0; w < warp_count; w++)
        if (in[w]) memcpy(warps[w].seen, seen, sizeof seen);
    for (u32 t : barrier.arrived) release(t);
    barrier.arrived.clear();
}

void end_of_thread() {
    if (is_dependent && !current->waited) fail("ends without having waited for the kernel ahead");
    if (!current->copies.empty()) fail("ends with copies that are in no group");
    for (auto& group : current->groups)
        if (!group.empty()) fail("ends with copies under way");
    current->ended = true;
    live--;
    if (live && barriers[0].arrived.size() == live) release_barrier(barriers[0]);
    to_scheduler();
}

void fiber_main() {
    entry(values);
    end_of_thread();
}

// ---------------------------------------------------------------- shared memory

// Index into shared_bytes, or below 0.
int64_t shared_index(const char* at) {
    if (at >= static_begin && at < static_end) return at - static_begin;
    if (at >= emulated_dynamic && at < emulated_dynamic + dynamic_bytes)
        return static_end - static_begin + (at - emulated_dynamic);
    return -1;
}

void touch_shared(u64 index, u32 bytes, bool write, bool atomic = false) {
    const u32 warp = current->thread / 32, lane = current->thread % 32;
    for (u64 i = index; i < index + bytes; i++) {
        SharedByte& byte = shared_bytes[i];
        const bool written = byte.write_epoch >= base;
        if (byte.under_way) fail("%s shared byte %lu while a copy to it is under way", write ? "writes" : "reads", (unsigned long)i);
        if (!write && !written) fail("reads shared byte %lu, which nobody wrote", (unsigned long)i);
        if (written && !(atomic && byte.atomic) && !ordered(byte.write_thread, byte.write_epoch))
            fail("race: %s shared byte %lu, which thread %u wrote, with no barrier between", write ? "writes" : "reads",
                 (unsigned long)i, byte.write_thread);
        if (!write) {
            byte.read_lane[warp] = byte.read_epoch[warp] == warps[warp].epoch && byte.read_lane[warp] != lane ? MANY : lane;
            byte.read_epoch[warp] = warps[warp].epoch;
            continue;
        }
        for (u32 w = 0; w < warp_count; w++) {
            const u32 epoch = byte.read_epoch[w];
            if (epoch < base) continue;
            if (w == warp ? epoch >= warps[w].epoch && byte.read_lane[w] != lane : epoch >= warps[warp].seen[w])
                fail("race: writes shared byte %lu, which warp %u read, with no barrier between", (unsigned long)i, w);
        }
        byte.write_epoch = warps[warp].epoch, byte.write_thread = current->thread, byte.atomic = atomic;
    }
}

// ---------------------------------------------------------------- global memory

const Buffer* buffer_of(u64 at, u32 bytes) {
    const Buffer* found = nullptr;
    for (u32 i = 0; i < buffer_count; i++)
        if (at >= buffers[i].begin && at + bytes <= buffers[i].end && (!found || buffers[i].writable)) found = buffers + i;
    return found;
}

struct Known { u64 number; Page* page; } known[1024];

Page* page_of(u64 at, bool create) {
    const u64 number = at >> 12;
    Known& entry = known[number % 1024];
    if (entry.number != number || (create && !entry.page)) {
        auto found = pages.find(number);
        if (found == pages.end() && create) {
            found = pages.emplace(number, std::make_unique<Page>()).first;
            memset(found->second.get(), 0, sizeof(Page));
        }
        entry = {number, found == pages.end() ? nullptr : found->second.get()};
    }
    return entry.page;
}

enum { PLAIN, CACHED_GLOBALLY, READ_ONLY, ATOMIC };

// True where what is read may be anything.
bool read_global(const Buffer* buffer, u64 at, u32 bytes, int kind) {
    bool any = false;
    Page* page = page_of(at, buffer->writable);  // an aligned access stays on its page
    if (!page || (!buffer->writable && page->write_launch + 1 < launch_number)) return false;
    for (u64 i = at; i < at + bytes; i++) {
        GlobalByte* byte = page->bytes + (i & 4095);
        if (is_dependent && !current->waited && byte->write_launch == launch_number - 1)
            fail("reads %s + %lu, which the kernel ahead writes, before waiting for it", buffer->name, (unsigned long)(i - buffer->begin));
        if (is_dependent && kind == READ_ONLY && byte->write_launch == launch_number - 1)
            fail("reads %s + %lu, which the kernel ahead writes, through the read-only path", buffer->name, (unsigned long)(i - buffer->begin));
        if (byte->write_launch == launch_number) {
            if (kind == READ_ONLY) {
                any = true;
            } else if (byte->write_block != block_number) {
                if (!current->sees_others)
                    fail("reads %s + %lu, which block %u writes, without a count and a fence", buffer->name, (unsigned long)(i - buffer->begin), byte->write_block);
            } else if (!ordered(byte->write_thread, byte->write_epoch)) {
                fail("race: reads %s + %lu, which thread %u wrote, with no barrier between", buffer->name, (unsigned long)(i - buffer->begin), byte->write_thread);
            }
        }
        if (buffer->writable && kind != READ_ONLY) {
            const bool again = byte->read_launch == launch_number && byte->read_block != block_number;
            byte->read_block = again ? MANY : block_number, byte->read_launch = launch_number;
        }
    }
    return any;
}

void write_global(const Buffer* buffer, u64 at, u32 bytes, bool atomic) {
    if (!buffer->writable) fail("writes %s, which is const", buffer->name);
    if (is_dependent && !current->waited) fail("writes %s before waiting for the kernel ahead", buffer->name);
    Page* page = page_of(at, true);
    page->write_launch = launch_number;
    for (u64 i = at; i < at + bytes; i++) {
        GlobalByte& byte = page->bytes[i & 4095];
        const bool mine = byte.write_launch == launch_number, counted = byte.atomic && (atomic || block_counted);
        if (mine && byte.write_block != block_number && !counted)
            fail("race: writes %s + %lu, which block %u wrote", buffer->name, (unsigned long)(i - buffer->begin), byte.write_block);
        if (mine && byte.write_block == block_number && !counted && !ordered(byte.write_thread, byte.write_epoch))
            fail("race: writes %s + %lu, which thread %u wrote, with no barrier between", buffer->name, (unsigned long)(i - buffer->begin), byte.write_thread);
        if (byte.read_launch == launch_number && byte.read_block != block_number && !counted)
            fail("race: writes %s + %lu, which another block reads", buffer->name, (unsigned long)(i - buffer->begin));
        byte.write_launch = launch_number, byte.write_block = block_number, byte.write_thread = current->thread;
        byte.write_epoch = own_warp().epoch, byte.atomic = atomic;
    }
    if (atomic) return;
    if (block_counted && !ordered(count_thread, count_epoch)) fail("writes %s while its block counts as done", buffer->name);
    current->unfenced = true, current->write_epoch = own_warp().epoch;
}

// ---------------------------------------------------------------- any memory

// True where what is read may be anything.
bool touch(const void* address, u32 bytes, bool write, int kind) {
    if (!current) return false;  // the emulator itself
    const char* at = (const char*)address;
    if (at >= current->stack && at < current->stack + STACK_BYTES) return false;
    if ((u64)(at - (const char*)&threadIdx) < sizeof threadIdx || (u64)(at - (const char*)&blockIdx) < sizeof blockIdx ||
        (u64)(at - (const char*)&blockDim) < sizeof blockDim || (u64)(at - (const char*)&gridDim) < sizeof gridDim ||
        (u64)(at - (const char*)&emulated_dynamic) < sizeof emulated_dynamic)
        return false;
    if (++steps > MOST_STEPS) fail("has no end");
    if ((u64)at % bytes) fail("%s %u bytes at %p, which is not a multiple of that", write ? "writes" : "reads", bytes, at);
    const int64_t index = shared_index(at);
    if (index >= 0) {
        if (shared_index(at + bytes - 1) != index + bytes - 1) fail("reaches %u bytes over the end of shared memory", bytes);
        touch_shared(index, bytes, write, kind == ATOMIC);
        return false;
    }
    const Buffer* buffer = buffer_of((u64)at, bytes);
    if (!buffer) {
        const Buffer* near = nullptr;
        for (u32 i = 0; i < buffer_count; i++)
            if (!near || std::llabs((long long)((u64)at - buffers[i].begin)) < std::llabs((long long)((u64)at - near->begin))) near = buffers + i;
        fail("%s %u bytes outside of all buffers, at %s + %lld of %llu", write ? "writes" : "reads", bytes, near ? near->name : "?",
             near ? (long long)((u64)at - near->begin) : 0ll, near ? (unsigned long long)(near->end - near->begin) : 0ull);
    }
    if (write) {
        write_global(buffer, (u64)at, bytes, kind == ATOMIC);
        return false;
    }
    return read_global(buffer, (u64)at, bytes, buffer->read_only ? READ_ONLY : kind);
}

u32 schedule() {
    u32 place = 0;
    if (mode == 0) place = draw((u32)ready.size());                        // any
    else if (mode == 1) place = (u32)ready.size() - 1;                     // who was released last: a warp runs ahead
    else place = draw(8) ? 0 : draw((u32)ready.size());                    // nearly in step
    const u32 thread = ready[place];
    if (mode == 2) ready.erase(ready.begin() + place);
    else ready[place] = ready.back(), ready.pop_back();
    return thread;
}

void describe_deadlock() {
    std::map<std::string, u32> count;
    for (u32 t = 0; t < threads; t++) count[fibers[t].ended ? "ended" : std::string("wait at ") + fibers[t].waits_at]++;
    std::string text;
    for (auto& [what, n] : count) text += (text.empty() ? "" : ", ") + std::to_string(n) + " " + what;
    current = nullptr;
    char all[700];
    snprintf(all, sizeof all, "%s, block (%u, %u, %u): deadlock, of %u threads %s", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z,
             threads, text.c_str());
    message = all, failed = true;
}

void run_block() {
    memset(static_begin, 0xff, static_end - static_begin);
    memset(emulated_dynamic, 0xff, dynamic_bytes);
    for (SharedByte& byte : shared_bytes) byte.under_way = false;
    for (Barrier& barrier : barriers) barrier.arrived.clear();
    for (u32 w = 0; w < warp_count; w++) {
        warps[w].arrived = 0, warps[w].epoch = base;
        for (u32 v = 0; v < MOST_WARPS; v++) warps[w].seen[v] = base;
    }
    ready.clear();
    live = threads, block_counted = false;
    for (u32 t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        if (!fiber.stack)
            fiber.stack = (char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        fiber.begun = fiber.ended = fiber.waited = fiber.unfenced = fiber.sees_others = false;
        fiber.write_epoch = 0;
        fiber.thread = t, fiber.waits_at = nullptr;
        fiber.copies.clear(), fiber.groups.clear();
        ready.push_back(t);
    }
    if (mode != 2)
        for (u32 t = threads - 1; t; t--) std::swap(ready[t], ready[draw(t + 1)]);
    _setjmp(scheduler);  // fibers come back here
    if (!failed && !ready.empty()) {
        current = fibers + schedule();
        threadIdx = {current->thread, 0, 0};
        if (current->begun) _longjmp(current->at, 1);
        current->begun = true;
        getcontext(&current->start);
        current->start.uc_stack.ss_sp = current->stack;
        current->start.uc_stack.ss_size = STACK_BYTES;
        current->start.uc_link = &unused;
        makecontext(&current->start, fiber_main, 0);
        setcontext(&current->start);
    }
    if (!failed && live) describe_deadlock();
    current = nullptr;
    for (u32 w = 0; w < warp_count; w++) base = std::max(base, warps[w].epoch);
    base++;
}

u16 narrow(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

float wide(u32 half) {
    const u32 bits = half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

extern "C" {

// Nearest BF16, ties to even, in one rounding.
u16 emulated_narrow(double value) {
    const double size = std::fabs(value);
    if (size == 0 || size >= 0x1p-120 || value != value) return narrow((float)value);
    // Near and below the subnormal numbers a float in between would round twice.
    int exponent;
    std::frexp(size, &exponent);
    const double step = std::ldexp(1., std::max(exponent - 8, -133));
    return narrow((float)std::copysign(std::nearbyint(size / step) * step, value));
}

int emulator_launch(const char* name, void (*function)(const u64*), const u64* arguments, u32 x, u32 y, u32 z, u32 block_threads,
                    u32 dynamic, char* shared_begin, char* shared_end, const Buffer* given, u32 count, int dependent, u64 seed,
                    char* error, u32 error_bytes) {
    kernel_name = name, entry = function, values = arguments, buffers = given, buffer_count = count;
    threads = block_threads, warp_count = threads / 32, dynamic_bytes = dynamic, is_dependent = dependent;
    static_begin = shared_begin, static_end = shared_end;
    failed = false, message.clear(), launch_number++, steps = 0;
    random_state = seed * 0x9e3779b97f4a7c15ull + launch_number, mode = seed % 3;
    blockIdx = {0, 0, 0};
    blockDim = {threads, 1, 1}, gridDim = {x, y, z};
    if (!dynamic_memory) {
        dynamic_memory = (char*)mmap(nullptr, MOST_DYNAMIC, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        emulated_dynamic = dynamic_memory + 16;  // no more than 16 bytes of alignment are promised
        launch_number++;                         // launch 0 is nobody's
    }
    if (threads % 32 || threads > MOST_THREADS || dynamic > MOST_DYNAMIC - 16) message = "threads or shared memory", failed = true;
    shared_bytes.resize(static_end - static_begin + dynamic_bytes);
    for (SharedByte& byte : shared_bytes) byte.write_epoch = 0, memset(byte.read_epoch, 0, sizeof byte.read_epoch);
    std::vector<u32> order(x * y * z);
    for (u32 i = 0; i < order.size(); i++) order[i] = i;
    for (u32 i = (u32)order.size(); i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    for (u32 i = 0; i < order.size() && !failed; i++) {
        block_number = order[i];
        blockIdx = {order[i] % x, order[i] / x % y, order[i] / x / y};
        run_block();
    }
    snprintf(error, error_bytes, "%s", message.c_str());
    return failed;
}

// Memory that was freed may come back as another buffer: nobody has written it.
void emulator_forget() {
    pages.clear(), launch_number += 2;
    memset(known, 0, sizeof known);
}

void emulated_load(const void* at, u32 bytes, int kind, void* to) {
    const bool any = touch(at, bytes, false, kind);
    if (any) memset(to, 0xff, bytes);
    else memcpy(to, at, bytes);
}
void emulated_store(void* at, u32 bytes, const void* from) {
    touch(at, bytes, true, CACHED_GLOBALLY);
    memcpy(at, from, bytes);
}

u32 emulated_atomic(void* at, int is_or, u32 value) {
    touch(at, 4, true, ATOMIC);
    if (shared_index((char*)at) < 0) {
        for (u32 t = 0; t < threads; t++)
            if (fibers[t].unfenced) fail("counts while what thread %u wrote is behind no fence", t);
            else if (!ordered(t, fibers[t].write_epoch)) fail("counts with no barrier after what thread %u wrote", t);
        block_counted = true, count_thread = current->thread, count_epoch = own_warp().epoch;
    }
    u32& word = *(u32*)at;
    const u32 before = word;
    word = is_or ? before | value : before + value;
    return before;
}

void emulated_fence() { current->unfenced = false, current->sees_others = block_counted; }
void emulated_wait_for_previous() { current->waited = true; }
void emulated_let_next_start() {
    if (is_dependent && !current->waited) fail("lets the next kernel start before waiting for the one ahead");
}

void emulated_barrier(u32 id, u32 expected) {
    static const char* names[16] = {"barrier 0", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                    "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    if (id > 15) fail("barrier %u: there are 16", id);
    if (expected % 32) fail("barrier %u of %u threads", id, expected);
    Barrier& barrier = barriers[id];
    if (!barrier.arrived.empty() && barrier.expected != expected) fail("barrier %u of %u threads, others came for %u", id, expected, barrier.expected);
    barrier.expected = expected;
    barrier.arrived.push_back(current->thread);
    if (barrier.arrived.size() == (expected ? expected : live)) {
        release_barrier(barrier);
        if (!_setjmp(current->at)) to_scheduler();
        return;
    }
    wait_at(names[id]);
}

void emulated_syncwarp() {
    meet("__syncwarp", [](Warp& warp) { warp.epoch++; });
}

u64 emulated_shuffle(const char* name, u32 mask, int kind, u64 value, u32 lane) {
    if (mask != 0xffffffffu) fail("%s with mask %x", name, mask);
    Warp& warp = own_warp();
    const u32 mine = own_lane();
    warp.in[mine] = value, warp.argument[mine] = lane;
    meet(name, [kind](Warp& w) {
        for (u32 i = 0; i < 32; i++) {
            const u32 a = w.argument[i];
            const u32 from = kind == 0 ? a & 31 : kind == 1 ? (i ^ a) & 31 : kind == 2 ? (i >= a ? i - a : i) : (i + a < 32 ? i + a : i);
            w.out[i] = w.in[from];
        }
    });
    return warp.out[mine];
}
u32 emulated_ballot(u32 mask, u32 value) {
    if (mask != 0xffffffffu) fail("__ballot_sync with mask %x", mask);
    Warp& warp = own_warp();
    warp.in[own_lane()] = value;
    meet("__ballot_sync", [](Warp& w) {
        u32 all = 0;
        for (u32 i = 0; i < 32; i++) all |= (u32)(w.in[i] != 0) << i;
        for (u32 i = 0; i < 32; i++) w.out[i] = all;
    });
    return (u32)warp.out[own_lane()];
}
u32 emulated_reduce_max(u32 mask, u32 value) {
    if (mask != 0xffffffffu) fail("__reduce_max_sync with mask %x", mask);
    Warp& warp = own_warp();
    warp.in[own_lane()] = value;
    meet("__reduce_max_sync", [](Warp& w) {
        u64 most = 0;
        for (u32 i = 0; i < 32; i++) most = std::max(most, w.in[i]);
        for (u32 i = 0; i < 32; i++) w.out[i] = most;
    });
    return (u32)warp.out[own_lane()];
}

// mma.m16n8k16: lane 4 g + t holds rows g and g + 8 of A at columns 2 t, 2 t + 1 and these + 8, column g of B at the
// same places, and of the sums rows g and g + 8 at columns 2 t and 2 t + 1.
void emulated_mma(float* sums, const u32* a, const u32* b) {
    Warp& warp = own_warp();
    const u32 mine = own_lane();
    memcpy(warp.fragments[mine], a, 16), memcpy(warp.fragments[mine] + 4, b, 8), memcpy(warp.sums[mine], sums, 16);
    meet("mma", [](Warp& w) {
        float rows[16][16], columns[8][16];
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 g = lane / 4, t = lane % 4, *f = w.fragments[lane];
            for (u32 i = 0; i < 2; i++) {
                const u32 shift = i * 16;
                rows[g][2 * t + i] = wide(f[0] >> shift & 0xffff), rows[g + 8][2 * t + i] = wide(f[1] >> shift & 0xffff);
                rows[g][2 * t + 8 + i] = wide(f[2] >> shift & 0xffff), rows[g + 8][2 * t + 8 + i] = wide(f[3] >> shift & 0xffff);
                columns[g][2 * t + i] = wide(f[4] >> shift & 0xffff), columns[g][2 * t + 8 + i] = wide(f[5] >> shift & 0xffff);
            }
        }
        for (u32 lane = 0; lane < 32; lane++)
            for (u32 i = 0; i < 4; i++) {
                const float *row = rows[lane / 4 + i / 2 * 8], *column = columns[lane % 4 * 2 + i % 2];
                float sum = 0;
                for (u32 k = 0; k < 16; k++) sum += row[k] * column[k];
                w.sums[lane][i] += sum;
            }
    });
    memcpy(sums, warp.sums[mine], 16);
}

u32 emulated_shared_address(const void* address) {
    const char* at = (const char*)address;
    if (at >= static_begin && at < static_end) return STATIC_TAG + (u32)(at - static_begin);
    return DYNAMIC_TAG + (u32)(at - emulated_dynamic);
}
static char* shared_pointer(u32 at) {
    return at >= STATIC_TAG ? static_begin + (at - STATIC_TAG) : emulated_dynamic + (at - DYNAMIC_TAG);
}
static void check_shared(u32 at, u32 bytes) {
    const char* pointer = shared_pointer(at);
    if (shared_index(pointer) < 0 || shared_index(pointer + bytes - 1) < 0)
        fail("%u bytes outside of shared memory, at byte %d of %u", bytes, (int)(at - DYNAMIC_TAG), dynamic_bytes);
    if (at % bytes) fail("%u bytes at byte %u of shared memory, which is no multiple of that", bytes, at - DYNAMIC_TAG);
}
void emulated_load_shared(u32 at, u32 bytes, void* to) {
    check_shared(at, bytes);
    touch(shared_pointer(at), bytes, false, PLAIN);
    memcpy(to, shared_pointer(at), bytes);
}

void emulated_copy16(u32 to, const void* from) {
    check_shared(to, 16);
    Copy copy;
    copy.to = shared_pointer(to);
    emulated_load(from, 16, READ_ONLY, copy.bytes);
    const u64 index = shared_index(copy.to);
    touch_shared(index, 16, true);
    memset(copy.to, 0xff, 16);
    for (u32 i = 0; i < 16; i++) shared_bytes[index + i].under_way = true;
    current->copies.push_back(copy);
}
void emulated_end_of_copies() {
    current->groups.push_back(std::move(current->copies));
    current->copies.clear();
}
void emulated_wait_for_copies(int ahead) {
    auto& groups = current->groups;
    while ((int)groups.size() > ahead) {
        for (const Copy& copy : groups.front()) {
            memcpy(copy.to, copy.bytes, 16);
            const u64 index = shared_index(copy.to);
            for (u32 i = 0; i < 16; i++) {
                shared_bytes[index + i].under_way = false;
                shared_bytes[index + i].write_epoch = own_warp().epoch;
            }
        }
        groups.erase(groups.begin());
    }
}

// ---------------------------------------------------------------- what -fsanitize=thread calls

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(n) \
    void __tsan_read##n(void* at) { touch(at, n, false, PLAIN); } \
    void __tsan_write##n(void* at) { touch(at, n, true, PLAIN); } \
    void __tsan_unaligned_read##n(void* at) { touch(at, n, false, PLAIN); } \
    void __tsan_unaligned_write##n(void* at) { touch(at, n, true, PLAIN); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, unsigned long bytes) {
    for (unsigned long i = 0; i < bytes; i++) touch((char*)at + i, 1, false, PLAIN);
}
void __tsan_write_range(void* at, unsigned long bytes) {
    for (unsigned long i = 0; i < bytes; i++) touch((char*)at + i, 1, true, PLAIN);
}
}
