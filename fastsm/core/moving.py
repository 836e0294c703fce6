"""Moving a recovered state to another generation.

Readers in other processes map a log up to the end that its owner last published. If recovery finds less (the owner
published frames whose pages the system lost after a failed sync), the file must not be cut: a reader would be killed
when it next reads the missing part. The recovered state is therefore copied into the next generation and the old files
are removed; readers that have them mapped can use them as long as they need.
"""

from __future__ import annotations

import logging
import os

from fastsm.core.hard_state import append_metadata
from fastsm.disk.base import Base, base_name
from fastsm.disk.files import PIECE, Directory, storage_errors
from fastsm.errors import StorageError
from fastsm.generation import current
from fastsm.generation.log import Log
from fastsm.generation.names import free_generations
from fastsm.lookup.index import Index
from fastsm.types import LogId

logger = logging.getLogger("fastsm")


def move(directory: Directory, opened: current.Generation) -> current.Generation:
    """Returns the same state in a new generation, which is durable and named by CURRENT. O(bytes of base and log)."""
    old = opened.log
    number = next(free_generations(directory, old.head.generation + 1))
    log: Log | None = None
    try:
        base = copy_base(directory, number, old.base)
        try:
            log = Log.create(directory, number, base)
        except BaseException:
            if base is not None:
                base.close()
            raise
        log.copy_from(old, current.EMPTY_LOG_BYTES, old.end)
        if opened.index.metadata is not None:
            append_metadata(log, opened.index.metadata)
        log.sync()
        index = Index()
        if base is not None:
            index.read_base(log.mapping, base)
        index.read_log(log.mapping, current.EMPTY_LOG_BYTES, log.end, True)
        current.prepare_next(directory, log)
        current.name_next(directory, old, log)
    except BaseException:
        current.discard(directory, log, number)
        old.close()
        raise
    logger.warning(
        "%s: the last owner published entries up to offset %d or beyond that are lost here: the state continues in "
        "generation %d, so that readers of the old one are not cut off", old.path, old.end, number)
    old.close()
    try:
        with storage_errors(directory.path, "removing the old generation"):
            current.remove_generation(directory, old.head.generation)
    except StorageError as error:
        logger.warning("%s: cleaning up is left to the next opening: %s", directory.path, error)
    applied = LogId(index.terms.seen, index.terms.last_term(log.head.base_term))
    return current.Generation(log, index, applied, opened.recovery, opened.verified)


def copy_base(directory: Directory, number: int, base: Base | None) -> Base | None:
    """Returns a synced copy of a base under another generation's name. If the base was verified, so is the copy."""
    if base is None:
        return None
    assert base.descriptor is not None
    name = base_name(number)
    with storage_errors(directory.path_of(name), "copying the base"):
        descriptor = directory.create_file(name)
        try:
            offset = 0
            while offset < base.size:
                piece = os.pread(base.descriptor.number, min(PIECE, base.size - offset), offset)
                if not piece:
                    raise StorageError(None, f"expected a base of {base.size} bytes, found only {offset}", base.path)
                offset = directory.write_paced(descriptor, piece, offset)
            directory.sync(descriptor)
        except BaseException:
            directory.close_file(descriptor)
            raise
    return Base(directory, name, descriptor, base.head)
