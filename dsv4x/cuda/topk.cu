// Selection of each row's k largest logits, equal ones by the smaller index, in the order of their indices.
//
// A row's way follows from its length, which the device reads. No more than k entries: all of them, without logits. Up
// to kItems: one block, the values in its registers. Longer: the blocks of a cluster stream a slice each, once, and keep
// the entries above a bound from a sample of the row, in their order; the first block then selects from what was kept.
// Where the bound kept too few or too many, the row is counted, as often as it takes to find one that cannot.
//
// An entry's order is its value's, then its column's. Entries are counted in kBins bins, of which one holds the k-th.
// While it holds too many to be compared with each other, its range is cut into as many bins again: of keys, and then
// of columns where all keys in it are one. Ranges are exact in integers, so nothing depends on the values.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef THREADS
#define THREADS 512
#endif
#ifndef BLOCKS
#define BLOCKS 2  // of a multiprocessor
#endif
#ifndef HELD
#define HELD 4  // loads of four columns that a thread's registers hold
#endif
#ifndef LONG
#define LONG 1  // whether rows can have more columns than registers hold
#endif
#ifndef ALIGNED
#define ALIGNED 1  // whether four columns can be loaded at once
#endif
#ifndef ROOM
#define ROOM 8192  // entries that are kept of a long row
#endif
#ifndef SAMPLES
#define SAMPLES 4096
#endif
#ifndef STREAMED
#define STREAMED 4  // loads of four columns, a thread's, between two barriers
#endif
#ifndef BITS
#define BITS (THREADS < 1024 ? 11 : 12)  // of a bin's number
#endif

namespace {

constexpr int kWarps = THREADS / 32;
constexpr int kBins = 1 << BITS;
constexpr int kOwnBins = kBins / THREADS;
constexpr int kItems = 4 * HELD * THREADS;
constexpr int kChunk = 128;         // columns that a warp loads at once
constexpr int kMost = 2048;         // k
constexpr u32 kRanked = 256;        // most entries that are compared with each other
constexpr int kPlaces = (kMost + THREADS - 1) / THREADS;              // of a row, a thread's
constexpr int kListed = (kMost + (int)kRanked + THREADS - 1) / THREADS;  // of the entries of a list, a thread's
constexpr u32 kAll = 0xffffffffu;
constexpr u32 kLargest = 0xff800000u, kSmallest = 0x007fffffu;  // keys, of the infinities
constexpr int kFine = 25 - BITS;  // kBins bins of this many bits are four powers of two

static_assert(kWarps <= 32 && HELD <= 8 && kBins % (2 * THREADS) == 0, "");

enum Flags { kLengths64 = 1, kStarts64 = 2, kBases64 = 4, kRequests64 = 8 };

// What bins are of: half precision's values; keys above the range's least, in kFine bits; the range, in shift bits.
enum Bins { kOfValues, kOfKept, kOfRange };

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
  int rows, width, k, method, flags;
  int next_n, num_requests, table_width, page_size, pages;
  u32 page_factor;  // a column's page is 2 * column * page_factor >> 32 + page_shift
  int page_shift;
};

namespace {

struct Row {
  const int* table;
  i64 base;
  int table_limit;
};

// The entries among which the k-th is: those of `low` <= key <= `high`, or, where these are one, of a range of columns.
struct Range {
  u32 low, high;
  int first, last;
  u32 wanted;  // of the entries inside; those above are selected
  u32 count;   // of the entries inside

  __device__ __forceinline__ bool one_key() const { return low == high; }
  __device__ __forceinline__ bool holds(u32 key, int column) const {
    return key >= low && key <= high && (low != high || (column >= first && column <= last));
  }
  __device__ __forceinline__ int shift() const {
    return max(0, 32 - BITS - __clz(low != high ? high - low : (u32)(last - first)));
  }
  // Of an entry inside; in descending order of entries.
  __device__ __forceinline__ u32 bin(u32 key, int column, int shift) const {
    return (low != high ? high - key : (u32)(column - first)) >> shift;
  }
};

struct Shared {
  u32 bins[kBins];  // zero but while they are counted and found
  alignas(16) u64 list[kMost + kRanked];
  u64 ties[kRanked];
  int pages[HELD * THREADS];  // of four columns each
  u32 counts[2 * 32];
  u32 sums[32];
  u32 unselected[kListed * kWarps];
  Range range;
  u32 num_ties;
#if LONG
  u32 kept_by[16];  // the cluster's blocks
  alignas(16) u64 kept[ROOM];
#endif
};

static_assert(sizeof(Shared) <= 22 * 1024 + 4 * kBins + 4 * HELD * THREADS + (LONG ? 8 * ROOM : 0), "");

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

__device__ __forceinline__ u32 remote(const void* pointer, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"((u32)__cvta_generic_to_shared(pointer)), "r"(rank));
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

__device__ __forceinline__ void store_remote(u32 address, u32 x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Two values in half precision, rounded toward zero; the first in the low half.
__device__ __forceinline__ u32 halves_of(float x, float y) {
  u32 both;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
}

__device__ __forceinline__ float value_of_half(u32 half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)half));
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

__device__ __forceinline__ int load_int(const int* pointer) {
  int y;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(y) : "l"(pointer) : "memory");
  return y;
}

__device__ __forceinline__ float4 load_aligned(const float* pointer) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(pointer)
               : "memory");
  return x;
}

// Starts to bring whole lines of 16 bytes to the second level's cache.
__device__ __forceinline__ void fetch_ahead(const float* pointer, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(pointer), "r"(bytes) : "memory");
}

// Computes the pointer here, rather than where it is used.
__device__ __forceinline__ void settle(const float*& pointer) { asm volatile("" : "+l"(pointer)); }

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

// As it was loaded: nothing waits for it before its value is needed.
struct Length {
  int low, high;
};

__device__ __forceinline__ Length load_length(const Params& p, int number) {
  bool wide = p.flags & kLengths64;
  const int* pointer = (const int*)p.lengths + ((i64)number << (wide ? 1 : 0));
  Length length = {load_int(pointer), 0};
  if (wide) length.high = load_int(pointer + 1);
  return length;
}

__device__ __forceinline__ int clamped_length(const Params& p, const Length& length, int most) {
  bool wide = p.flags & kLengths64;
  return clamped(wide ? (i64)length.high << 32 | (u32)length.low : (i64)length.low, most);
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// NaN is -inf, and -0 is 0.
__device__ __forceinline__ float plain(float x) { return fmaxf(x, -infinity()) + 0.0f; }

// Of plain values: unsigned, and in their order.
__device__ __forceinline__ u32 key_of(float x) {
  int bits = __float_as_int(x);
  return (u32)bits ^ ((u32)(bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float value_of(u32 key) {
  return __int_as_float((int)(key & 0x80000000u ? key ^ 0x80000000u : ~key));
}

// Entries with larger keys come first, and of equal keys those of smaller columns.
__device__ __forceinline__ u64 composite(u32 key, int column) { return (u64)key << 32 | (u32)~column; }
__device__ __forceinline__ int column_of(u64 entry) { return (int)~(u32)entry; }

__device__ __forceinline__ float& part(float4& x, int j) { return j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w; }
__device__ __forceinline__ float part(const float4& x, int j) {
  return j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w;
}

// Counts four plain values in bins of half precision's, in descending order; those that are NaN are none.
__device__ __forceinline__ void count_values(Shared& s, const float4& x, bool all) {
  u32 halves[2] = {halves_of(x.x, x.y), halves_of(x.z, x.w)};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 both = halves[j / 2];
    u32 ordered = both ^ ((~both >> 15 & 0x00010001u) * 0x7fffu);
    u32 bin = (j % 2 ? ordered >> (32 - BITS) : ordered >> (16 - BITS) & (kBins - 1));
    if (all || part(x, j) == part(x, j)) atomicAdd(&s.bins[bin], 1u);
  }
}

// A bin of a range: `before` entries come before the bin's, which are `count`.
template <int OF>
__device__ __forceinline__ Range narrowed(Range r, u32 bin, u32 before, u32 count, int shift) {
  r.wanted -= before;
  r.count = count;
  if (OF == kOfValues) {
    u32 first = bin << (16 - BITS), last = first + (1u << (16 - BITS)) - 1;
    if (first < 0x8000u) {
      u32 half = first ^ 0x7fffu;
      r.low = key_of(value_of_half(last ^ 0x7fffu));
      r.high = half >= 0x7c00u ? kLargest : key_of(value_of_half(half + 1)) - 1;
    } else {
      u32 least = first & 0x7fffu, most = last & 0x7fffu;
      r.low = most >= 0x7c00u ? kSmallest : key_of(-value_of_half(most + 1)) + 1;
      r.high = key_of(-value_of_half(least));
    }
  } else if (OF == kOfKept) {
    r.low += (kBins - 1 - bin) << kFine;
    r.high = bin == 0 ? kLargest : min(r.low + ((1u << kFine) - 1), kLargest);
  } else {
    u32 from = bin << shift, size = (1u << shift) - 1;
    if (r.low != r.high) {
      r.high -= from;
      r.low = r.high - r.low > size ? r.high - size : r.low;
    } else {
      r.first += (int)from;
      r.last = (u32)(r.last - r.first) > size ? r.first + (int)size : r.last;
    }
  }
  // No entry has the key of -0, which is not less than 0.
  if (r.high == 0x7fffffffu && r.low != r.high) --r.high;
  return r;
}

// The bin that holds the wanted-th of a range's entries, by all threads. Bins are zero afterwards, but of a cluster's
// blocks, where a barrier has to come before they are.
template <int OF>
__device__ __forceinline__ Range find(Shared& s, const Range& r, int shift, int blocks) {
  uint2* bins = (uint2*)&s.bins[kOwnBins * threadIdx.x];
  u32 own[kOwnBins];
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < kOwnBins / 2; ++i) {
    uint2 two = bins[i];
    own[2 * i] = two.x;
    own[2 * i + 1] = two.y;
    if (blocks == 1) bins[i] = make_uint2(0, 0);
  }
#if LONG
  if (blocks > 1) {
    int rank = (int)cluster_rank();
#pragma unroll 1
    for (int q = 0; q < blocks; ++q) {
      if (q == rank) continue;
#pragma unroll
      for (int i = 0; i < kOwnBins; ++i) own[i] += load_remote(remote(&s.bins[kOwnBins * threadIdx.x + i], q));
    }
  }
#endif
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) sum += own[i];
  u32 end = warp_scan(sum);
  if (lane_id() == 31) s.sums[warp_id()] = end;
  __syncthreads();
  u32 before = warp_sum(lane_id() < warp_id() ? s.sums[lane_id()] : 0) + end - sum;
  if (before < r.wanted && before + sum >= r.wanted) {
    u32 bin = kOwnBins * threadIdx.x, count = own[0], last = before;
#pragma unroll
    for (int i = 1; i < kOwnBins; ++i) {
      last += own[i - 1];
      if (last < r.wanted) {
        before = last;
        count = own[i];
        bin = kOwnBins * threadIdx.x + i;
      }
    }
    s.range = narrowed<OF>(r, bin, before, count, shift);
  }
  __syncthreads();
  return s.range;
}

__device__ __forceinline__ int page_number(const Params& p, int column) {
  return (int)(__umulhi(2 * (u32)column, p.page_factor) >> p.page_shift);
}

__device__ __forceinline__ int load_page(const Params& p, const Row& row, int column) {
  int number = page_number(p, column);
  return p.method == 2 && number < row.table_limit ? load_int(row.table + number) : -1;
}

// `page` is what the table has for the column.
__device__ __forceinline__ int in_space(const Params& p, const Row& row, int column, int page) {
  if (p.method == 1) {
    i64 moved = row.base + column;
    return row.base >= 0 && moved <= 0x7fffffff ? (int)moved : -1;
  }
  if (p.method == 2) {
    int at = column - page_number(p, column) * p.page_size;
    return page < 0 || page >= p.pages ? -1 : page * p.page_size + at;
  }
  return column;
}

__device__ __forceinline__ void write(const Params& p, const Row& row, int number, u32 place, int column, int page) {
  p.out[number * p.out_stride + place] = in_space(p, row, column, page);
  if (p.local) p.local[number * p.local_stride + place] = column;
}

__device__ __forceinline__ Row make_row(const Params& p, int number) {
  Row row;
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

__device__ __forceinline__ float4 load_columns(const float* row, int column, int end) {
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
#if ALIGNED
  if (column < end) x = load_aligned(row + column);
#else
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (column + j < end) part(x, j) = row[column + j];
#endif
  return x;
}

// Of a row of no more than k entries.
struct Pages {
  int held[kPlaces];
};

__device__ __forceinline__ Pages load_pages(const Params& p, const Row& row, int length) {
  Pages pages;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int place = threadIdx.x + i * THREADS;
    pages.held[i] = place < length ? load_page(p, row, place) : -1;
  }
  return pages;
}

__device__ __forceinline__ void select_all(
    const Params& p, const Row& row, int number, int length, const Pages& pages) {
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int place = threadIdx.x + i * THREADS;
    if (place < length) {
      write(p, row, number, place, place, pages.held[i]);
    } else if (place < p.k) {
      p.out[number * p.out_stride + place] = -1;
      if (p.local) p.local[number * p.local_stride + place] = -1;
    }
  }
}

// The entries that are selected from: of a short row, its columns; of a long one, what was kept of it. A warp has
// `loads` chunks of them, one behind the other.
struct Items {
  float4 x[HELD];
  int pages[HELD];  // of a short row whose pages four columns share
  int loads;
  int first;
  int size;
};

__device__ __forceinline__ Items make_items(int size) {
  Items items;
  items.size = size;
  items.loads = (size + kChunk * kWarps - 1) / (kChunk * kWarps);
  items.first = warp_id() * items.loads * kChunk + 4 * lane_id();
  return items;
}

__device__ __forceinline__ bool pages_of_four(const Params& p) { return p.method == 2 && p.page_size % 4 == 0; }

__device__ __forceinline__ Items load_row(const Params& p, const Row& row, const float* logits, int length) {
  Items items = make_items(length);
#pragma unroll
  for (int i = 0; i < HELD; ++i)
    items.x[i] = load_columns(logits, items.first + i * kChunk, i < items.loads ? length : 0);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    int column = items.first + i * kChunk;
    items.pages[i] = i < items.loads && column < length && pages_of_four(p) ? load_page(p, row, column) : -1;
  }
  return items;
}

// The place among the warp's of the first of this lane's items that are in `mine`, four bits, and how many they are.
__device__ __forceinline__ u32 place_of(u32 mine, u32& all) {
  u32 before = 0, below = (1u << lane_id()) - 1;
  all = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 votes = __ballot_sync(kAll, mine >> j & 1);
    before += __popc(votes & below);
    all += __popc(votes);
  }
  return before;
}

// Selects from a row of more than k entries; s.bins are zero. `KEPT`: items are s.kept, with keys from `low` on.
template <bool KEPT>
__device__ __forceinline__ void select_items(
    const Params& p, Shared& s, const Row& row, int number, int length, Items& items, u32 low) {
  int lane = lane_id(), warp = warp_id();
#if LONG
  auto column_at = [&](int slot) { return KEPT ? (int)(u32)s.kept[slot] : slot; };
#else
  auto column_at = [&](int slot) { return slot; };
#endif
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    int slot = items.first + i * kChunk;
    if (i < items.loads && slot < items.size) {
      bool all = slot + 4 <= items.size;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!KEPT) part(items.x[i], j) = plain(part(items.x[i], j));
        if (!all && slot + j >= items.size) part(items.x[i], j) = __int_as_float(0x7fffffff);
      }
      if (KEPT) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (all || slot + j < items.size)
            atomicAdd(&s.bins[kBins - 1 - min((key_of(part(items.x[i], j)) - low) >> kFine, (u32)kBins - 1)], 1u);
      } else {
        count_values(s, items.x[i], all);
        if (pages_of_four(p)) s.pages[slot / 4] = items.pages[i];
      }
    } else {
      items.x[i] = {__int_as_float(0x7fffffff), __int_as_float(0x7fffffff), __int_as_float(0x7fffffff),
                    __int_as_float(0x7fffffff)};
    }
  }
  __syncthreads();
  Range r = {KEPT ? low : 0, kAll, 0, length - 1, (u32)p.k, 0};
  r = find<KEPT ? kOfKept : kOfValues>(s, r, 0, 1);
#pragma unroll 1
  while (r.count != r.wanted && r.count > kRanked) {
    int shift = r.shift();
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = part(items.x[i], j);
        int slot = items.first + i * kChunk + j;
        if (!(x == x)) continue;
        u32 key = key_of(x);
        int column = column_at(slot);
        if (r.holds(key, column)) atomicAdd(&s.bins[r.bin(key, column, shift)], 1u);
      }
    }
    __syncthreads();
    r = find<kOfRange>(s, r, shift, 1);
  }

  // The entries above the range and in it, in order.
  float least = value_of(r.low);
  u32 mine = 0, places[HELD], sum = 0;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    places[i] = sum;
    if (i >= items.loads) continue;
    u32 four = 0, all;
#pragma unroll
    for (int j = 0; j < 4; ++j) four |= (u32)(part(items.x[i], j) >= least) << j;
    if (r.one_key()) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int slot = items.first + i * kChunk + j;
        if (part(items.x[i], j) == least && column_at(slot) > r.last) four &= ~(1u << j);
      }
    }
    places[i] += place_of(four, all);
    sum += all;
    mine |= four << (4 * i);
  }
  if (lane == 0) s.counts[warp] = sum;
  __syncthreads();
  u32 before = warp_sum(lane < warp ? s.counts[lane] : 0);
  bool ranked = r.count != r.wanted;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    if (!(mine >> (4 * i) & 15)) continue;
    u32 place = before + places[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!(mine >> (4 * i + j) & 1)) continue;
      int column = column_at(items.first + i * kChunk + j);
      u64 entry = composite(key_of(part(items.x[i], j)), column);
      s.list[place++] = entry;
      if (ranked && r.holds((u32)(entry >> 32), column)) s.ties[atomicAdd(&s.num_ties, 1u)] = entry;
    }
  }
  __syncthreads();

  u32 size = p.k - r.wanted + r.count;
  // Of a long row, the first pages are on their way while its entries are ranked.
  constexpr int kUnrolled = KEPT ? kListed : 1, kFetched = kListed < 2 ? kListed : 2;
  int pages[kFetched];
  if (KEPT) {
#pragma unroll
    for (int i = 0; i < kFetched; ++i) {
      u32 at = i * THREADS + threadIdx.x;
      pages[i] = at < size ? load_page(p, row, column_of(s.list[at])) : -1;
    }
  }
  u32 selected = 0;
  if (ranked) {
#pragma unroll 1
    for (int i = 0; i * THREADS < size; ++i) {
      u32 at = i * THREADS + threadIdx.x;
      u64 entry = at < size ? s.list[at] : 0;
      bool chosen = entry != 0;
      if (chosen && r.holds((u32)(entry >> 32), column_of(entry))) {
        u32 rank = 0;
#pragma unroll 4
        for (u32 t = 0; t < r.count; ++t) rank += s.ties[t] > entry;
        chosen = rank < r.wanted;
      }
      selected |= (u32)chosen << i;
      u32 votes = __ballot_sync(kAll, chosen);
      if (lane == 0) s.unselected[i * kWarps + warp] = 32 - __popc(votes);
    }
    __syncthreads();
  }
  u32 skipped = 0;
#pragma unroll kUnrolled
  for (int i = 0; i < kListed; ++i) {
    if (i * THREADS >= size) break;
    u32 at = i * THREADS + threadIdx.x, place = at;
    bool chosen = at < size;
    if (ranked) {
      chosen = selected >> i & 1;
      u32 own = lane < kWarps ? s.unselected[i * kWarps + lane] : 0;
      u32 votes = __ballot_sync(kAll, chosen);
      place -= skipped + warp_sum(lane < warp ? own : 0) + __popc(~votes & ((1u << lane) - 1));
      skipped += warp_sum(own);
    }
    if (!chosen) continue;
    int column = column_of(s.list[at]);
    int page = KEPT && i < kFetched ? pages[i < kFetched ? i : 0]
               : !KEPT && pages_of_four(p) ? s.pages[column / 4]
                                           : load_page(p, row, column);
    write(p, row, number, place, column, page);
  }
}

#if LONG

constexpr int kSampled = SAMPLES / 4 / THREADS;  // loads of four columns, a thread's
constexpr int kAhead = 64 * 1024;                // bytes of a slice that are fetched during its row's sample
constexpr int kTile = kChunk * STREAMED * kWarps;

static_assert(ROOM >= kMost && ROOM <= kItems && SAMPLES % (4 * THREADS) == 0 && STREAMED <= 4, "");

// A row's columns for each of its blocks, a power of two of them.
__device__ __forceinline__ int share_of(int length, int blocks) {
  return (((length + blocks - 1) >> (__ffs(blocks) - 1)) + 3) & ~3;
}

__device__ __forceinline__ void barrier_of(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

struct Sample {
  float4 logits[kSampled];
};

__device__ __forceinline__ Sample load_sample(const float* row, int length) {
  Sample sample;
  u32 vectors = (u32)length / 4;
#pragma unroll
  for (int i = 0; i < kSampled; ++i) {
    u32 at = (u32)((u64)(i * THREADS + threadIdx.x) * vectors / (SAMPLES / 4));
    sample.logits[i] = load_columns(row, (int)(4 * at), length);
  }
  return sample;
}

// A key that between k and ROOM of the row's are not below, most likely: a bin's least.
__device__ __forceinline__ u32 sampled_bound(const Params& p, Shared& s, int length, const Sample& sample) {
#pragma unroll
  for (int i = 0; i < kSampled; ++i) {
    float4 x = sample.logits[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) part(x, j) = plain(part(x, j));
    count_values(s, x, true);
  }
  __syncthreads();
  // 4.3 standard deviations more than the k-th of the row has before it in the sample.
  float expected = (float)p.k * (float)SAMPLES / (float)length;
  int wanted = (int)(expected + 10.25f + 4.3f * sqrtf(expected + 4.63f));
  Range r = {0, kAll, 0, length - 1, (u32)min(wanted, SAMPLES), 0};
  return find<kOfValues>(s, r, 0, 1).low;
}

struct Tile {
  float4 x[STREAMED];
};

__device__ __forceinline__ Tile load_tile(const float* row, int first, int end) {
  Tile tile;
#pragma unroll
  for (int i = 0; i < STREAMED; ++i) tile.x[i] = load_columns(row, first + i * kChunk, end);
  return tile;
}

// Keeps the slice's entries from (`low`, `last`) on, in order, as far as there is room; returns the number of all.
__device__ __forceinline__ u32 keep(
    Shared& s, const float* row, int begin, int end, u32 low, int last) {
  float bound = value_of(low);
  int lane = lane_id(), warp = warp_id(), turn = 0;
  u32 kept = 0;
  int column = begin + warp * STREAMED * kChunk + 4 * lane;
  Tile next = load_tile(row, column, end);
#pragma unroll 1
  for (int from = begin; from < end; from += kTile, column += kTile, turn ^= 32) {
    Tile tile = next;
    next = load_tile(row, column + kTile, end);
    u32 mine = 0, places = 0, counts = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < STREAMED; ++i) {
      const float4& x = tile.x[i];
      // Of NaN, neither is true.
      bool none = x.x < bound && x.y < bound && x.z < bound && x.w < bound;
      if (!__any_sync(kAll, !none)) continue;
      u32 four = 0, all;
      if (!none) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float value = plain(part(x, j));
          int at = column + i * kChunk + j;
          if (at < end && (value > bound || (value == bound && at <= last))) four |= 1u << j;
        }
      }
      places |= place_of(four, all) << (8 * i);
      counts |= all << (8 * i);
      sum += all;
      mine |= four << (4 * i);
    }
    if (lane == 0) s.counts[turn + warp] = sum;
    __syncthreads();
    u32 own = lane < kWarps ? s.counts[turn + lane] : 0;
    u32 before = kept + warp_sum(lane < warp ? own : 0);
    kept += warp_sum(own);
    if (sum == 0) continue;
#pragma unroll
    for (int i = 0; i < STREAMED; ++i) {
      u32 place = before + (places >> (8 * i) & 255);
      before += counts >> (8 * i) & 255;
      if (!(mine >> (4 * i) & 15)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(mine >> (4 * i + j) & 1)) continue;
        if (place < ROOM)
          s.kept[place] = (u64)(u32)__float_as_int(plain(part(tile.x[i], j))) << 32 | (u32)(column + i * kChunk + j);
        ++place;
      }
    }
  }
  return kept;
}

// Where the entries that each block kept end, among those of all, in the lane of its rank.
__device__ __forceinline__ u32 exchange_kept(Shared& s, u32 kept, int rank, int blocks) {
  if (threadIdx.x < blocks) store_remote(remote(&s.kept_by[rank], threadIdx.x), kept);
  barrier_of(blocks);
  return warp_scan(lane_id() < blocks ? s.kept_by[lane_id()] : 0);
}

// A range from whose least entry on there are between k and ROOM, by all of the row's blocks.
__device__ __noinline__ Range counted_range(
    const Params& p, Shared& s, const float* row, int length, int begin, int end, int blocks) {
  Range r = {0, kAll, 0, length - 1, (u32)p.k, 0};
#pragma unroll 1
  for (bool values = true;; values = false) {
    int shift = r.shift();
#pragma unroll 1
    for (int column = begin + 4 * (int)threadIdx.x; column < end; column += 4 * THREADS) {
      float4 x = load_columns(row, column, end);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        part(x, j) = column + j < end ? plain(part(x, j)) : __int_as_float(0x7fffffff);
      if (values) {
        count_values(s, x, false);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 key = key_of(part(x, j));
        if (column + j < end && r.holds(key, column + j)) atomicAdd(&s.bins[r.bin(key, column + j, shift)], 1u);
      }
    }
    barrier_of(blocks);
    r = values ? find<kOfValues>(s, r, shift, blocks) : find<kOfRange>(s, r, shift, blocks);
    if (blocks > 1) {
      barrier_of(blocks);
      for (int i = threadIdx.x; i < kBins; i += THREADS) s.bins[i] = 0;
    }
    __syncthreads();
    if (p.k - r.wanted + r.count <= ROOM) return r;
  }
}

// Appends the other blocks' entries to this one's.
__device__ __forceinline__ void gather(Shared& s, int blocks, u32 end, u32 size) {
  u32 own = __shfl_sync(kAll, end, 0);
#pragma unroll 1
  for (u32 warp_at = own + warp_id() * 32; warp_at < size; warp_at += THREADS) {
    u32 at = warp_at + lane_id(), start = own;
    int block = 1;
#pragma unroll 1
    for (int q = 1; q < blocks - 1; ++q) {
      u32 ended = __shfl_sync(kAll, end, q);
      if (at >= ended) {
        block = q + 1;
        start = ended;
      }
    }
    if (at < size) s.kept[at] = load_remote_u64(remote(&s.kept[at - start], block));
  }
}

__device__ __forceinline__ void select_long(
    const Params& p, Shared& s, const float* logits, int number, int length, const Sample& sample, int rank,
    int blocks) {
  // No block's memory is written to before it runs.
  if (blocks > 1) cluster_arrive();
  int share = share_of(length, blocks);
  int begin = min(rank * share, length), end = min(begin + share, length);
  u32 low = sampled_bound(p, s, length, sample), ended, size;
  int last = length;
  bool alone = blocks == 1, ready = alone;
#pragma unroll 1
  for (;;) {
    ended = size = keep(s, logits, begin, end, low, last);
    if (!ready) cluster_wait();
    ready = true;
    if (!alone) {
      ended = exchange_kept(s, size, rank, blocks);
      size = __shfl_sync(kAll, ended, 31);
    }
    if (size >= (u32)p.k && size <= ROOM) break;
    barrier_of(blocks);
    Range r = counted_range(p, s, logits, length, begin, end, blocks);
    low = r.low;
    if (r.one_key()) last = r.last;
  }
  if (!alone) {
    if (rank == 0) gather(s, blocks, ended, size);
    // No block ends while another reads its memory.
    cluster_arrive();
    cluster_wait();
    if (rank != 0) return;
  } else {
    __syncthreads();
  }
  Items items = make_items((int)size);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    int slot = items.first + i * kChunk;
    if (i < items.loads && slot < items.size) {
      const uint4* four = (const uint4*)&s.kept[slot];
      items.x[i] = {__int_as_float((int)four[0].y), __int_as_float((int)four[0].w), __int_as_float((int)four[1].y),
                    __int_as_float((int)four[1].w)};
    }
  }
  select_items<true>(p, s, make_row(p, number), number, length, items, low);
}

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) topk(const __grid_constant__ Params p) {
  Shared& s = *(Shared*)block_memory();
  int blocks = (int)cluster_size(), rank = (int)cluster_rank();
  int number = (int)(blockIdx.x >> (__ffs(blocks) - 1));

  // A kernel in front may still write the length: what is read before the wait is a guess.
  int guess = p.lengths ? clamped_length(p, load_length(p, number), p.width) : p.width;
  const float* logits = p.logits + number * p.logits_stride;
  settle(logits);
#pragma unroll
  for (int i = 0; i < kOwnBins / 2; ++i) ((uint2*)s.bins)[i * THREADS + threadIdx.x] = make_uint2(0, 0);
  if (threadIdx.x == 0) s.num_ties = 0;
  __syncthreads();
  wait_for_kernels_in_front();

  int most = p.width;
  Length loaded = p.lengths ? load_length(p, number) : Length{most, 0};
  if (p.starts) {
    int first = clamped(load_integer(p.starts, number, p.flags & kStarts64), p.width);
    most -= first;
    logits += first;
    guess = clamped_length(p, loaded, most);
  }
  // What is loaded for the guess is on its way together with the length.
  for (;;) {
    int length;
    if (guess <= p.k) {
      Row row = make_row(p, number);
      Pages pages = load_pages(p, row, rank == 0 ? guess : 0);
      length = clamped_length(p, loaded, most);
      if (guess == length) return rank == 0 ? select_all(p, row, number, length, pages) : void();
    } else if (!LONG || guess <= kItems) {
      Row row = make_row(p, number);
      Items items = load_row(p, row, logits, rank == 0 ? guess : 0);
      length = clamped_length(p, loaded, most);
      if (guess == length) return rank == 0 ? select_items<false>(p, s, row, number, length, items, 0) : void();
    } else {
#if LONG
      Sample sample = load_sample(logits, guess);
      if (ALIGNED && threadIdx.x == 0) {
        int share = share_of(guess, blocks), begin = min(rank * share, guess);
        int ahead = min(4 * (min(begin + share, guess) - begin) & ~15, kAhead);
        if (ahead > 0) fetch_ahead(logits + begin, ahead);
      }
      length = clamped_length(p, loaded, most);
      if (guess == length) return select_long(p, s, logits, number, length, sample, rank, blocks);
#endif
    }
    guess = length;
  }
}
