"""Which server this is, and the address of the workers' door."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Request

router = APIRouter(tags=["health"])


@router.get("", summary="Which server this is")
async def root(request: Request) -> dict[str, str]:
    """The server's version, and the address that workers connect to."""
    return {"version": installed_version("pushstep"), "grpc": request.app.state.grpc_address}
