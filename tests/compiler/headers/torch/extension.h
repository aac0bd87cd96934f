// What most of DeepSpeed's sources use of torch/extension.h; ../../g++ adds the rest where they name it.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch {
using namespace at;
}
