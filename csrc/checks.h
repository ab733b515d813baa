// What every op checks of its arguments, and how it says what is wrong.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "rules.h"
#include "sums.h"

// As STD_TORCH_CHECK, a RuntimeError in Python; but its message is what we say, without the name and line of the source file.
#define METAADAMW_CHECK(condition, ...)                                                \
  do {                                                                                 \
    if (!(condition)) throw std::runtime_error(::metaadamw::concatenate(__VA_ARGS__)); \
  } while (false)

namespace metaadamw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef METAADAMW_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

template <typename... Args>
std::string concatenate(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

using List = std::optional<std::vector<Tensor>>;

// Of the device that the tensor is on: -1 for the CPU, the number of a GPU, -2 for anything else.
inline int64_t device_of(const Tensor& x) { return x.is_cpu() ? -1 : x.is_cuda() ? x.get_device_index() : -2; }

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline ElementType element_type(ScalarType dtype) {
  return dtype == ScalarType::Float      ? ElementType::kFloat32
         : dtype == ScalarType::Double   ? ElementType::kFloat64
         : dtype == ScalarType::BFloat16 ? ElementType::kBFloat16
                                         : ElementType::kFloat16;
}

inline std::string device_name(int64_t device) {
  return device == -1 ? "cpu" : device < 0 ? "neither the CPU nor a CUDA device" : concatenate("cuda:", device);
}

// Checks what `measure` is asked for. Returns the carried sums, [T, kCarriedSums], which it need not read, null if none are given.
template <class R>
const double* check_measured(const Header& header, int64_t mask, const std::optional<Tensor>& carried, ScalarType dtype) {
  METAADAMW_CHECK(mask >= 0 && mask < 1 << R::kSums, "there are no more than ", R::kSums, " sums");
  for (int s = 0; s < R::kSums; ++s) {
    METAADAMW_CHECK(!(mask >> s & 1) || !(R::reads(s) & ~(header.given | R::kOptionalLists)),
                    "the launch was made without the lists of these columns");
  }
  METAADAMW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "the statistics are float32 or float64, not ",
                  torch::headeronly::toString(dtype));
  METAADAMW_CHECK(!carried || (!(mask & kCarriedMask<R>) && carried->scalar_type() == ScalarType::Double && carried->dim() == 2 &&
                               carried->size(0) == header.tensors && carried->size(1) == kCarriedSums<R> &&
                               carried->is_contiguous() && device_of(*carried) == header.device),
                  "carried must be a contiguous float64 tensor of shape [", header.tensors, ", ", kCarriedSums<R>,
                  "] on the device of the tensors, instead of the sums that it holds");
  return carried ? static_cast<const double*>(carried->data_ptr()) : nullptr;
}

// What the sums of `mask` need to know of the last update: float64 [kMeasureVectors, T]; no vectors if they need nothing.
template <class R>
Update measured_update(const std::optional<Tensor>& vectors, int64_t mask, const Header& header) {
  if (R::kMeasureVectors == 0 || mask >> R::kFirstExtra == 0) {
    return {nullptr, header.tensors, false, 0};
  }
  METAADAMW_CHECK(vectors, "these columns need the vectors of the last update");
  METAADAMW_CHECK(vectors->scalar_type() == ScalarType::Double && vectors->dim() == 2 && vectors->size(0) == R::kMeasureVectors &&
                      vectors->size(1) == header.tensors && vectors->is_contiguous() && device_of(*vectors) == header.device,
                  "vectors must be a contiguous float64 tensor of shape [", static_cast<int>(R::kMeasureVectors), ", ",
                  header.tensors, "] on the device of the tensors");
  return {static_cast<const double*>(vectors->data_ptr()), header.tensors, false, 0};
}

// The sums that tensor_stats returns, as a mask.
inline int statistics_mask(bool params, bool exp_avg_sqs, bool count_nonzero) {
  return 1 << AdamW::kGradSquared | 1 << AdamW::kGradMomentum | 1 << AdamW::kMomentumSquared | params << AdamW::kParamSquared |
         exp_avg_sqs << AdamW::kSecondMomentSquared | count_nonzero << AdamW::kGradNonzero |
         count_nonzero << AdamW::kMomentumNonzero;
}

// The vectors of an update, float64 [kVectors, T]. Also checks that the table may be used for one.
template <class R>
Update checked_update(const Tensor& vectors, const std::optional<int64_t>& rounding_seed, const Header& header) {
  METAADAMW_CHECK(header.written, "the launch was not made for updates: written=False");
  METAADAMW_CHECK(vectors.scalar_type() == ScalarType::Double && vectors.dim() == 2 && vectors.size(0) == R::kVectors &&
                      vectors.size(1) == header.tensors && vectors.is_contiguous() && device_of(vectors) == header.device,
                  "vectors must be a contiguous float64 tensor of shape [", static_cast<int>(R::kVectors), ", ", header.tensors,
                  "] on the device of the tensors");
  return {static_cast<const double*>(vectors.data_ptr()), header.tensors, rounding_seed.has_value(), rounding_seed.value_or(0)};
}

// Where the update writes its sums, null if it need not.
template <class R>
NewSums<R> sums_output(const std::optional<Tensor>& x, const Header& header) {
  METAADAMW_CHECK(!x || (x->scalar_type() == ScalarType::Double && x->dim() == 2 && x->size(0) == header.tensors &&
                         (x->size(1) == kCarriedSums<R> || NewSums<R>::can_be_found(x->size(1))) && x->is_contiguous() &&
                         device_of(*x) == header.device),
                  "new_sums must be a contiguous float64 tensor of shape [", header.tensors, ", ", kCarriedSums<R>, "] or [",
                  header.tensors, ", ", static_cast<int>(R::kFoundSums), "] on the device of the tensors");
  return x ? NewSums<R>{static_cast<double*>(x->data_ptr()), static_cast<int>(x->size(1))} : NewSums<R>{nullptr, kCarriedSums<R>};
}

}  // namespace metaadamw
