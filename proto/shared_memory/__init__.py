"""Memory that two processes of one host share: the slots' layout, the local socket, CUDA's handles."""
