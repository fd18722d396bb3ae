#define BOTH 3
