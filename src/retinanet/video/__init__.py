"""Detection and tracking in videos and camera streams."""
