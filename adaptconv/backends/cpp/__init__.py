"""cpp: a depthwise kernel by taps in C++, compiled on this machine when it is first run."""
