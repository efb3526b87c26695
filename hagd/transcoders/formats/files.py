"""Reading and writing the files of the layouts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.errors import ArtifactError, ConfigError


class Tensors:
    """The tensors of one file, taken by name with the shape that they must have.

    Raises:
        ArtifactError: the file is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._found = load_file(file)
        except FileNotFoundError:
            raise ArtifactError(
                f"{file}: expected the tensors of a dictionary, found no such file; copy the folder again"
            ) from None
        except SafetensorError as error:
            raise ArtifactError(
                f"{file}: expected a complete safetensors file, found damage ({error}); copy the folder again"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`; a size of −1 stands for any.

        Raises:
            ArtifactError: it is missing or of another shape.
        """
        if name not in self._found:
            raise ArtifactError(
                f"{self.file}: expected a tensor {name}, found {', '.join(sorted(self._found))}; save the dictionary "
                "again where it was trained"
            )
        tensor = self._found[name]
        known = [have if want == -1 else want for want, have in zip(shape, tensor.shape, strict=False)]
        if len(shape) != tensor.ndim or known != list(tensor.shape):
            wanted = [size if size >= 0 else "any" for size in shape]
            raise ArtifactError(
                f"{self.file}: expected {name} of shape {wanted}, found {list(tensor.shape)}; dictionaries here read "
                "and write vectors of one width, d_model"
            )
        return tensor

    def take_if_there(self, name: str, *shape: int) -> Tensor | None:
        """The same, or None where the file has no such tensor."""
        return self.take(name, *shape) if name in self else None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return _read(file, json.loads)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises as `read_json` does."""
    return _read(file, yaml.safe_load)


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{file}: expected the description of a dictionary, found no such file; copy the folder again"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"{file}: expected a readable description, found damage ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: expected named entries, found {type(content).__name__}; copy the folder again")
    return content


def write_tensors(file: Path, tensors: dict[str, Tensor | None]) -> None:
    """Those that are not None; each gets memory of its own, which safetensors asks for."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in given.items()}, file)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """An object as JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def folders_with(folder: Path, name: str) -> list[Path]:
    """`folder` itself if it holds a file `name`, else its subfolders that do."""
    if (folder / name).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{name}"))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Within: a folder to write into, which becomes `folder` at the end and is deleted if anything fails.

    Raises:
        ConfigError: `folder` exists and is not empty.
    """
    _refuse_content(folder)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_unwritable(folder: Path) -> None:
    """To be asked before the training whose dictionaries are to be written to `folder`.

    Raises:
        ConfigError: `folder` has content, or cannot be made where it should be.
    """
    _refuse_content(folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.absolute().parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"export.path: expected a folder that can be written, found {folder} ({error.strerror}); make what it is "
            "in writable, or choose another"
        ) from None


def _refuse_content(folder: Path) -> None:
    """Dictionaries are not written among other files, where layers of two sets could mix.

    Raises:
        ConfigError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"export.path: expected a new or empty folder, found {folder} with content; delete it or choose another"
        )
