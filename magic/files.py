"""Tensors in a safetensors file: whole or not there at all, with a fingerprint of their bits."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch

from . import determinism
from .verify import ReplayMismatch


def write(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors, whole or not at all, with their order, a fingerprint and which were on the CPU."""
    on_cpu = [k for k, x in tensors.items() if x.device.type == "cpu"]
    meta = meta | {"order": list(tensors), "fingerprint": determinism.fingerprint(tensors), "on_cpu": on_cpu}
    part = path.with_name(path.name + ".part")
    library = _safetensors()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        library.torch.save_file(
            {k: x.contiguous() for k, x in tensors.items()}, part, {"magic": json.dumps(meta)}
        )
        os.replace(part, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(
            f"{path.name} could not be written into {path.parent} ({error}). What is there already is whole: "
            "make room, or give another folder, and call again"
        ) from error


def read(path: Path, device: torch.device) -> tuple[dict[str, torch.Tensor], dict]:
    """What `write` wrote, each tensor where it was; ReplayMismatch if the file is damaged."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads(file.metadata()["magic"])
            # a copy lies where PyTorch puts tensors; at another alignment, sums are rounded otherwise
            tensors = {k: file.get_tensor(k).clone() for k in meta["order"]}
        whole = determinism.fingerprint(tensors) == meta["fingerprint"]
    except Exception as error:
        raise ReplayMismatch(f"{path} is damaged, or was not written by magic: {error}") from error
    if not whole:
        raise ReplayMismatch(f"{path} is damaged: it does not hold the bits that were written")
    return {k: x if k in meta["on_cpu"] else x.to(device) for k, x in tensors.items()}, meta


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a folder for states needs safetensors: pip install 'magic-attribution[disk]'"
        ) from error
    return safetensors


def writable(disk: str | os.PathLike) -> Path:
    """The folder, made if it is not there; OSError if nothing can be written into it."""
    folder = Path(disk)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe.part"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"disk={str(disk)!r} is not a folder that can be written ({error}); give another"
        ) from error
    return folder
