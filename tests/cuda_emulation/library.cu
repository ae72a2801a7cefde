// All that csrc/cuda exports, as one source for the emulation.
#include "info.cu"
#include "resident.cu"
