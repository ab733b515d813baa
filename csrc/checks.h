// From lists of torch tensors to rows of pointers, with every check that must pass before the first byte is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <vector>

#include "chunks.h"

namespace metaadamw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One tensor of one list. `data` is null where the row has no such operand.
struct Operand {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  bool dense = true;  // its elements lie one after another in the order of the row's shape
  int64_t stride[kMaxDims];

  int64_t itemsize() const { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }
};

// One position of all lists: N tensors of the same shape, walked together.
template <int N>
struct Row {
  int64_t numel = 0;
  Shape shape;
  std::array<Operand, N> operands;

  // float64 tensors are computed in float64, all others in float32.
  bool is_double() const {
    return std::any_of(operands.begin(), operands.end(), [](const Operand& o) { return o.data && o.dtype == ScalarType::Double; });
  }
};

// The dimensions of a row in the order of the last operand's memory (a tensor that is always given and, in the update, written),
// without those of size 1, and merged where every operand allows it. So tensors that are transposed or channels_last all alike
// are walked as one dense run.
template <int N>
void set_layout(Row<N>& row, const std::array<const Tensor*, N>& tensors) {
  const Tensor& leader = *tensors[N - 1];
  bool dense = true;
  for (const Tensor* x : tensors) {
    dense = dense && (x == nullptr || x->is_contiguous());
  }
  if (dense || row.numel == 0) {
    return;
  }
  std::vector<int64_t> order;
  for (int64_t d = 0; d < leader.dim(); ++d) {
    if (leader.size(d) != 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return leader.stride(a) > leader.stride(b); });
  Shape& shape = row.shape;
  for (const int64_t d : order) {
    bool merges = shape.dims > 0;
    for (int i = 0; i < N && merges; ++i) {
      merges = tensors[i] == nullptr || row.operands[i].stride[shape.dims - 1] == tensors[i]->stride(d) * leader.size(d);
    }
    STD_TORCH_CHECK(merges || shape.dims < kMaxDims, "tensors with more than ", kMaxDims, " separate dimensions are not supported");
    shape.dims += merges ? 0 : 1;
    shape.size[shape.dims - 1] = merges ? shape.size[shape.dims - 1] * leader.size(d) : leader.size(d);
    for (int i = 0; i < N; ++i) {
      if (tensors[i] != nullptr) {
        row.operands[i].stride[shape.dims - 1] = tensors[i]->stride(d);
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    row.operands[i].dense = tensors[i] == nullptr || shape.dims == 0 || (shape.dims == 1 && row.operands[i].stride[0] == 1);
  }
}

inline void check_tensor(const Tensor& x, const char* list, size_t index, bool on_cuda) {
  STD_TORCH_CHECK(x.layout() == torch::headeronly::Layout::Strided, list, "[", index,
                  "] is sparse: only dense tensors are supported");
  STD_TORCH_CHECK(on_cuda ? x.is_cuda() : x.is_cpu(), list, "[", index,
                  "] is on another device than the first tensor of the lists");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, list,
      "[", index, "] has dtype ", torch::headeronly::toString(dtype),
      ": only float32, float64, bfloat16 and float16 are supported");
}

struct List {
  const char* name;
  const std::vector<Tensor>* tensors;  // null: the op was called without this list
  bool may_be_absent;                  // an entry without elements says that this row has no such operand
  bool written;
};

// Lists of equal length T to T rows. The last list leads: it is always given and its shapes rule.
template <int N>
std::vector<Row<N>> make_rows(const std::array<List, N>& lists, bool on_cuda) {
  const std::vector<Tensor>& leaders = *lists[N - 1].tensors;
  std::vector<Row<N>> rows(leaders.size());
  for (const List& list : lists) {
    STD_TORCH_CHECK(list.tensors == nullptr || list.tensors->size() == rows.size(), list.name, " has ",
                    list.tensors == nullptr ? 0 : list.tensors->size(), " tensors, ", lists[N - 1].name, " has ", rows.size());
  }
  for (size_t t = 0; t < rows.size(); ++t) {
    const Tensor& leader = leaders[t];
    check_tensor(leader, lists[N - 1].name, t, on_cuda);
    rows[t].numel = leader.numel();
    std::array<const Tensor*, N> tensors{};
    for (int i = 0; i < N; ++i) {
      if (lists[i].tensors == nullptr) {
        continue;
      }
      const Tensor& x = (*lists[i].tensors)[t];
      check_tensor(x, lists[i].name, t, on_cuda);
      if (lists[i].may_be_absent && x.numel() == 0) {
        continue;
      }
      STD_TORCH_CHECK(std::equal(x.sizes().begin(), x.sizes().end(), leader.sizes().begin(), leader.sizes().end()), lists[i].name,
                      "[", t, "] and ", lists[N - 1].name, "[", t, "] differ in shape");
      if (lists[i].written && x.numel() != 0) {
        for (int64_t d = 0; d < x.dim(); ++d) {
          STD_TORCH_CHECK(x.stride(d) != 0 || x.size(d) < 2, lists[i].name, "[", t,
                          "] is expanded: several of its elements share one place in memory, so it cannot be updated");
        }
      }
      tensors[i] = &x;
      rows[t].operands[i].data = static_cast<char*>(x.data_ptr());
      rows[t].operands[i].dtype = x.scalar_type();
    }
    set_layout<N>(rows[t], tensors);
  }
  return rows;
}

// The number of chunks before each tensor, then their total: see tensor_of_chunk.
template <int N>
std::vector<int64_t> chunk_offsets(const std::vector<Row<N>>& rows) {
  std::vector<int64_t> first_chunk(rows.size() + 1, 0);
  for (size_t t = 0; t < rows.size(); ++t) {
    first_chunk[t + 1] = first_chunk[t] + chunks_of(rows[t].numel);
  }
  return first_chunk;
}

// A [T] float64 tensor of hyper-parameters.
inline const double* hyperparameter(const Tensor& x, const char* name, int64_t tensors) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.size(0) == tensors && x.is_contiguous() && x.is_cpu(),
                  name, " must be a contiguous float64 tensor of shape [", tensors, "]");
  return static_cast<const double*>(x.data_ptr());
}

}  // namespace metaadamw
