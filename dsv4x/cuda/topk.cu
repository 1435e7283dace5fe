// Selection of each row's k largest logits, equal ones by the smaller index, in the order of their indices.
//
// A row's way follows from its length, which the device reads. No more than k entries: all of them, without logits. Up
// to solo_columns: one block. Longer: the blocks of a cluster, a contiguous slice each. A slice is read from global
// memory once; its keys stay in registers, or in shared memory as far as that reaches.
//
// Keys are counted in 4096 bins, of which one holds the k-th. While that bin holds too many keys to be compared with
// each other, its range is cut into 4096 bins again. The range is exact in integers, so nothing depends on the values.
// In the last bin the keys are ranked by (key, column); or all are wanted, or all are equal and the first are taken.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef THREADS
#define THREADS 512
#endif
#ifndef BLOCKS
#define BLOCKS 2  // of a multiprocessor
#endif

namespace {

constexpr int kWarps = THREADS / 32;
constexpr int kBins = 4096;
constexpr int kSegments = kBins / 32;
constexpr int kHeld = 4;      // loads of four columns that a thread's registers hold
constexpr int kChunk = 128;   // columns that a warp loads at once
constexpr int kRanked = 256;  // most keys that are compared with each other, of all blocks
constexpr int kPlaces = (2048 + THREADS - 1) / THREADS;  // of a row, a thread's
constexpr int kPages = 512;   // of a slice, kept at hand
constexpr u32 kAll = 0xffffffffu;
// Bins of 1/64 of a power of two from 2^-16 to 2^16; the first and the last of either sign take what is beyond.
constexpr int kLeast = (127 - 16) * 64;
constexpr int kInfinity = 0x7f800000;

enum Flags { kLengths64 = 1, kStarts64 = 2, kBases64 = 4, kRequests64 = 8, kAligned = 16 };

}  // namespace

struct Params {
  const float* logits;
  const void* lengths;   // null: every row is as long as the buffer is wide
  const void* starts;    // null: 0
  const void* bases;
  const void* requests;  // null: row / next_n
  const int* table;
  int* out;
  int* local;            // may be null
  i64 logits_stride, table_stride, out_stride, local_stride;
  int rows, width, k, method, flags, solo_columns, resident;
  int next_n, num_requests, table_width, page_size, page_shift, pages;
};

namespace {

struct Slice {
  int begin, end;  // of the row's entries
  int loads;       // of four columns, a thread
  int warp_begin;
  int column;      // this thread's first
};

struct Row {
  i64 offset;
  const int* table;
  i64 base;
  int length, table_limit;
};

struct Shared {
  u32 bins[kBins];
  u64 staged[kRanked];
  u64 ranked[kRanked];
  u32 sums[kBins / 4];
  u32 segments[kSegments];
  u32 counts[kWarps];
  int pages[kPages];
  int rows[THREADS];
  u32 warps[kWarps];
  u64 threshold;
  Row row;
  u32 stage_size;
  int guess;
  int range[2];  // of the places that this block fills
};

struct Crossing {
  u32 bin, before, count;
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

#ifndef EMULATED  // by tests, on a CPU

extern __shared__ __align__(16) unsigned char dynamic_memory[];

__device__ __forceinline__ unsigned char* block_memory() { return dynamic_memory; }

__device__ __forceinline__ u32 cluster_rank() {
  u32 x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

__device__ __forceinline__ u32 cluster_size() {
  u32 x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}

// A barrier of the cluster that makes known what its blocks wrote to their own shared memory, and nothing else: a
// release of all memory would wait for global memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1207
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return (u32)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ u32 remote(const void* pointer, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

__device__ __forceinline__ u32 load_remote(u32 address) {
  u32 x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ u64 load_remote_u64(u32 address) {
  u64 x;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_remote_four(u32 address) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Past the first level's cache: it may hold what was there before the kernels in front ended.
__device__ __forceinline__ i64 load_integer(const void* pointer, i64 at, bool wide) {
  i64 x;
  if (wide) {
    asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(x) : "l"((const i64*)pointer + at) : "memory");
    return x;
  }
  int y;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(y) : "l"((const int*)pointer + at) : "memory");
  return y;
}

// Waits until the kernels in front have ended, and lets the next one start: it waits for this one in its turn.
__device__ __forceinline__ void wait_for_kernels_in_front() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

#endif

__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(kAll, x); }

__device__ __forceinline__ u32 warp_scan(u32 x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    u32 y = __shfl_up_sync(kAll, x, d);
    if (lane_id() >= d) x += y;
  }
  return x;
}

__device__ __forceinline__ int clamped(i64 x, int most) { return (int)(x < 0 ? 0 : x > most ? (i64)most : x); }

__device__ __forceinline__ int row_length(const Params& p, int row, int first) {
  int most = p.width - first;
  return p.lengths ? clamped(load_integer(p.lengths, row, p.flags & kLengths64), most) : most;
}

__device__ __forceinline__ int row_first(const Params& p, int row) {
  return p.starts ? clamped(load_integer(p.starts, row, p.flags & kStarts64), p.width) : 0;
}

// Keys are unsigned and ordered as the values; NaN is -inf, -0 is 0. No value has key 0.
__device__ __forceinline__ u32 key_of(float x) {
  x = fmaxf(x, __int_as_float(0xff800000)) + 0.0f;
  int bits = __float_as_int(x);
  return (u32)bits ^ ((u32)(bits >> 31) | 0x80000000u);
}

// Bins are in descending order of the keys.
__device__ __forceinline__ u32 bin_of(u32 key) {
  int y = (int)(key >> 17) - 16384;
  int sign = y >> 31;
  int q = min(max((y ^ sign) - kLeast, 0), 2047);
  return (u32)((2047 - q) ^ (sign & 4095));
}

__device__ __forceinline__ void bin_range(u32 bin, u32& low, u32& high) {
  int q = bin < 2048 ? 2047 - (int)bin : (int)bin - 2048;
  u32 least = q == 0 ? 0 : (u32)(q + kLeast) << 17;
  u32 most = q == 2047 ? (u32)kInfinity : ((u32)(q + 1 + kLeast) << 17) - 1;
  low = bin < 2048 ? least | 0x80000000u : most ^ 0x7fffffffu;
  high = bin < 2048 ? most | 0x80000000u : least ^ 0x7fffffffu;
}

// A row's columns for each of its blocks, a power of two of them.
__device__ __forceinline__ int share_of(int length, int blocks) {
  return (((length + blocks - 1) >> (__ffs(blocks) - 1)) + 3) & ~3;
}

__device__ __forceinline__ Slice make_slice(int length, int rank, int size) {
  Slice s;
  int share = share_of(length, size);
  s.begin = min(rank * share, length);
  s.end = min(s.begin + share, length);
  s.loads = (s.end - s.begin + kChunk * kWarps - 1) / (kChunk * kWarps);
  s.warp_begin = min(s.begin + warp_id() * s.loads * kChunk, s.end);
  s.column = s.warp_begin + lane_id() * 4;
  return s;
}

// Four columns from `column` on, of an aligned row; those at `end` or past it are anything.
__device__ __forceinline__ float4 load_four(const float* row, int column, int end) {
  return column < end ? *(const float4*)(row + column) : make_float4(0.f, 0.f, 0.f, 0.f);
}

__device__ __forceinline__ float4 load_columns(const Params& p, const float* row, int column, int end) {
  if (p.flags & kAligned) return load_four(row, column, end);
  float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
  if (column < end) x.x = row[column];
  if (column + 1 < end) x.y = row[column + 1];
  if (column + 2 < end) x.z = row[column + 2];
  if (column + 3 < end) x.w = row[column + 3];
  return x;
}

__device__ __forceinline__ uint4 keys_of(float4 x, int column, int end) {
  uint4 keys;
  if (column + 4 <= end) {
    keys.x = key_of(x.x);
    keys.y = key_of(x.y);
    keys.z = key_of(x.z);
    keys.w = key_of(x.w);
    return keys;
  }
  keys.x = column < end ? key_of(x.x) : 0;
  keys.y = column + 1 < end ? key_of(x.y) : 0;
  keys.z = column + 2 < end ? key_of(x.z) : 0;
  keys.w = column + 3 < end ? key_of(x.w) : 0;
  return keys;
}

__device__ __forceinline__ bool any_from(u32 low, const uint4& keys) {
  return __any_sync(kAll, max(max(keys.x, keys.y), max(keys.z, keys.w)) >= low);
}

__device__ __forceinline__ u32 part(const uint4& keys, int j) {
  return j == 0 ? keys.x : j == 1 ? keys.y : j == 2 ? keys.z : keys.w;
}

// A slice's keys: where they are depends on how many there are.
template <bool HELD>
struct Keys {
  uint4 held[HELD ? kHeld : 1];
  uint4* kept;
  const float* row;


  // Calls f(keys, column) for this thread's columns, in order.
  template <class F>
  __device__ __forceinline__ void each(const Params& p, const Slice& s, F f) const {
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (i < s.loads) f(held[i], s.column + i * kChunk);
    } else {
      int resident = min(p.resident, s.loads);
#pragma unroll 2
      for (int i = 0; i < resident; ++i) f(kept[i * THREADS + threadIdx.x], s.column + i * kChunk);
#pragma unroll 1
      for (int at = resident; at < s.loads; at += kHeld) {
        float4 some[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
          some[i] = load_columns(p, row, s.column + (at + i) * kChunk, at + i < s.loads ? s.end : 0);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          int column = s.column + (at + i) * kChunk;
          if (at + i < s.loads) f(keys_of(some[i], column, s.end), column);
        }
      }
    }
  }
};

__device__ __forceinline__ void reset(Shared& s) {
#pragma unroll 2
  for (int i = threadIdx.x; i < kBins / 4; i += THREADS) ((uint4*)s.bins)[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) s.stage_size = 0;
  __syncthreads();
}

// The bin that holds the wanted-th key of those counted, by all threads of the row's blocks, a power of two.
template <bool GROUPED>
__device__ __forceinline__ Crossing find(Shared& s, u32 wanted, int block, int blocks) {
  int lane = lane_id();
  int shift = GROUPED ? __ffs(kSegments) - __ffs(blocks) : 0, share = 1 << shift;
  uint4 four;
  if constexpr (GROUPED) {
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int segment = warp_id(); segment < share; segment += kWarps) {
      const u32* bin = &s.bins[(block * share + segment) * 32 + lane];
      u32 sum = 0;
#pragma unroll 4
      for (int q = 0; q < blocks; ++q) sum += load_remote(remote(bin, q));
      s.sums[segment * 32 + lane] = sum;
      sum = warp_sum(sum);
      if (lane == 0) s.segments[segment] = sum;
    }
    cluster_arrive();
    cluster_wait();
    four = load_remote_four(remote(&s.segments[(4 * lane) & (share - 1)], (4 * lane) >> shift));
  } else {
    __syncthreads();
    constexpr int kOwn = kBins / THREADS;
    if constexpr (kOwn < 32) {
      const uint4* bins = (const uint4*)&s.bins[kOwn * threadIdx.x];
      u32 sum = 0;
#pragma unroll
      for (int i = 0; i < kOwn / 4; ++i) sum += bins[i].x + bins[i].y + bins[i].z + bins[i].w;
#pragma unroll
      for (int d = 1; d < 32 / kOwn; d *= 2) sum += __shfl_xor_sync(kAll, sum, d);
      if (lane % (32 / kOwn) == 0) s.segments[kOwn * threadIdx.x / 32] = sum;
    } else {
      for (int segment = threadIdx.x; segment < kSegments; segment += THREADS) {
        u32 sum = 0;
        for (int i = 0; i < 32; ++i) sum += s.bins[segment * 32 + i];
        s.segments[segment] = sum;
      }
    }
    __syncthreads();
    four = ((const uint4*)s.segments)[lane];
  }
  u32 own = four.x + four.y + four.z + four.w;
  u32 end = warp_scan(own);
  int source = __ffs(__ballot_sync(kAll, end >= wanted)) - 1;
  u32 before = end - own;
  int segment = 4 * lane;
  if (before + four.x < wanted) {
    before += four.x;
    ++segment;
    if (before + four.y < wanted) {
      before += four.y;
      ++segment;
      if (before + four.z < wanted) {
        before += four.z;
        ++segment;
      }
    }
  }
  before = __shfl_sync(kAll, before, source);
  segment = __shfl_sync(kAll, segment, source);
  u32 count;
  if constexpr (GROUPED) {
    count = load_remote(remote(&s.sums[(segment & (share - 1)) * 32 + lane], segment >> shift));
  } else {
    count = s.bins[segment * 32 + lane];
  }
  end = before + warp_scan(count);
  source = __ffs(__ballot_sync(kAll, end >= wanted)) - 1;
  Crossing c;
  c.bin = segment * 32 + source;
  c.count = __shfl_sync(kAll, count, source);
  c.before = __shfl_sync(kAll, end, source) - c.count;
  return c;
}

__device__ __forceinline__ u64 composite(u32 key, int column) { return (u64)key << 32 | (u32)~column; }

__device__ __forceinline__ int page_number(const Params& p, int column) {
  return p.page_shift >= 0 ? column >> p.page_shift : (int)((u32)column / (u32)p.page_size);
}

__device__ __forceinline__ int load_page(const Params& p, const Row& row, int number) {
  int page = number < row.table_limit ? (int)load_integer(row.table, number, false) : -1;
  return page < p.pages ? page : -1;
}

__device__ __forceinline__ int in_space(const Params& p, const Row& row, int column, int page, int number) {
  if (p.method == 1) {
    i64 moved = row.base + column;
    return row.base >= 0 && moved <= 0x7fffffff ? (int)moved : -1;
  }
  if (p.method == 2) return page < 0 ? -1 : page * p.page_size + (column - number * p.page_size);
  return column;
}

__device__ __forceinline__ Row make_row(const Params& p, int number, int first) {
  Row row;
  row.length = 0;
  row.offset = number * p.logits_stride + first;
  row.base = 0;
  row.table = p.table;
  row.table_limit = 0;
  if (p.method == 1) row.base = load_integer(p.bases, number, p.flags & kBases64);
  if (p.method == 2) {
    i64 request = p.requests      ? load_integer(p.requests, number, p.flags & kRequests64)
                  : p.next_n == 1 ? number
                                  : number / p.next_n;
    if (request >= 0 && request < p.num_requests) {
      row.table += request * p.table_stride;
      row.table_limit = p.table_width;
    }
  }
  return row;
}

// The pages of this thread's places in a row of no more than k entries.
struct Pages {
  int held[kPlaces];
};

__device__ __forceinline__ Pages pages_ahead(const Params& p, const Row& row) {
  Pages pages;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int place = threadIdx.x + i * THREADS;
    pages.held[i] = place < p.k ? load_page(p, row, page_number(p, place)) : -1;
  }
  return pages;
}

// Writes a row of no more than k entries.
__device__ __forceinline__ void select_all(const Params& p, const Row& row, int number, const Pages& pages) {
  int* out = p.out + number * p.out_stride;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int place = threadIdx.x + i * THREADS;
    if (place >= p.k) break;
    int index = -1, moved = -1;
    if (place < row.length) {
      index = place;
      int page = 0, page_at = 0;
      if (p.method == 2) {
        page_at = page_number(p, place);
        page = pages.held[i];
      }
      moved = in_space(p, row, place, page, page_at);
    }
    out[place] = moved;
    if (p.local) p.local[number * p.local_stride + place] = index;
  }
}

// What is where among a slice's keys.
struct Selected {
  u32 low, high;   // keys above `high` are selected, those from `low` to `high` may be
  u64 least;       // of the composites selected among those
  u32 wanted;      // how many of those, where that goes by their order
  bool ranked;     // by `least`, else by their order
};

// Ranks `size` composites; the wanted-th is left in s.threshold.
__device__ __forceinline__ void rank(Shared& s, const u64* list, u32 size, u32 wanted) {
  int lane = lane_id();
#pragma unroll 1
  for (u32 i = warp_id(); i < size; i += kWarps) {
    u64 x = list[i];
    u32 above = 0;
#pragma unroll 1
    for (u32 at = lane; at < size; at += 32) above += list[at] > x;
    if (warp_sum(above) == wanted - 1 && lane == 0) s.threshold = x;
  }
}

// Packs the lists of the row's blocks in s.ranked.
__device__ __forceinline__ void pack(Shared& s, int blocks) {
  int lane = lane_id();
  u32 count = lane < blocks ? load_remote(remote(&s.stage_size, lane)) : 0;
  u32 end = warp_scan(count);
#pragma unroll 1
  for (int block = warp_id(); block < blocks; block += kWarps) {
    u32 held = __shfl_sync(kAll, count, block), last = __shfl_sync(kAll, end, block);
#pragma unroll 1
    for (u32 i = lane; i < held; i += 32) s.ranked[last - held + i] = load_remote_u64(remote(&s.staged[i], block));
  }
}

// Writes the slice's selected columns in their order; bases are what the warps in front have.
template <bool HELD>
__device__ __forceinline__ void emit(
    const Params& p, Shared& s, int number, const Slice& slice, const Keys<HELD>& keys, const Selected& x,
     u32 above_base, u32 tie_base, int first_page, bool cached) {
  // No block counts in its bins any more.
  u32* chosen = s.bins;
  if (threadIdx.x == 0) s.range[0] = above_base + min(tie_base, x.wanted);
  keys.each(p, slice, [&](const uint4& four, int column) {
    if (!any_from(x.low, four)) return;
    u32 above = 0, tie = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 key = part(four, j);
      bool higher = key > x.high, within = key >= x.low && !higher;
      if (x.ranked) {
        higher = higher || (within && composite(key, column + j) >= x.least);
        within = false;
      }
      above |= (u32)higher << j;
      tie |= (u32)within << j;
    }
    // A warp has 128 columns here: either count fits in half a word.
    u32 own = __popc(above) | __popc(tie) << 16;
    u32 end = warp_scan(own);
    u32 all = __shfl_sync(kAll, end, 31);
    u32 taken = above_base + ((end - own) & 0xffff), ties = tie_base + ((end - own) >> 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bool higher = above >> j & 1, within = tie >> j & 1;
      if (higher || (within && ties < x.wanted)) chosen[taken + min(ties, x.wanted)] = column + j;
      taken += higher;
      ties += within;
    }
    above_base += all & 0xffff;
    tie_base += all >> 16;
  });
  if (threadIdx.x == THREADS - 1) s.range[1] = above_base + min(tie_base, x.wanted);
  __syncthreads();
  const Row& row = s.row;
  int* out = p.out + number * p.out_stride;
  int* local = p.local ? p.local + number * p.local_stride : nullptr;
#pragma unroll 1
  for (int place = s.range[0] + threadIdx.x; place < s.range[1]; place += THREADS) {
    int column = chosen[place], page = 0, at = 0;
    if (p.method == 2) {
      at = page_number(p, column);
      page = cached ? s.pages[at - first_page] : load_page(p, row, at);
    }
    out[place] = in_space(p, row, column, page, at);
    if (local) local[place] = column;
  }
}

// Selects from a row of more than k entries; s.bins are zero. False where the row's length is not `length`, which is
// known only after its keys have been counted.
template <bool HELD>
__device__ __forceinline__ bool select_row(
    const Params& p, Shared& s, uint4* kept, const Row& row, int number, int block, int blocks, const Slice& slice,
    const float4* loaded, int length) {
  int lane = lane_id(), warp = warp_id();
  Keys<HELD> keys;
  keys.kept = kept;
  keys.row = p.logits + row.offset;
  auto count = [&](u32 key) {
    if (key) atomicAdd(&s.bins[bin_of(key)], 1u);
  };
  auto count_four = [&](const uint4& four) {
    count(four.x);
    count(four.y);
    count(four.z);
    count(four.w);
  };
  if (threadIdx.x == 0) s.row = row;
  // The slice's part of the page table comes with its keys.
  int first_page = 0;
  bool cached = false;
  if (p.method == 2) {
    first_page = page_number(p, slice.begin);
    int pages = page_number(p, max(slice.end - 1, slice.begin)) - first_page + 1;
    cached = pages <= kPages;
    if (cached)
#pragma unroll 1
      for (int i = threadIdx.x; i < pages; i += THREADS) s.pages[i] = load_page(p, row, first_page + i);
  }
  if constexpr (HELD) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int column = slice.column + i * kChunk;
      keys.held[i] = keys_of(loaded[i], column, slice.end);
      if (i < slice.loads) count_four(keys.held[i]);
    }
  } else {
    float4 next[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) next[i] = load_columns(p, keys.row, slice.column + i * kChunk, i < slice.loads ? slice.end : 0);
#pragma unroll 1
    for (int at = 0; at < slice.loads; at += kHeld) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        int column = slice.column + (at + i) * kChunk;
        uint4 four = keys_of(next[i], column, at + i < slice.loads ? slice.end : 0);
        int later = at + i + kHeld;
        next[i] = load_columns(p, keys.row, column + kHeld * kChunk, later < slice.loads ? slice.end : 0);
        if (at + i < p.resident) kept[(at + i) * THREADS + threadIdx.x] = four;
        count_four(four);
      }
    }
  }

  if (length != row.length) return false;
  bool grouped = blocks > 1;
  Selected x;
  x.wanted = p.k;
  Crossing c;
  int shift = -1;
#pragma unroll 1
  for (;;) {
    c = grouped ? find<true>(s, x.wanted, block, blocks) : find<false>(s, x.wanted, block, blocks);
    x.wanted -= c.before;
    if (shift < 0) {
      bin_range(c.bin, x.low, x.high);
    } else {
      x.high -= c.bin << shift;
      x.low = max(x.low, x.high - ((1u << shift) - 1));
    }
    if (c.count == x.wanted || c.count <= kRanked || x.low == x.high) break;
    shift = max(0, 20 - __clz(x.high - x.low));
    __syncthreads();
    reset(s);
    keys.each(p, slice, [&](const uint4& four, int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 key = part(four, j);
        if (key >= x.low && key <= x.high) atomicAdd(&s.bins[(x.high - key) >> shift], 1u);
      }
    });
  }
  x.ranked = c.count != x.wanted && x.low != x.high;

  u32 own = 0;
  keys.each(p, slice, [&](const uint4& four, int column) {
    if (!any_from(x.low, four)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 key = part(four, j);
      own += key > x.high;
      if (key >= x.low && key <= x.high) {
        own += 1 << 12;
        if (x.ranked) s.staged[atomicAdd(&s.stage_size, 1u)] = composite(key, column + j);
      }
    }
  });
  // Fewer than k <= 2048 keys are above the bin.
  own = warp_sum(own);
  if (lane == 0) s.counts[warp] = own;
  u32 above = 0, ties = 0;
  auto add = [&](u32 counts) {
    above += counts & 0xfff;
    ties += counts >> 12;
  };
  if (grouped) {
    cluster_arrive();
    cluster_wait();
#pragma unroll 4
    for (int i = lane; i < block * kWarps + warp; i += 32) add(load_remote(remote(&s.counts[i % kWarps], i / kWarps)));
    if (x.ranked) pack(s, blocks);
  } else {
    __syncthreads();
    if (lane < warp) add(s.counts[lane]);
  }
  above = warp_sum(above);
  ties = warp_sum(ties);
  // No block ends while another reads its memory.
  if (grouped) cluster_arrive();
  x.least = 0;
  if (x.ranked) {
    const u64* list = grouped ? s.ranked : s.staged;
    if (grouped) __syncthreads();
    rank(s, list, c.count, x.wanted);
    __syncthreads();
    x.least = s.threshold;
    u32 before = 0;
#pragma unroll 1
    for (u32 i = lane; i < c.count; i += 32) before += list[i] >= x.least && (int)~(u32)list[i] < slice.warp_begin;
    above += warp_sum(before);
    ties = 0;
    x.wanted = 0;
  }
  emit<HELD>(p, s, number, slice, keys, x, above, ties, first_page, cached);
  if (grouped) cluster_wait();
  return true;
}

// Loads of four columns a thread for the widest slice of a row.
__device__ __forceinline__ int loads_of(int length, int blocks) {
  return (share_of(length, blocks) + kChunk * kWarps - 1) / (kChunk * kWarps);
}

__device__ __forceinline__ bool is_shared(const Params& p, int length, int size) {
  return size > 1 && length > p.solo_columns && length > p.k;
}

// Lists the rows from `at` to `at` + THREADS that a cluster shares, in their order, in s.rows; returns how many.
__device__ __forceinline__ int list_shared(const Params& p, Shared& s, int at, int size) {
  int candidate = at + (int)threadIdx.x;
  bool mine = candidate < p.rows && is_shared(p, row_length(p, candidate, row_first(p, candidate)), size);
  u32 votes = __ballot_sync(kAll, mine);
  __syncthreads();
  if (lane_id() == 0) s.warps[warp_id()] = __popc(votes);
  __syncthreads();
  int before = 0, found = 0;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp_id() ? s.warps[w] : 0;
    found += s.warps[w];
  }
  if (mine) s.rows[before + __popc(votes & ((1u << lane_id()) - 1))] = candidate;
  __syncthreads();
  return found;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) topk(const __grid_constant__ Params p) {
  unsigned char* memory = block_memory();
  Shared& s = *(Shared*)memory;
  uint4* kept = (uint4*)(memory + ((sizeof(Shared) + 15) & ~15));
  int size = (int)cluster_size(), rank = (int)cluster_rank();
  int log = __ffs(size) - 1, clusters = gridDim.x >> log, cluster = blockIdx.x >> log;
  // Few rows have a cluster each. Of many, each block takes its share of the short ones, then each cluster of the long.
  bool few = p.rows <= clusters;
  int number = few ? cluster : blockIdx.x;
  bool dealing = !few && number >= p.rows;
  if (few && number >= p.rows) return;

  // A kernel in front may still write the length: what is read before the wait is a guess, the same for all threads.
  if (threadIdx.x == 0 && number < p.rows) s.guess = row_length(p, number, 0);
  reset(s);
  bool guessed = !p.starts && !dealing;
  int guess = guessed ? s.guess : 0;
  wait_for_kernels_in_front();

  int at = -THREADS, found = 0, next = 0, turn = 0;  // of dealing
  bool dirty = false;
  for (;;) {
    if (dealing) {
      if (size == 1) return;
      while (next >= found || turn % clusters != cluster) {
        if (next < found) {
          ++next;
          ++turn;
          continue;
        }
        at += THREADS;
        if (at >= p.rows) return;
        found = list_shared(p, s, at, size);
        next = 0;
      }
      number = s.rows[next];
      ++next;
      ++turn;
    }
    int first = row_first(p, number);
    Row row = make_row(p, number, first);
    int length = row_length(p, number, first);
    row.length = guessed ? guess : length;
    for (;;) {
      bool grouped = is_shared(p, row.length, size);
      if (grouped ? !dealing && !few : few && rank != 0) {
        if (length == row.length) break;
      } else if (row.length <= p.k) {
        Pages pages;
        if (p.method == 2) pages = pages_ahead(p, row);
        if (length == row.length) {
          select_all(p, row, number, pages);
          break;
        }
      } else {
        if (dirty) {
          __syncthreads();
          reset(s);
        }
        dirty = true;
        int blocks = grouped ? size : 1, block = grouped ? rank : 0;
        Slice slice = make_slice(row.length, block, blocks);
        bool done;
        if (p.flags & kAligned && loads_of(row.length, blocks) <= kHeld) {
          float4 loaded[kHeld];
#pragma unroll
          for (int i = 0; i < kHeld; ++i)
            loaded[i] = load_four(
                p.logits + row.offset, slice.column + i * kChunk, i < slice.loads ? slice.end : 0);
          done = select_row<true>(p, s, kept, row, number, block, blocks, slice, loaded, length);
        } else {
          done = select_row<false>(p, s, kept, row, number, block, blocks, slice, nullptr, length);
        }
        if (done) break;
      }
      row.length = length;
    }
    if (few) return;
    guessed = false;
    if (!dealing) {
      number += gridDim.x;
      dealing = number >= p.rows;
    }
  }
}
