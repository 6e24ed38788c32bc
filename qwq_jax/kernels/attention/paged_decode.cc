// Attention of one query a row over a paged float32 cache, for CPUs: what `native.py` compiles and calls.
//
// XLA has no product that reads pages where they lie: it copies them first, and multiplies few rows on one core. Here
// each core streams pages through its cache once: scores, a running maximum and sum (arXiv 1805.02867), and values.
// A row's sums depend on nothing but the row: neither on the rows beside it nor on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Vectors as wide as a register, since compilers keep wider ones in memory, and as many as there are registers for: sums
// of kQueries x kVectors, and what is added to them.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kQueries = 4;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector4 __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

// Finite, as in reference.py: a row without a token gives 0 and no NaN.
constexpr float kMasked = -1e30f;
// Tokens of a row that are one unit of work; longer rows are shared out, and joined at the end.
constexpr int64_t kUnitTokens = 512;

struct Sizes {
  int64_t rows, heads, group, width, pages, page, table_width;
  float scale;
};

struct Arrays {
  const float* q;         // [rows, heads * group, width]
  const float* pool;      // [heads, pages, 2, page, width], keys at 0 and values at 1
  const int32_t* table;   // [rows, table_width]
  const int32_t* length;  // [rows]
  float* out;             // [rows, heads * group, width]
  float* lse;             // [rows, heads * group]
};

// Tokens [first, last) of a row that one thread computes for one head, and where its sums go.
struct Unit {
  int64_t row, head, first, last;
};

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

// The low and the high half of a vector, added.
template <typename Whole, typename Half>
inline Half fold(const Whole& x) {
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  return halves[0] + halves[1];
}

inline float sum(Vector x) {
  Vector4 four;
  if constexpr (kLanes == 16) {
    four = fold<Vector8, Vector4>(fold<Vector, Vector8>(x));
  } else if constexpr (kLanes == 8) {
    four = fold<Vector, Vector4>(x);
  } else {
    std::memcpy(&four, &x, sizeof four);
  }
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// exp(x) of x <= 0 within 2 units in the last place: 2^n times a polynomial of what is left (Cephes, expf).
inline Vector exponential(Vector x) {
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it leaves an integer in the last bits
  const Integers in_range = ~(x <= -87.0f);  // what is not a number stays so
  const Vector n = (x * 1.44269504f + kRound) - kRound;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  const Vector y = p * scale;
  Integers bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits &= in_range;
  Vector result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Scores [G, stride] of `tokens` keys [tokens, width] with G queries [G, width].
template <int G>
void score(const float* q, const float* keys, int64_t tokens, int64_t width, float scale, float* scores,
           int64_t stride) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t s = 0; s < tokens; ++s) {
    const float* key = keys + s * width;
    Vector sums[G] = {};
    for (int64_t h = 0; h < whole; h += kLanes) {
      const Vector k = load(key + h);
      for (int g = 0; g < G; ++g) sums[g] += k * load(q + g * width + h);
    }
    for (int g = 0; g < G; ++g) {
      float total = sum(sums[g]);
      for (int64_t h = whole; h < width; ++h) total += key[h] * q[g * width + h];
      scores[g * stride + s] = total * scale;
    }
  }
}

// out [G, width] += weights [G, stride] x values [tokens, width], V vectors of each from `h` on.
template <int G, int V>
void add_values(const float* weights, int64_t stride, const float* values, int64_t tokens, int64_t width, int64_t h,
                float* out) {
  Vector sums[G][V];
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) sums[g][v] = load(out + g * width + h + v * kLanes);
  for (int64_t s = 0; s < tokens; ++s) {
    const float* value = values + s * width + h;
    for (int v = 0; v < V; ++v) {
      const Vector x = load(value + v * kLanes);
      for (int g = 0; g < G; ++g) sums[g][v] += x * weights[g * stride + s];
    }
  }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) store(out + g * width + h + v * kLanes, sums[g][v]);
}

template <int G>
void add_all_values(const float* weights, int64_t stride, const float* values, int64_t tokens, int64_t width,
                    float* out) {
  int64_t h = 0;
  for (; h + kVectors * kLanes <= width; h += kVectors * kLanes)
    add_values<G, kVectors>(weights, stride, values, tokens, width, h, out);
  for (; h + kLanes <= width; h += kLanes) add_values<G, 1>(weights, stride, values, tokens, width, h, out);
  for (; h < width; ++h)
    for (int g = 0; g < G; ++g)
      for (int64_t s = 0; s < tokens; ++s) out[g * width + h] += weights[g * stride + s] * values[s * width + h];
}

// One unit for G queries: the softmax's maximum [G], its sum [G], and the values' weighted sum [G, width], which begin as
// of no token: kMasked and zeros.
template <int G>
void attend(const Sizes& sizes, const Arrays& arrays, const Unit& unit, const float* q, float* scores, float* top,
            float* total, float* out) {
  const int64_t stride = (sizes.page + kLanes - 1) / kLanes * kLanes, size = sizes.page * sizes.width;
  for (int64_t begin = unit.first; begin < unit.last; begin += sizes.page) {
    const int64_t tokens = std::min(sizes.page, unit.last - begin);
    const int64_t named = arrays.table[unit.row * sizes.table_width + begin / sizes.page];
    const int64_t page = std::clamp<int64_t>(named, 0, sizes.pages - 1);
    const float* keys = arrays.pool + (unit.head * sizes.pages + page) * 2 * size;
    score<G>(q, keys, tokens, sizes.width, sizes.scale, scores, stride);
    for (int g = 0; g < G; ++g) {
      float* row = scores + g * stride;
      std::fill(row + tokens, row + stride, kMasked);
      const float highest = std::max(top[g], *std::max_element(row, row + tokens));
      Vector sums = {};
      for (int64_t s = 0; s < stride; s += kLanes) {
        const Vector weights = exponential(load(row + s) - highest);
        store(row + s, weights);
        sums += weights;
      }
      const float shrink = std::exp(top[g] - highest);
      total[g] = total[g] * shrink + sum(sums);
      for (int64_t h = 0; h < sizes.width; ++h) out[g * sizes.width + h] *= shrink;
      top[g] = highest;
    }
    add_all_values<G>(scores, stride, keys + size, tokens, sizes.width, out);
  }
}

// The work of one call, which outlives the call where a thread comes too late to find any.
struct Work {
  Sizes sizes;
  Arrays arrays;
  std::vector<Unit> units;
  std::vector<float> tops, totals, outs;  // [units, group], [units, group], [units, group, width]
  std::atomic<int64_t> next{0}, done{0};

  void run_unit(int64_t i, float* scores) {
    const Unit& unit = units[i];
    const int64_t group = sizes.group, width = sizes.width;
    for (int64_t g = 0; g < group; g += kQueries) {
      const float* q = arrays.q + ((unit.row * sizes.heads + unit.head) * group + g) * width;
      float *top = &tops[i * group + g], *total = &totals[i * group + g], *out = &outs[(i * group + g) * width];
      switch (std::min<int64_t>(kQueries, group - g)) {
        case 1: attend<1>(sizes, arrays, unit, q, scores, top, total, out); break;
        case 2: attend<2>(sizes, arrays, unit, q, scores, top, total, out); break;
        case 3: attend<3>(sizes, arrays, unit, q, scores, top, total, out); break;
        default: attend<kQueries>(sizes, arrays, unit, q, scores, top, total, out);
      }
    }
  }

  void run() {
    const int64_t count = units.size();
    std::vector<float> scores;
    for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) {
      scores.resize(kQueries * (sizes.page + kLanes));
      run_unit(i, scores.data());
    }
  }
};

// Joins the units [begin, end) of one row and head, into zeros.
void join(const Work& work, int64_t begin, int64_t end) {
  const Unit& unit = work.units[begin];
  const int64_t group = work.sizes.group, width = work.sizes.width;
  for (int64_t g = 0; g < group; ++g) {
    float highest = kMasked, total = 0.0f;
    for (int64_t i = begin; i < end; ++i) highest = std::max(highest, work.tops[i * group + g]);
    const int64_t at = (unit.row * work.sizes.heads + unit.head) * group + g;
    float* out = work.arrays.out + at * width;
    for (int64_t i = begin; i < end; ++i) {
      const float share = std::exp(work.tops[i * group + g] - highest);
      const float* part = &work.outs[(i * group + g) * width];
      total += share * work.totals[i * group + g];
      for (int64_t h = 0; h < width; ++h) out[h] += share * part[h];
    }
    for (int64_t h = 0; h < width; ++h) out[h] /= total;
    work.arrays.lse[at] = highest + std::log(total);
  }
}

// Names without a comma, which a macro would cut them at.
using Queries = ffi::Buffer<ffi::F32, 3>;
using Cache = ffi::Buffer<ffi::F32, 5>;
using Table = ffi::Buffer<ffi::S32, 2>;
using Lengths = ffi::Buffer<ffi::S32, 1>;
using LogSums = ffi::Buffer<ffi::F32, 2>;

ffi::Error paged_decode(ffi::ThreadPool pool, Queries q, Cache cache, Table table, Lengths length,
                        ffi::Result<Queries> out, ffi::Result<LogSums> lse, float scale) {
  const auto shape = cache.dimensions();
  const int64_t rows = q.dimensions()[0], queries = q.dimensions()[1], heads = shape[0];
  if (shape[2] != 2 || q.dimensions()[2] != shape[4] || queries % heads || table.dimensions()[0] != rows ||
      length.dimensions()[0] != rows)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "queries, cache, page table and lengths are not of one batch");
  auto work = std::make_shared<Work>();
  work->sizes = {rows, heads, queries / heads, shape[4], shape[1], shape[3], table.dimensions()[1], scale};
  work->arrays = {q.typed_data(),      cache.typed_data(), table.typed_data(),
                  length.typed_data(), out->typed_data(),  lse->typed_data()};
  std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  std::fill_n(lse->typed_data(), lse->element_count(), kMasked);

  // Whole pages, so that a unit begins where a page does.
  const int64_t step = std::max<int64_t>(1, kUnitTokens / shape[3]) * shape[3];
  const int64_t longest = work->sizes.table_width * shape[3];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t tokens = std::min<int64_t>(length.typed_data()[row], longest);
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t first = 0; first < tokens; first += step)
        work->units.push_back({row, head, first, std::min(first + step, tokens)});
  }
  const int64_t count = work->units.size();
  work->tops.resize(count * work->sizes.group, kMasked);
  work->totals.resize(count * work->sizes.group);
  work->outs.resize(count * work->sizes.group * work->sizes.width);

  const int64_t others = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < others; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  // What is not done now another thread is at: none that has not begun is waited for, so that no pool can be too busy.
  while (work->done.load(std::memory_order_acquire) < count) std::this_thread::yield();

  for (int64_t begin = 0, end; begin < count; begin = end) {
    const auto same = [&](int64_t i) {
      return work->units[i].row == work->units[begin].row && work->units[i].head == work->units[begin].head;
    };
    for (end = begin + 1; end < count && same(end);) ++end;
    join(*work, begin, end);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwq_jax_paged_decode, paged_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Queries>()
                                  .Arg<Cache>()
                                  .Arg<Table>()
                                  .Arg<Lengths>()
                                  .Ret<Queries>()
                                  .Ret<LogSums>()
                                  .Attr<float>("scale"));
