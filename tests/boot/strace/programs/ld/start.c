int other(void); int start(void) { return other(); }
