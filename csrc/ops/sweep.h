// Constants and chunks for the CPU kernels of the optimizers' ops.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/add_up.h"
#include "cpu/factored.h"
#include "ops/kernel.h"
#include "ops/variables.h"
#include "tensorflow/core/platform/mem.h"

namespace wdops {

// The constants of a rule's step: one for each dtype where all variables share
// their hyperparameters, else one for each variable.
class Steps {
 public:
  Steps(const Inputs& inputs, const RuleInfo& rule, StepOptions options,
        const Hypers& hypers)
      : shared_(hypers.shared()), steps_(shared_ ? kDTypeCount : inputs.n) {
    std::vector<double> hyper(std::max<int>(hypers.count(), kStepHyperCount));
    for (size_t s = 0; s < steps_.size(); ++s) {
      std::copy_n(hypers.Of(s), hypers.count(), hyper.begin());
      const int dtype = shared_ ? s : FromTensorFlow(inputs.dtypes[s]);
      rule.make_step[dtype](hyper.data(), options, &steps_[s]);
    }
  }
  AnyStep* Of(int i, DType dtype) { return &steps_[shared_ ? dtype : i]; }

 private:
  bool shared_;
  std::vector<AnyStep> steps_;
};

// The gradients of all variables, one behind the other, in chunks: of kChunk
// elements, or tiles of a factored gradient.
class Gradients {
 public:
  // `wanted(i)`: whether gradient i has any chunks.
  template <class Wanted>
  absl::Status Make(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                    const cpu::Kernels& kernels, const Wanted& wanted) {
    inputs_ = &inputs;
    first_ = {0};
    for (int i = 0; i < inputs.n; ++i) {
      const tensorflow::Tensor& grad =
          ctx->input(inputs.Tensor(inputs.Grad(i)));
      One one;
      one.dtype = FromTensorFlow(grad.dtype());
      one.n = wanted(i) ? grad.NumElements() : 0;
      one.data = Data(grad);
      if (!wanted(i) || !IsFactored(ctx, inputs, i)) {
        bytes_ += one.n * kDTypeBytes[one.dtype];
        first_.push_back(first_[i] + wdops::Chunks(one.n));
        ones_.push_back(std::move(one));
        continue;
      }
      const tensorflow::Tensor& dz =
          ctx->input(inputs.Tensor(inputs.factor[i]));
      one.shape = ShapeOf(grad, dz);
      one.n = one.shape.rows * one.shape.columns;
      one.kernels = &(*kernels.factored)[one.dtype];
      TF_RETURN_IF_ERROR(Pack(ctx, one, grad, one.kernels->x, &one.x));
      TF_RETURN_IF_ERROR(Pack(ctx, one, dz, one.kernels->dz, &one.dz));
      bytes_ += one.n * kDTypeBytes[one.dtype];
      // A core adds 32 products a cycle, and moves 16 bytes.
      product_bytes_ += one.n * one.shape.batch / 2;
      tile_bytes_ =
          std::max(tile_bytes_, one.shape.TileRows() * one.shape.TileColumns() *
                                    kDTypeBytes[one.dtype]);
      first_.push_back(first_[i] + one.shape.Tiles());
      ones_.push_back(std::move(one));
    }
    return absl::OkStatus();
  }

  static cpu::Factored ShapeOf(const tensorflow::Tensor& x,
                               const tensorflow::Tensor& dz) {
    return {x.dim_size(0), x.dim_size(1), dz.dim_size(1)};
  }

  int64_t Chunks() const { return first_.back(); }

  // The sums of variable i.
  Sums SumOver(int i, const std::vector<Sums>& of_chunks) const {
    return cpu::AddUp(of_chunks.data() + first_[i], first_[i + 1] - first_[i]);
  }

  // Calls run(variable, chunk, begin, n, grad) for every run of memory in every
  // chunk, in TensorFlow's pool. `chunk` counts over all variables; `begin` and
  // `n` are elements of its own, and so is `grad`, where they begin. `passes`:
  // how often as much as the gradients is read or written. value(input) is the
  // tensor of a resource, which `run` reads too.
  template <class Value, class Run>
  void ForChunks(tensorflow::OpKernelContext* ctx, int passes,
                 const Value& value, const Run& run) const {
    Share(ctx, Chunks(), bytes_ * passes + product_bytes_,
          [&](int64_t chunk, int64_t end) {
            size_t i = std::upper_bound(first_.begin(), first_.end(), chunk) -
                       1 - first_.begin();
            const std::unique_ptr<char, void (*)(void*)> tile(
                tile_bytes_
                    ? static_cast<char*>(tensorflow::port::AlignedMalloc(
                          tile_bytes_, kAlignment))
                    : nullptr,
                &tensorflow::port::AlignedFree);
            for (; chunk < end; ++chunk) {
              while (chunk >= first_[i + 1]) ++i;
              const One& one = ones_[i];
              if (one.kernels) {
                ForTile(
                    one, chunk - first_[i], tile.get(),
                    [&](int64_t begin, int64_t n) {
                      std::vector<cpu::Span> read;
                      for (int input = i; input < inputs_->Resources();
                           input += inputs_->n) {
                        const tensorflow::Tensor& tensor = value(input);
                        const int size = DataTypeSize(tensor.dtype());
                        read.push_back({Data(tensor) + begin * size, n * size});
                      }
                      return read;
                    },
                    [&](int64_t begin, int64_t n, const char* grad) {
                      run(i, chunk, begin, n, grad);
                    });
                continue;
              }
              const int64_t begin = (chunk - first_[i]) * kChunk;
              run(i, chunk, begin, std::min(kChunk, one.n - begin),
                  one.data + begin * kDTypeBytes[one.dtype]);
            }
          });
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct One {
    DType dtype;
    int64_t n;
    const char* data;  // of a tensor
    // Of factors, else null.
    const cpu::FactoredKernels* kernels = nullptr;
    cpu::Factored shape;
    tensorflow::Tensor x, dz;  // packed
  };

  static int64_t ComputeBytes(DType dtype) {
    return dtype == k_float64 ? sizeof(double) : sizeof(float);
  }

  static absl::Status Pack(tensorflow::OpKernelContext* ctx, const One& one,
                           const tensorflow::Tensor& factor,
                           const cpu::Packing& packing,
                           tensorflow::Tensor* packed) {
    const int64_t batch = factor.dim_size(0), n = factor.dim_size(1);
    const int64_t panels = Ceil(n, packing.width);
    const int64_t bytes =
        panels * packing.width * batch * ComputeBytes(one.dtype);
    TF_RETURN_IF_ERROR(ctx->allocate_temp(
        tensorflow::DT_UINT8, tensorflow::TensorShape({bytes}), packed));
    // What it writes is in no cache: four times the time of as many bytes
    // there.
    Share(ctx, panels, 4 * 2 * bytes, [&](int64_t begin, int64_t end) {
      packing.pack(Data(factor), batch, n, begin, end, Data(*packed));
    });
    return absl::OkStatus();
  }

  // Calls run(begin, n, grad) for the runs of memory in tile t.
  template <class FindBeside, class Run>
  static void ForTile(const One& one, int64_t t, char* tile,
                      const FindBeside& find_beside, const Run& run) {
    const cpu::Factored& shape = one.shape;
    const int64_t across = shape.TilesAcross();
    const int64_t row = t / across * shape.TileRows();
    const int64_t column = t % across * shape.TileColumns();
    const int64_t rows = std::min(shape.TileRows(), shape.rows - row);
    const int64_t columns =
        std::min(shape.TileColumns(), shape.columns - column);
    const int64_t panel_bytes = shape.batch * ComputeBytes(one.dtype);
    const bool one_run = columns == shape.columns;
    std::vector<cpu::Span> beside;
    if (one_run) beside = find_beside(row * columns, rows * columns);
    one.kernels->product(Data(one.x) + row * panel_bytes,
                         Data(one.dz) + column * panel_bytes, shape.batch, rows,
                         columns, tile, beside.data(), beside.size());
    if (one_run) {
      run(row * columns, rows * columns, tile);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      run((row + r) * shape.columns + column, columns,
          tile + r * columns * kDTypeBytes[one.dtype]);
    }
  }

  const Inputs* inputs_;
  std::vector<One> ones_;
  std::vector<int64_t> first_;  // chunk of each variable, then how many in all
  int64_t bytes_ = 0;           // of the gradients
  int64_t product_bytes_ = 0;   // that are moved in the time of the products
  int64_t tile_bytes_ = 0;      // of the largest
};

}  // namespace wdops
