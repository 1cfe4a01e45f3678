// Metal's types and functions as C++14, for text that translate.py has written. Nothing of the C library is visible:
// a name that Metal lacks does not compile.
#pragma once

#include "runtime.h"
#include "spaces.h"
#include "numbers.h"
#include "vectors.h"
#include "maths.h"
#include "simd.h"

using namespace metal;  // as in MLX's own prelude of every kernel
