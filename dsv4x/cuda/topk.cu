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
#define ROOM 8192  // entries that are kept of a long row, in equal parts of its blocks
#endif
#ifndef SAMPLES
#define SAMPLES 4096
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

struct Outs {
  int* space;
  int* local;
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
  u64 ties[kRanked];
  u64 least;
  u32 counts[2 * 32];
  u32 sums[32];
  Range range;
  u32 num_ties;
#if LONG
  u32 kept_by[16];  // the cluster's blocks
  alignas(16) u64 kept[ROOM];
#endif
};

static_assert(sizeof(Shared) <= 3 * 1024 + 4 * kBins + (LONG ? 8 * ROOM : 0), "");

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

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

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

__device__ __forceinline__ void store_remote(u32 address, u32 x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void store_remote_u64(u32 address, u64 x) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
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

// Counts the first `valid` of four plain values in bins of half precision's, in descending order.
__device__ __forceinline__ void count_values(Shared& s, const float4& x, int valid) {
  u32 halves[2] = {halves_of(x.x, x.y), halves_of(x.z, x.w)};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 both = halves[j / 2];
    u32 ordered = both ^ ((~both >> 15 & 0x00010001u) * 0x7fffu);
    u32 bin = (j % 2 ? ordered >> (32 - BITS) : ordered >> (16 - BITS) & (kBins - 1));
    if (j < valid) atomicAdd(&s.bins[bin], 1u);
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

// What the table has for a column of the row, -1 past its end.
__device__ __forceinline__ int load_page(const Params& p, const Row& row, int column) {
  if (row.table_limit <= 0) return -1;
  int number = page_number(p, column);
  int page = load_int(row.table + min(number, row.table_limit - 1));
  return number < row.table_limit ? page : -1;
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

__device__ __forceinline__ void write(const Params& p, const Outs& outs, u32 place, int index, int column) {
  outs.space[place] = index;
  if (p.local) outs.local[place] = column;
}

__device__ __forceinline__ Row make_row(const Params& p, int number) {
  Row row;
  row.base = 0;
  row.table = p.table;
  row.table_limit = 0;
  if (p.method == 1) {
    row.base = load_integer(p.bases, number, p.flags & kBases64);
    if (row.base > 0x7fffffff) row.base = -1;
  }
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

__device__ __forceinline__ Outs make_outs(const Params& p, int number) {
  return {p.out + number * p.out_stride, p.local + number * p.local_stride};
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
  Outs outs = make_outs(p, number);
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int place = threadIdx.x + i * THREADS;
    if (place < p.k) {
      bool there = place < length;
      write(p, outs, place, there ? in_space(p, row, place, pages.held[i]) : -1, there ? place : -1);
    }
  }
}

// Indices of four columns, one behind the other; of those past `last`, none.
struct Four {
  int first, last;

  __device__ __forceinline__ int index(int j) const { return j <= last ? first + j : -1; }
};

__device__ __forceinline__ Four indices_of(const Params& p, const Row& row, int column, int page) {
  if (p.method == 1) {
    i64 first = row.base + column;
    return {(int)first, row.base < 0 ? -1 : (int)max((i64)-1, min((i64)3, 0x7fffffff - first))};
  }
  if (p.method == 2) return {in_space(p, row, column, page), page < 0 || page >= p.pages ? -1 : 3};
  return {column, 3};
}

__device__ __forceinline__ bool pages_of_four(const Params& p) { return p.page_size % 4 == 0; }

// The entries that are selected from, in order: a warp's are one behind the other, of each of its chunks four a lane.
// Of a short row they are its columns; of a long one, what was kept of it.
template <bool KEPT>
struct Items {
  static constexpr int kPages = KEPT ? 4 * HELD : HELD;

  float4 x[HELD];
  int column[kPages];
  int pages[kPages];
  int valid[HELD];  // of four

  __device__ __forceinline__ int column_at(int at) const { return KEPT ? column[at] : column[at / 4] + at % 4; }

  // What `f(i)` has of the item `at`, which is known only where it runs.
  template <class F>
  static __device__ __forceinline__ auto pick(int at, F f) {
    auto found = f(0);
#pragma unroll
    for (int i = 1; i < 4 * HELD; ++i) found = at == i ? f(i) : found;
    return found;
  }
};

__device__ __forceinline__ int chunks_of(int size) { return (size + kChunk - 1) / kChunk; }

__device__ __forceinline__ Items<false> load_row(const Params& p, const Row& row, const float* logits, int length) {
  Items<false> items;
  int loads = (chunks_of(length) + kWarps - 1) / kWarps;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    items.column[i] = (warp_id() * loads + i) * kChunk + 4 * lane_id();
    items.valid[i] = i < loads ? min(max(length - items.column[i], 0), 4) : 0;
    items.x[i] = load_columns(logits, items.column[i], i < loads ? length : 0);
  }
#pragma unroll
  for (int i = 0; i < HELD; ++i)
    items.pages[i] = p.method == 2 && items.valid[i] > 0 && pages_of_four(p) ? load_page(p, row, items.column[i]) : -1;
  return items;
}

// Selects from a row of more than k entries; s.bins are zero. `KEPT`: of what was kept, all keys are from `low` on.
template <bool KEPT>
__device__ __forceinline__ void select_items(
    const Params& p, Shared& s, const Row& row, int number, int length, Items<KEPT>& items, u32 low) {
  int lane = lane_id(), warp = warp_id();
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    float4& x = items.x[i];
    int valid = items.valid[i];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      part(x, j) = j < valid ? KEPT ? part(x, j) : plain(part(x, j)) : __int_as_float(0x7fffffff);
    if (KEPT) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 bin = kBins - 1 - min((key_of(part(x, j)) - low) >> kFine, (u32)kBins - 1);
        if (j < valid) atomicAdd(&s.bins[bin], 1u);
      }
    } else {
      count_values(s, x, valid);
    }
  }
  __syncthreads();
  Range r = {KEPT ? low : 0, kAll, 0, length - 1, (u32)p.k, 0};
  r = find<KEPT ? kOfKept : kOfValues>(s, r, 0, 1);
#pragma unroll 1
  while (r.count != r.wanted && r.count > kRanked) {
    int shift = r.shift();
#pragma unroll
    for (int at = 0; at < 4 * HELD; ++at) {
      u32 key = key_of(part(items.x[at / 4], at % 4));
      int column = items.column_at(at);
      if (at % 4 < items.valid[at / 4] && r.holds(key, column)) atomicAdd(&s.bins[r.bin(key, column, shift)], 1u);
    }
    __syncthreads();
    r = find<kOfRange>(s, r, shift, 1);
  }

  u64 least = composite(r.low, r.one_key() ? r.last : 0x7fffffff);
  if (r.count != r.wanted) {
    float lowest = value_of(r.low), highest = value_of(r.high);
    u32 inside = 0;
#pragma unroll
    for (int at = 0; at < 4 * HELD; ++at) {
      float x = part(items.x[at / 4], at % 4);
      inside |= (u32)(x >= lowest && x <= highest) << at;
    }
    while (inside != 0) {
      int at = __ffs(inside) - 1;
      inside &= inside - 1;
      u32 key = key_of(items.pick(at, [&](int i) { return part(items.x[i / 4], i % 4); }));
      int column = items.pick(at, [&](int i) { return items.column_at(i); });
      if (r.holds(key, column)) s.ties[atomicAdd(&s.num_ties, 1u)] = composite(key, column);
    }
    __syncthreads();
#pragma unroll 1
    for (u32 i = warp; i < r.count; i += kWarps) {
      u64 entry = s.ties[i];
      u32 above = 0;
#pragma unroll 1
      for (u32 at = 0; at < r.count; at += 32)
        above += __popc(__ballot_sync(kAll, at + lane < r.count && s.ties[min(at + lane, r.count - 1)] > entry));
      if (above == r.wanted - 1 && lane == 0) s.least = entry;
    }
    __syncthreads();
    least = s.least;
  }

  float bound = value_of((u32)(least >> 32));
  int last = column_of(least);
  u32 selected = 0, places[HELD], sum = 0, below = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    places[i] = sum;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x = part(items.x[i], j);
      bool mine = x > bound || (x == bound && items.column_at(4 * i + j) <= last);
      u32 votes = __ballot_sync(kAll, mine);
      selected |= (u32)mine << (4 * i + j);
      places[i] += __popc(votes & below);
      sum += __popc(votes);
    }
  }
  if (lane == 0) s.counts[warp] = sum;
  Outs outs = make_outs(p, number);
  Four four[HELD];
  if (!KEPT) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) four[i] = indices_of(p, row, items.column[KEPT ? 0 : i], items.pages[KEPT ? 0 : i]);
  }
  __syncthreads();
  u32 before = warp_sum(lane < warp ? s.counts[lane] : 0);
  bool apart = KEPT || (p.method == 2 && !pages_of_four(p));
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    u32 place = before + places[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int at = 4 * i + j;
      if (!(selected >> at & 1)) continue;
      int column = items.column_at(at);
      int index = apart ? in_space(p, row, column, KEPT ? items.pages[KEPT ? at : 0] : load_page(p, row, column))
                        : four[i].index(j);
      write(p, outs, place++, index, column);
    }
  }
}

#if LONG

constexpr int kSampled = SAMPLES / 4 / THREADS;  // loads of four columns, a thread's
constexpr int kAhead = 64 * 1024;                // bytes of a slice that are fetched during its row's sample
constexpr int kStreamed = 4;                     // loads of four columns, a thread's, between two barriers

// A bound that was counted leaves kMost entries, in chunks that up to eight blocks did not fill.
static_assert(ROOM >= kMost && HELD * kWarps >= kMost / kChunk + 8 && SAMPLES % (4 * THREADS) == 0, "");

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
    count_values(s, x, 4);
  }
  __syncthreads();
  // 4.3 standard deviations more than the k-th of the row has before it in the sample.
  float expected = (float)p.k * (float)SAMPLES / (float)length;
  int wanted = (int)(expected + 10.25f + 4.3f * sqrtf(expected + 4.63f));
  Range r = {0, kAll, 0, length - 1, (u32)min(wanted, SAMPLES), 0};
  return find<kOfValues>(s, r, 0, 1).low;
}

struct Tile {
  float4 x[kStreamed];
};

__device__ __forceinline__ Tile load_tile(const float* row, int first, int loads, int end) {
  Tile tile;
#pragma unroll
  for (int i = 0; i < kStreamed; ++i) tile.x[i] = load_columns(row, first + i * kChunk, i < loads ? end : 0);
  return tile;
}

// A lane's counts of four items are packed so, a byte each: of the loads 0, 2, 1 and 3.
__device__ __forceinline__ u32 packed_counts(u32 mine) {
  u32 pairs = mine - (mine >> 1 & 0x5555u);
  u32 fours = (pairs & 0x3333u) + (pairs >> 2 & 0x3333u);
  return (fours & 0x0f0fu) | (fours & 0xf0f0u) << 12;
}

__device__ __forceinline__ u32 packed_count(u32 counts, int load) {
  return counts >> (load == 1 ? 16 : load == 2 ? 8 : 8 * load) & 255;
}

// Keeps the slice's entries from (`low`, `last`) on, in order, at `kept` of the first block, as far as there is room;
// returns the number of all.
__device__ __forceinline__ u32 keep(
    Shared& s, const float* row, int begin, int end, u32 low, int last, u32 kept, u32 room) {
  float bound = value_of(low);
  int lane = lane_id(), warp = warp_id(), turn = 0;
  int loads = min((chunks_of(end - begin) + kWarps - 1) / kWarps, kStreamed), step = loads * kChunk * kWarps;
  // NaN, and columns of one key, need more than one comparison.
  bool plainly = low > kSmallest && last == 0x7fffffff;
  u32 size = 0;
  int column = begin + warp * loads * kChunk + 4 * lane;
  Tile next = load_tile(row, column, loads, end);
#pragma unroll 1
  for (int from = begin; from < end; from += step, column += step, turn ^= 32) {
    Tile tile = next;
    next = load_tile(row, column + step, loads, end);
    u32 mine = 0;
    if (plainly && from + step <= end) {
#pragma unroll
      for (int at = 0; at < 4 * kStreamed; ++at) mine |= (u32)(part(tile.x[at / 4], at % 4) >= bound) << at;
      mine &= (1u << (4 * loads)) - 1;
    } else {
#pragma unroll
      for (int at = 0; at < 4 * kStreamed; ++at) {
        float x = part(tile.x[at / 4], at % 4) = plain(part(tile.x[at / 4], at % 4));
        int where = column + at / 4 * kChunk + at % 4;
        mine |= (u32)(at / 4 < loads && where < end && (x > bound || (x == bound && where <= last))) << at;
      }
    }
    u32 counts = packed_counts(mine), ends = 0, all = 0;
    if (__any_sync(kAll, mine != 0)) {
      ends = warp_scan(counts);
      all = __shfl_sync(kAll, ends, 31);
    }
    u32 sum = (all & 0x00ff00ffu) + (all >> 8 & 0x00ff00ffu);
    sum = (sum & 0xffffu) + (sum >> 16);
    if (lane == 0) s.counts[turn + warp] = sum;
    __syncthreads();
    u32 own = lane < kWarps ? s.counts[turn + lane] : 0;
    u32 before = size + warp_sum(lane < warp ? own : 0);
    size += warp_sum(own);
#pragma unroll
    for (int i = 0; i < kStreamed; ++i) {
      u32 total = packed_count(all, i);
      if (total == 0) continue;
      u32 place = before + packed_count(ends - counts, i);
      before += total;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool kept_one = mine >> (4 * i + j) & 1;
        float x = part(tile.x[i], j) + 0.0f;
        if (kept_one && place < room)
          store_remote_u64(kept + 8 * place, (u64)(u32)__float_as_int(x) << 32 | (u32)(column + i * kChunk + j));
        place += kept_one;
      }
    }
  }
  return size;
}

// A range from whose least entry on there are between k and kMost, by all of the row's blocks.
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
      for (int j = 0; j < 4; ++j) part(x, j) = plain(part(x, j));
      if (values) {
        count_values(s, x, end - column);
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
    if (p.k - r.wanted + r.count <= kMost) return r;
  }
}

// The first block's items: chunks of the blocks' parts, `size` of them in the lane of a block's rank.
__device__ __forceinline__ Items<true> load_kept(const Params& p, Shared& s, const Row& row, u32 size, int part_size) {
  Items<true> items;
  u32 chunks = chunks_of((int)size), ends = warp_scan(chunks);
  int loads = ((int)__shfl_sync(kAll, ends, 31) + kWarps - 1) / kWarps;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    u32 chunk = warp_id() * loads + i;
    int block = __popc(__ballot_sync(kAll, ends <= chunk)) & 31;
    int slot = ((int)(chunk - __shfl_sync(kAll, ends - chunks, block))) * kChunk + 4 * lane_id();
    int valid = i < loads ? min(max((int)__shfl_sync(kAll, size, block) - slot, 0), 4) : 0;
    const uint4* two = (const uint4*)&s.kept[valid > 0 ? block * part_size + slot : 0];
    uint4 first = two[0], second = two[1];
    items.valid[i] = valid;
    items.x[i] = {__int_as_float((int)first.y), __int_as_float((int)first.w), __int_as_float((int)second.y),
                  __int_as_float((int)second.w)};
    items.column[4 * i] = (int)first.x;
    items.column[4 * i + 1] = (int)first.z;
    items.column[4 * i + 2] = (int)second.x;
    items.column[4 * i + 3] = (int)second.z;
  }
#pragma unroll
  for (int at = 0; at < 4 * HELD; ++at)
    items.pages[at] = p.method == 2 && at % 4 < items.valid[at / 4] ? load_page(p, row, items.column[at]) : -1;
  return items;
}

__device__ __forceinline__ void select_long(
    const Params& p, Shared& s, const float* logits, int number, int length, const Sample& sample, int rank,
    int blocks) {
  // No block's memory is written to before it runs.
  if (blocks > 1) cluster_arrive();
  int share = share_of(length, blocks);
  int begin = min(rank * share, length), end = min(begin + share, length);
  int part_size = ROOM >> (__ffs(blocks) - 1);
  u32 low = sampled_bound(p, s, length, sample), size;
  int last = 0x7fffffff;
  if (blocks > 1) cluster_wait();
#pragma unroll 1
  for (;;) {
    u32 own = keep(s, logits, begin, end, low, last, remote(&s.kept[rank * part_size], 0), part_size);
    if (threadIdx.x < blocks) store_remote(remote(&s.kept_by[rank], threadIdx.x), own);
    barrier_of(blocks);
    size = lane_id() < blocks ? s.kept_by[lane_id()] : 0;
    bool fits = !__any_sync(kAll, size > part_size) && warp_sum(chunks_of((int)size)) <= HELD * kWarps;
    if (fits && warp_sum(size) >= (u32)p.k) break;
    barrier_of(blocks);
    Range r = counted_range(p, s, logits, length, begin, end, blocks);
    low = r.low;
    if (r.one_key()) last = r.last;
  }
  if (rank != 0) return;
  Row row = make_row(p, number);
  Items<true> items = load_kept(p, s, row, size, part_size);
  select_items<true>(p, s, row, number, length, items, low);
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
      Items<false> items = load_row(p, row, logits, rank == 0 ? guess : 0);
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
