// The whole of ATen, for shm.cpp, which uses of it no more than this.
#include <torch/extension.h>
