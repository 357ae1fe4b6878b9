"""Handles the workers' requests, from gRPC or the local socket: join, leave, push, pull and upload."""
