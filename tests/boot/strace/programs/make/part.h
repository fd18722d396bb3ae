#define PART 0
