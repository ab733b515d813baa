// The schemas of the ops, once, the launch table, and the Python module that carries them. What the ops compute is documented in
// metaadamw_fast/ops.py, the life of a launch table in metaadamw_fast/launch.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "make_table.h"

namespace metaadamw {
namespace {

// `tensors` are the lists of the operands, one after the other, and lengths[i] says how many tensors are of operand i; -1: no list.
Tensor launch_table(int64_t rule, std::vector<Tensor> tensors, std::vector<int64_t> lengths, bool written, int64_t chunk_size) {
  const auto memory = with_rule(rule, [&](auto of) {
    using R = decltype(of);
    METAADAMW_CHECK(lengths.size() == kOperandsOf<R>, "the rule has ", kOperandsOf<R>, " operands, not ", lengths.size());
    Lists<R> lists{{}, written};
    auto next = tensors.begin();
    for (int i = 0; i < kOperandsOf<R>; ++i) {
      if (lengths[i] >= 0) {
        METAADAMW_CHECK(lengths[i] <= tensors.end() - next, "there are fewer tensors than the lengths say");
        lists.tensors[i] = std::vector<Tensor>(next, next + lengths[i]);
        next += lengths[i];
      }
    }
    METAADAMW_CHECK(lists.tensors[kGrad] && lists.tensors[kGrad + 1], "a launch needs ", lists.name(kGrad), " and ",
                    lists.name(kGrad + 1));
    return make_table(lists, chunk_size);
  });
  Tensor table = torch::stable::empty({static_cast<int64_t>(memory.size())}, ScalarType::Long);
  std::memcpy(table.data_ptr(), memory.data(), memory.size() * sizeof(int64_t));
  return table;
}

enum Outcome : int64_t { kSame, kOtherAddresses, kOtherTable, kNegatives };  // see metaadamw_fast/launch.py

// Whether `grad` is the gradient that the table expects in this row, but for its address. As few calls of the ABI as possible.
template <int N>
bool is_expected(const Tensor& grad, const Row<N>& row, const int64_t* shape, int64_t dims, int64_t device) {
  if (grad.layout() != torch::headeronly::Layout::Strided || device_of(grad) != device) {
    return false;
  }
  const ScalarType dtype = grad.scalar_type();
  const auto sizes = grad.sizes();
  return is_supported(dtype) && element_type(dtype) == row.type[kGrad] && static_cast<int64_t>(sizes.size()) == dims &&
         std::equal(shape, shape + dims, sizes.data()) && std::equal(shape + dims, shape + 2 * dims, grad.strides().data());
}

// The addresses of other gradients into the table. Nothing but addresses can be changed here, and nothing is unless all gradients
// are of the dtypes and layouts that the table was made for.
template <int N>
int64_t set_gradients(const Header& header, const Table<N>& table, const std::vector<Tensor>& grads) {
  if (static_cast<int64_t>(grads.size()) != table.tensors) {
    return kOtherTable;
  }
  const int64_t* shapes = table.shape_begin + table.tensors + 1;
  std::vector<char*> addresses(grads.size());
  bool same = true;
  for (int64_t t = 0; t < table.tensors; ++t) {
    const Row<N>& row = table.rows[t];
    const int64_t begin = table.shape_begin[t], dims = (table.shape_begin[t + 1] - begin) / 2;
    if (is_expected(grads[t], row, shapes + begin, dims, header.device)) {
      addresses[t] = static_cast<char*>(grads[t].data_ptr());
      if (addresses[t] == nullptr && row.numel != 0) return kOtherTable;  // freed; a new table says so
    } else if (grads[t].numel() == 0 && row.numel != 0 && grads[t].layout() == torch::headeronly::Layout::Strided) {
      addresses[t] = nullptr;
    } else {
      return kOtherTable;
    }
    same = same && addresses[t] == row.data[kGrad];
  }
  for (int64_t t = 0; t < table.tensors; ++t) {
    table.rows[t].data[kGrad] = addresses[t];
  }
  return same ? kSame : kOtherAddresses;
}

int64_t launch_set_gradients(Tensor memory, std::vector<Tensor> grads) {
  const Header& header = *static_cast<Header*>(memory.data_ptr());
  return with_rule(header.rule, [&](auto rule) {
    return set_gradients(header, Table<kOperandsOf<decltype(rule)>>(header, static_cast<char*>(memory.data_ptr())), grads);
  });
}

// Where a gradient has the negative bit: a view whose elements are minus what lies in memory. torch would hand the op a copy, whose
// address the table would keep when it is gone.
int64_t launch_set_negative_gradients(Tensor, std::vector<Tensor>) { return kNegatives; }

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY(metaadamw_fast, m) {
  m.def(
      "tensor_stats(Tensor[] grads, Tensor[] exp_avgs, Tensor[]? params, Tensor[]? exp_avg_sqs, bool count_nonzero, ScalarType "
      "dtype)"
      " -> Tensor");
  m.def(
      "adamw_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[]? max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps,"
      " Tensor? grad_scale, Tensor(e!)? new_sums=None, int? rounding_seed=None,"
      " Tensor(f!)[]? low_precision_params=None) -> ()");
  // The same on a launch table. They reach the tensors through addresses that no schema can tell of, so they are not for
  // torch.compile. `copy` is the GPU's part of the table, None on the CPU.
  m.def("launch_table(int rule, Tensor[] tensors, int[] lengths, bool written, int chunk_size=0) -> Tensor");
  m.def("launch_capture(Tensor like) -> int");  // CUDA only
  m.def("launch_set_gradients(Tensor(a!) table, Tensor[] grads) -> int");
  m.def(
      "launch_measure(Tensor table, Tensor? copy, int sums, ScalarType dtype, Tensor? carried=None,"
      " Tensor? vectors=None) -> Tensor");
  m.def("launch_update_(Tensor table, Tensor? copy, Tensor vectors, Tensor(a!)? new_sums, int? rounding_seed) -> ()");
  // The vectors of an update by AdamW or AVGrad, [8, T], from hyper-parameters [T] each.
  m.def(
      "update_vectors(Tensor step_size, Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps, Tensor? "
      "grad_scale)"
      " -> Tensor");
  // What MADA's coefficients learn, and the vectors of its update (mada_policy.h).
  m.def(
      "mada_policy_(Tensor? sums, Tensor(a!) coefficients, Tensor(b!) momentum, Tensor(c!) hyper_gradient, Tensor(d!) hyper_sums,"
      " Tensor(e!) last, Tensor set_of, Tensor lr, Tensor weight_decay, Tensor eps, Tensor? grad_scale, Tensor? unclipped,"
      " Tensor counts, Tensor? present, Tensor turns, Tensor? go, Tensor constants, float hyper_clip, int freeze_steps, float "
      "lion1,"
      " float lion2, int flags, bool lagged, bool advance) -> Tensor");
  // What stands on both sides of the encoder (policy.h).
  m.def(
      "group_features(Tensor statistics, Tensor order, Tensor begin, Tensor numel, Tensor constants, bool enhanced, bool v_norm,"
      " bool deviations, int time, Tensor done, int ahead, float total_steps) -> Tensor");
  m.def("scaled_gradients(Tensor statistics, Tensor? sign, Tensor? loss_scale, float max_norm) -> (Tensor, Tensor, Tensor)");
  m.def(
      "modulation(Tensor scales, Tensor group_of, Tensor lr, Tensor weight_decay, Tensor beta1, Tensor beta2, Tensor eps, Tensor?"
      " grad_scale, Tensor steps, Tensor? go, bool released) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CompositeExplicitAutograd, m) {
  m.impl("launch_table", TORCH_BOX(&metaadamw::launch_table));
  m.impl("launch_set_gradients", TORCH_BOX(&metaadamw::launch_set_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, Negative, m) {
  m.impl("launch_set_gradients", TORCH_BOX(&metaadamw::launch_set_negative_gradients));
}

// The items of lists and the values of dicts (and what is neither, itself), one after the other, if their addresses are those that
// `expected` has as 64-bit numbers; else None. An optimizer asks it of all its parameters and states in every step: in Python it
// takes ten times as long. The addresses hold nothing alive.
static PyObject* expected_objects(PyObject*, PyObject* args) {
  PyObject *containers, *expected;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &containers, &PyBytes_Type, &expected)) {
    return nullptr;
  }
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(expected, &bytes, &size) != 0) {
    return nullptr;
  }
  const Py_ssize_t count = size / static_cast<Py_ssize_t>(sizeof(uint64_t));
  PyObject* found = PyList_New(count);
  if (found == nullptr) {
    return nullptr;
  }
  Py_ssize_t next = 0;
  const auto take = [&](PyObject* x) {
    uint64_t address;
    if (next == count) return false;
    std::memcpy(&address, bytes + next * sizeof(address), sizeof(address));
    if (address != reinterpret_cast<uintptr_t>(x)) return false;
    Py_INCREF(x);
    PyList_SetItem(found, next++, x);
    return true;
  };
  bool same = true;
  for (Py_ssize_t i = 0; i < PyList_Size(containers) && same; ++i) {
    PyObject *container = PyList_GetItem(containers, i), *key, *value;
    if (PyDict_Check(container)) {
      for (Py_ssize_t at = 0; same && PyDict_Next(container, &at, &key, &value);) same = take(value);
    } else if (PyList_Check(container)) {
      for (Py_ssize_t j = 0; same && j < PyList_Size(container); ++j) same = take(PyList_GetItem(container, j));
    } else {
      same = take(container);
    }
  }
  if (same && next == count) {
    return found;
  }
  Py_DECREF(found);
  Py_RETURN_NONE;
}

// `import metaadamw_fast._C` loads the library, which registers the ops; the hash of the sources lets Python refuse a stale build,
// and the GPU architectures tell what else was built: "" for nothing but the CPU.
#ifndef METAADAMW_CUDA
#define METAADAMW_CUDA ""
#endif
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"expected_objects", expected_objects, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "source_hash", METAADAMW_SOURCE_HASH);
    PyModule_AddStringConstant(module, "source_names", METAADAMW_SOURCE_NAMES);
    PyModule_AddStringConstant(module, "cuda_architectures", METAADAMW_CUDA);
  }
  return module;
}
