// Random bits for stochastic rounding: a hash of (seed, element), so that they
// depend on neither the order nor the place of computation. The mixing steps
// are those of C. Wellons' "lowbias32" (Prospecting for Hash Functions, 2018),
// with the second key entering between its two multiplications.
#pragma once

#include "rules/number.h"

namespace wdops {

// U is uint32_t, or its HLO.
template <class U>
struct Key {
  U first, second;
};

template <class U>
WDOPS_FN U Mix(U x, U key) {
  x = x ^ (x >> 16);
  x = x * Like(x, 0x21f0aaad);
  x = x ^ key;
  x = x ^ (x >> 15);
  x = x * Like(x, 0x735a2d97);
  return x ^ (x >> 15);
}

// `seed` is a whole number in [0, 2^53), of type D.
template <class U, class D>
WDOPS_FN Key<U> MakeKey(const D& seed) {
  const D high = Floor(seed / 4294967296.0);
  const U low = static_cast<U>(seed - high * 4294967296.0);
  const U first = Mix(low, static_cast<U>(high));
  return {first, Mix(static_cast<U>(high), first)};
}

// The bits of element `high` * 2^32 + `low` of a variable.
template <class U>
WDOPS_FN U RandomBits(const Key<U>& key, U high, U low) {
  return Mix(low ^ key.first, key.second + high);
}

// The 16 bits for tensor k of a step (the slots, then the parameter, then the
// average), made of the RandomBits of the element: its two halves, and beyond
// them upper halves of its products with powers of a multiplier whose lattices
// are nearly the best, so that any two are as good as independent.
template <class U>
WDOPS_FN U Addend(U bits, int k) {
  if (k == 1) return bits & Like(bits, 0xffff);
  for (; k > 1; --k) bits = bits * Like(bits, 0x93d765dd);
  return bits >> 16;
}

}  // namespace wdops
