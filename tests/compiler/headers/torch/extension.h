// What DeepSpeed's operators use of torch/extension.h, which reads all of torch's C++ library.
#pragma once

#include <torch/types.h>

#include <torch/csrc/utils/pybind.h>
