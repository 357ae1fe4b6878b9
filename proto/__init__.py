"""pushstep.proto: the contract between workers and the server, which import it and which it never imports.

It holds the .proto files with the code generated from them (`python proto/generate.py`), the wire codec and the
layout of a model's arenas (wire/), the conventions of shared memory (shared_memory/) and the one catalogue of errors
(errors/). It decides nothing for either side.
"""
