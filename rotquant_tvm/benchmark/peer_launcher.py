"""The C++ that lets another project's CUDA source, written as a torch extension, be built and called without torch.

The source is included as it is. It sees a ``torch::Tensor`` that is no more than a pointer and sizes, allocates its
output where the caller says, and registers its bindings in a table instead of a Python module.
"""

from __future__ import annotations

STAND_IN = r"""
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>

#define TORCH_EXTENSION_NAME peer
#define PYBIND11_MODULE(name, module) static void register_bindings(Bindings& module)

namespace c10 { using Half = __half; }
namespace at { using BFloat16 = __nv_bfloat16; }

namespace torch {
struct Options {};
struct Tensor {
  void* data;
  int64_t sizes[3];
  int64_t size(int axis) const { return sizes[axis]; }
  Options options() const { return {}; }
  template <typename T> T* data_ptr() const { return static_cast<T*>(data); }
};
inline void*& output() { static thread_local void* place = nullptr; return place; }
inline Tensor empty_like(const Tensor& like) { return {output(), {like.sizes[0], like.sizes[1], like.sizes[2]}}; }
inline Tensor empty(std::initializer_list<int64_t> sizes, Options) {
  Tensor made{output(), {1, 1, 1}};
  std::copy(sizes.begin(), sizes.end(), made.sizes);
  return made;
}
}  // namespace torch

struct Bindings {
  std::map<std::string, void (*)()> table;
  template <typename F> void def(const char* name, F* function) {
    table[name] = reinterpret_cast<void (*)()>(function);
  }
};
"""

LAUNCHER = r"""
#include <torch/extension.h>
#include PEER_SOURCE

// Calls the binding `name`, whose arguments are tensors and numbers in the order of `kinds` ('t' or 'i'), on vectors
// [rows, dim]. Returns 0, -1 for a binding that is not there, -2 for arguments that are none of the known ones, or
// the CUDA error of the launch.
extern "C" int launch(const char* name, const char* kinds, void** tensors, const int* numbers, int64_t rows,
                      int64_t dim, void* out) {
  static Bindings bindings = [] { Bindings made; register_bindings(made); return made; }();
  auto found = bindings.table.find(name);
  if (found == bindings.table.end()) return -1;
  torch::output() = out;
  using T = torch::Tensor;
  T t[7];
  for (int i = 0, n = 0; kinds[i]; ++i)
    if (kinds[i] == 't' && n < 7) { t[n] = T{tensors[n], {rows, dim, 1}}; ++n; }
  const int* n = numbers;
  void (*f)() = found->second;
  cudaGetLastError();
  if (!std::strcmp(kinds, "tttti")) reinterpret_cast<T (*)(T, T, T, T, int)>(f)(t[0], t[1], t[2], t[3], n[0]);
  else if (!std::strcmp(kinds, "ttti")) reinterpret_cast<T (*)(T, T, T, int)>(f)(t[0], t[1], t[2], n[0]);
  else if (!std::strcmp(kinds, "tttitititi"))
    reinterpret_cast<T (*)(T, T, T, int, T, int, T, int, T, int)>(f)(t[0], t[1], t[2], n[0], t[3], n[1], t[4], n[2],
                                                                    t[5], n[3]);
  else return -2;
  return static_cast<int>(cudaGetLastError());
}
"""
