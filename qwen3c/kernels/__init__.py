"""The kernels: kernels.h is the contract, scalar.c the spec, table.pyx their table for Cython and Python."""
