"""pushstep.proto: the contract between workers and the server, owned by neither.

The .proto files with the code generated from them (`python proto/generate.py`), the frame codec, the layout of a
model's arenas, and the one catalogue of errors. Nobody's logic lives here.
"""
