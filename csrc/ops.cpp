// The schemas of the ops, once, and the Python module that carries them. What they compute is documented in metaadamw_fast/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(metaadamw_fast, m) {
  m.def(
      "tensor_stats(Tensor[] grads, Tensor[] exp_avgs, Tensor[]? params, Tensor[]? exp_avg_sqs, bool count_nonzero, ScalarType "
      "dtype)"
      " -> Tensor");
  m.def(
      "adamw_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[]? max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps,"
      " Tensor? grad_scale, Tensor(e!)? new_sums=None) -> ()");
}

// `import metaadamw_fast._C` loads the library, which registers the ops; the hash of the sources lets Python refuse a stale build.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "source_hash", METAADAMW_SOURCE_HASH);
  }
  return module;
}
