"""The operating system's calls and the kinds of devices, the same for all rooms above."""
