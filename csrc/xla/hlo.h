// The numbers of rules/number.h as HLO: with Hlo<float> in the place of float,
// a rule is an expression that XLA compiles.
#pragma once

#include <cstdlib>
#include <string_view>

#include "rules/exponential.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/primitive_util.h"

namespace wdops {

// An XlaOp with elements of type T, a scalar or of a variable's shape. A scalar
// meets a shape by broadcasting.
template <class T>
struct Hlo {
  xla::XlaOp op;

  template <class U>
  explicit operator Hlo<U>() const {
    return {xla::ConvertElementType(
        op, xla::primitive_util::NativeToPrimitiveType<U>())};
  }

  friend Hlo operator+(Hlo a, Hlo b) { return {xla::Add(a.op, b.op)}; }
  friend Hlo operator-(Hlo a, Hlo b) { return {xla::Sub(a.op, b.op)}; }
  friend Hlo operator*(Hlo a, Hlo b) { return {xla::Mul(a.op, b.op)}; }
  friend Hlo operator/(Hlo a, Hlo b) { return {xla::Div(a.op, b.op)}; }
  friend Hlo operator-(Hlo a) { return {xla::Neg(a.op)}; }
  friend Hlo operator^(Hlo a, Hlo b) { return {xla::Xor(a.op, b.op)}; }
  friend Hlo operator&(Hlo a, Hlo b) { return {xla::And(a.op, b.op)}; }
  friend Hlo operator>>(Hlo a, int bits) {
    return {xla::ShiftRightLogical(a.op, Like(a, bits).op)};
  }
  friend Hlo operator+(Hlo a, double b) { return a + Like(a, b); }
  friend Hlo operator*(Hlo a, double b) { return a * Like(a, b); }
  friend Hlo operator/(Hlo a, double b) { return a / Like(a, b); }
  friend Hlo operator+(double a, Hlo b) { return Like(b, a) + b; }
  friend Hlo operator-(double a, Hlo b) { return Like(b, a) - b; }
  friend Hlo operator*(double a, Hlo b) { return Like(b, a) * b; }
  friend Hlo operator/(double a, Hlo b) { return Like(b, a) / b; }
  friend Hlo<bool> operator>(Hlo a, Hlo b) { return {xla::Gt(a.op, b.op)}; }
  friend Hlo<bool> operator<(Hlo a, Hlo b) { return {xla::Lt(a.op, b.op)}; }
  friend Hlo<bool> operator==(Hlo a, Hlo b) { return {xla::Eq(a.op, b.op)}; }
  friend Hlo<bool> operator!=(Hlo a, Hlo b) { return {xla::Ne(a.op, b.op)}; }
  friend Hlo<bool> operator>(Hlo a, double b) { return a > Like(a, b); }
  friend Hlo<bool> operator<(Hlo a, double b) { return a < Like(a, b); }
  friend Hlo<bool> operator==(Hlo a, double b) { return a == Like(a, b); }
  friend Hlo<bool> operator!=(Hlo a, double b) { return a != Like(a, b); }

  friend Hlo Like(Hlo like, double value) {
    // XLA makes no integer constant of a double.
    if constexpr (std::is_integral_v<T>) {
      return {xla::ScalarLike(like.op, static_cast<int64_t>(value))};
    } else {
      return {xla::ScalarLike(like.op, value)};
    }
  }
  friend Hlo Abs(Hlo x) { return {xla::Abs(x.op)}; }
  friend Hlo Floor(Hlo x) { return {xla::Floor(x.op)}; }
  friend Hlo Round(Hlo x, Hlo* power) {
    const Hlo n = {xla::RoundNearestEven(x.op)};
    constexpr bool kDouble = std::is_same_v<T, double>;
    using Bits = std::conditional_t<kDouble, int64_t, int32_t>;
    const auto whole = static_cast<Hlo<Bits>>(n);
    const auto exponent = whole + Like(whole, kDouble ? 1023 : 127);
    const auto bits =
        xla::ShiftLeft(exponent.op, Like(exponent, kDouble ? 52 : 23).op);
    *power = {xla::BitcastConvertType(
        bits, xla::primitive_util::NativeToPrimitiveType<T>())};
    return n;
  }
  friend Hlo Sqrt(Hlo x) { return {xla::Sqrt(x.op)}; }
  friend Hlo Pow(Hlo x, Hlo y) { return {xla::Pow(x.op, y.op)}; }
};

template <class T>
struct Scalar<Hlo<T>> {
  using type = T;
};

// Whether there shall be no call of a kernel: for programs that are to run
// without this library, and for tests.
inline bool WithoutCalls() {
  const char* choice = std::getenv("WDOPS_XLA");
  return choice && std::string_view(choice) == "hlo";
}

// What a call of a kernel takes and gives: row after row.
inline xla::Shape RowMajor(xla::XlaOp op) {
  const xla::Shape* shape = op.builder()->GetShapePtr(op).value();
  return xla::ShapeUtil::MakeShape(shape->element_type(), shape->dimensions());
}

inline absl::Span<const int64_t> Dimensions(xla::XlaOp op) {
  return op.builder()->GetShapePtr(op).value()->dimensions();
}

// The sum of doubles over some dimensions. On a CPU XLA adds up one element, or
// one row, after another, and waits 4 cycles for each: so where the first
// dimension is one of them and long, its four quarters are added first.
inline xla::XlaOp SumOver(xla::XlaOp x, absl::Span<const int64_t> over) {
  constexpr int64_t kParts = 4;
  xla::XlaBuilder* builder = x.builder();
  const auto sum = [&](xla::XlaOp op) {
    return xla::Reduce(op, xla::ConstantR0<double>(builder, 0),
                       xla::CreateScalarAddComputation(xla::F64, builder),
                       over);
  };
  const bool cut = !over.empty() && over[0] == 0;
  const int64_t n = cut ? Dimensions(x)[0] : 0, length = n / kParts;
  if (length == 0) return sum(x);
  const auto part = [&](int64_t begin, int64_t end) {
    return xla::SliceInDim(x, begin, end, 1, 0);
  };
  xla::XlaOp parts = part(0, length);
  for (int64_t k = 1; k < kParts; ++k) {
    parts = xla::Add(parts, part(k * length, (k + 1) * length));
  }
  return xla::Add(sum(parts), sum(part(kParts * length, n)));
}

// xla::Select wants three equal shapes.
template <class T>
Hlo<T> Select(Hlo<bool> condition, Hlo<T> yes, Hlo<T> no) {
  for (xla::XlaOp shaped : {condition.op, yes.op, no.op}) {
    const auto dimensions = Dimensions(shaped);
    if (dimensions.empty()) continue;
    for (xla::XlaOp* op : {&condition.op, &yes.op, &no.op}) {
      if (Dimensions(*op).empty()) *op = xla::Broadcast(*op, dimensions);
    }
    break;
  }
  return {xla::Select(condition.op, yes.op, no.op)};
}

}  // namespace wdops
