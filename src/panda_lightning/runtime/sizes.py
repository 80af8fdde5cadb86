"""Sizes in words."""


def in_words(size: float) -> str:
    """Bytes as people read them: ``512 bytes``, ``30.0 KiB``, ``1.5 GiB``."""
    if size < 1024:
        return f"{size:.0f} bytes"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"
