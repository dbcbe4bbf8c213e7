"""Files that are whole or not there at all; tensors in them carry what they are and their bits' fingerprint.

A file is written under a name of its own and then renamed, so a kill or a failing disk leaves what was
there before; nothing that others made is ever opened for writing, emptied or removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch

from ..identity import fingerprints
from ..show import needs
from ..training.record import ReplayMismatch

PARTS = ".magic-*.part"  # files that are being written, or were when a process was killed


class Misplaced(ReplayMismatch):
    """A whole file that is not the one its name says: of another step, kind or run."""


def _new(folder: Path) -> Path:
    """A new, empty file in this folder, under a name that nothing had before."""
    path = folder / PARTS.replace("*", secrets.token_hex(8))
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside `path` to write into. When the block is done, it takes that name.

    It is on the disk before it has its name, and the name is on the disk when this returns. So at any moment
    there is under the name either all that was there before or all that is new.

    Raises OSError, with the way out, where it cannot be written.
    """
    path, part = Path(path), None
    try:
        part = _new(path.parent)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except BaseException as error:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        what, out = "What is there already is whole", "make room, or give another folder, and call again"
        if not path.parent.exists():
            what, out = "There is no such folder, or not any more", "make it, and call again"
        where = f"{path.name} could not be written into {path.parent}"
        raise OSError(f"{where} ({error}). {what}: {out}") from error


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system can say so."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors, whole or not at all, with their order, a fingerprint and which were on the CPU.

    `meta` says what the file is; `read` compares it.
    """
    on_cpu = [k for k, x in tensors.items() if x.device.type == "cpu"]
    # A tensor's layout in memory (channels_last, transposed) decides how sums are rounded, so it is kept.
    strides = {k: torch.empty_like(x, device="meta").stride() for k, x in tensors.items()}
    strides = {k: s for k, s in strides.items() if s != torch.empty(tensors[k].shape, device="meta").stride()}
    meta = meta | {"order": list(tensors), "on_cpu": on_cpu, "strides": strides}
    meta["fingerprint"] = _bits(tensors, meta)
    library = _safetensors()
    with replacing(path) as part:
        library.torch.save_file(
            {k: x.contiguous() for k, x in tensors.items()}, part, {"magic": json.dumps(meta)}
        )


def _bits(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    """The fingerprint of the tensors and of what the file says of itself."""
    said = {name: value for name, value in meta.items() if name != "fingerprint"}
    return fingerprints.digest(fingerprints.fingerprint(tensors) + json.dumps(said, sort_keys=True))


def write_json(path: Path, content: dict) -> None:
    """Write a value that JSON knows, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict:
    """What `write_json` wrote; FileNotFoundError, or ValueError for a file that is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or was not written by magic: {error}. Remove the folder, or give another"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is damaged, or was not written by magic: it holds {type(found).__name__}, no names. "
            "Remove the folder, or give another"
        )
    return found


def read(
    path: Path, device: torch.device, expected: dict | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """What `write` wrote, each tensor where it was; ReplayMismatch if the file is damaged.

    expected  what its meta must say; a whole file that says something else is Misplaced
    """
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads(file.metadata()["magic"])
            # The copy lies where PyTorch puts tensors: at another alignment, sums may be rounded otherwise.
            tensors = {k: file.get_tensor(k).clone() for k in meta["order"]}
        whole = _bits(tensors, meta) == meta["fingerprint"]
    except Exception as error:
        raise ReplayMismatch(f"{path} is damaged, or was not written by magic: {error}") from error
    if not whole:
        raise ReplayMismatch(f"{path} is damaged: it does not hold the bits that were written")
    expected = expected or {}
    wrong = [name for name, value in expected.items() if meta.get(name) != value]
    if wrong:
        told = ", ".join(f"its {name} is {meta.get(name)!r}, not {expected[name]!r}" for name in wrong)
        raise Misplaced(
            f"{path} is a whole file in the wrong place: {told}. Remove it, or put back the folder as it was"
        )
    for k, stride in meta.get("strides", {}).items():
        tensors[k] = torch.empty_strided(tensors[k].shape, stride, dtype=tensors[k].dtype).copy_(tensors[k])
    return {k: x if k in meta["on_cpu"] else x.to(device) for k, x in tensors.items()}, meta


def _safetensors():
    """The library, with its part for PyTorch."""
    needs("safetensors.torch", "disk", "a folder for states needs")
    return needs("safetensors", "disk", "a folder for states needs")


def writable(disk: str | os.PathLike) -> Path:
    """The folder, made if it is not there; OSError if nothing can be written into it."""
    folder = Path(disk)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _new(folder).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"disk={str(disk)!r} is not a folder that can be written ({error}); give another"
        ) from error
    return folder
