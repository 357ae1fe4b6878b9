"""pushstep.server: one engine, two doors (gRPC for workers, REST for operators).

A push walks through the rooms one way: door -> session -> gate -> policy -> stepper -> publish. `intake` is that
walk; each other module is one room.
"""
