// The products of factored gradients: each element is a sum over the batch in
// its order, and every product is added to it with one rounding, so that tiles,
// threads and instruction sets give the same bits.
#include "cpu/factored.h"

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "cpu/add_up.h"
#include "cpu/ahead.h"
#include "cpu/float_mode.h"

namespace wdops::cpu {
namespace {

// The accumulators of a register tile, kHeight rows of kWidth vectors, are
// three quarters of the vector registers: half of them wait for each other on a
// Xeon, which took 5 to 8 % longer. GCC keeps them there if they are vectors of
// its own.
constexpr int kHeight = 6;
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kWidth = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kWidth = 2;
#else
constexpr int kVectorBytes = 16, kWidth = 2;
#endif

template <class S>
struct Register {
  static constexpr int kLength = kVectorBytes / sizeof(S);
  static constexpr int kColumns = kWidth * kLength;
  typedef S Vector
      __attribute__((vector_size(kVectorBytes), aligned(sizeof(S)), may_alias));
};

// a * b + c, rounded once. Nothing else in this library is so but where both
// ways give the same bits (cpu/add_up.h): only a product is limited by
// arithmetic and not by memory, and where a processor adds in the
// units in which it multiplies, two instructions take it twice as long. By
// intrinsics, because GCC makes no such instruction of a vector otherwise, but
// with -ffp-contract, which would reach all that is compiled here.
#if defined(__AVX512F__)
inline __m512 Fma(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline __m512d Fma(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
inline __m256 Fma(__m256 a, __m256 b, __m256 c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline __m256d Fma(__m256d a, __m256d b, __m256d c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <class V>
inline V Fma(V a, V b, V c) {
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) {
    c[i] = wdops::Fma(a[i], b[i], c[i]);
  }
  return c;
}
#endif

// Keeps a vector where it is until here: GCC puts the last sums in place of
// what they are the last to read, and moves them back in every turn of the
// loop.
template <class V>
inline void KeepInRegister(const V& vector) {
#if defined(__AVX__)
  asm("" ::"v"(vector));
#endif
}

// Starts to load a line into L2: L1 is full of what the product reads.
WDOPS_FN void FetchLine(const char* line) { __builtin_prefetch(line, 0, 2); }

// x [batch, kHeight] and dz [batch, kColumns]: x^T dz goes to `to`, whose rows
// are `stride` elements apart, or is added to it. Meanwhile it starts to load
// the first `lines` lines of `next`, `batch` at most.
template <class S>
void RegisterTile(const S* x, const S* dz, int64_t batch, bool add, S* to,
                  int64_t stride, const char* next = nullptr,
                  int64_t lines = 0) {
  using V = typename Register<S>::Vector;
  constexpr int kLength = Register<S>::kLength;
  V sums[kHeight][kWidth] = {};
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) {
        sums[r][v] = *reinterpret_cast<const V*>(to + r * stride + v * kLength);
      }
    }
  }
  // Every instruction of this loop counts where two threads share a core, as in
  // most virtual machines: 23 of them for 12 products, where there were 28,
  // took 7 to 30 % less time beside a busy neighbour, and 0 to 3 % beside none.
  const auto add_row = [&]() __attribute__((always_inline)) {
    V row[kWidth];
    for (int v = 0; v < kWidth; ++v) {
      row[v] = *reinterpret_cast<const V*>(dz + v * kLength);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) {
        // Less 0, a number is the same in every lane.
        sums[r][v] = Fma(x[r] - V{}, row[v], sums[r][v]);
      }
    }
    for (const V& vector : row) KeepInRegister(vector);
    x += kHeight;
    dz += Register<S>::kColumns;
  };
  const S* const end = dz + batch * Register<S>::kColumns;
  const S* const asked = dz + std::min(batch, lines) * Register<S>::kColumns;
  for (; dz != asked; next += kLine) {
    FetchLine(next);
    add_row();
  }
#pragma GCC unroll 2
  while (dz != end) add_row();
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      *reinterpret_cast<V*>(to + r * stride + v * kLength) = sums[r][v];
    }
  }
}

template <class T, int kPanel>
void Pack(const void* from, int64_t batch, int64_t n, int64_t begin,
          int64_t end, void* to) {
  // Panel by panel, one of 6 columns reads parts of lines, and rows at a
  // distance of a power of two are in each other's way: twice as long.
  constexpr int64_t kTogether = 8;
  using S = Compute<T>;
  const FloatMode mode;
  for (; begin < end; begin += kTogether) {
    const int64_t stop = std::min(begin + kTogether, end);
    for (int64_t k = 0; k < batch; ++k) {
      for (int64_t panel = begin; panel < stop; ++panel) {
        const int64_t column = panel * kPanel;
        const T* row = static_cast<const T*>(from) + k * n + column;
        S* packed = static_cast<S*>(to) + column * batch + k * kPanel;
        if (column + kPanel <= n) {
          for (int i = 0; i < kPanel; ++i) packed[i] = Load(row[i]);
        } else {
          for (int i = 0; i < kPanel; ++i) {
            packed[i] = column + i < n ? Load(row[i]) : S(0);
          }
        }
      }
    }
  }
}

// Starts to load what is swept behind a product, part by part while it is made:
// some lines of each KiB, behind which the processor goes on by itself. On a
// Xeon it takes two to set it going, and a step from factors of 8 to 32 rows is
// 8 % shorter for them. On an EPYC (Zen 3) two cost as much as they gain, and
// one makes a step of 8 to 128 rows 4 to 9 % shorter, if one span is asked for
// behind the other: of a line of each in turn nothing was left. On one of Zen 4
// two of each in turn made a step up to 8 % longer; one was not tried there.
// All lines would hold up the product for longer.
class Asks {
 public:
  // In `parts` parts.
  Asks(const Span* spans, int count, int64_t parts)
      : next_(spans), end_(spans + count), parts_(parts) {
    for (const Span* span = next_; span != end_; ++span) {
      steps_ += Ceil(span->bytes, kStep);
    }
  }

  WDOPS_FN void AskForPart() {
    for (due_ += steps_; due_ >= parts_; due_ -= parts_) {
      while (left_ <= 0) {
        if (next_ == end_) return;
        at_ = next_->begin;
        left_ = next_->bytes;
        ++next_;
      }
      FetchLine(at_);
      if (kAsksAhead) FetchLine(at_ + kLine);
      at_ += kStep;
      left_ -= kStep;
    }
  }

 private:
  static constexpr int64_t kStep = 1024;  // bytes
  const Span* next_;
  const Span* const end_;
  const int64_t parts_;
  int64_t steps_ = 0;  // in all
  int64_t due_ = 0;    // steps, in parts_ths of one
  const char* at_ = nullptr;
  int64_t left_ = 0;  // bytes of the span, at and behind `at_`
};

template <class T>
void Product(const void* x, const void* dz, int64_t batch, int64_t rows,
             int64_t columns, void* tile, const Span* beside, int count) {
  using S = Compute<T>;
  constexpr int kColumns = Register<S>::kColumns;
  // So much of a panel of dz stays in L1 while all rows pass it, and meanwhile
  // as much of what comes next is asked for: a Xeon waited for its L3 in a long
  // batch's product for up to a fifth of it, an EPYC (Zen 3) for a tenth, if
  // a panel was longer.
  constexpr int64_t kDepth = 128;
  const bool asks = kAsksAhead || batch > kDepth;
  const FloatMode mode;
  T* to = static_cast<T*>(tile);
  const int64_t down = rows / kHeight;
  Asks beside_it(beside, count, down * (columns / kColumns));
  for (int64_t c = 0; c < columns; c += kColumns) {
    const S* dz_panel = static_cast<const S*>(dz) + c * batch;
    const bool wide = std::is_same_v<S, T> && c + kColumns <= columns;
    const int64_t whole_rows = wide ? down * kHeight : 0;
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t k = 0; k == 0 || k < batch; k += kDepth) {
        const int64_t depth = std::min(kDepth, batch - k);
        const int64_t bytes = depth * kColumns * int64_t{sizeof(S)};
        const int64_t lines = asks && down > 0 ? Ceil(bytes, down * kLine) : 0;
        const S* block = dz_panel + k * kColumns;
        const char* next =
            reinterpret_cast<const char*>(block + depth * kColumns);
        for (int64_t r = 0; r < whole_rows; r += kHeight) {
          if (k == 0) beside_it.AskForPart();
          RegisterTile(static_cast<const S*>(x) + r * batch + k * kHeight,
                       block, depth, k > 0, to + r * columns + c, columns, next,
                       lines);
          next += lines * kLine;
        }
      }
    }
    for (int64_t r = whole_rows; r < rows; r += kHeight) {
      S part[kHeight * kColumns];
      RegisterTile(static_cast<const S*>(x) + r * batch, dz_panel, batch, false,
                   part, kColumns);
      const int64_t height = std::min<int64_t>(kHeight, rows - r);
      const int64_t width = std::min<int64_t>(kColumns, columns - c);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          Store(part[i * kColumns + j], &to[(r + i) * columns + c + j]);
        }
      }
    }
  }
}

template <class T>
double Dot(const T* a, const T* b, int64_t n) {
  return AddUp(n,
               [&](int64_t i) {
                 const double x = Load(a[i]), y = Load(b[i]);
                 return std::array{x * y};
               })
      .a;
}

// |a|^2, or NaN where it is lost because squares of doubles underflow.
template <class T>
double SquaredNorm(const T* a, int64_t n) {
  const double square = Dot(a, a, n);
  if constexpr (std::is_same_v<T, double>) {
    const auto is_set = [](double x) { return x != 0; };
    if (square < 0x1p-960 && std::any_of(a, a + n, is_set)) return NAN;
  }
  return square;
}

template <class T>
Sums Gram(const void* x_data, const void* dz_data, const Factored& shape,
          int64_t k) {
  const FloatMode mode;
  const T* x = static_cast<const T*>(x_data);
  const T* dz = static_cast<const T*>(dz_data);
  const T* x_k = x + k * shape.rows;
  const T* dz_k = dz + k * shape.columns;
  const double x_square = SquaredNorm(x_k, shape.rows);
  const double dz_square = SquaredNorm(dz_k, shape.columns);
  Sums sums = {x_square * dz_square,
               std::sqrt(x_square) * std::sqrt(dz_square)};
  for (int64_t l = 0; l < k; ++l) {
    sums.a += 2 * Dot(x_k, x + l * shape.rows, shape.rows) *
              Dot(dz_k, dz + l * shape.columns, shape.columns);
  }
  return sums;
}

}  // namespace

const std::array<FactoredKernels, kDTypeCount> kFactoredKernels = {{
#define DTYPE(name, Type)                            \
  {{kHeight, &Pack<Type, kHeight>},                  \
   {Register<Compute<Type>>::kColumns,               \
    &Pack<Type, Register<Compute<Type>>::kColumns>}, \
   &Product<Type>,                                   \
   &Gram<Type>},
#include "rules/dtypes.inc"
}};

}  // namespace wdops::cpu
