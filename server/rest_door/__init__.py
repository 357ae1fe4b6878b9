"""The operators' door: REST under /v1, one file per resource, one error shape.

Routes only translate: they read a request, call the same rooms as the gRPC door, and show what came of it. Every
reply to an edit says from which version it holds.
"""

from .app import create_app

__all__ = ["create_app"]
