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

template <class Bits, class S>
__device__ void LoadBits(const void* from, const Place& place, Raw<S>* raw) {
  using All = Words<kWidth<S> * sizeof(Bits)>;
  const Bits* const first = static_cast<const Bits*>(from) + place.at;
  if (place.whole) {
    const All words = *reinterpret_cast<const All*>(first);
    memcpy(raw->word, &words, sizeof words);
  } else {
    Bits bits[kWidth<S>] = {};
    for (int w = 0; w < kWidth<S>; ++w) {
      if (w < place.count) bits[w] = first[w];
    }
    memcpy(raw->word, bits, sizeof bits);
  }
}

template <class Bits, class S>
__device__ void StoreBits(const Raw<S>& raw, void* to, const Place& place) {
  using All = Words<kWidth<S> * sizeof(Bits)>;
  Bits* const first = static_cast<Bits*>(to) + place.at;
  if (place.whole) {
    All words;
    memcpy(&words, raw.word, sizeof words);
    *reinterpret_cast<All*>(first) = words;
  } else {
    Bits bits[kWidth<S>];
    memcpy(bits, raw.word, sizeof bits);
    for (int w = 0; w < kWidth<S>; ++w) {
      if (w < place.count) first[w] = bits[w];
    }
  }
}

template <class S>
using BitsOf = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

// `bytes`: of a number.
template <class S>
__device__ Raw<S> LoadRaw(int bytes, const void* from, const Place& place) {
  Raw<S> raw = {};
  if (bytes == sizeof(S)) {
    LoadBits<BitsOf<S>>(from, place, &raw);
  } else if constexpr (std::is_same_v<S, float>) {
    LoadBits<uint16_t>(from, place, &raw);
  }
  return raw;
}

template <class S>
__device__ void StoreRaw(int bytes, const Raw<S>& raw, void* to,
                         const Place& place) {
  if (bytes == sizeof(S)) {
    StoreBits<BitsOf<S>>(raw, to, place);
  } else if constexpr (std::is_same_v<S, float>) {
    StoreBits<uint16_t>(raw, to, place);
  }
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

// How the numbers of a vector are rounded where they are stored.
template <class S>
struct Rounding {
  bool stochastic;
  uint32_t bits[kWidth<S>];

  // Stores numbers of tensor k of a step.
  template <class T>
  __device__ void Round(const Vector<S>& vector, T* to, int k) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (stochastic) {
        for (int w = 0; w < kWidth<S>; ++w) {
          Store(vector.of[w], &to[w], Addend(bits[w], k));
        }
        return;
      }
    }
    for (int w = 0; w < kWidth<S>; ++w) Store(vector.of[w], &to[w]);
  }
};

template <class S>
__device__ Raw<S> Convert(int dtype, const Vector<S>& vector,
                          const Rounding<S>& rounding, int k) {
  Raw<S> raw = {};
  switch (dtype) {
#define DTYPE(name, Type)                        \
  case k_##name:                                 \
    if constexpr (kIsComputedIn<Type, S>) {      \
      Type numbers[kWidth<S>];                   \
      rounding.Round(vector, numbers, k);        \
      memcpy(raw.word, numbers, sizeof numbers); \
    }                                            \
    break;
#include "rules/dtypes.inc"
  }
  return raw;
}

}  // namespace wdops::cuda
