// ldmatrix: four 8 x 8 matrices of 16-bit numbers from shared memory into the registers mma wants.
//
// Lane l gives the address of one row of 8 numbers (16 bytes, 16-byte aligned): row l % 8 of matrix l / 8.
//   plain:       lane l gets in r[i] row l / 4, columns 2 (l % 4) and + 1, of matrix i
//   transposed:  lane l gets in r[i] column l / 4, rows 2 (l % 4) and + 1, of matrix i
// Plain also serves 32-bit numbers as 8 x 4 matrices: lane l gets row l / 4, column l % 4.
// Section 9.7.14.5.15 (ldmatrix), PTX 6.5, sm_75. All lanes of the warp take part.
#pragma once
#include "memory.cuh"

namespace tile {

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
#if defined(SHIFT_EMULATE)
    emulation::ldmatrix(r, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
#if defined(SHIFT_EMULATE)
    emulation::ldmatrix(r, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

}  // namespace tile
