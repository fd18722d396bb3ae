#define FIRST 2
