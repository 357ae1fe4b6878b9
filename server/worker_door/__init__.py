"""The workers' door: gRPC and the local socket. It takes and gives bytes."""
