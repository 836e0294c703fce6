"""Log lines that any handler can write, whatever bytes are in a path."""

from __future__ import annotations

import logging
import traceback


class EncodableLines(logging.Filter):
    """Escapes what no encoding can represent in a record: the bytes of a path that are not UTF-8.

    A handler would raise for such a record, and lose the line.
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
    """Returns whether a text is valid Unicode, which any Unicode encoding can represent."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def encodable(text: str) -> str:
    """Returns a text in which everything that is not valid Unicode is escaped, as in ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
