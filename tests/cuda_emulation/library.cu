// All that csrc/cuda exports but resident_sm90a.cu, as one source for the emulation.
#include "info.cu"
#include "resident.cu"
