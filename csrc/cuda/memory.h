// Numbers of a type that is known at run time alone, moved between the card's
// memory and registers.
#pragma once

#include <cuda_runtime.h>

#include "cuda/table.h"

namespace wdops::cuda {

template <class S>
struct alignas(16) Vector {
  S of[kWidth<S>];
};

// As they are in memory: what waits for a load is its conversion, which comes
// when all loads are under way.
template <class S>
struct Raw {
  uint32_t word[4];
};

template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t of[kBytes / 4];
};

template <class T, class S>
inline constexpr bool kIsComputedIn = std::is_same_v<Compute<T>, S>;

// What a vector is read from or written to: `count` of its numbers, and if
// `whole` all of them, by one instruction.
struct Place {
  int64_t at;
  int count;
  bool whole;
};

template <class S>
__device__ Raw<S> LoadRaw(int dtype, const void* from, const Place& place) {
  Raw<S> raw = {};
  switch (dtype) {
#define DTYPE(name, Type)                                                  \
  case k_##name:                                                           \
    if constexpr (kIsComputedIn<Type, S>) {                                \
      constexpr int kBytes = kWidth<S> * sizeof(Type);                     \
      const Type* first = static_cast<const Type*>(from) + place.at;       \
      if (place.whole) {                                                   \
        const auto words = *reinterpret_cast<const Words<kBytes>*>(first); \
        for (int w = 0; w < kBytes / 4; ++w) raw.word[w] = words.of[w];    \
      } else {                                                             \
        Type numbers[kWidth<S>] = {};                                      \
        for (int w = 0; w < kWidth<S>; ++w) {                              \
          if (w < place.count) numbers[w] = first[w];                      \
        }                                                                  \
        memcpy(raw.word, numbers, sizeof numbers);                         \
      }                                                                    \
    }                                                                      \
    break;
#include "rules/dtypes.inc"
  }
  return raw;
}

template <class S>
__device__ Vector<S> Convert(int dtype, const Raw<S>& raw) {
  Vector<S> vector = {};
  switch (dtype) {
#define DTYPE(name, Type)                        \
  case k_##name:                                 \
    if constexpr (kIsComputedIn<Type, S>) {      \
      Type numbers[kWidth<S>];                   \
      memcpy(numbers, raw.word, sizeof numbers); \
      for (int w = 0; w < kWidth<S>; ++w) {      \
        vector.of[w] = Load(numbers[w]);         \
      }                                          \
    }                                            \
    break;
#include "rules/dtypes.inc"
  }
  return vector;
}

// Stores number `w` of a vector that is tensor k of a step.
struct Nearest {
  template <class S, class T>
  __device__ void Round(S value, T* to, int, int) const {
    Store(value, to);
  }
};

template <class S>
struct Rounding {
  bool stochastic;
  uint32_t bits[kWidth<S>];

  template <class T>
  __device__ void Round(S value, T* to, int w, int k) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      const uint32_t nearest = ToNearest(BitCast<uint32_t>(value));
      Store(value, to, stochastic ? Addend(bits[w], k) : nearest);
    } else {
      Store(value, to);
    }
  }
};

template <class S, class Rounding>
__device__ void StoreVector(int dtype, const Vector<S>& vector, void* to,
                            const Place& place, const Rounding& rounding,
                            int k) {
  switch (dtype) {
#define DTYPE(name, Type)                                 \
  case k_##name:                                          \
    if constexpr (kIsComputedIn<Type, S>) {               \
      constexpr int kBytes = kWidth<S> * sizeof(Type);    \
      Type numbers[kWidth<S>];                            \
      for (int w = 0; w < kWidth<S>; ++w) {               \
        rounding.Round(vector.of[w], &numbers[w], w, k);  \
      }                                                   \
      Type* first = static_cast<Type*>(to) + place.at;    \
      if (place.whole) {                                  \
        Words<kBytes> words;                              \
        memcpy(&words, numbers, sizeof words);            \
        *reinterpret_cast<Words<kBytes>*>(first) = words; \
      } else {                                            \
        for (int w = 0; w < kWidth<S>; ++w) {             \
          if (w < place.count) first[w] = numbers[w];     \
        }                                                 \
      }                                                   \
    }                                                     \
    break;
#include "rules/dtypes.inc"
  }
}

}  // namespace wdops::cuda
