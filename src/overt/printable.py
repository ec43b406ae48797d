"""Names that others choose, as a line of text can show them.

A file's name, and so an upper directory's, may be any bytes: one with an escape sequence or a line break in it would
say what it likes in an operator's terminal, and one that is no UTF-8 cannot be encoded at all.
"""


def printable(name: str) -> str:
    """`name` with control and format characters as escapes, and bytes that are no UTF-8 (os.fsdecode) as ``\\xNN``."""
    return "".join(each if each.isprintable() else _escaped(each) for each in name)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # PEP 383
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
