#include "local.h"
#include <first.h>
#include <both.h>
#include <sys/second.h>
#include <mounted.h>
#if __has_include(<nowhere.h>)
#include <nowhere.h>
#endif
int main(void) { return LOCAL + FIRST + BOTH + SECOND + MOUNTED; }
