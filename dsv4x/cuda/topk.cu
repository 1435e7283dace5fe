// Selection of each row's k largest logits, equal ones by the smaller index, in the order of their indices.
//
// A row's way follows from its length, which the device reads. No more than k entries: all of them, without logits. Up
// to kHeldColumns: one block, the keys in its registers. Longer: the blocks of a cluster stream a slice each, once, and
// keep the entries above a bound from a sample of the row; the first block then selects from what was kept. Where the
// bound kept too few or too many, the row is counted, as often as it takes to find one that cannot.
//
// An entry's order is its key's, then its index's. Keys are counted in 4096 bins, of which one holds the k-th. While it
// holds too many to be compared with each other, its range is cut into 4096 bins again: of keys, and then of columns
// where all keys in it are one. Ranges are exact in integers, so nothing depends on the values.

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
#ifndef ROOM
#define ROOM 8192  // entries that are kept of a long row
#endif
#ifndef SAMPLES
#define SAMPLES 8192
#endif
#ifndef STREAMED
#define STREAMED 4  // loads of four columns that a thread waits for at once
#endif

namespace {

constexpr int kWarps = THREADS / 32;
constexpr int kBins = 4096;
constexpr int kOwnBins = kBins / THREADS;
constexpr int kHeldColumns = 4 * HELD * THREADS;
constexpr int kRanked = 256;                             // most entries that are compared with each other
constexpr int kPlaces = (2048 + THREADS - 1) / THREADS;  // of a row, a thread's
constexpr int kKept = ROOM / THREADS;                    // of a long row's entries, a thread's
constexpr int kSampled = SAMPLES / 4 / THREADS;          // loads of four columns
constexpr int kAhead = 64 * 1024;                        // bytes of a slice that are fetched during its row's sample
constexpr u32 kAll = 0xffffffffu;
constexpr u32 kInfinity = 0x7f800000;
constexpr u32 kLargest = kInfinity | 0x80000000u;  // key, of infinity
// Bins of 1/64 of a power of two from 2^-16 to 2^16; the first and the last of either sign take what is beyond.
constexpr int kLeast = (127 - 16) * 64;
// Bins of a long row's kept entries: 1/1024 of a power of two.
constexpr int kFine = 13;

static_assert(kWarps <= 32 && HELD <= 8 && kBins % THREADS == 0 && kOwnBins % 4 == 0 && SAMPLES % (4 * THREADS) == 0, "");

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
  int rows, width, k, method, flags;
  int next_n, num_requests, table_width, page_size, page_shift, pages;
};

namespace {

struct Row {
  const float* logits;
  const int* table;
  i64 base;
  int table_limit;
};

struct Crossing {
  u32 bin, before, count;
};

struct Shared {
  u32 bins[kBins];  // zero but while they are counted and found, or hold bits of columns
  u64 staged[kRanked];
  u32 counts[HELD * kWarps];
  u32 sums[32];
  Crossing crossing;
  u64 least;
  u32 stage_size;
  u32 list_size;
#if LONG
  u32 prefix[THREADS];
  u64 list[ROOM];
#endif
};

static_assert(sizeof(Shared) <= 20 * 1024 + (LONG ? 4 * THREADS + 8 * ROOM : 0), "what the host gives a block");

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

// Keys are unsigned and ordered as the values; NaN is -inf, -0 is 0. No value has key 0.
__device__ __forceinline__ u32 key_of(float x) {
  x = fmaxf(x, __int_as_float(0xff800000)) + 0.0f;
  int bits = __float_as_int(x);
  return (u32)bits ^ ((u32)(bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float value_of(u32 key) {
  return __int_as_float((int)(key & 0x80000000u ? key ^ 0x80000000u : ~key));
}

// Entries with larger keys come first, and of equal keys those of smaller columns.
__device__ __forceinline__ u64 composite(u32 key, int column) { return (u64)key << 32 | (u32)~column; }
__device__ __forceinline__ int column_of(u64 entry) { return (int)~(u32)entry; }

// Bins are in descending order of the keys.
__device__ __forceinline__ u32 bin_of(u32 key) {
  int y = (int)(key >> 17) - 16384;
  int sign = y >> 31;
  int q = min(max((y ^ sign) - kLeast, 0), 2047);
  return (u32)((2047 - q) ^ (sign & 4095));
}

// The entries among which the k-th is: those of `low` <= key <= `high`, or, where these are one, of a range of columns.
struct Range {
  u32 low, high;
  int first, last;
  u32 wanted;  // of the entries inside; those above are selected

  __device__ __forceinline__ bool holds(u32 key, int column) const {
    return key >= low && key <= high && (low != high || (column >= first && column <= last));
  }
  __device__ __forceinline__ int shift() const {
    return max(0, 20 - __clz(low != high ? high - low : (u32)(last - first)));
  }
  // Of an entry inside; in descending order of entries.
  __device__ __forceinline__ u32 bin(u32 key, int column, int shift) const {
    return (low != high ? high - key : (u32)(column - first)) >> shift;
  }
  __device__ __forceinline__ void narrow(const Crossing& c, int shift) {
    wanted -= c.before;
    u32 from = c.bin << shift, size = (1u << shift) - 1;
    if (low != high) {
      high -= from;
      low = high - low > size ? high - size : low;
    } else {
      first += (int)from;
      last = (u32)(last - first) > size ? first + (int)size : last;
    }
  }
  // Of a bin of bin_of.
  __device__ __forceinline__ void narrow_values(const Crossing& c) {
    wanted -= c.before;
    int q = c.bin < 2048 ? 2047 - (int)c.bin : (int)c.bin - 2048;
    u32 least = q == 0 ? 0 : (u32)(q + kLeast) << 17;
    u32 most = q == 2047 ? kInfinity : ((u32)(q + 1 + kLeast) << 17) - 1;
    low = c.bin < 2048 ? least | 0x80000000u : most ^ 0x7fffffffu;
    high = c.bin < 2048 ? most | 0x80000000u : least ^ 0x7fffffffu;
  }
  // The least entry of the range.
  __device__ __forceinline__ u64 least() const { return composite(low, low == high ? last : 0x7fffffff); }
};

// Every value, in a row of `length` columns.
__device__ __forceinline__ Range whole(int length, u32 wanted) { return {0, kAll, 0, length - 1, wanted}; }

__device__ __forceinline__ float4 load_columns(const Params& p, const float* row, int column, int end) {
  const float nothing = __int_as_float(0xff800000);
  float4 x = {nothing, nothing, nothing, nothing};
  if (p.flags & kAligned) {
    if (column < end) x = load_aligned(row + column);
    return x;
  }
  if (column < end) x.x = row[column];
  if (column + 1 < end) x.y = row[column + 1];
  if (column + 2 < end) x.z = row[column + 2];
  if (column + 3 < end) x.w = row[column + 3];
  return x;
}

__device__ __forceinline__ float part(const float4& x, int j) { return j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w; }

// The bin that holds the wanted-th of those counted, by all threads. Bins are zero afterwards, but of a cluster, whose
// blocks are `blocks`: there a barrier has to come before they are.
__device__ __forceinline__ Crossing find(Shared& s, u32 wanted, int blocks) {
  uint4* bins = (uint4*)s.bins + threadIdx.x * (kOwnBins / 4);
  u32 own[kOwnBins];
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < kOwnBins / 4; ++i) {
    uint4 four = bins[i];
    own[4 * i] = four.x;
    own[4 * i + 1] = four.y;
    own[4 * i + 2] = four.z;
    own[4 * i + 3] = four.w;
    if (blocks == 1) bins[i] = make_uint4(0, 0, 0, 0);
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
  if (before < wanted && before + sum >= wanted) {
    Crossing c = {0, 0, 0};
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) {
      if (before < wanted && before + own[i] >= wanted) c = {kOwnBins * threadIdx.x + i, before, own[i]};
      before += own[i];
    }
    s.crossing = c;
  }
  __syncthreads();
  return s.crossing;
}

// The least selected entry. `c` is what was found of the range `r`, narrowed since; `each(f)` calls f(key, column) for
// this thread's entries.
template <class Each>
__device__ __forceinline__ u64 choose(Shared& s, Range r, u32 count, const Each& each) {
#pragma unroll 1
  while (count != r.wanted && count > kRanked) {
    int shift = r.shift();
    each([&](u32 key, int column) {
      if (r.holds(key, column)) atomicAdd(&s.bins[r.bin(key, column, shift)], 1u);
    });
    __syncthreads();
    Crossing c = find(s, r.wanted, 1);
    r.narrow(c, shift);
    count = c.count;
  }
  if (count == r.wanted) return r.least();
  each([&](u32 key, int column) {
    if (r.holds(key, column)) s.staged[atomicAdd(&s.stage_size, 1u)] = composite(key, column);
  });
  __syncthreads();
  int lane = lane_id();
#pragma unroll 1
  for (u32 i = warp_id(); i < count; i += kWarps) {
    u64 entry = s.staged[i];
    u32 above = 0;
#pragma unroll 1
    for (u32 at = 0; at < count; at += 32)
      above += __popc(__ballot_sync(kAll, at + lane < count && s.staged[min(at + lane, count - 1)] > entry));
    if (above == r.wanted - 1 && lane == 0) s.least = entry;
  }
  __syncthreads();
  return s.least;
}

__device__ __forceinline__ int page_number(const Params& p, int column) {
  return p.page_shift >= 0 ? column >> p.page_shift : (int)((u32)column / (u32)p.page_size);
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
    int at = p.page_shift >= 0 ? column & (p.page_size - 1) : column - page_number(p, column) * p.page_size;
    return page < 0 || page >= p.pages ? -1 : page * p.page_size + at;
  }
  return column;
}

__device__ __forceinline__ void write(const Params& p, const Row& row, int number, u32 place, int column, int page) {
  p.out[number * p.out_stride + place] = in_space(p, row, column, page);
  if (p.local) p.local[number * p.local_stride + place] = column;
}

__device__ __forceinline__ Row make_row(const Params& p, int number, int first) {
  Row row;
  row.logits = p.logits + number * p.logits_stride + first;
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

// A row whose logits registers hold: a thread has four columns of each THREADS * 4.
struct Held {
  float4 logits[HELD];
  int pages[HELD];  // of the first of four columns
};

__device__ __forceinline__ bool whole_pages(const Params& p) { return p.method == 2 && p.page_shift >= 2; }

__device__ __forceinline__ Held load_held(const Params& p, const Row& row, int length) {
  Held held;
#pragma unroll
  for (int i = 0; i < HELD; ++i) held.logits[i] = load_columns(p, row.logits, 4 * (i * THREADS + threadIdx.x), length);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    int column = 4 * (i * THREADS + threadIdx.x);
    held.pages[i] = column < length && whole_pages(p) ? load_page(p, row, column) : -1;
  }
  return held;
}

struct HeldKeys {
  u32 held[4 * HELD];

  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
#pragma unroll
    for (int i = 0; i < 4 * HELD; ++i) f(held[i], 4 * (i / 4 * THREADS + (int)threadIdx.x) + i % 4);
  }
};

__device__ __forceinline__ void select_held(
    const Params& p, Shared& s, const Row& row, int number, int length, const Held& held) {
  HeldKeys keys;
  int lane = lane_id(), warp = warp_id();
#pragma unroll
  for (int i = 0; i < 4 * HELD; ++i) {
    int column = 4 * (i / 4 * THREADS + threadIdx.x) + i % 4;
    keys.held[i] = column < length ? key_of(part(held.logits[i / 4], i % 4)) : 0;
    if (column < length) atomicAdd(&s.bins[bin_of(keys.held[i])], 1u);
  }
  __syncthreads();
  Range r = whole(length, p.k);
  Crossing c = find(s, r.wanted, 1);
  r.narrow_values(c);
  u64 least = choose(s, r, c.count, keys);

  u32 selected = 0, below[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    u32 all = 0;
    below[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bool mine = composite(keys.held[4 * i + j], 4 * (i * THREADS + (int)threadIdx.x) + j) >= least;
      u32 votes = __ballot_sync(kAll, mine);
      selected |= (u32)mine << (4 * i + j);
      below[i] += __popc(votes & ((1u << lane) - 1));
      all += __popc(votes);
    }
    if (lane == 0) s.counts[i * kWarps + warp] = all;
  }
  __syncthreads();
  u32 before = 0;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    if (4 * i * THREADS >= length) break;
    u32 count = lane < kWarps ? s.counts[i * kWarps + lane] : 0;
    u32 place = before + warp_sum(lane < warp ? count : 0) + below[i];
    before += warp_sum(count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!(selected >> (4 * i + j) & 1)) continue;
      int column = 4 * (i * THREADS + (int)threadIdx.x) + j;
      int page = whole_pages(p) ? held.pages[i] : load_page(p, row, column);
      write(p, row, number, place, column, page);
      ++place;
    }
  }
}

#if LONG

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

__device__ __forceinline__ Sample load_sample(const Params& p, const Row& row, int length) {
  Sample sample;
  u32 vectors = (u32)length / 4;
#pragma unroll
  for (int i = 0; i < kSampled; ++i) {
    u32 at = (u32)((u64)(i * THREADS + threadIdx.x) * vectors / (SAMPLES / 4));
    sample.logits[i] = load_columns(p, row.logits, (int)(4 * at), length);
  }
  return sample;
}

// A key that between k and ROOM of the row's are not below, most likely: a bin's least.
__device__ __forceinline__ u32 sampled_bound(const Params& p, Shared& s, int length, const Sample& sample) {
#pragma unroll
  for (int i = 0; i < 4 * kSampled; ++i) atomicAdd(&s.bins[bin_of(key_of(part(sample.logits[i / 4], i % 4)))], 1u);
  __syncthreads();
  // 4.3 standard deviations more than the k-th of the row has before it in the sample.
  float expected = (float)p.k * (float)SAMPLES / (float)length;
  int wanted = (int)(expected + 10.25f + 4.3f * sqrtf(expected + 4.63f));
  Range r = whole(length, 0);
  r.narrow_values(find(s, (u32)min(wanted, SAMPLES), 1));
  return r.low;
}

// Calls f(columns, column, end) for this thread's columns of the slice, four at a time.
template <class F>
__device__ __forceinline__ void stream(const Params& p, const Row& row, int begin, int end, F f) {
#pragma unroll 1
  for (int at = begin + 4 * (int)threadIdx.x; at < end; at += 4 * THREADS * STREAMED) {
    float4 some[STREAMED];
#pragma unroll
    for (int i = 0; i < STREAMED; ++i) some[i] = load_columns(p, row.logits, at + 4 * i * THREADS, end);
#pragma unroll
    for (int i = 0; i < STREAMED; ++i) f(some[i], at + 4 * i * THREADS);
  }
}

// Lists the slice's entries from `least` on, in any order, as far as there is room; s.list_size counts all.
__device__ __forceinline__ void keep(const Params& p, Shared& s, const Row& row, int begin, int end, u64 least) {
  float bound = value_of((u32)(least >> 32));
  stream(p, row, begin, end, [&](const float4& x, int column) {
    // Of NaN, neither is true.
    if (x.x < bound && x.y < bound && x.z < bound && x.w < bound) return;
    u64 entries[4];
    u32 found = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      entries[j] = composite(key_of(part(x, j)), column + j);
      if (column + j >= end || entries[j] < least) entries[j] = 0;
      found += entries[j] != 0;
    }
    if (found == 0) return;
    u32 at = atomicAdd(&s.list_size, found);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (entries[j] == 0) continue;
      if (at < ROOM) s.list[at] = entries[j];
      ++at;
    }
  });
}

// The number of entries that the row's blocks listed, and those of the blocks up to this lane's.
__device__ __forceinline__ u32 listed(Shared& s, int blocks, u32& end) {
  if (blocks == 1) {
    end = s.list_size;
    return end;
  }
  end = warp_scan(lane_id() < blocks ? load_remote(remote(&s.list_size, lane_id())) : 0);
  return __shfl_sync(kAll, end, 31);
}

// An entry from which on there are between k and ROOM, by all of the row's blocks.
__device__ __forceinline__ u64 counted_bound(
    const Params& p, Shared& s, const Row& row, int length, int begin, int end, int blocks) {
  Range r = whole(length, p.k);
  for (bool values = true;; values = false) {
    int shift = r.shift();
    stream(p, row, begin, end, [&](const float4& x, int column) {
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        u32 key = key_of(part(x, j));
        if (column + j < end && r.holds(key, column + j))
          atomicAdd(&s.bins[values ? bin_of(key) : r.bin(key, column + j, shift)], 1u);
      }
    });
    barrier_of(blocks);
    Crossing c = find(s, r.wanted, blocks);
    if (blocks > 1) {
      barrier_of(blocks);
      for (int i = threadIdx.x; i < kBins; i += THREADS) s.bins[i] = 0;
    }
    __syncthreads();
    if (values) r.narrow_values(c); else r.narrow(c, shift);
    if (p.k - r.wanted + c.count <= ROOM) return r.least();
  }
}

// Appends the other blocks' lists to this one's.
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
    if (at < size) s.list[at] = load_remote_u64(remote(&s.list[at - start], block));
  }
}

struct ListedKeys {
  const u64* list;
  u32 size;

  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
#pragma unroll 2
    for (u32 at = threadIdx.x; at < size; at += THREADS) f((u32)(list[at] >> 32), column_of(list[at]));
  }
};

// Selects from the list, which holds all entries that can be.
__device__ __forceinline__ void select_listed(
    const Params& p, Shared& s, const Row& row, int number, int length, u32 size, u32 low) {
  int pages[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    u32 at = i * THREADS + threadIdx.x;
    pages[i] = at < size ? load_page(p, row, column_of(s.list[at])) : -1;
  }
  ListedKeys each = {s.list, size};
  each([&](u32 key, int) { atomicAdd(&s.bins[kBins - 1 - min((key - low) >> kFine, (u32)kBins - 1)], 1u); });
  __syncthreads();
  Range r = whole(length, p.k);
  Crossing c = find(s, r.wanted, 1);
  r.wanted -= c.before;
  r.low = low + ((kBins - 1 - c.bin) << kFine);
  r.high = c.bin == 0 ? kLargest : min(r.low + ((1u << kFine) - 1), kLargest);
  u64 least = choose(s, r, c.count, each);

  // The order of columns is that of their bits.
  u32 base = 0;
#pragma unroll 1
  for (int from = 0; from < length; from += 32 * kBins) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      u32 at = i * THREADS + threadIdx.x;
      if (at >= size) break;
      u32 column = (u32)(column_of(s.list[at]) - from);
      if (s.list[at] >= least && column < 32 * kBins) atomicOr(&s.bins[column >> 5], 1u << (column & 31));
    }
    __syncthreads();
    const uint4* words = (const uint4*)s.bins + threadIdx.x * (kOwnBins / 4);
    u32 own = 0;
#pragma unroll
    for (int i = 0; i < kOwnBins / 4; ++i)
      own += __popc(words[i].x) + __popc(words[i].y) + __popc(words[i].z) + __popc(words[i].w);
    u32 end = warp_scan(own);
    if (lane_id() == 31) s.sums[warp_id()] = end;
    __syncthreads();
    u32 sum = lane_id() < kWarps ? s.sums[lane_id()] : 0;
    s.prefix[threadIdx.x] = base + warp_sum(lane_id() < warp_id() ? sum : 0) + end - own;
    base += warp_sum(sum);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      u32 at = i * THREADS + threadIdx.x;
      if (at >= size) break;
      u64 entry = s.list[at];
      u32 column = (u32)(column_of(entry) - from);
      if (entry < least || column >= 32 * kBins) continue;
      u32 word = column >> 5, group = word / kOwnBins;
      u32 place = s.prefix[group] + __popc(s.bins[word] & ((1u << (column & 31)) - 1));
#pragma unroll
      for (int w = 0; w < kOwnBins - 1; ++w)
        if (group * kOwnBins + w < word) place += __popc(s.bins[group * kOwnBins + w]);
      write(p, row, number, place, column_of(entry), pages[i]);
    }
    if (from + 32 * kBins >= length) break;
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += THREADS) s.bins[i] = 0;
    __syncthreads();
  }
}

__device__ __forceinline__ void select_long(
    const Params& p, Shared& s, const Row& row, int number, int length, const Sample& sample, int rank, int blocks) {
  int share = share_of(length, blocks);
  int begin = min(rank * share, length), end = min(begin + share, length);
  u32 low = sampled_bound(p, s, length, sample), ends;
  keep(p, s, row, begin, end, (u64)low << 32);
  barrier_of(blocks);
  u32 size = listed(s, blocks, ends);
  if (size < (u32)p.k || size > ROOM) {
    barrier_of(blocks);
    if (threadIdx.x == 0) s.list_size = 0;
    __syncthreads();
    u64 least = counted_bound(p, s, row, length, begin, end, blocks);
    low = (u32)(least >> 32);
    keep(p, s, row, begin, end, least);
    barrier_of(blocks);
    size = listed(s, blocks, ends);
  }
  // No block ends while another reads its memory.
  if (blocks > 1) {
    if (rank == 0) gather(s, blocks, ends, size);
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    if (rank != 0) return;
  }
  select_listed(p, s, row, number, length, size, low);
}

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) topk(const __grid_constant__ Params p) {
  Shared& s = *(Shared*)block_memory();
  int blocks = (int)cluster_size(), rank = (int)cluster_rank();
  int number = (int)(blockIdx.x >> (__ffs(blocks) - 1));

  // A kernel in front may still write the length: what is read before the wait is a guess.
  int most = p.width;
  int guess = p.lengths && !p.starts ? clamped(load_integer(p.lengths, number, p.flags & kLengths64), most) : most;
#pragma unroll
  for (int i = 0; i < kOwnBins / 4; ++i)
    ((uint4*)s.bins)[threadIdx.x * (kOwnBins / 4) + i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) s.stage_size = s.list_size = 0;
  __syncthreads();
  wait_for_kernels_in_front();

  int first = p.starts ? clamped(load_integer(p.starts, number, p.flags & kStarts64), p.width) : 0;
  most -= first;
  int length = p.lengths ? clamped(load_integer(p.lengths, number, p.flags & kLengths64), most) : most;
  if (p.starts) guess = length;
  Row row = make_row(p, number, first);
  for (;; guess = length) {
    // What is loaded for the guess is on its way together with the length.
    if (guess <= p.k) {
      if (rank != 0 && guess == length) return;
      Pages pages = load_pages(p, row, guess);
      if (guess != length) continue;
      return select_all(p, row, number, length, pages);
    }
    if (!LONG || guess <= kHeldColumns) {
      if (rank != 0 && guess == length) return;
      Held held = load_held(p, row, guess);
      if (guess != length) continue;
      return select_held(p, s, row, number, length, held);
    }
#if LONG
    Sample sample = load_sample(p, row, guess);
    if (p.flags & kAligned && threadIdx.x == 0) {
      int share = share_of(guess, blocks), begin = min(rank * share, guess);
      int ahead = min(4 * (min(begin + share, guess) - begin) & ~15, kAhead);
      if (ahead > 0) fetch_ahead(row.logits + begin, ahead);
    }
    if (guess != length) continue;
    return select_long(p, s, row, number, length, sample, rank, blocks);
#endif
  }
}
