"""Loads the native libraries of this package with ctypes, so that calls of their functions run without the GIL.

A library is built when the package is installed. It may be missing, or it may have been built by another version of the
package; its interface function returns the version. Worker processes import this module, so it imports little.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NativeLibrary", "library_path"]


def library_path(folder: str, name: str) -> str:
    """The path of the library `name` (`cmake/CMakeLists.txt`) of the package in `folder`."""
    return os.path.join(folder, f"{name}.so")


@dataclass
class NativeLibrary:
    """A library that is loaded on first use. The result is kept, also if loading fails.

    Attributes:
        path: the library's file.
        interface: the name of a function without arguments, and the number that it must return.
        declare: sets the argument and result types of the library's functions.
    """

    path: str | os.PathLike[str]
    interface: tuple[str, int]
    declare: Callable[[Any], None]
    _loaded: ctypes.CDLL | str | None = field(default=None, init=False, repr=False, compare=False)

    def load(self) -> ctypes.CDLL:
        """Returns the loaded library. Raises `OSError` with the reason if it cannot be used."""
        if self._loaded is None:
            try:
                self._loaded = self._open()
            except OSError as error:
                self._loaded = str(error)
        if isinstance(self._loaded, str):
            raise OSError(self._loaded)
        return self._loaded

    def available(self) -> bool:
        """Whether the library exists, was built by this version of the package, and can be loaded."""
        try:
            self.load()
        except OSError:
            return False
        return True

    def _open(self) -> ctypes.CDLL:
        library = ctypes.CDLL(os.fspath(self.path))
        name, wanted = self.interface
        try:
            found = getattr(library, name)()
        except AttributeError:
            found = None
        if found != wanted:
            raise OSError(f"{self.path}: built by another version of this package (interface {found}, not {wanted})")
        self.declare(library)
        return library
