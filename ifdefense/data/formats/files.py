"""Reading, decoding and atomic writing of files; errors name the file."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ifdefense.data.errors import DataError
from ifdefense.data.formats.table import FILE, Options, logger

BYTES_ON_DISK = 256
"""Limit on the file size per point of the limit on points."""

PIECE = 1 << 22
"""Bytes compared at a time."""

NO_TEXT = re.compile(r"[\0-\x08\x0e-\x19\x1b-\x1f]")
"""Control characters other than line ends and the end-of-file mark of DOS."""


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Prefixes errors with the name of the file.

    Raises:
        DataError: for any error of a reader except `ImportError`.
    """
    token = FILE.set(str(name))
    try:
        yield
    except ImportError:
        raise
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except MemoryError:
        raise DataError(f"{name}: there is not enough memory to read it") from None
    except Exception as error:  # parsers raise many kinds of errors on damaged files
        raise DataError(f"{name}: the file is damaged: {type(error).__name__}: {error}") from error
    finally:
        FILE.reset(token)


def read_bytes(path: str | Path, options: Options) -> bytes:
    """The contents of a file.

    Raises:
        DataError: if it is missing, not a regular file, unreadable, too large, empty, or a git-lfs pointer.
    """
    path = Path(path)
    try:
        state = path.stat()
        if stat.S_ISDIR(state.st_mode):
            raise DataError("it is a folder")
        if not stat.S_ISREG(state.st_mode):
            raise DataError("not a regular file; use - for standard input")
        limit = BYTES_ON_DISK * options.max_points
        if state.st_size > limit:
            raise DataError(
                f"it has {state.st_size} bytes, more than the limit of {limit}; "
                "max_points (--max-points) raises it"
            )
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("there is no such file") from None
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror or error}") from None
    check_content(data)
    return data


def check_content(data: bytes) -> None:
    """Rejects empty files and git-lfs pointers.

    Raises:
        DataError: if it is empty or a git-lfs pointer.
    """
    if not data:
        raise DataError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise DataError("it is a git-lfs pointer; run `git lfs pull` to fetch the file")


def decoded_text(data: bytes) -> str:
    """Decodes text and normalises line ends to a newline character.

    The encoding is that of the byte order mark, else UTF-8, else Latin-1. Files in GBK or Shift-JIS get
    garbled comments and names, but correct numbers.

    Raises:
        DataError: if it contains control characters.
    """
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    encoding = next((name for mark, name in marks if data.startswith(mark)), None)
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise DataError(f"not a text file: {error}") from None
        logger.debug("%s: not UTF-8 (%s), read as Latin-1", FILE.get(), error)
        text = data.decode("latin-1")
    if found := NO_TEXT.search(text):
        raise DataError(f"not a text file: it holds the byte {ord(found[0])}")
    return text.rstrip("\x1a").replace("\r\n", "\n").replace("\r", "\n")


def without_mark(data: bytes) -> bytes:
    """The bytes of a file that may be text, as UTF-8 without a byte order mark.

    Raises:
        DataError: if there is a mark and the rest cannot be decoded.
    """
    if data.startswith(codecs.BOM_UTF8):
        return data[len(codecs.BOM_UTF8) :]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return decoded_text(data).encode("utf-8")
    return data


@contextmanager
def replacing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Context with a temporary file that replaces ``path`` on success.

    Args:
        path: the file to write.
        force: replace an existing file.

    Raises:
        DataError: if the file exists already or its folder does not.

    Examples:
        >>> with replacing(Path("notes.txt"), force=False) as partial:
        ...     size = partial.write_text("done")
        >>> Path("notes.txt").read_text()
        'done'
    """
    path = Path(path)
    if path.exists() and not force:
        raise DataError(f"{path}: it exists already; force replaces it")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Writes a file atomically: to a temporary file, which is read back, compared and renamed.

    Raises:
        DataError: if the file exists already, its folder does not, or it cannot be written or is not what was
            written, as on a full disk.
    """
    try:
        with replacing(path, force=force) as temporary:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _compare(temporary, data)
    except OSError as error:
        raise DataError(f"{path}: it could not be written: {error.strerror or error}") from error


def is_full(error: BaseException) -> bool:
    """Whether the error is, or was raised from, that of a full disk or an exceeded quota."""
    cause = error.__cause__
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (cause is not None and is_full(cause))


def _compare(path: Path, data: bytes) -> None:
    """Checks that the file has these contents."""
    view = memoryview(data)
    with path.open("rb") as file:
        for start in range(0, len(data), PIECE):
            if file.read(PIECE) != view[start : start + PIECE]:
                raise OSError(f"it is not what was written from byte {start} on")
        if file.read(1):
            raise OSError("it is longer than what was written")
