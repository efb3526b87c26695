/* The k largest of each row: `cpu_selection.py`. */

#define BITS 16
#define INTEGER int16_t
#define COUNT uint16_t
#define INFINITE 0x7f80
#define NAME(of) of##_bfloat16
#include "cpu_top_of_rows.h"

#undef BITS
#undef INTEGER
#undef COUNT
#undef INFINITE
#undef NAME
#define BITS 32
#define INTEGER int32_t
#define COUNT uint32_t
#define INFINITE 0x7f800000
#define NAME(of) of##_float32
#include "cpu_top_of_rows.h"
