// What DeepSpeed's operators use of torch/extension.h, which reads torch's whole C++ library:
// a third of the work at each of their sources. Found before torch's own (tests/conftest.py).
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

namespace torch {
using namespace at;
}
