// Stands for the CUDA header in tests.
#pragma once

#include <cuda_runtime.h>
