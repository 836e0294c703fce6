"""Lines of the log that any handler can write, whatever bytes are in a path."""

from __future__ import annotations

import logging
import traceback


class EncodableLines(logging.Filter):
    """Escapes in a record what no encoding has: the bytes of a path that are not UTF-8.

    A handler that meets them raises, and the line is lost.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not is_encodable(message):
            record.msg, record.args = encodable(message), ()
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if not is_encodable(text):
                record.exc_text = encodable(text)
        return True


def is_encodable(text: str) -> bool:
    """Return whether a text is Unicode that every encoding of it can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def encodable(text: str) -> str:
    """Return a text with what is no Unicode escaped, as in ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
