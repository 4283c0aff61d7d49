"""What goes wrong: the guard's verdict on a step, and drills that provoke faults."""
