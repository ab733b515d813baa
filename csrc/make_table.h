// From lists of torch tensors to a launch table, with every check that must pass before the first byte is written.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "checks.h"

namespace metaadamw {

// The lists of one call, by operand. Those that are not given are empty optionals; gradients and what stands next always are given.
template <class R>
struct Lists {
  static constexpr int kLowPrecision = R::kOperands;
  std::array<List, kOperandsOf<R>> tensors;
  bool written;  // all but the gradients will be

  static const char* name(int operand) { return operand == kLowPrecision ? "low_precision_params" : R::kLists[operand]; }
  // The list whose shapes rule and whose memory is walked in order: the parameters, if they are given.
  int leader() const { return tensors[R::kParam] ? static_cast<int>(R::kParam) : kGrad + 1; }
  // Lists in which a tensor without elements says that this row has no such operand.
  static bool may_be_absent(int operand) {
    return operand == kGrad || operand == kLowPrecision || (R::kLastIsOptional && operand == R::kOperands - 1);
  }
};

inline std::string shape_name(const Tensor& x) {
  std::string name;
  for (const int64_t size : x.sizes()) {
    name += concatenate(name.empty() ? "[" : ", ", size);
  }
  return name.empty() ? "[]" : name + "]";
}

template <class R>
void check_tensor(const Tensor& x, int operand, size_t index, const Lists<R>& lists, int64_t device) {
  const char* list = lists.name(operand);
  METAADAMW_CHECK(x.layout() == torch::headeronly::Layout::Strided, list, "[", index,
                  "] is sparse: only dense tensors are supported");
  METAADAMW_CHECK(device_of(x) == device, list, "[", index, "] is on ", device_name(device_of(x)), ", another device than ",
                  lists.name(lists.leader()), "[0] on ", device_name(device));
  METAADAMW_CHECK(is_supported(x.scalar_type()), list, "[", index, "] has dtype ", torch::headeronly::toString(x.scalar_type()),
                  ": only float32, float64, bfloat16, float16 are supported");
}

// A parameter of 16 bits, and its master in place of the parameter.
inline void check_low_precision(const Tensor& low, const Tensor& master, size_t index, const char* list, const char* of_masters) {
  const ScalarType dtype = low.scalar_type(), of_master = master.scalar_type();
  METAADAMW_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, list, "[", index, "] has dtype ",
                  torch::headeronly::toString(dtype), ": only bfloat16, float16 have a master");
  METAADAMW_CHECK(of_master == ScalarType::Float, of_masters, "[", index, "] has dtype ", torch::headeronly::toString(of_master),
                  ": the master of ", list, "[", index, "] must be float32");
}

// Sizes and strides of the dimensions with more than one element, the smallest stride first.
inline std::vector<std::pair<int64_t, int64_t>> strides_and_sizes(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) {
      dims.emplace_back(x.stride(d), x.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// The memory of a tensor that will be written.
struct Extent {
  const char* begin;
  const char* end;
  bool full;  // it holds every byte in between
  const char* list;
  size_t index;
};

// The extent of x, after a check that no two of its elements share a place: each stride must lead beyond all that the smaller ones
// reach. That refuses a few exotic tensors whose elements interleave without meeting.
inline Extent written_extent(const Tensor& x, const char* list, size_t index) {
  int64_t reach = 1;  // elements from the first to the last, both included
  if (x.is_contiguous()) {
    reach = x.numel();
  } else {
    for (const auto& [stride, size] : strides_and_sizes(x)) {
      METAADAMW_CHECK(
          stride >= reach, list, "[", index,
          "] is expanded or overlaps itself: several of its elements share one place in memory, so it cannot be updated");
      reach += (size - 1) * stride;
    }
  }
  const auto* begin = static_cast<const char*>(x.data_ptr());
  return {begin, begin + reach * itemsize(element_type(x.scalar_type())), reach == x.numel(), list, index};
}

// Two tensors that certainly share memory would be updated by two threads at once. Strided ones that interleave are fine.
inline void check_distinct(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* full = nullptr;  // of those before that are full, the one that ends last
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& x = extents[i];
    const Extent* other = i > 0 && extents[i - 1].begin == x.begin ? &extents[i - 1]
                          : full != nullptr && x.begin < full->end ? full
                                                                   : nullptr;
    METAADAMW_CHECK(other == nullptr, x.list, "[", x.index, "] and ", other->list, "[", other->index,
                    "] share memory, so they cannot be updated");
    if (x.full && (full == nullptr || x.end > full->end)) {
      full = &x;
    }
  }
}

// The dimensions of a row in the order of the leader's memory, without those of size 1, and merged where every operand allows it:
// so tensors that are transposed or channels_last all alike are walked as one dense run. Sets row.dense. Returns the layout if some
// operand needs it.
template <int N>
std::optional<Layout<N>> walk(Row<N>& row, const Tensor* const (&tensors)[N], const Tensor& leader) {
  row.dense = (1 << N) - 1;
  const auto is_plain = [](const Tensor* x) { return x == nullptr || x->is_contiguous(); };
  if (row.numel == 0 || std::all_of(std::begin(tensors), std::end(tensors), is_plain)) {
    return {};
  }
  std::vector<int64_t> order;
  for (int64_t d = 0; d < leader.dim(); ++d) {
    if (leader.size(d) != 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return leader.stride(a) > leader.stride(b); });
  Layout<N> layout{};
  Shape& shape = layout.shape;
  for (const int64_t d : order) {
    bool merges = shape.dims > 0;
    for (int i = 0; i < N && merges; ++i) {
      merges = tensors[i] == nullptr || layout.stride[i][shape.dims - 1] == tensors[i]->stride(d) * leader.size(d);
    }
    METAADAMW_CHECK(merges || shape.dims < kMaxDims, "tensors with more than ", kMaxDims, " separate dimensions are not supported");
    shape.dims += merges ? 0 : 1;
    shape.size[shape.dims - 1] = merges ? shape.size[shape.dims - 1] * leader.size(d) : leader.size(d);
    for (int i = 0; i < N; ++i) {
      layout.stride[i][shape.dims - 1] = tensors[i] == nullptr ? 0 : tensors[i]->stride(d);
    }
  }
  bool all = true;
  for (int i = 0; i < N; ++i) {
    int64_t run = 1;
    bool dense = true;
    for (int d = shape.dims - 1; d >= 0; run *= shape.size[d--]) {
      dense = dense && (tensors[i] == nullptr || layout.stride[i][d] == run);
    }
    row.dense &= ~(!dense << i);
    all = all && dense;
  }
  return all ? std::nullopt : std::optional(layout);
}

// Fills row t of the table, checks its tensors, and adds those that will be written to `extents`.
template <class R>
std::optional<Layout<kOperandsOf<R>>> make_row(const Lists<R>& lists, size_t t, int64_t device, Row<kOperandsOf<R>>& row,
                                               std::vector<Extent>& extents) {
  constexpr int kAll = kOperandsOf<R>;
  const Tensor& leader = (*lists.tensors[lists.leader()])[t];
  check_tensor(leader, lists.leader(), t, lists, device);
  row = {};
  row.numel = leader.numel();
  const Tensor* tensors[kAll] = {};  // null where the row has no such operand
  for (int i = 0; i < kAll; ++i) {
    if (!lists.tensors[i]) {
      continue;
    }
    const Tensor& x = (*lists.tensors[i])[t];
    check_tensor(x, i, t, lists, device);
    row.type[i] = element_type(x.scalar_type());
    if (lists.may_be_absent(i) && x.numel() == 0) {
      continue;
    }
    METAADAMW_CHECK(std::equal(x.sizes().begin(), x.sizes().end(), leader.sizes().begin(), leader.sizes().end()), lists.name(i),
                    "[", t, "] and ", lists.name(lists.leader()), "[", t, "] differ in shape: ", shape_name(x), ", ",
                    shape_name(leader));
    if (i == lists.kLowPrecision) {
      check_low_precision(x, leader, t, lists.name(i), lists.name(R::kParam));
    }
    if (lists.written && i != kGrad && row.numel != 0) {  // of two that change roles each is written in its turn
      extents.push_back(written_extent(x, lists.name(i), t));
    }
    tensors[i] = &x;
    row.data[i] = static_cast<char*>(x.data_ptr());
    METAADAMW_CHECK(row.data[i] != nullptr || row.numel == 0, lists.name(i), "[", t, "] has no memory: its storage was freed");
  }
  if constexpr (kExchanges<R>) {
    const Tensor *a = tensors[R::kExchanged[0]], *b = tensors[R::kExchanged[1]];
    METAADAMW_CHECK(a == nullptr || b == nullptr ||
                        (a->scalar_type() == b->scalar_type() &&
                         std::equal(a->strides().begin(), a->strides().end(), b->strides().begin(), b->strides().end())),
                    lists.name(R::kExchanged[0]), "[", t, "] and ", lists.name(R::kExchanged[1]), "[", t,
                    "] differ in dtype or strides: they take turns");
  }
  if (row.lacks_gradient()) {  // one that comes later will most likely be as autograd makes it
    row.type[kGrad] = row.type[lists.leader()];
    tensors[kGrad] = &leader;
  }
  int widest = 0;
  for (int i = 0; i < kAll; ++i) {
    widest = tensors[i] == nullptr ? widest : std::max(widest, itemsize(row.type[i]));
  }
  row.is_double = widest == 8;
  row.vector = row.is_double ? 1 : 16 / std::max(widest, 2);
  return walk(row, tensors, leader);
}

// The launch table of these lists, as int64 so that it is aligned. A chunk_size of 0 takes that of their device.
template <class R>
std::vector<int64_t> make_table(const Lists<R>& lists, int64_t chunk_size) {
  constexpr int kAll = kOperandsOf<R>;
  const int leader = lists.leader();
  const std::vector<Tensor>& leaders = *lists.tensors[leader];
  for (int i = 0; i < kAll; ++i) {
    METAADAMW_CHECK(!lists.tensors[i] || lists.tensors[i]->size() == leaders.size(), lists.name(i), " has ",
                    lists.tensors[i] ? lists.tensors[i]->size() : 0, " tensors, ", lists.name(leader), " has ", leaders.size());
  }
  std::string missing;
  for (int i = 0; i < R::kOperands; ++i) {
    const bool needed = !lists.tensors[i] && !(R::kOptionalLists >> i & 1);
    missing += needed ? concatenate(missing.empty() ? "" : " and ", lists.name(i)) : "";
  }
  METAADAMW_CHECK(!lists.written || missing.empty(), "the update needs ", missing);
  METAADAMW_CHECK(!lists.tensors[lists.kLowPrecision] || lists.tensors[R::kParam],
                  "low_precision_params need params, which are their masters");
  if constexpr (kExchanges<R>) {
    constexpr int a = R::kExchanged[0], b = R::kExchanged[1];
    METAADAMW_CHECK(!lists.tensors[a] || lists.tensors[b], lists.name(a), " need ", lists.name(b), ", with which they take turns");
  }
  Header header{};
  header.rule = rule_number<R>;
  header.tensors = leaders.size();
  header.written = lists.written;
  for (int i = 0; i < kAll; ++i) {
    header.given |= lists.tensors[i].has_value() << i;
  }
  header.device = leaders.empty() ? -1 : device_of(leaders[0]);
  METAADAMW_CHECK(header.device == -1 || (kHasCuda && header.device >= 0), lists.name(leader), "[0] is on ",
                  device_name(header.device), kHasCuda ? "" : ", and the extension was built for the CPU only");
  METAADAMW_CHECK(chunk_size >= 0 && chunk_size % kChunkOnGpu == 0 && chunk_size <= kChunkOnCpu, "a chunk has a multiple of ",
                  kChunkOnGpu, " elements, at most ", kChunkOnCpu, ", not ", chunk_size);
  header.chunk_size = chunk_size != 0 ? chunk_size : header.device == -1 ? kChunkOnCpu : kChunkOnGpu;
  std::vector<Row<kAll>> rows(leaders.size());
  std::vector<int64_t> first_chunk{0}, shape_begin{0}, shapes;
  std::vector<Layout<kAll>> layouts;
  std::vector<Extent> extents;
  for (size_t t = 0; t < leaders.size(); ++t) {
    const auto layout = make_row(lists, t, header.device, rows[t], extents);
    header.masters |= rows[t].data[lists.kLowPrecision] != nullptr;
    rows[t].layout = layout ? static_cast<int64_t>(layouts.size()) : -1;
    if (layout) {
      layouts.push_back(*layout);
    }
    first_chunk.push_back(first_chunk.back() + chunks_of(rows[t].numel, header.chunk_size));
    const Tensor& grad = rows[t].lacks_gradient() ? leaders[t] : (*lists.tensors[kGrad])[t];
    shapes.insert(shapes.end(), grad.sizes().begin(), grad.sizes().end());
    shapes.insert(shapes.end(), grad.strides().begin(), grad.strides().end());
    shape_begin.push_back(shapes.size());
  }
  for (Row<kAll>& row :
       rows) {  // one update kernel less to compile: beside masters, only rows of 16 bits throughout would be wider
    row.vector = header.masters ? std::min<uint8_t>(row.vector, 4) : row.vector;
  }
  check_distinct(extents);
  header.chunks = first_chunk.back();
  header.layouts = layouts.size();
  header.row_bytes = Table<kAll>::row_bytes(header);
  header.copied_bytes = Table<kAll>::copied_bytes(header);
  header.device_bytes = header.copied_bytes + header.chunks * R::kSums * sizeof(double);
  std::vector<int64_t> memory(header.copied_bytes / 8 + shape_begin.size() + shapes.size(), 0);
  const Table<kAll> table(header, reinterpret_cast<char*>(memory.data()));
  *reinterpret_cast<Header*>(memory.data()) = header;
  std::copy(rows.begin(), rows.end(), table.rows);
  std::copy(first_chunk.begin(), first_chunk.end(), table.first_chunk);
  std::copy(layouts.begin(), layouts.end(), table.layouts);
  for (int64_t t = 0; t < header.tensors; ++t) {
    std::fill(table.tensor_of_chunk + first_chunk[t], table.tensor_of_chunk + first_chunk[t + 1], static_cast<int32_t>(t));
  }
  std::copy(shape_begin.begin(), shape_begin.end(), table.shape_begin);
  std::copy(shapes.begin(), shapes.end(), table.shape_begin + header.tensors + 1);
  return memory;
}

}  // namespace metaadamw
