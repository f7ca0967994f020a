// Every header that the kernels use, before an instruction set is turned on.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../common/directions.h"
#include "../common/resize.h"
#include "kernels.h"
