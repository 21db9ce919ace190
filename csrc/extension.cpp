// aligntok._C: importing it registers the operators; build_info() says what was compiled and how.

#include <Python.h>

#include <torch/version.h>

#ifndef ALIGNTOK_COMPILER
#define ALIGNTOK_COMPILER "unknown"
#endif
#ifndef ALIGNTOK_FLAGS
#define ALIGNTOK_FLAGS ""
#endif
#ifndef ALIGNTOK_CUDA_ARCHS
#define ALIGNTOK_CUDA_ARCHS ""
#endif

namespace {

#ifdef ALIGNTOK_WITH_CUDA
constexpr int kCuda = 1;
#else
constexpr int kCuda = 0;
#endif
#ifdef _OPENMP
constexpr int kOpenMP = 1;
#else
constexpr int kOpenMP = 0;
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:O,s:s,s:s,s:s,s:O}", "torch", TORCH_VERSION, "cuda", kCuda ? Py_True : Py_False,
      "cuda_architectures", ALIGNTOK_CUDA_ARCHS, "compiler", ALIGNTOK_COMPILER, "flags", ALIGNTOK_FLAGS,
      "openmp", kOpenMP ? Py_True : Py_False);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info() -> dict: torch, cuda, cuda_architectures, compiler, flags, openmp."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled operators of aligntok.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
