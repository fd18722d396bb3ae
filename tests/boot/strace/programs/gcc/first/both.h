#include_next <both.h>
