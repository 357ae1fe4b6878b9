"""What belongs to the process: threads, memory, descriptors, sockets, the log."""
