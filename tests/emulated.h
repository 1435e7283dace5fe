// CUDA's blocks and clusters on one CPU thread, for kernels without further headers: every CUDA thread is a fiber, and
// whoever waits at a barrier or in a warp's exchange lets the others go on.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Barrier {
  int size = 0, arrived = 0, turn = 0;
  int arrive();
  void wait_for(int turn);
  void wait() { wait_for(arrive()); }
};

struct Warp {
  Barrier barrier;
  uint64_t values[32];
};

struct Block {
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
  Barrier barrier;
  int rank;
};

struct Index { unsigned x; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  Index thread, block_index;
  int turn;
  bool done = false;
};

static std::vector<Block> blocks;
static Barrier cluster_barrier;
static Fiber* running;
static ucontext_t scheduler;
static Index grid;

#define threadIdx (running->thread)
#define blockIdx (running->block_index)
#define gridDim grid

int Barrier::arrive() {
  int mine = turn;
  if (++arrived == size) {
    arrived = 0;
    ++turn;
  }
  return mine;
}

void Barrier::wait_for(int mine) {
  while (turn == mine) swapcontext(&running->context, &scheduler);
}

inline Warp& own_warp() { return running->block->warps[running->thread.x / 32]; }

template <class F>
auto exchange(uint64_t value, F f) {
  Warp& warp = own_warp();
  warp.values[running->thread.x % 32] = value;
  warp.barrier.wait();
  auto result = f(warp.values);
  warp.barrier.wait();
  return result;
}

inline void __syncthreads() { running->block->barrier.wait(); }
inline unsigned __ballot_sync(unsigned, bool x) {
  return exchange(x, [](uint64_t* v) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (unsigned)v[i] << i;
    return bits;
  });
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  return exchange(x, [](uint64_t* v) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += (unsigned)v[i];
    return sum;
  });
}
template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return exchange((uint64_t)x, [=](uint64_t* v) { return (T)v[source & 31]; });
}
template <class T>
T __shfl_up_sync(unsigned, T x, int d) {
  int lane = running->thread.x % 32;
  return exchange((uint64_t)x, [=](uint64_t* v) { return (T)v[lane >= d ? lane - d : lane]; });
}
inline unsigned __umulhi(unsigned x, unsigned y) { return (uint64_t)x * y >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned atomicAdd(unsigned* p, unsigned x) { unsigned old = *p; *p += x; return old; }

static unsigned half_of(float x) {
  unsigned bits = __float_as_int(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  int exponent = (int)(magnitude >> 23) - 127;
  unsigned digits = (magnitude & 0x7fffff) | 0x800000;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude == 0x7f800000) return sign | 0x7c00;
  if (exponent > 15) return sign | 0x7bff;
  if (exponent >= -14) return sign | (magnitude >> 13) - (112 << 10);
  return exponent < -24 ? sign : sign | digits >> (-1 - exponent);
}
static unsigned halves_of(float x, float y) { return half_of(x) | half_of(y) << 16; }
static float value_of_half(unsigned half) {
  int exponent = half >> 10 & 31, digits = half & 0x3ff;
  float x = exponent == 31 ? INFINITY : exponent ? std::ldexp((float)(digits | 0x400), exponent - 25) : std::ldexp((float)digits, -24);
  return half & 0x8000 ? -x : x;
}

static unsigned char* block_memory() { return running->block->memory.data(); }
static unsigned cluster_rank() { return running->block->rank; }
static unsigned cluster_size() { return blocks.size(); }
static void cluster_arrive() { running->turn = cluster_barrier.arrive(); }
static void cluster_wait() { cluster_barrier.wait_for(running->turn); }
static unsigned remote(const void* p, int rank) { return (unsigned)rank << 24 | (unsigned)((unsigned char*)p - block_memory()); }
static unsigned char* place(unsigned address) { return blocks.at(address >> 24).memory.data() + (address & 0xffffff); }
static unsigned load_remote(unsigned address) { return *(unsigned*)place(address); }
static void store_remote_u64(unsigned address, uint64_t x) { *(uint64_t*)place(address) = x; }
static long long load_integer(const void* p, long long at, bool wide) {
  return wide ? ((const long long*)p)[at] : ((const int*)p)[at];
}
static void store_remote(unsigned address, unsigned x) { *(unsigned*)place(address) = x; }
static int load_int(const int* p) { return *p; }
static float4 load_aligned(const float* p) { return *(const float4*)p; }
static void settle(const float*&) {}
static void fetch_ahead(const float*, int) {}

// What a kernel in front writes while this one waits for it.
static void* late_target;
static const void* late_source;
static size_t late_bytes;
extern "C" void write_late(void* target, const void* source, size_t bytes) {
  late_target = target;
  late_source = source;
  late_bytes = bytes;
}
static void wait_for_kernels_in_front() {
  if (late_bytes) memcpy(late_target, late_source, late_bytes);
}

#include KERNEL_SOURCE

static const Params* arguments;

static void start() {
  topk(*arguments);
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

// Runs the kernel; whether every thread came to its end, rather than to a barrier that others never reached.
extern "C" bool emulate(const Params* p, unsigned blocks_of_grid, unsigned cluster, unsigned shared_bytes) {
  arguments = p;
  grid.x = blocks_of_grid;
  for (unsigned first = 0; first < blocks_of_grid; first += cluster) {
    blocks.assign(cluster, Block());
    cluster_barrier = {(int)(cluster * THREADS), 0, 0};
    std::vector<Fiber> fibers(cluster * THREADS);
    for (unsigned b = 0; b < cluster; ++b) {
      blocks[b].memory.assign(shared_bytes, 0xa5);
      blocks[b].rank = b;
      blocks[b].barrier.size = THREADS;
      blocks[b].warps.resize(THREADS / 32);
      for (Warp& warp : blocks[b].warps) warp.barrier.size = 32;
      for (unsigned t = 0; t < THREADS; ++t) {
        Fiber& fiber = fibers[b * THREADS + t];
        fiber.block = &blocks[b];
        fiber.thread.x = t;
        fiber.block_index.x = first + b;
        fiber.stack.reset(new char[65536]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 65536;
        makecontext(&fiber.context, start, 0);
      }
    }
    size_t done = 0;
    for (int idle = 0; done < fibers.size(); ++idle) {
      if (idle > 100000) return false;
      size_t before = done;
      for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        running = &fiber;
        swapcontext(&scheduler, &fiber.context);
        done += fiber.done;
      }
      if (done != before) idle = 0;
    }
  }
  return true;
}
