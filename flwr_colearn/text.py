"""Text that others chose, such as a participant's, made safe for logs and records."""


def printable(text: object, most: int) -> str:
    r"""Return a text with at most about `most` characters, all of which a log can show.

    Control characters, with which a text could forge lines of a log or change a terminal, line
    separators and lone surrogates are escaped. Of a longer text the middle is left out, since both
    ends tell most.

    Parameters
    ----------
    text : object
        The text, or any object, of which ``str`` is shown.
    most : int
        The largest number of characters before escapes.

    Examples
    --------
    >>> printable("done\nERROR: forged", 100)
    'done\\nERROR: forged'
    >>> printable("a" * 50, 20)
    'aaaaaaaa ... aaaaaaa'
    """
    whole = str(text)
    if len(whole) > most:
        kept = max(most - len(_GAP), 2)
        whole = whole[: kept - kept // 2] + _GAP + whole[len(whole) - kept // 2 :]
    # Most texts need no escapes, and this test is fast.
    if whole.isprintable():
        return whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


_GAP = " ... "
