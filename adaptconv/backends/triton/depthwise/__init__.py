"""depthwise: one channel a group, tap by tap on the vector units."""
